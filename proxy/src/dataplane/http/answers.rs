//! What the answers on an upstream connection of HTTP/1 say that the codec does not show: how their heads are spelled, and
//! what comes before them.
//!
//! Invariant: a head belongs to the answer that was asked for last; what comes unasked is not read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::interims::{Interims, TooMuch};
use super::spelling::{Heads, Spelling};
use crate::base::net::BoxedIo;
use crate::dataplane::tap::{Listens, Tap};

/// The heads of the answers on an upstream connection. Clones are handles on one connection.
#[derive(Clone, Debug)]
pub(crate) struct Answers(Arc<Heard>);

#[derive(Debug)]
struct Heard {
    heads: Mutex<Heads>,
    /// Something was said before an answer, and who is to be told.
    interims: AtomicBool,
    asked: AtomicWaker,
}

impl Answers {
    /// Reads the answers of an upstream connection, each after it was [asked](Self::asked) for.
    pub(in crate::dataplane) fn watch(io: BoxedIo) -> (Tap<Self>, Self) {
        let answers = Self::new();
        (Tap::new(io, answers.clone()), answers)
    }

    fn new() -> Self {
        let (heads, interims) = (Mutex::new(Heads::of_answers()), AtomicBool::new(false));
        Self(Arc::new(Heard { heads, interims, asked: AtomicWaker::new() }))
    }

    /// A request is about to be sent: the next head is of its answer.
    pub(crate) fn asked(&self) {
        self.0.heads.lock().asked();
    }

    /// Hands on what was said before the answer; whoever asks is woken when there is more.
    ///
    /// # Errors
    /// It is too much.
    pub(crate) fn hear(&self, waker: &Waker, interims: Option<&Interims>) -> Result<(), TooMuch> {
        self.0.asked.register(waker);
        if !self.0.interims.load(Ordering::Acquire) {
            return Ok(());
        }
        // What comes from here on is taken too, or told again.
        self.0.interims.store(false, Ordering::Release);
        let said = self.0.heads.lock().saying().take()?;
        if let Some(interims) = interims {
            said.into_iter().for_each(|interim| interims.hear(interim));
        }
        Ok(())
    }

    /// The spelling of the head that was read last.
    pub(crate) fn answered(&self) -> Option<Spelling> {
        self.0.heads.lock().next()
    }
}

impl Listens for Answers {
    fn hear(&mut self, bytes: &[u8]) {
        let mut heads = self.0.heads.lock();
        heads.read(bytes);
        if heads.saying().is_any() {
            self.0.interims.store(true, Ordering::Release);
            self.0.asked.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn spelled(answers: &Answers) -> Option<HeaderValue> {
        answers.answered().map(|spelling| spelling.to_header())
    }

    #[test]
    fn of_answers_the_final_one_is_read_and_nothing_of_its_body() {
        let mut answers = Answers::new();
        Listens::hear(&mut answers, b"HTTP/1.1 200 OK\r\nNobody: asked\r\n\r\n");
        assert_eq!(spelled(&answers), None);
        for interim in ["", "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"] {
            answers.asked();
            let text = format!("{interim}HTTP/1.1 200 OK\r\nServer : A\r\nX-b: c\r\n\r\nHTTP/1.1 200 OK\r\nFake: A\r\n\r\n");
            Listens::hear(&mut answers, text.as_bytes());
            assert_eq!(spelled(&answers).unwrap(), "Server,X-b");
            assert_eq!(spelled(&answers), None);
        }
        answers.asked();
        Listens::hear(&mut answers, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\n\r\n");
        assert_eq!(spelled(&answers).unwrap(), "Upgrade");
    }

    #[test]
    fn what_comes_before_an_answer_is_handed_on_however_it_is_cut() {
        let text = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nX-B: 1\r\n\r\nHTTP/1.1 102 Processing\n\nHTTP/1.1 200 OK\r\nA: b\r\n\r\nHTTP/1.1 103 Not\r\n\r\n";
        for cut in 1..=text.len() {
            let (mut answers, interims) = (Answers::new(), Interims::default());
            answers.asked();
            for part in text.as_bytes().chunks(cut) {
                Listens::hear(&mut answers, part);
                answers.hear(Waker::noop(), Some(&interims)).unwrap();
            }
            let said: Vec<_> = std::iter::from_fn(|| interims.next())
                .map(|interim| (interim.status().as_u16(), interim.headers().len()))
                .collect();
            assert_eq!(said, [(103, 2), (102, 0)], "{cut}");
            assert_eq!(spelled(&answers).unwrap(), "A");
        }
    }
}

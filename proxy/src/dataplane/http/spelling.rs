//! How header names were spelled, from one HTTP/1 connection to another.
//!
//! Names mean the same in every spelling (RFC 9110 5.1), and HTTP/2 knows one spelling alone (RFC 9113 8.2.1); applications
//! that look at letters exist all the same. So a head's names are read off its bytes as they pass ([`Heads`]), cross a
//! link in one header of the sidecars' own, and dress the head again where it is written as HTTP/1. A head whose names are
//! all lower case carries nothing. The text of one client's names seldom changes, so that HPACK sends it once, and a
//! connection builds it once.
//!
//! The codec restores spellings from a map that nobody but itself can make. It is asked to make one: it reads a head of
//! these names, once for each distinct text; the results are kept, as far as there is place ([`restore`]).
//!
//! Invariant: a spelling changes letters alone. What is sent, in which order and with which meaning, is in the header map,
//! so that a text which belongs to another head can do no more than to change case.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;

use super::interims::{Saying, TooMuch};

/// A head's names as they were spelled, in order, with commas between.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Spelling(HeaderValue);

/// Follows the heads in the bytes of one direction of a connection.
#[derive(Debug)]
pub(crate) struct Heads {
    at: At,
    answers: bool,
    names: Vec<u8>,
    /// Is none of this head's names kept yet?
    first: bool,
    /// The name that is being read, as far as it matters, and how long it is. What a head says of its body is told from
    /// these alone: it holds for names of any length and number, whether they are kept or not.
    name: [u8; NAME_LETTERS],
    name_length: usize,
    /// A letter of them is a capital.
    spelled: bool,
    /// They are too long to be kept.
    long: bool,
    /// What the head says of the body behind it.
    length: u64,
    chunked: bool,
    /// Of an answer's first line.
    line: usize,
    interim: bool,
    /// The status of an interim answer, digit by digit, and what becomes of its headers.
    status: [u8; 3],
    saying: Saying,
    /// The last text, for the next one is usually the same.
    last: Option<Spelling>,
    /// Heads that passed and that the codec has not given away yet. No more than fit into what the codec reads ahead, and in
    /// step with it: one that were left out would leave its oddities to another.
    done: VecDeque<(Option<Spelling>, Odd)>,
    /// A Content-Length was there.
    lengths: bool,
    fragment: bool,
    /// A chunk of the body that is being read says that it is larger than any body, a line behind the last one ends as only some
    /// end lines, or more heads wait than a codec reads ahead.
    astray: bool,
}

/// What a request's bytes say and the codec does not show.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Odd {
    /// Both a Content-Length and a Transfer-Encoding. The codec shows only the one that counts; others on the way may have
    /// taken the other.
    pub(crate) framed_twice: bool,
    /// The target has a fragment. The codec cuts it off.
    pub(crate) fragment: bool,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum At {
    /// To nothing yet: empty lines may come before a head.
    Start,
    FirstLine,
    /// To the headers of an interim answer.
    Interim,
    Name,
    Value,
    /// The value of a Content-Length.
    Length,
    Body(u64),
    ChunkSize(u64),
    /// What stands behind a chunk's size in its line.
    ChunkLine(u64),
    Chunk(u64),
    ChunkEnd,
    /// A line behind the last chunk: whether it is empty so far, and whether a carriage return came last.
    Trailer(bool, bool),
    /// Nobody asks, or it is no longer known.
    Rest,
}

impl Heads {
    /// For requests: every head is read, and what is between them is passed over.
    pub(crate) fn of_requests() -> Self {
        Self::new(false)
    }

    /// For answers: the next head is read once it was [asked](Self::asked) for, and what comes before it.
    pub(super) fn of_answers() -> Self {
        Self::new(true)
    }

    /// The next head is of an answer.
    pub(super) fn asked(&mut self) {
        self.done.clear();
        self.at = At::Start;
        self.saying.begin();
    }

    /// What was said before it.
    pub(super) fn saying(&mut self) -> &mut Saying {
        &mut self.saying
    }

    fn new(answers: bool) -> Self {
        Self {
            at: if answers { At::Rest } else { At::Start },
            answers,
            names: Vec::new(),
            first: true,
            name: [0; NAME_LETTERS],
            name_length: 0,
            spelled: false,
            long: false,
            length: 0,
            chunked: false,
            line: 0,
            interim: false,
            status: [0; 3],
            saying: Saying::default(),
            last: None,
            done: VecDeque::new(),
            lengths: false,
            fragment: false,
            astray: false,
        }
    }

    /// The spelling of the next head, in the order in which the codec reads them.
    pub(crate) fn next(&mut self) -> Option<Spelling> {
        self.next_odd().0
    }

    /// The same, and what else the codec does not show of that head.
    pub(crate) fn next_odd(&mut self) -> (Option<Spelling>, Odd) {
        self.done.pop_front().unwrap_or_default()
    }

    /// Can bodies and heads no longer be told apart as the codec does? A chunk says that it is larger than any body, whose end
    /// nobody can wait for; a line of the trailers ends without a carriage return, behind which some read the next request and
    /// some the next trailer; or more heads wait than a codec reads ahead.
    pub(crate) fn is_astray(&self) -> bool {
        self.astray
    }

    /// Does the last head say that its body is longer than any that the codec reads?
    pub(crate) fn is_longer_than_any(&self) -> bool {
        self.length > LENGTH_MAX
    }

    /// Is all of what passed known, and the codec's own by now, up to where the next head begins?
    pub(crate) fn is_between(&self) -> bool {
        self.at == At::Start && self.done.is_empty()
    }

    /// Is the body of the last head that the codec has still on its way?
    pub(crate) fn is_in_body(&self) -> bool {
        let in_body = match self.at {
            At::Start | At::FirstLine | At::Interim | At::Name | At::Value | At::Length | At::Rest => false,
            At::Body(_) | At::ChunkSize(_) | At::ChunkLine(_) | At::Chunk(_) | At::ChunkEnd | At::Trailer(..) => true,
        };
        // Of a head that the codec has not, it is another one.
        in_body && self.done.is_empty()
    }

    /// Takes bytes as they pass.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let used = match self.at {
                At::Rest => return,
                At::Start => self.start(bytes),
                At::FirstLine => self.first_line(bytes),
                At::Interim => self.interim(bytes),
                At::Name => self.name(bytes),
                At::Value => self.until_line_end(bytes, At::Name),
                At::Length => self.length(bytes),
                At::Body(left) => self.skip(bytes, left, At::Start, At::Body),
                At::ChunkSize(size) => self.chunk_size(bytes, size),
                At::ChunkLine(0) => self.until_line_end(bytes, At::Trailer(true, false)),
                At::ChunkLine(size) => self.until_line_end(bytes, At::Chunk(size)),
                At::Chunk(left) => self.skip(bytes, left, At::ChunkEnd, At::Chunk),
                At::ChunkEnd => self.until_line_end(bytes, At::ChunkSize(0)),
                At::Trailer(empty, cr) => self.trailer(bytes, empty, cr),
            };
            bytes = bytes.get(used..).unwrap_or_default();
        }
    }

    fn start(&mut self, bytes: &[u8]) -> usize {
        let empty = bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        if empty < bytes.len() {
            self.names.clear();
            self.first = true;
            self.name_length = 0;
            self.spelled = false;
            self.long = false;
            self.length = 0;
            self.chunked = false;
            self.lengths = false;
            self.fragment = false;
            self.line = 0;
            self.interim = false;
            self.at = At::FirstLine;
        }
        empty
    }

    fn first_line(&mut self, bytes: &[u8]) -> usize {
        let used = self.until_line_end(bytes, At::Name);
        if self.answers {
            // `HTTP/1.1 100 Continue`, but 101 is the answer.
            let line = self.line;
            let at = |place: usize| bytes.iter().take(used).nth(place.checked_sub(line)?);
            if let Some(byte) = at(9) {
                self.interim = *byte == b'1';
                self.status = [0; 3];
            }
            if self.interim {
                for (place, digit) in self.status.iter_mut().enumerate() {
                    *digit = at(9 + place).copied().unwrap_or(*digit);
                }
                self.interim = self.status != *b"101";
            }
            if self.interim && self.at == At::Name {
                self.at = At::Interim;
            }
            self.line = line.saturating_add(used);
        } else {
            self.fragment |= bytes.iter().take(used).any(|byte| *byte == b'#');
        }
        used
    }

    fn name(&mut self, bytes: &[u8]) -> usize {
        let end = bytes.iter().position(|byte| matches!(byte, b':' | b'\n' | b'\r'));
        let part = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
        if !part.is_empty() {
            self.keep(part);
            if let Some(letters) = self.name.get_mut(self.name_length..) {
                letters.iter_mut().zip(part).for_each(|(letter, byte)| *letter = *byte);
            }
            self.name_length = self.name_length.saturating_add(part.len());
        }
        let Some(end) = end else { return bytes.len() };
        match bytes.get(end) {
            Some(b':') => self.name_ended(),
            Some(b'\n') => self.head_ended(),
            _carriage_return => {}
        }
        end + 1
    }

    fn interim(&mut self, bytes: &[u8]) -> usize {
        let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| end + 1);
        match self.saying.line(&self.status, bytes.get(..end).unwrap_or_default()) {
            Ok(true) => self.at = At::Start,
            Ok(false) => {}
            // Whoever asked gives the connection up.
            Err(TooMuch) => self.at = At::Rest,
        }
        end
    }

    /// Adds to the text of the names.
    fn keep(&mut self, part: &[u8]) {
        if self.long {
            return;
        }
        if self.name_length == 0 && !self.first {
            self.names.push(b',');
        }
        self.first = false;
        self.spelled |= part.iter().any(u8::is_ascii_uppercase);
        self.long = self.names.len() + part.len() >= NAMES_MAX;
        if !self.long {
            self.names.extend_from_slice(part);
        }
    }

    fn name_ended(&mut self) {
        if self.answers && self.names.last().is_some_and(is_blank) {
            // A blank there is no part of the name, and goes no further (RFC 9112 5.1). In a request the codec refuses it.
            while self.names.pop_if(|byte| is_blank(byte)).is_some() {}
        }
        let name = self.name.get(..self.name_length).unwrap_or_default();
        self.at = At::Value;
        if name.eq_ignore_ascii_case(b"content-length") {
            self.at = At::Length;
            self.length = 0;
            self.lengths = true;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.chunked = true;
        }
        self.name_length = 0;
    }

    fn length(&mut self, bytes: &[u8]) -> usize {
        for (index, byte) in bytes.iter().enumerate() {
            match byte {
                b'0'..=b'9' => self.length = self.length.saturating_mul(10).saturating_add(u64::from(byte - b'0')),
                b'\n' => {
                    self.at = At::Name;
                    return index + 1;
                }
                _other => {}
            }
        }
        bytes.len()
    }

    fn head_ended(&mut self) {
        if self.answers {
            self.at = At::Rest;
        } else {
            // A chunked body goes before a length (RFC 9112 6.3).
            self.at = match (self.chunked, self.length) {
                (true, _) => At::ChunkSize(0),
                (false, 0) => At::Start,
                (false, length) => At::Body(length),
            };
        }
        self.astray |= self.done.len() >= AHEAD_MAX;
        if self.astray {
            return;
        }
        let spelling = if self.spelled && !self.long { self.text() } else { None };
        self.done.push_back((spelling, Odd { framed_twice: self.chunked && self.lengths, fragment: self.fragment }));
    }

    fn text(&mut self) -> Option<Spelling> {
        match &self.last {
            Some(last) if last.0.as_bytes() == self.names => {}
            _another => self.last = HeaderValue::from_bytes(&self.names).ok().map(Spelling),
        }
        self.last.clone()
    }

    fn chunk_size(&mut self, bytes: &[u8], size: u64) -> usize {
        let mut size = size;
        for (index, byte) in bytes.iter().enumerate() {
            match char::from(*byte).to_digit(16) {
                Some(digit) => size = size.saturating_mul(16).saturating_add(u64::from(digit)),
                None => {
                    self.astray |= size > CHUNK_MAX;
                    self.at = At::ChunkLine(size);
                    return index;
                }
            }
        }
        self.at = At::ChunkSize(size);
        bytes.len()
    }

    fn trailer(&mut self, bytes: &[u8], empty: bool, cr: bool) -> usize {
        let (mut empty, mut cr) = (empty, cr);
        for (index, byte) in bytes.iter().enumerate() {
            self.astray |= *byte == b'\n' && !cr;
            cr = *byte == b'\r';
            match byte {
                b'\n' if empty => {
                    self.at = At::Start;
                    return index + 1;
                }
                b'\n' => empty = true,
                b'\r' => {}
                _other => empty = false,
            }
        }
        self.at = At::Trailer(empty, cr);
        bytes.len()
    }

    fn until_line_end(&mut self, bytes: &[u8], then: At) -> usize {
        match bytes.iter().position(|byte| *byte == b'\n') {
            Some(end) => {
                self.at = then;
                end + 1
            }
            None => bytes.len(),
        }
    }

    fn skip(&mut self, bytes: &[u8], left: u64, then: At, still: fn(u64) -> At) -> usize {
        let here = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.at = if here < left { still(left - here) } else { then };
        usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len())
    }
}

impl Spelling {
    /// As it crosses a link.
    pub(crate) fn to_header(&self) -> HeaderValue {
        self.0.clone()
    }

    /// Takes what a link carried.
    pub(crate) fn take(headers: &HeaderMap) -> Option<Self> {
        headers.get(HEADER_NAMES).filter(|text| text.len() <= NAMES_MAX).cloned().map(Self)
    }
}

/// Has the codec write a head in this spelling.
pub(crate) fn restore(spelling: &Spelling, extensions: &mut Extensions) {
    KNOWN.with_borrow_mut(|known| {
        match known.iter().position(|(text, _)| text == spelling) {
            // The ones in use come to stand in front.
            Some(0) => {}
            Some(index) => known.swap(index, index / 2),
            None => {
                if known.len() >= KNOWN_MAX {
                    known.pop();
                }
                known.insert(0, (spelling.clone(), read_by_codec(spelling).unwrap_or_default()));
            }
        }
        if let Some((_, map)) = known.iter().find(|(text, _)| text == spelling) {
            extensions.extend(map.clone());
        }
    });
}

/// Lets the codec read a head of these names. `None`: they are no names.
fn read_by_codec(spelling: &Spelling) -> Option<Extensions> {
    let text = spelling.0.to_str().ok()?;
    let mut head = String::with_capacity(2 * text.len() + 64);
    head.push_str("GET / HTTP/1.1\r\n");
    let mut chunked = None;
    for name in text.split(',') {
        // Behind a Transfer-Encoding the codec passes over a Content-Length.
        if name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = Some(name);
        } else {
            head.push_str(name);
            head.push_str(": 0\r\n");
        }
    }
    if let Some(name) = chunked {
        head.push_str(name);
        head.push_str(": chunked\r\n");
    }
    head.push_str("\r\n");
    let found = Arc::new(Mutex::new(None));
    let service = {
        let found = Arc::clone(&found);
        service_fn(move |request: Request<Incoming>| {
            *found.lock() = Some(request.into_parts().0.extensions);
            std::future::ready(Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())))
        })
    };
    let io = tokio::io::join(io::Cursor::new(head.into_bytes()), tokio::io::sink());
    let mut served = pin!(
        http1::Builder::new()
            .preserve_header_case(true)
            .header_read_timeout(None)
            // A name takes a byte, and another one for its comma.
            .max_headers(NAMES_MAX / 2)
            .serve_connection(TokioIo::new(io), service)
    );
    // All of it is there, so nothing is waited for.
    drop(served.as_mut().poll(&mut Context::from_waker(Waker::noop())));
    let mut extensions = found.lock().take()?;
    extensions.remove::<hyper::upgrade::OnUpgrade>();
    Some(extensions)
}

fn is_blank(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

thread_local! {
    /// What the codec made, the most used in front. One for each thread, so that nobody waits for anybody.
    static KNOWN: RefCell<Vec<(Spelling, Extensions)>> = const { RefCell::new(Vec::new()) };
}

/// Carries a spelling across a link.
pub(crate) const HEADER_NAMES: HeaderName = HeaderName::from_static("outrigger-header-names");
/// Carries a reason phrase that is not the usual one across a link.
pub(crate) const REASON_PHRASE: HeaderName = HeaderName::from_static("outrigger-reason-phrase");
/// The longest text. A head with more goes in lower case.
const NAMES_MAX: usize = 4096;
/// Heads that wait for the codec: the least is 16 bytes, and it reads no megabyte ahead.
const AHEAD_MAX: usize = 64 * 1024;
/// Of a name that is being read; the longest that says anything of a body has one less.
const NAME_LETTERS: usize = 18;
/// The largest chunk: no system can hold more of a body, or count it (RFC 9112 7.1).
const CHUNK_MAX: u64 = i64::MAX.unsigned_abs();
/// The longest body that the codec reads.
const LENGTH_MAX: u64 = u64::MAX - 2;
/// Texts that are kept.
const KNOWN_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(heads: &mut Heads) -> Vec<String> {
        std::iter::from_fn(|| heads.done.pop_front())
            .map(|(text, _)| text.map_or_else(String::new, |text| text.0.to_str().unwrap().to_owned()))
            .collect()
    }

    const REQUESTS: &[u8] = b"\r\nPOST /a HTTP/1.1\r\nHost: a\r\nX-A: b:C\r\nContent-Length: 12\r\n\r\nNot: A\r\nHead\
        GET / HTTP/1.1\nhost: a\nTE:x\n\n\
        POST / HTTP/1.1\r\nHOST: a\r\nTransfer-Encoding: chunked\r\n\r\n4;Ext=A\r\nA: b\r\n0A\r\n0123456789\r\n0\r\nX-Trailer: B\r\n\r\n\
        GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    #[test]
    fn the_heads_of_requests_are_told_from_what_is_between_them() {
        let mut heads = Heads::of_requests();
        heads.read(REQUESTS);
        let wanted = ["Host,X-A,Content-Length", "host,TE", "HOST,Transfer-Encoding", ""];
        assert_eq!(texts(&mut heads), wanted);
        // However they are cut.
        let mut heads = Heads::of_requests();
        REQUESTS.iter().for_each(|byte| heads.read(&[*byte]));
        assert_eq!(texts(&mut heads), wanted);
    }

    #[test]
    fn a_body_is_on_its_way_until_its_last_byte() {
        for body in ["Content-Length: 4\r\n\r\nbody", "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nA: b\r\n\r\n"] {
            let request = format!("POST / HTTP/1.1\r\nHost: a\r\n{body}");
            let head_bytes = request.find("\r\n\r\n").unwrap() + 4;
            let mut heads = Heads::of_requests();
            for (index, byte) in request.bytes().enumerate() {
                heads.read(&[byte]);
                heads.next();
                let expected = (head_bytes..request.len()).contains(&(index + 1));
                assert_eq!(heads.is_in_body(), expected, "{body:?} {index}");
            }
            heads.read(b"P");
            assert!(!heads.is_in_body(), "another one begins");
            heads.read(request.get(1..head_bytes).unwrap().as_bytes());
            assert!(!heads.is_in_body(), "it is that of a head which the codec has not");
        }
    }

    #[test]
    fn too_many_names_are_not_kept() {
        let mut heads = Heads::of_requests();
        heads.read(b"GET / HTTP/1.1\r\n");
        for number in 0..1000 {
            heads.read(format!("X-Header-{number}: a\r\n").as_bytes());
        }
        heads.read(b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(texts(&mut heads), ["", "Host"]);
        assert!(heads.names.capacity() <= 2 * NAMES_MAX);
    }

    #[test]
    fn what_is_odd_about_a_head_is_told_of_long_names_and_behind_many_requests_too() {
        let plain = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        let long = [b"X-".as_slice(), &[b'a'; 2 * NAMES_MAX], b": 1\r\n"].concat();
        let many: Vec<u8> = (0..90).flat_map(|number| format!("X-{number:048}: 1\r\n").into_bytes()).collect();
        for names in [long, many] {
            // What the body of the first looks like is no head.
            let body = b"GET /#x HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
            let mut bytes = b"POST / HTTP/1.1\r\n".to_vec();
            bytes.extend_from_slice(&names);
            bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
            bytes.extend_from_slice(body);
            bytes.extend_from_slice(plain);
            bytes.extend_from_slice(b"POST /#a HTTP/1.1\r\n");
            bytes.extend_from_slice(&names);
            bytes.extend_from_slice(b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
            for cut in [1, 7, bytes.len()] {
                let mut heads = Heads::of_requests();
                bytes.chunks(cut).for_each(|part| heads.read(part));
                assert_eq!(heads.next_odd().1, Odd::default());
                assert_eq!(heads.next_odd().1, Odd::default());
                assert_eq!(heads.next_odd().1, Odd { framed_twice: true, fragment: true });
                assert!(heads.is_between());
            }
        }
        let mut heads = Heads::of_requests();
        heads.read(&plain.repeat(70));
        heads.read(b"GET /#a HTTP/1.1\r\nX-Aa: a\r\n\r\n");
        (0..70).for_each(|_| assert_eq!(heads.next_odd().1, Odd::default()));
        let (spelling, odd) = heads.next_odd();
        assert_eq!((spelling.unwrap().0, odd.fragment), (HeaderValue::from_static("X-Aa"), true));
        // Of one that nobody keeps in step with, nothing is guessed: its connection ends.
        assert!(!heads.is_astray());
        heads.read(&plain.repeat(AHEAD_MAX + 10));
        assert!(heads.is_astray() && heads.done.len() <= AHEAD_MAX);
    }

    #[test]
    fn the_codec_makes_its_map_of_any_names_and_of_nothing_else() {
        for (text, good) in [
            ("Host,X-A,x-a,X-a", true),
            ("Transfer-Encoding,Content-Length,Content-length,Connection,Upgrade,Expect", true),
            ("", false),
            ("Host,,A", false),
            ("Host,a b", false),
        ] {
            let spelling = Spelling(HeaderValue::from_static(text));
            assert_eq!(read_by_codec(&spelling).is_some_and(|map| !map.is_empty()), good, "{text}");
        }
        for number in 0..3 * KNOWN_MAX {
            restore(&Spelling(HeaderValue::try_from(format!("X-{number}")).unwrap()), &mut Extensions::new());
        }
        assert_eq!(KNOWN.with_borrow(Vec::len), KNOWN_MAX);
    }
}

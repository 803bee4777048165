//! How a destination in clear begins to speak, where HTTP/2 is spoken to it: as a server of HTTP/2, or as something else.
//!
//! Sources: RFC 9113 3.4 ("The server connection preface consists of a potentially empty SETTINGS frame that MUST be the first
//! frame the server sends"). A server of HTTP/1 takes the client's preface for a request that it does not understand, and
//! answers in its own words.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::net::BoxedIo;
use crate::dataplane::tap::{Listens, Tap};

/// What is known of it. Clones are handles on one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct First(Arc<AtomicBool>);

/// Reads the first frame.
struct Reader {
    first: First,
    /// Bytes of the first frame that were looked at.
    seen: usize,
}

impl First {
    /// Looks at the first bytes that come.
    pub(super) fn watch(&self, io: BoxedIo) -> BoxedIo {
        Box::new(Tap::new(io, Reader { first: self.clone(), seen: 0 }))
    }

    /// Did it say something else than a server of HTTP/2 does?
    pub(super) fn is_other(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Listens for Reader {
    fn hear(&mut self, bytes: &[u8]) {
        for byte in bytes.iter().take(HEAD - self.seen) {
            // The frame's length is short, its type is SETTINGS, and it is about the connection.
            let fits = match self.seen {
                0 => *byte == 0,
                3 => *byte == SETTINGS,
                5..=8 => *byte == 0,
                _any => true,
            };
            self.seen += 1;
            if !fits {
                self.first.0.store(true, Ordering::Relaxed);
                self.seen = HEAD;
                return;
            }
        }
    }
}

const HEAD: usize = 9;
const SETTINGS: u8 = 4;

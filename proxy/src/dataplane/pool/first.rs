//! How a destination in clear begins to speak, where HTTP/2 is spoken to it: as a server of HTTP/2, or as something else.
//!
//! Sources: RFC 9113 3.4 ("The server connection preface consists of a potentially empty SETTINGS frame that MUST be the first
//! frame the server sends"). A server of HTTP/1 takes the client's preface for a request that it does not understand, and
//! answers in its own words.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::base::net::BoxedIo;
use crate::dataplane::tap::{Listens, Tap};

/// What is known of it. Clones are handles on one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct First(Arc<AtomicU8>);

/// Reads the first frame.
struct Reader {
    first: First,
    /// Bytes of the first frame that were looked at.
    seen: usize,
    /// What its head says of its length, and what is still to come of it.
    left: usize,
}

impl First {
    /// Looks at the first bytes that come.
    pub(super) fn watch(&self, io: BoxedIo) -> BoxedIo {
        Box::new(Tap::new(io, Reader { first: self.clone(), seen: 0, left: 0 }))
    }

    /// Did it say something else than a server of HTTP/2 does?
    pub(super) fn is_other(&self) -> bool {
        self.0.load(Ordering::Relaxed) == OTHER
    }

    /// Is its first frame here, and with it all that it offers?
    pub(super) fn is_known(&self) -> bool {
        self.0.load(Ordering::Relaxed) == SETTINGS
    }
}

impl Listens for Reader {
    fn hear(&mut self, bytes: &[u8]) {
        let head = bytes.len().min(HEAD - self.seen);
        for byte in bytes.iter().take(head) {
            // The frame's length is short, its type is SETTINGS, and it is about the connection.
            let fits = match self.seen {
                0 => *byte == 0,
                1 | 2 => {
                    self.left = (self.left << 8) | usize::from(*byte);
                    true
                }
                3 => *byte == SETTINGS,
                5..=8 => *byte == 0,
                _any => true,
            };
            self.seen += 1;
            if !fits {
                self.first.0.store(OTHER, Ordering::Relaxed);
                self.seen = HEAD;
                return;
            }
        }
        if self.seen == HEAD && self.first.0.load(Ordering::Relaxed) == NOTHING {
            self.left = self.left.saturating_sub(bytes.len() - head);
            if self.left == 0 {
                self.first.0.store(SETTINGS, Ordering::Relaxed);
            }
        }
    }
}

const HEAD: usize = 9;
const SETTINGS: u8 = 4;
/// Nothing is known yet, and: it was something else.
const NOTHING: u8 = 0;
const OTHER: u8 = 1;

//! Requests that the codec of HTTP/2 refuses before anybody else sees them.
//!
//! It resets a stream whose head breaks the rules or holds a target that it cannot read, answers a head far over its limit by
//! a bare 431, and refuses a stream too many; it tells nobody. Its resets and answers without any header are seen here when
//! they are written. Requests that were seen have a record of their own, whatever is written for them: heads that came and
//! requests that were asked are counted, and no more is told than the difference.
//!
//! Sources: RFC 9113 5.4.2 (stream errors), 8.1.1 (malformed requests), 5.1.2 (concurrency); RFC 7541 5.2 (the shortest code
//! has five bits).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use super::cut::{Cut, Cutter, DATA, END_STREAM, Frame, HEADERS, RST_STREAM, WINDOW_UPDATE};
use super::frames::Traffic;
use super::reject::{Flood, Limit, Reject};
use crate::policy::limits::Limits;

/// What is known of the requests of one connection that nobody saw. One task changes it, so nothing is lost between load
/// and store; the atomics are there because the codec wants a service that can be sent elsewhere.
#[derive(Debug, Default)]
pub(super) struct Unseen {
    /// Heads that came whole, and the last stream of theirs.
    heads: AtomicU32,
    last: AtomicU32,
    asked: AtomicU32,
    told: AtomicU32,
    /// Streams whose heads were so long on the wire that their targets may be longer than the codec reads.
    long: Mutex<VecDeque<u32>>,
    ends: Mutex<VecDeque<(u32, End)>>,
    any: AtomicBool,
}

/// How the codec ends a stream that it refuses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum End {
    /// By an answer without headers. If the client sends more, a reset follows.
    Bare,
    Malformed,
    TooMany,
}

/// What the codec writes.
#[derive(Debug)]
pub(super) struct Written(Cutter);

impl Unseen {
    /// A head came whole: so many bytes of it.
    pub(super) fn head(&self, stream: u32, bytes: usize) {
        // Trailers are no head.
        if !self.is_new(stream) {
            return;
        }
        self.last.store(stream, Ordering::Relaxed);
        one_more(&self.heads);
        if bytes >= TARGET_BYTES_LEAST {
            let mut long = self.long.lock();
            if long.len() >= PENDING {
                long.pop_front();
            }
            long.push_back(stream);
        }
    }

    /// Is it a request's stream, and not one whose head came before, of which trailers come?
    pub(super) fn is_new(&self, stream: u32) -> bool {
        stream > self.last.load(Ordering::Relaxed)
    }

    /// A request was seen.
    pub(super) fn asked(&self) {
        one_more(&self.asked);
    }

    /// Did more heads come than requests were seen or told of?
    pub(super) fn left(&self) -> bool {
        let known = self.asked.load(Ordering::Relaxed).wrapping_add(self.told.load(Ordering::Relaxed));
        let left = self.heads.load(Ordering::Relaxed).wrapping_sub(known);
        left != 0 && left < u32::MAX / 2
    }

    /// What is to be told, one after the other.
    pub(super) fn take(&self, limits: &Limits) -> Option<Reject> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        let mut ends = self.ends.lock();
        let end = if self.left() { ends.pop_front() } else { None };
        let Some((stream, end)) = end else {
            // What is left are ends of requests that were seen.
            ends.clear();
            self.any.store(false, Ordering::Relaxed);
            return None;
        };
        one_more(&self.told);
        Some(match end {
            End::Bare => Reject::TooLarge(Limit::HeadBytes(limits.header_bytes)),
            End::TooMany => Reject::Flood(Flood::Streams(limits.concurrent_streams)),
            End::Malformed if self.long.lock().contains(&stream) => Reject::TooLarge(Limit::Target(limits.uri_bytes)),
            End::Malformed => Reject::BadRequest("a header of connections, or a pseudo-header that is not as HTTP/2 wants it"),
        })
    }

    fn ended(&self, stream: u32, end: End) {
        let mut ends = self.ends.lock();
        // They are taken each time that the codec ran.
        if ends.len() < PENDING {
            ends.push_back((stream, end));
            self.any.store(true, Ordering::Relaxed);
        }
    }
}

impl Written {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self(Cutter::new(0))
    }

    /// Takes bytes as they pass.
    pub(super) fn take(&mut self, mut bytes: &[u8], traffic: &Traffic) {
        let unseen = &traffic.unseen;
        while let Some(cut) = self.0.next(&mut bytes) {
            let Cut::Frame(frame) = cut else { continue };
            match frame {
                Frame { kind: DATA, length, .. } => traffic.sent(length),
                Frame { kind: HEADERS, flags, length: ..=STATUS_BYTES, stream, .. } if flags & END_STREAM != 0 => {
                    unseen.ended(stream, End::Bare);
                }
                Frame { kind: RST_STREAM, word: PROTOCOL_ERROR, stream, .. } => unseen.ended(stream, End::Malformed),
                Frame { kind: RST_STREAM, word: REFUSED_STREAM, stream, .. } => unseen.ended(stream, End::TooMany),
                Frame { kind: WINDOW_UPDATE, stream: 0, word, .. } => traffic.account.granted(word),
                _another => {}
            }
        }
    }
}

fn one_more(count: &AtomicU32) {
    count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// The codec reads targets of 65534 bytes, whatever the limit on them; more than these cannot be fewer bytes on the wire.
const TARGET_BYTES_LEAST: usize = 65_534 / 8 * 5;
/// As much as a status may be on the wire.
const STATUS_BYTES: usize = 5;
/// More than are read before all of them are told: a pause is made after 128 heads and the rest of a read of 8 KiB, in which a head
/// has ten bytes at least.
const PENDING: usize = 1_024;
const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 7;

//! An HTTP/1 connection between requests, without a codec: what is left of it is the stream, what is known of its client,
//! and the wait for the next byte.
//!
//! A codec keeps buffers of several times the size of all the rest, and most connections of most applications idle. What
//! resting connections gave up goes back to the system a moment later, when many of them did: the allocator by itself keeps
//! it for the next allocation, which an idle sidecar never makes.
//!
//! Invariant: nothing of a request is in memory while a connection rests, so that nothing can be lost or waited for in vain.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::ready;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::time::{Instant, sleep, sleep_until};

use super::pipeline::Connection;
use crate::base::memory;
use crate::base::net::BoxedIo;

thread_local! {
    /// What this worker's connections gave up since it was given back.
    static GIVEN_UP: Cell<GivenUp> = const { Cell::new(GivenUp { connections: 0, awaited: false }) };
}

#[derive(Clone, Copy)]
struct GivenUp {
    connections: u32,
    /// Somebody waits to give it back.
    awaited: bool,
}

/// Waits for the first bytes of the next request; `None` when there will be none: the client left, or stayed silent until
/// `until`, or the sidecar stops.
pub(super) async fn rest(io: &mut BoxedIo, connection: &Connection, until: Instant) -> Option<Bytes> {
    give_back_soon(connection);
    let mut drain = connection.drain.clone();
    let first = poll_fn(|cx| {
        // It is there only while there is something to read.
        let mut room = [MaybeUninit::uninit(); FIRST_READ];
        let mut room = ReadBuf::uninit(&mut room);
        ready!(Pin::new(&mut *io).poll_read(cx, &mut room))?;
        Ok::<_, io::Error>(Bytes::copy_from_slice(room.filled())).into()
    });
    tokio::select! {
        biased;
        first = first => first.ok().filter(|first| !first.is_empty()),
        () = sleep_until(until) => None,
        () = drain.stopped() => None,
    }
}

/// One for each worker, whose memory is its own, waits until no more connections come to rest.
fn give_back_soon(connection: &Connection) {
    let mut given_up = GIVEN_UP.get();
    given_up.connections = given_up.connections.saturating_add(1);
    let begins = !given_up.awaited && given_up.connections >= GIVE_BACK_MIN;
    given_up.awaited |= begins;
    GIVEN_UP.set(given_up);
    if !begins {
        return;
    }
    let mut drain = connection.drain.clone();
    connection.proxy.tasks.spawn(async move {
        let calm = async {
            for _look in 0..GIVE_BACK_LOOKS {
                let before = GIVEN_UP.get().connections;
                sleep(GIVE_BACK_AFTER).await;
                if GIVEN_UP.get().connections == before {
                    break;
                }
            }
        };
        tokio::select! {
            () = calm => give_back(),
            () = drain.stopped() => {}
        }
        GIVEN_UP.set(GivenUp { connections: 0, awaited: false });
    });
}

/// What connections at rest gave up, and the code that is not run for them: what runs again is mapped again by some dozens
/// of minor faults.
fn give_back() {
    memory::release_freed();
    if let Err(error) = memory::release_code() {
        tracing::debug!(%error, "code that was run was not given back");
    }
}

/// As much as the codec's own first read.
const FIRST_READ: usize = 8 * 1024;
/// Fewer connections are not worth a walk through the allocator's pages.
const GIVE_BACK_MIN: u32 = 32;
/// While more come to rest, more will come; but not for ever.
const GIVE_BACK_AFTER: Duration = Duration::from_millis(200);
const GIVE_BACK_LOOKS: u32 = 10;

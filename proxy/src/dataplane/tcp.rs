//! Copies opaque bytes in both directions: a half-close is passed on, bytes are counted as they go, and a connection on
//! which nothing moves for too long is closed.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, sleep_until};

/// Bytes of one connection or request, counted while it lives.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// From the caller.
    pub(crate) received: AtomicU64,
    /// To the caller.
    pub(crate) sent: AtomicU64,
}

/// How a copy ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Both sides said that they send no more.
    Both,
    /// Nothing moved for the idle time.
    Idle,
    /// The caller's side broke.
    Downstream(io::Error),
    /// The other side broke.
    Upstream(io::Error),
}

/// Copies until both directions ended, one side broke, or nothing moved for `idle`. Both streams are closed at the end.
pub(crate) async fn copy<D, U>(downstream: D, upstream: U, counts: &Counts, idle: Duration) -> Ended
where
    D: AsyncRead + AsyncWrite,
    U: AsyncRead + AsyncWrite,
{
    let (down_read, down_write) = tokio::io::split(downstream);
    let (up_read, up_write) = tokio::io::split(upstream);
    let both = async {
        let there = async { one_way(down_read, up_write, &counts.received).await.map_err(Side::turned) };
        let back = async { one_way(up_read, down_write, &counts.sent).await };
        tokio::try_join!(there, back)
    };
    tokio::select! {
        ended = both => match ended {
            Ok(((), ())) => Ended::Both,
            // `one_way` names its reader and its writer; the first direction reads from the caller.
            Err(Side::Writer(error)) => Ended::Downstream(error),
            Err(Side::Reader(error)) => Ended::Upstream(error),
        },
        () = silence(counts, idle) => Ended::Idle,
    }
}

/// Which end of one direction broke.
enum Side {
    Reader(io::Error),
    Writer(io::Error),
}

impl Side {
    /// The same end, named from the opposite direction.
    fn turned(self) -> Self {
        match self {
            Self::Reader(error) => Self::Writer(error),
            Self::Writer(error) => Self::Reader(error),
        }
    }
}

async fn one_way(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, count: &AtomicU64) -> Result<(), Side> {
    let mut buffer = bytes::BytesMut::with_capacity(BUFFER);
    loop {
        buffer.clear();
        if from.read_buf(&mut buffer).await.map_err(Side::Reader)? == 0 {
            break;
        }
        to.write_all(&buffer).await.map_err(Side::Writer)?;
        to.flush().await.map_err(Side::Writer)?;
        count.fetch_add(u64::try_from(buffer.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    // The reader said that no more comes: the other side is told, and may go on answering.
    match to.shutdown().await {
        // It was closed already, which says the same.
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(Side::Writer(error)),
        _closed => Ok(()),
    }
}

/// Returns when nothing was counted for `idle`.
async fn silence(counts: &Counts, idle: Duration) {
    let total = || counts.received.load(Ordering::Relaxed).wrapping_add(counts.sent.load(Ordering::Relaxed));
    let mut last = total();
    loop {
        sleep_until(Instant::now() + idle).await;
        let now = total();
        if now == last {
            return;
        }
        last = now;
    }
}

/// One read.
const BUFFER: usize = 16 * 1024;
/// How long an opaque connection may be silent. Longer than the keep-alive of databases' pools; an application that needs
/// more sends keep-alives of its own.
pub(crate) const IDLE_MAX: Duration = Duration::from_secs(2 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_half_close_is_passed_on_and_the_answer_still_comes() {
        let (mut client, down) = tokio::io::duplex(64);
        let (up, mut server) = tokio::io::duplex(64);
        let counts = Counts::default();
        let talk = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut heard = String::new();
            server.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "question");
            server.write_all(b"a longer answer").await.unwrap();
            server.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "a longer answer");
        };
        let (ended, ()) = tokio::join!(copy(down, up, &counts, IDLE_MAX), talk);
        assert!(matches!(ended, Ended::Both), "{ended:?}");
        assert_eq!((counts.received.into_inner(), counts.sent.into_inner()), (8, 15));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_closed() {
        let (_client, down) = tokio::io::duplex(64);
        let (up, _server) = tokio::io::duplex(64);
        let ended = copy(down, up, &Counts::default(), Duration::from_secs(60)).await;
        assert!(matches!(ended, Ended::Idle), "{ended:?}");
    }
}

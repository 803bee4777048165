//! How a destination in clear begins to speak, where HTTP/2 is spoken to it: as a server of HTTP/2, or as something else.
//!
//! Sources: RFC 9113 3.4 ("The server connection preface consists of a potentially empty SETTINGS frame that MUST be the first
//! frame the server sends"). A server of HTTP/1 takes the client's preface for a request that it does not understand, and
//! answers in its own words.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::base::net::BoxedIo;

/// What is known of it. Clones are handles on one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct First(Arc<AtomicBool>);

/// The stream under the codec.
struct Watched {
    io: BoxedIo,
    first: First,
    /// Bytes of the first frame that were looked at.
    seen: usize,
}

impl First {
    /// Looks at the first bytes that come.
    pub(super) fn watch(&self, io: BoxedIo) -> BoxedIo {
        Box::new(Watched { io, first: self.clone(), seen: 0 })
    }

    /// Did it say something else than a server of HTTP/2 does?
    pub(super) fn is_other(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Watched {
    fn take(&mut self, bytes: &[u8]) {
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

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if this.seen < HEAD
            && let Some(bytes) = buf.filled().get(before..)
        {
            this.take(bytes);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

const HEAD: usize = 9;
const SETTINGS: u8 = 4;

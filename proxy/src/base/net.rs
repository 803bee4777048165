//! The door to the network: a byte stream, and how one is dialled. In memory in tests, sockets otherwise.

use std::any::Any;
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// A byte stream in both directions.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Itself, for [`socket`] to look at.
    fn as_any(&self) -> &dyn Any;
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Any byte stream; the cost is one indirection per read or write.
pub(crate) type BoxedIo = Box<dyn Io>;

/// The TCP socket that a stream is, if it is nothing else: what the kernel knows of its bytes is then true of the stream's.
pub(crate) fn socket(io: &BoxedIo) -> Option<&TcpStream> {
    // The box is a stream itself; what is asked for is inside of it.
    (**io).as_any().downcast_ref()
}

/// Writes what is in pieces with one system call. Small pieces are put together before: to copy a head and a body of 1 KiB costs
/// less than to have the kernel take a list of them.
pub(crate) fn poll_write_pieces(io: Pin<&mut BoxedIo>, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
    let mut some = pieces.iter().filter(|piece| !piece.is_empty());
    match (some.next(), some.next()) {
        (Some(one), None) => io.poll_write(cx, one),
        (Some(_), Some(_)) if pieces.iter().map(|piece| piece.len()).sum::<usize>() <= JOINED_MAX => {
            // Taken out meanwhile: a stream may be made of another one, which does the same.
            let mut joined = JOINED.take();
            joined.clear();
            for piece in pieces {
                joined.extend_from_slice(piece);
            }
            let written = io.poll_write(cx, &joined);
            JOINED.set(joined);
            written
        }
        _many_or_none => io.poll_write_vectored(cx, pieces),
    }
}

thread_local! {
    /// Where pieces are put together: one for all streams of a thread, for a write is over before the next begins.
    static JOINED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Bytes that are copied rather than listed.
const JOINED_MAX: usize = 4 * 1024;

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// Writes the pieces until all of them are through a pipe of this size; what arrives.
    async fn carried(pipe: usize, pieces: &[&[u8]]) -> Vec<u8> {
        let (near, mut far) = tokio::io::duplex(pipe);
        let write = async move {
            let mut near: BoxedIo = Box::new(near);
            let mut left: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
            let mut left = left.as_mut_slice();
            while left.iter().any(|piece| !piece.is_empty()) {
                let written = poll_fn(|cx| poll_write_pieces(Pin::new(&mut near), cx, left)).await.unwrap();
                IoSlice::advance_slices(&mut left, written);
            }
        };
        let mut all = Vec::new();
        tokio::join!(write, far.read_to_end(&mut all)).1.unwrap();
        all
    }

    #[tokio::test]
    async fn pieces_arrive_whole_and_in_order_whatever_their_size() {
        let large = vec![7; 3 * JOINED_MAX];
        let small: &[u8] = b"head";
        for pieces in [vec![small], vec![small, b"", b"body"], vec![b"", small], vec![small, &large, b"end"], vec![]] {
            for pipe in [3, 1 << 20] {
                assert!(carried(pipe, &pieces).await == pieces.concat(), "{} pieces, {pipe}", pieces.len());
            }
        }
    }
}

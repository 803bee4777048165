//! The door to the network: a byte stream, and how one is dialled. In memory in tests, sockets otherwise.

use std::any::Any;

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

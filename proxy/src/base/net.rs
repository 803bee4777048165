//! The door to the network: a byte stream, and how one is dialled. In memory in tests, sockets otherwise.

use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream in both directions.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// Any byte stream; the cost is one indirection per read or write.
pub(crate) type BoxedIo = Box<dyn Io>;

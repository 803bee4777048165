//! The name that an application's own TLS asks for, overheard while its bytes pass.
//!
//! Sources: RFC 8446 4.1.2, RFC 6066 3 (the name is in clear in a ClientHello). Nothing is held back for it: bytes are
//! passed on as they come, and a copy of the first of them is read until the hello is whole or is none.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::sniff::{BYTES_MAX, Sniffed, classify};
use crate::base::net::BoxedIo;

/// What is known of an application's own TLS; empty while, or where, there is none.
pub(crate) type Hello = OnceLock<ServerName>;

/// The name that a ClientHello asks for: a valid DNS name in lower case, if any.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct ServerName(pub(crate) Option<Box<str>>);

/// A client's stream, listened to until it said hello.
pub(crate) struct Overheard {
    inner: BoxedIo,
    listening: Option<Box<Listening>>,
}

struct Listening {
    hello: Arc<Hello>,
    /// How much was read.
    heard: usize,
    acceptor: Acceptor,
}

impl Overheard {
    /// `hello` is filled in when it was heard.
    pub(crate) fn new(inner: BoxedIo, hello: Arc<Hello>) -> Self {
        Self { inner, listening: Some(Box::new(Listening { hello, heard: 0, acceptor: Acceptor::default() })) }
    }
}

impl Listening {
    /// Takes more of the client's bytes; `false` once there is nothing more to listen for.
    fn listen(&mut self, bytes: &[u8]) -> bool {
        if self.heard == 0 && matches!(classify(bytes), Some(known) if known != Sniffed::Tls) {
            return false;
        }
        self.heard = self.heard.saturating_add(bytes.len());
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.acceptor.read_tls(&mut rest).is_err() {
                return false;
            }
            match self.acceptor.accept() {
                Ok(Some(accepted)) => {
                    let name = accepted.client_hello().server_name().map(|name| name.to_ascii_lowercase().into_boxed_str());
                    // It is said once.
                    drop(self.hello.set(ServerName(name)));
                    return false;
                }
                Ok(None) => {}
                Err(_not_a_hello) => return false,
            }
        }
        self.heard < BYTES_MAX
    }
}

impl AsyncRead for Overheard {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        if let Some(listening) = &mut self.listening
            && let Some(bytes) = buf.filled().get(before..)
            && !bytes.is_empty()
            && !listening.listen(bytes)
        {
            self.listening = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Overheard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::dataplane::tls::tests::hello_for;

    async fn overhear(parts: impl IntoIterator<Item = &[u8]>) -> Option<ServerName> {
        let (mut near, far) = tokio::io::duplex(64 * 1024);
        let hello = Arc::new(Hello::new());
        let mut stream = Overheard::new(Box::new(far), Arc::clone(&hello));
        for part in parts {
            near.write_all(part).await.unwrap();
            let mut passed = vec![0; part.len()];
            // Nothing is held back.
            stream.read_exact(&mut passed).await.unwrap();
            assert_eq!(passed, part);
        }
        drop(stream);
        Arc::into_inner(hello).unwrap().into_inner()
    }

    #[tokio::test]
    async fn the_name_is_heard_in_whatever_pieces_it_comes() {
        let hello = hello_for("API.example.org", &[b"h2"]);
        let name = Some(ServerName(Some("api.example.org".into())));
        assert_eq!(overhear([&*hello, b"more"]).await, name);
        for size in [1, 5, 64] {
            assert_eq!(overhear(hello.chunks(size)).await, name, "{size}");
        }
    }

    #[tokio::test]
    async fn what_is_no_hello_has_no_name() {
        assert_eq!(overhear([b"PING\r\n".as_slice(), b"\x16\x03\x01"]).await, None);
        assert_eq!(overhear([b"\x16\x03\x01\x00\x04\x01\x00\x00\x00garbage".as_slice()]).await, None);
        let hello = hello_for("192.0.2.1", &[b"h2"]);
        assert_eq!(overhear([&*hello]).await, Some(ServerName(None)), "an address is no name");
    }
}

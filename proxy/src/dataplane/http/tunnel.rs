//! A stream of HTTP/2 as a stream of bytes: what a CONNECT becomes when it is accepted, be it an extended one.
//!
//! Sources: RFC 9113 8.5, RFC 8441 5 (END_STREAM is the end of one direction, a reset that of both), RFC 9113 5.2.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::credit::Account;
use crate::base::net::BoxedIo;

/// The bytes of a connection that speaks another protocol from now on, once it does.
pub(crate) struct Upgrading(Pin<Box<dyn Future<Output = io::Result<BoxedIo>> + Send>>);

/// Both directions of a stream.
pub(crate) struct Tunnel {
    from: RecvStream,
    /// Of the connection.
    account: Arc<Account>,
    to: SendStream<Bytes>,
    left: Bytes,
}

impl Upgrading {
    pub(crate) fn new(bytes: impl Future<Output = io::Result<BoxedIo>> + Send + 'static) -> Self {
        Self(Box::pin(bytes))
    }

    /// What the codec of HTTP/1 gives up.
    pub(crate) fn codec(codec: OnUpgrade) -> Self {
        Self::new(async {
            let upgraded = codec.await.map_err(io::Error::other)?;
            Ok(Box::new(TokioIo::new(upgraded)) as BoxedIo)
        })
    }
}

impl Future for Upgrading {
    type Output = io::Result<BoxedIo>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for Upgrading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Upgrading")
    }
}

impl Tunnel {
    pub(crate) fn new(from: RecvStream, account: Arc<Account>, to: SendStream<Bytes>) -> Self {
        Self { from, account, to, left: Bytes::new() }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // The codec lets go of what nobody read.
        self.account.released(self.from.flow_control().used_capacity());
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.left.is_empty() {
            match ready!(this.from.poll_data(cx)) {
                Some(Ok(data)) => this.left = data,
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = this.left.len().min(buf.remaining());
        buf.put_slice(this.left.get(..count).unwrap_or_default());
        this.left.advance(count);
        // What was taken is granted anew; a stream that is over needs no grant.
        this.account.released(count);
        drop(this.from.flow_control().release_capacity(count));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.to.reserve_capacity(buf.len());
        let room = loop {
            match self.to.capacity() {
                0 => match ready!(self.to.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                    None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                },
                room => break room.min(buf.len()),
            }
        };
        let piece = Bytes::copy_from_slice(buf.get(..room).unwrap_or_default());
        Poll::Ready(self.to.send_data(piece, false).map(|()| room).map_err(broken))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection sends what it was given at the end of its turn.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.to.send_data(Bytes::new(), true).map_err(broken))
    }
}

fn broken(error: h2::Error) -> io::Error {
    match error.reason() {
        Some(Reason::CANCEL | Reason::STREAM_CLOSED) => io::ErrorKind::BrokenPipe.into(),
        _other if error.is_io() => error.into_io().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into()),
        _other => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_direction_that_is_taken_back_without_an_error_did_not_end() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let reader = async {
            let mut codec = h2::server::handshake(far).await.unwrap();
            let (request, mut respond) = codec.accept().await.unwrap().unwrap();
            tokio::spawn(async move { while codec.accept().await.is_some() {} });
            let to = respond.send_response(Response::new(()), false).unwrap();
            let mut read = Vec::new();
            let ended = Tunnel::new(request.into_body(), Account::new(), to).read_to_end(&mut read).await;
            assert!(ended.is_err() && read == b"abc", "{ended:?} {read:?}");
        };
        let writer = async {
            let (mut sender, connection) = h2::client::handshake(near).await.unwrap();
            tokio::spawn(connection);
            let request = Request::connect("api.shop:80").body(()).unwrap();
            let (answer, mut to) = sender.send_request(request, false).unwrap();
            to.send_data(Bytes::from_static(b"abc"), false).unwrap();
            let answer = answer.await.unwrap();
            to.send_reset(Reason::NO_ERROR);
            answer
        };
        let ((), _answer) = tokio::join!(reader, writer);
    }
}

//! The stream under HTTP/2, in clear or in TLS: what many requests write within one turn of their connection's task leaves
//! in one piece, and what came in is read in large ones.
//!
//! The codec flushes after every frame. Here a flush only says that something is to be sent; it is sent when the turn is
//! over ([`Wire::drive`]): one system call and few TLS records for the frames of many requests.
//!
//! The buffers are those of the thread. A connection has one only as long as there is something in it, and an idle one none:
//! they never grow by being copied, and what they hold is still in the processor's caches.
//!
//! Sources: RFC 8446 5 (records), 6.1 (a close without `close_notify` is an error to whoever reads).
//! Invariant: whoever polls the codec does it inside `drive`, or nothing is ever sent.

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, BufRead as _, IoSlice, Write};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::thread::LocalKey;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::base::net::{BoxedIo, poll_write_pieces};

/// A stream that is shared by the codec and by whoever drives it. Clones are handles on one stream.
#[derive(Clone)]
pub(crate) struct Wire(Arc<Mutex<Conn>>);

struct Conn {
    io: BoxedIo,
    tls: Option<Box<rustls::Connection>>,
    /// Was read, and how much of it was taken already. Empty where all of it was.
    left: Vec<u8>,
    taken: usize,
    /// Was written and has not been sent yet, in clear.
    out: Vec<u8>,
    /// How much of `out` was sent already. Always 0 with TLS.
    sent: usize,
    ended: bool,
    closing: bool,
    /// Counts what was read, so that silence is noticed.
    heard: u32,
    /// Sending failed; whoever writes next is told.
    failed: Option<io::ErrorKind>,
}

impl Wire {
    /// In clear.
    pub(crate) fn plain(io: BoxedIo) -> Self {
        Self::new(io, None)
    }

    /// In TLS, whose handshake is over.
    pub(crate) fn secured(io: BoxedIo, session: impl Into<rustls::Connection>) -> Self {
        let mut session = Box::new(session.into());
        // What is handed to it is bounded here.
        session.set_buffer_limit(None);
        Self::new(io, Some(session))
    }

    fn new(io: BoxedIo, tls: Option<Box<rustls::Connection>>) -> Self {
        let (left, out) = (Vec::new(), Vec::new());
        let conn = Conn { io, tls, left, taken: 0, out, sent: 0, ended: false, closing: false, heard: 0, failed: None };
        Self(Arc::new(Mutex::new(conn)))
    }

    /// A number that changes with whatever the peer says.
    pub(crate) fn heard(&self) -> u32 {
        self.0.lock().heard
    }

    /// Drives a codec on this stream: after each turn, what it wrote is sent.
    pub(crate) async fn drive<F: Future>(self, codec: F) -> F::Output {
        let mut codec = pin!(codec);
        poll_fn(|cx| {
            let polled = codec.as_mut().poll(cx);
            self.0.lock().turn(cx);
            polled
        })
        .await
    }
}

impl Conn {
    fn turn(&mut self, cx: &mut Context<'_>) {
        if self.failed.is_none()
            && let Poll::Ready(Err(error)) = self.poll_send(cx)
        {
            self.failed = Some(error.kind());
            self.out = Vec::new();
            // The codec is told when it writes next, which is now.
            cx.waker().wake_by_ref();
        }
    }

    /// Is ready when everything was sent.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, tls, out, sent, .. } = self;
        match tls {
            None => {
                while let Some(rest) = out.get(*sent..).filter(|rest| !rest.is_empty()) {
                    *sent += some(ready!(Pin::new(&mut *io).poll_write(cx, rest))?)?;
                }
                *sent = 0;
            }
            Some(session) => loop {
                while session.wants_write() {
                    match session.write_tls(&mut Sink { io, cx }) {
                        Ok(written) => drop(some(written)?),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
                if out.is_empty() {
                    break;
                }
                session.writer().write_all(out)?;
                give_back(&OUT, out);
            },
        }
        give_back(&OUT, out);
        Pin::new(io).poll_flush(cx)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let Some(kind) = self.failed {
            return Poll::Ready(Err(kind.into()));
        }
        if self.out.len() >= OUT_MAX {
            ready!(self.poll_send(cx))?;
        }
        lend(&OUT, &mut self.out, OUT_MAX);
        let mut taken = 0;
        for piece in pieces {
            let room = OUT_MAX.saturating_sub(self.out.len()).min(piece.len());
            self.out.extend_from_slice(piece.get(..room).unwrap_or_default());
            taken += room;
            if room < piece.len() {
                break;
            }
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            let Self { io, tls, left, taken, ended, heard, .. } = self;
            let bytes = left.get(*taken..).unwrap_or_default();
            let (took, over) = match tls {
                None => (take(bytes, buf), *ended),
                Some(session) => {
                    let took = feed(session, bytes, buf)?;
                    (took, plaintext(session, buf)?)
                }
            };
            *taken += took;
            if *taken >= left.len() {
                *taken = 0;
                give_back(&READ, left);
            }
            if buf.filled().len() > before || over || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            lend(&READ, left, READ_MAX);
            let polled = poll_read_buf(Pin::new(&mut *io), cx, left);
            if left.is_empty() {
                give_back(&READ, left);
            }
            *ended = ready!(polled)? == 0;
            *heard = heard.wrapping_add(1);
            if let (true, Some(session)) = (*ended, tls) {
                session.read_tls(&mut io::empty())?;
            }
        }
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What was written before goes before the goodbye.
        ready!(self.poll_send(cx))?;
        if !std::mem::replace(&mut self.closing, true)
            && let Some(session) = &mut self.tls
        {
            session.send_close_notify();
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Puts bytes in clear where they are wanted. Returns how many there was room for.
fn take(bytes: &[u8], buf: &mut ReadBuf<'_>) -> usize {
    let count = bytes.len().min(buf.remaining());
    buf.put_slice(bytes.get(..count).unwrap_or_default());
    count
}

/// Decrypts bytes and puts what they hold where it is wanted. Returns how many were taken: all, unless there is no room.
fn feed(session: &mut rustls::Connection, bytes: &[u8], buf: &mut ReadBuf<'_>) -> io::Result<usize> {
    let mut rest = bytes;
    while !rest.is_empty() && !plaintext(session, buf)? && buf.remaining() > 0 {
        if session.read_tls(&mut rest)? == 0 {
            break;
        }
        session.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    }
    Ok(bytes.len() - rest.len())
}

/// Puts what was decrypted where it is wanted. True: the peer said that nothing more will come.
fn plaintext(session: &mut rustls::Connection, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
    while buf.remaining() > 0 {
        let mut reader = session.reader();
        let count = match reader.fill_buf() {
            Ok([]) => return Ok(true),
            Ok(bytes) => take(bytes, buf),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // What came before a broken end is still good.
            Err(_) if !buf.filled().is_empty() => return Ok(false),
            Err(error) => return Err(error),
        };
        reader.consume(count);
    }
    Ok(false)
}

/// A stream that takes nothing is broken.
fn some(written: usize) -> io::Result<usize> {
    if written == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(written) }
}

/// The socket as TLS writes to it.
struct Sink<'a, 'b, 'c> {
    io: &'a mut BoxedIo,
    cx: &'b mut Context<'c>,
}

impl Write for Sink<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        at_once(Pin::new(&mut *self.io).poll_write(self.cx, bytes))
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        at_once(poll_write_pieces(Pin::new(&mut *self.io), self.cx, pieces))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn at_once(polled: Poll<io::Result<usize>>) -> io::Result<usize> {
    match polled {
        Poll::Ready(done) => done,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.lock().poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // At the end of the turn.
        Poll::Ready(self.0.lock().failed.map_or(Ok(()), |kind| Err(kind.into())))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().poll_shutdown(cx)
    }
}

/// Takes the thread's buffer, where there is none yet. While another connection has not done with it, there is a new one.
fn lend(spare: &'static LocalKey<Cell<Vec<u8>>>, buffer: &mut Vec<u8>, size: usize) {
    if buffer.capacity() == 0 {
        *buffer = spare.take();
        buffer.reserve_exact(size);
    }
}

/// Gives it back, whatever is in it.
fn give_back(spare: &'static LocalKey<Cell<Vec<u8>>>, buffer: &mut Vec<u8>) {
    let mut buffer = std::mem::take(buffer);
    if buffer.capacity() > 0 {
        buffer.clear();
        spare.set(buffer);
    }
}

thread_local! {
    /// What sockets are read into.
    static READ: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// What is collected in until a turn is over.
    static OUT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Bytes of one read.
const READ_MAX: usize = 32 * 1024;
/// Bytes that are collected before they are sent within a turn.
const OUT_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    use super::*;
    use crate::identity::source::Identity;
    use crate::identity::testing::{Authority, Leaf, clock};
    use crate::identity::verify::ClientDemand;

    const ALPN: &[&[u8]] = &[b"outrigger-h2"];

    /// Both ends of a link over a pipe of this size.
    async fn link(pipe: usize) -> (Wire, Wire) {
        let authority = Authority::new();
        let identity = |account: &str| {
            let identity = Identity::new("cluster.local".parse().unwrap(), clock());
            authority.issue_to(&identity, &Leaf::workload(account), &[&authority]);
            identity
        };
        let (web, api) = (identity("web"), identity("api"));
        let config = web.client_config(&"spiffe://cluster.local/ns/shop/sa/api".parse().unwrap(), ALPN).unwrap();
        let (near, far) = tokio::io::duplex(pipe);
        let name = rustls_pki_types::ServerName::try_from("outrigger").unwrap();
        let (near, far) = tokio::join!(
            TlsConnector::from(config).connect(name, Box::new(near) as BoxedIo),
            TlsAcceptor::from(api.server_config(ClientDemand::Certificate, ALPN).unwrap()).accept(Box::new(far) as BoxedIo)
        );
        let ((near, client), (far, server)) = (near.unwrap().into_inner(), far.unwrap().into_inner());
        (Wire::secured(near, client), Wire::secured(far, server))
    }

    fn plain(pipe: usize) -> (Wire, Wire) {
        let (near, far) = tokio::io::duplex(pipe);
        (Wire::plain(Box::new(near)), Wire::plain(Box::new(far)))
    }

    /// Sends `bytes` one way in pieces, closes, and returns what arrived.
    async fn carry(from: Wire, to: Wire, bytes: &[u8], piece: usize) -> Vec<u8> {
        let (mut writer, mut reader) = (from.clone(), to.clone());
        let write = async move {
            for piece in bytes.chunks(piece) {
                writer.write_all(piece).await.unwrap();
                writer.flush().await.unwrap();
            }
            writer.shutdown().await.unwrap();
        };
        let read = async move {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).await.unwrap();
            all
        };
        tokio::join!(from.drive(write), to.drive(read)).1
    }

    #[tokio::test]
    async fn what_is_written_arrives_through_pipes_of_any_size() {
        let bytes: Vec<u8> = (0..300_000_u32).map(|number| number.to_le_bytes()[1]).collect();
        for pipe in [100, 5_000, 1 << 20] {
            for piece in [7_000, 100_000] {
                let (near, far) = link(pipe.max(1_000)).await;
                assert!(carry(near, far, &bytes, piece).await == bytes, "TLS, {pipe}, {piece}");
                let (near, far) = plain(pipe);
                assert!(carry(far, near, &bytes, piece).await == bytes, "in clear, {pipe}, {piece}");
            }
        }
    }

    #[tokio::test]
    async fn a_connection_has_a_buffer_only_while_there_is_something_in_it() {
        let (near, far) = link(1 << 16).await;
        assert!(carry(near.clone(), far.clone(), &[7; 100_000], 9_000).await == [7; 100_000]);
        for wire in [near, far] {
            let conn = wire.0.lock();
            assert_eq!((conn.left.capacity(), conn.out.capacity()), (0, 0));
        }
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let wire = Wire::plain(Box::new(near));
        let mut reader = wire.clone();
        far.write_all(b"abcdef").await.unwrap();
        let mut first = [0; 2];
        reader.read_exact(&mut first).await.unwrap();
        {
            let conn = wire.0.lock();
            assert_eq!((&first, conn.left.as_slice(), conn.taken), (b"ab", b"abcdef".as_slice(), 2));
        }
        let mut rest = [0; 4];
        reader.read_exact(&mut rest).await.unwrap();
        assert_eq!((&rest, wire.0.lock().left.capacity()), (b"cdef", 0));
    }

    #[tokio::test]
    async fn a_turn_leaves_in_one_piece() {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let wire = Wire::plain(Box::new(near));
        let mut writer = wire.clone();
        wire.drive(async {
            for _ in 0..3 {
                writer.write_all(b"frame").await.unwrap();
                writer.flush().await.unwrap();
            }
            let mut early = [0; 1];
            let nothing = poll_fn(|cx| Poll::Ready(Pin::new(&mut far).poll_read(cx, &mut ReadBuf::new(&mut early)).is_pending()));
            assert!(nothing.await);
        })
        .await;
        let mut heard = [0; 64];
        assert_eq!(far.read(&mut heard).await.unwrap(), 15);
    }

    #[tokio::test]
    async fn a_link_that_ends_without_a_goodbye_is_broken() {
        let (near, far) = link(1 << 16).await;
        drop(near);
        let mut reader = far.clone();
        let error = far.drive(async move { reader.read(&mut [0; 16]).await.unwrap_err() }).await;
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_told_to_whoever_writes() {
        let (near, far) = link(1 << 16).await;
        drop(far);
        let mut writer = near.clone();
        let failed = near.drive(async move {
            loop {
                if let Err(error) = writer.write_all(b"anybody there?").await {
                    break error.kind();
                }
                tokio::task::yield_now().await;
            }
        });
        assert_eq!(failed.await, io::ErrorKind::BrokenPipe);
    }
}

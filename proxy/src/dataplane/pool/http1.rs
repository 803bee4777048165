//! Kept-alive HTTP/1 connections: which of them may carry another request, and what a broken one proves.
//!
//! Sources: RFC 9110 9.2.2 (who may repeat a request that is not idempotent: only who knows that it was never applied),
//! RFC 9112 9.3 and 9.5 (a server may close an idle connection at any time), RFC 9293 3.10.7 (a FIN carries an
//! acknowledgement of everything that was received before it), tcp(7) (SIOCOUTQ).
//!
//! What is provable: a server's FIN acknowledges all that reached it before it closed. If no byte of a request was
//! acknowledged when the end of the stream is read, and its host then answers the request with a reset and still no
//! acknowledgement, the socket was gone when the request came: nobody read it. It did not happen and is sent again,
//! whatever its method. A reset without a FIN before it proves nothing, since a process that dies after its work sends
//! one too; neither does an end that comes after an acknowledgement, nor one of a server that only stopped writing. One thing
//! is assumed: that a server which stopped writing, and so can answer nothing more, does not read another request, carry it
//! out and reset the connection within the time for which its kernel delays acknowledgements.
//!
//! Invariants: a connection whose peer closed, or spoke out of turn, as far as this host knows carries no request; what
//! a connection proves is decided by the first thing that ended it and never revised.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Method;
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::idleness::Idleness;
use super::seats::{Seat, Seats};
use super::{AnswerLimits, HeadTooLarge, Key, SendError};
use crate::base::net::{BoxedIo, poll_write_pieces, socket};
use crate::base::sockopt::unacknowledged;
use crate::dataplane::http::answers::Answers;
use crate::dataplane::http::body::Body;
use crate::policy::limits::Limits;

/// All kept connections, and what is known of the servers at their other ends.
#[derive(Debug)]
pub(super) struct Singles {
    idle: Mutex<Idle>,
    seats: Mutex<BTreeMap<Key, Arc<Seats>>>,
    /// How many connections there may be to one address for one client.
    connections: AtomicU32,
    endpoints: Mutex<BTreeMap<SocketAddr, Arc<Mutex<Idleness>>>>,
}

/// Those that carry no request just now.
#[derive(Debug, Default)]
struct Idle {
    kept: BTreeMap<Key, Vec<Single>>,
    /// What answers may be. A connection is told when it is opened, and kept no longer than that holds.
    limits: AnswerLimits,
}

/// One connection, for one request at a time.
#[derive(Debug)]
pub(super) struct Single {
    pub(super) sender: SendRequest<Body>,
    pub(super) answers: Answers,
    watch: Watch,
    limits: AnswerLimits,
    seats: Arc<Seats>,
}

/// What happens on a connection, seen beside its codec. Clones are handles on one connection.
#[derive(Clone)]
pub(super) struct Watch {
    conn: Arc<Mutex<Conn>>,
    endpoint: Arc<Mutex<Idleness>>,
}

/// The stream under the codec, or of a tunnel. Dropping it closes the connection, whoever still has a [`Watch`], and its place is
/// another one's then.
pub(super) struct Watched {
    watch: Watch,
    _seat: Seat,
}

struct Conn {
    io: Option<BoxedIo>,
    turn: Turn,
    /// How it ended, once it did.
    ended: Option<Ended>,
    /// The end of the stream was read before the other host said what it did with the request.
    settling: Option<Settling>,
}

/// A wait for a reset or an acknowledgement.
struct Settling {
    until: Instant,
    next: Pin<Box<Sleep>>,
}

/// Whose turn it is to speak.
#[derive(Clone, Copy, Debug)]
enum Turn {
    /// Nobody's, since then.
    Idle(Instant),
    /// A request is under way.
    Busy {
        /// Bytes of it that the kernel took.
        written: u64,
        /// Something came back.
        heard: bool,
        /// How long the connection was idle before it; none for its first request.
        idle: Option<Duration>,
    },
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ended {
    /// Nobody read anything of the request that was under way.
    Unread,
    /// It cannot be known.
    Open,
}

impl Default for Singles {
    fn default() -> Self {
        let connections = AtomicU32::new(Limits::default().upstream_connections);
        Self { idle: Mutex::default(), seats: Mutex::default(), connections, endpoints: Mutex::default() }
    }
}

impl Singles {
    /// A connection that can carry a request of this method now. Those that rest are for those who wait, where anybody does.
    pub(super) fn take(&self, key: &Key, method: &Method) -> Option<Single> {
        let mut idle = self.idle.lock();
        let list = idle.kept.get_mut(key)?;
        if list.last().is_some_and(|single| single.seats.are_awaited()) {
            return None;
        }
        // The one that was used last is on top; what lies below it is older.
        while let Some(ready) = list.iter().rposition(|single| single.sender.is_ready()) {
            let single = list.remove(ready);
            if single.begin_again(method) {
                return Some(single);
            }
        }
        None
    }

    /// A connection for one who waited, whether it can carry a request already or not.
    pub(super) fn next(&self, key: &Key) -> Option<Single> {
        self.idle.lock().kept.get_mut(key)?.pop()
    }

    /// The places for connections that may share this key.
    pub(super) fn seats(&self, key: &Key) -> Arc<Seats> {
        Arc::clone(self.seats.lock().entry(key.clone()).or_default())
    }

    /// How many of them there are.
    pub(super) fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Keeps a connection for the next request.
    pub(super) fn put(&self, key: Key, single: Single) {
        if single.sender.is_closed() || !single.watch.rest() {
            return;
        }
        let mut idle = self.idle.lock();
        if single.limits != idle.limits {
            return;
        }
        let list = idle.kept.entry(key).or_default();
        if list.len() >= PER_KEY_MAX {
            list.retain(Single::usable);
        }
        if list.len() < PER_KEY_MAX {
            let seats = single.seats.are_awaited().then(|| Arc::clone(&single.seats));
            list.push(single);
            if let Some(seats) = seats {
                seats.ring();
            }
        }
    }

    /// Watches a connection that was just opened, for its first request.
    pub(super) fn watch(&self, address: SocketAddr, io: BoxedIo, seat: Seat) -> (Watched, Watch) {
        let endpoint = Arc::clone(self.endpoints.lock().entry(address).or_default());
        let turn = Turn::Busy { written: 0, heard: false, idle: None };
        let watch = Watch { conn: Arc::new(Mutex::new(Conn { io: Some(io), turn, ended: None, settling: None })), endpoint };
        (Watched { watch: watch.clone(), _seat: seat }, watch)
    }

    /// Closes what was idle for too long.
    pub(super) fn sweep(&self) {
        self.idle.lock().kept.retain(|_, list| {
            list.retain(Single::usable);
            !list.is_empty()
        });
        self.seats.lock().retain(|_, seats| Arc::strong_count(seats) > 1);
    }

    /// What answers may be from now on, and how many connections there may be. Connections that were told something else are let go
    /// of.
    pub(super) fn limit(&self, limits: AnswerLimits, connections: u32) {
        if self.connections.swap(connections, Ordering::Relaxed) < connections {
            // There is room for some of those who wait.
            self.seats.lock().values().for_each(|seats| seats.freed.notify_waiters());
        }
        let mut idle = self.idle.lock();
        if idle.limits != limits {
            *idle = Idle { kept: BTreeMap::new(), limits };
        }
    }

    /// What answers may be.
    pub(super) fn limits(&self) -> AnswerLimits {
        self.idle.lock().limits
    }

    /// Forgets connections that are not `kept`, and what was learned of endpoints that are not in `known`.
    pub(super) fn retain(&self, known: &BTreeSet<SocketAddr>, mut kept: impl FnMut(&Key) -> bool) {
        self.idle.lock().kept.retain(|key, _| kept(key));
        self.endpoints.lock().retain(|address, endpoint| known.contains(address) || Arc::strong_count(endpoint) > 1);
    }
}

impl Single {
    pub(super) fn new(
        sender: SendRequest<Body>,
        watch: Watch,
        answers: Answers,
        limits: AnswerLimits,
        seats: Arc<Seats>,
    ) -> Self {
        Self { sender, answers, watch, limits, seats }
    }

    /// Another request of this method begins; `false` if this connection must not carry it.
    pub(super) fn begin_again(&self, method: &Method) -> bool {
        self.watch.begin_again(method)
    }

    /// What a request came to that may have been processed.
    pub(super) fn failed(&self, error: hyper::Error) -> SendError {
        if error.is_parse_too_large() {
            HeadTooLarge::Http1(self.limits).into()
        } else if error.is_parse() {
            SendError::Malformed(error.into())
        } else {
            SendError::Broken(error.into())
        }
    }

    /// Learns from an answer.
    pub(super) fn answered(&self, headers: &http::HeaderMap) {
        if let Some(field) = headers.get("keep-alive") {
            self.watch.endpoint.lock().told(field.as_bytes());
        }
    }

    /// Is it proven that nobody read anything of the request that broke off?
    pub(super) fn unread(&self) -> bool {
        self.watch.conn.lock().ended == Some(Ended::Unread)
    }

    /// Had it carried a request before this one?
    pub(super) fn reused(&self) -> bool {
        matches!(self.watch.conn.lock().turn, Turn::Busy { idle: Some(_), .. })
    }

    fn usable(&self) -> bool {
        !self.sender.is_closed() && self.watch.fresh()
    }
}

impl Watch {
    /// Has it been idle for no longer than its server may be trusted to keep it?
    fn fresh(&self) -> bool {
        let now = Instant::now();
        let conn = self.conn.lock();
        match conn.turn {
            Turn::Idle(since) => conn.ended.is_none() && now.saturating_duration_since(since) < self.endpoint.lock().bound(now),
            Turn::Busy { .. } => false,
        }
    }

    /// Another request begins; `false` if this connection must not carry it.
    fn begin_again(&self, method: &Method) -> bool {
        let now = Instant::now();
        let mut conn = self.conn.lock();
        let Turn::Idle(since) = conn.turn else { return false };
        let idle = now.saturating_duration_since(since);
        let bound = self.endpoint.lock().bound(now);
        // What may be done once only takes no risk with a server that closes as soon as a busy machine schedules.
        if conn.ended.is_some() || idle >= bound || (bound < HASTY && !method.is_idempotent()) {
            return false;
        }
        // The codec is told of a FIN when its task runs. The event loop knows it from its last round on, and the kernel at once;
        // but to ask the kernel is a system call, which a connection is not worth that was used just now.
        let closed = conn.io.as_ref().is_none_or(if idle < PEEK_AFTER { told } else { spoke });
        if closed {
            conn.ended = Some(Ended::Open);
            self.endpoint.lock().closed(idle, now);
            return false;
        }
        conn.turn = Turn::Busy { written: 0, heard: false, idle: Some(idle) };
        true
    }

    /// The request is through; `false` if the connection is.
    fn rest(&self) -> bool {
        let mut conn = self.conn.lock();
        conn.turn = Turn::Idle(Instant::now());
        conn.ended.is_none() && conn.io.is_some()
    }
}

impl Conn {
    /// The stream ended, or broke: what does that prove?
    fn end(&mut self, endpoint: &Mutex<Idleness>, in_order: bool) {
        if self.ended.is_some() {
            return;
        }
        let now = Instant::now();
        match self.turn {
            Turn::Idle(since) => {
                endpoint.lock().closed(now.saturating_duration_since(since), now);
                self.ended = Some(Ended::Open);
            }
            Turn::Busy { written, heard, idle } => {
                if let Some(idle) = idle
                    && !heard
                {
                    endpoint.lock().closed(idle, now);
                }
                let unread = in_order && !heard && (written == 0 || self.answered(written) == Some(false));
                self.ended = Some(if unread { Ended::Unread } else { Ended::Open });
            }
        }
    }
}

impl Conn {
    /// Did the other host take anything of a request of `written` bytes? `None` while it has not said so.
    fn answered(&self, written: u64) -> Option<bool> {
        let Some(socket) = self.io.as_ref().and_then(socket) else { return Some(true) };
        // The order matters: a reset is the last word, so what is not acknowledged after it never will be.
        let reset = socket.peer_addr().is_err();
        match unacknowledged(socket) {
            Ok(left) if left >= written => reset.then_some(false),
            Ok(_) | Err(_) => Some(true),
        }
    }

    /// Waits, at the end of the stream, until the other host has said what it did with the request.
    fn poll_settled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Turn::Busy { written, heard: false, .. } = self.turn else { return Poll::Ready(()) };
        if written == 0 || self.ended.is_some() {
            return Poll::Ready(());
        }
        loop {
            if self.answered(written).is_some() {
                return Poll::Ready(());
            }
            let settling = self
                .settling
                .get_or_insert_with(|| Settling { until: Instant::now() + SETTLE_MAX, next: Box::pin(sleep(SETTLE_STEP)) });
            std::task::ready!(settling.next.as_mut().poll(cx));
            let now = Instant::now();
            if now >= settling.until {
                return Poll::Ready(());
            }
            settling.next.as_mut().reset(now + SETTLE_STEP);
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Watch { conn, endpoint } = &self.watch;
        let mut conn = conn.lock();
        let Some(io) = &mut conn.io else { return Poll::Ready(Ok(())) };
        let before = buf.filled().len();
        let polled = std::task::ready!(Pin::new(io).poll_read(cx, buf));
        match &polled {
            Ok(()) if buf.filled().len() > before => {
                if let Turn::Busy { heard, .. } = &mut conn.turn {
                    *heard = true;
                }
            }
            Ok(()) => {
                std::task::ready!(conn.poll_settled(cx));
                conn.end(endpoint, buf.remaining() > 0);
            }
            Err(_) => conn.end(endpoint, false),
        }
        Poll::Ready(polled)
    }
}

impl Watched {
    fn poll_with(
        &self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut BoxedIo>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let Watch { conn, endpoint } = &self.watch;
        let mut conn = conn.lock();
        let Some(io) = &mut conn.io else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        let polled = std::task::ready!(write(Pin::new(io), cx));
        match &polled {
            Ok(count) => {
                if let Turn::Busy { written, .. } = &mut conn.turn {
                    *written = written.saturating_add(u64::try_from(*count).unwrap_or(u64::MAX));
                }
            }
            // EPIPE: a reset came after the server's FIN (tcp_reset of the kernel tells the two apart), so its FIN counts.
            Err(error) => {
                let in_order = error.kind() == io::ErrorKind::BrokenPipe;
                conn.end(endpoint, in_order);
            }
        }
        Poll::Ready(polled)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |io, cx| io.poll_write(cx, buf))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |io, cx| poll_write_pieces(io, cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.watch.conn.lock().io.as_ref().is_some_and(|io| io.is_write_vectored())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.watch.conn.lock().io {
            Some(io) => Pin::new(io).poll_flush(cx),
            None => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.watch.conn.lock().io {
            Some(io) => Pin::new(io).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut conn = self.watch.conn.lock();
        let io = conn.io.take();
        let unheard = conn.ended.is_none() && matches!(conn.turn, Turn::Busy { heard: false, .. });
        drop(conn);
        // A request was given up. Who closes first waits for what is still on its way (TIME-WAIT, RFC 9293 3.6.1), a minute on
        // Linux, and keeps the port: at some hundreds a second there is none left, and the kernel looks through all of them for
        // each further connection. A reset leaves nothing behind, and tells the application as well.
        if unheard
            && let Some(socket) = io.as_ref().and_then(socket)
            && let Err(error) = socket.set_zero_linger()
        {
            tracing::debug!(%error, "a port is kept for a request that was given up");
        }
        drop(io);
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let conn = self.conn.lock();
        f.debug_struct("Watch").field("turn", &conn.turn).field("ended", &conn.ended).finish_non_exhaustive()
    }
}

/// Did the other side close, or say something, while it was nobody's turn?
fn spoke(io: &BoxedIo) -> bool {
    socket(io).is_some_and(|socket| !matches!(peek(socket), Err(Errno::AGAIN | Errno::INTR)))
}

/// The same, asked of the event loop: no system call unless it saw something.
fn told(io: &BoxedIo) -> bool {
    let Some(socket) = socket(io) else { return false };
    let seen = socket.try_io(Interest::READABLE, || Ok(peek(socket)?));
    !seen.is_err_and(|error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted))
}

fn peek(socket: &TcpStream) -> Result<usize, Errno> {
    let mut byte = [0_u8];
    rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT).map(|(count, _)| count)
}

/// Connections kept for one client of the application.
const PER_KEY_MAX: usize = 128;
/// How long another host's reset or acknowledgement is waited for: longer than acknowledgements are delayed (40 ms).
const SETTLE_MAX: Duration = Duration::from_millis(60);
const SETTLE_STEP: Duration = Duration::from_millis(1);
/// From this idleness on, the kernel is asked before a connection is used again, and before it the event loop. Where many
/// connections are busy, a turn of each comes round sooner.
const PEEK_AFTER: Duration = Duration::from_millis(20);
/// Where connections must be used again sooner than this, a request that waits for its turn on the processor crosses their
/// end: it was asked for in time and is sent too late. The server's kernel may take it before the server closes, unread,
/// and then nothing tells that nobody read it (RFC 9110 9.2.2).
const HASTY: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::fd::AsFd as _;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    fn seat() -> Seat {
        Arc::<Seats>::default().take(1).unwrap()
    }

    /// A watched connection that has carried one exchange, its server's end, and what was learned of the server.
    async fn used() -> (Watched, Watch, TcpStream) {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = server.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), server.accept());
        let (mut near, watch) = Singles::default().watch(address, Box::new(near.unwrap()), seat());
        let mut far = far.unwrap().0;
        near.write_all(b"first").await.unwrap();
        far.read_exact(&mut [0; 5]).await.unwrap();
        far.write_all(b"ok").await.unwrap();
        near.read_exact(&mut [0; 2]).await.unwrap();
        assert!(watch.rest());
        (near, watch, far)
    }

    fn ended(watch: &Watch) -> Option<Ended> {
        watch.conn.lock().ended
    }

    /// The watched end sends a request, and reads until there is no more.
    async fn fails(near: &mut Watched) {
        if near.write_all(b"second").await.is_ok() {
            drop(near.read_to_end(&mut Vec::new()).await);
        }
    }

    #[tokio::test]
    async fn a_request_that_crosses_the_servers_end_was_read_by_nobody() {
        let (mut near, watch, far) = used().await;
        assert!(watch.begin_again(&Method::GET));
        drop(far);
        fails(&mut near).await;
        assert_eq!(ended(&watch), Some(Ended::Unread));
    }

    #[tokio::test]
    async fn so_it_is_if_the_reset_is_there_before_the_end_is_read() {
        let (mut near, watch, far) = used().await;
        assert!(watch.begin_again(&Method::GET));
        drop(far);
        near.write_all(b"head").await.unwrap();
        // Written after the server's reset, which answers the first part.
        while watch.conn.lock().io.as_ref().and_then(socket).unwrap().peer_addr().is_ok() {
            sleep(SETTLE_STEP).await;
        }
        assert_eq!(near.write_all(b"body").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(ended(&watch), Some(Ended::Unread));
    }

    #[tokio::test]
    async fn a_request_that_is_given_up_unheard_resets_its_connection_and_keeps_no_port() {
        for heard in [false, true] {
            let (mut near, watch, mut far) = used().await;
            assert!(watch.begin_again(&Method::GET));
            near.write_all(b"second").await.unwrap();
            far.read_exact(&mut [0; 6]).await.unwrap();
            if heard {
                far.write_all(b"ok").await.unwrap();
                near.read_exact(&mut [0; 2]).await.unwrap();
            }
            drop(near);
            let end = far.read(&mut [0; 1]).await.map_err(|error| error.kind());
            assert_eq!(end, if heard { Ok(0) } else { Err(io::ErrorKind::ConnectionReset) });
        }
        let (near, watch, mut far) = used().await;
        assert!(watch.fresh());
        drop(near);
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0, "one that rests ends in order");
    }

    #[tokio::test]
    async fn a_request_that_was_read_proves_nothing() {
        for reset in [false, true] {
            let (mut near, watch, mut far) = used().await;
            assert!(watch.begin_again(&Method::GET));
            near.write_all(b"second").await.unwrap();
            far.read_exact(&mut [0; 6]).await.unwrap();
            if reset {
                far.set_zero_linger().unwrap();
            }
            drop(far);
            drop(near.read_to_end(&mut Vec::new()).await);
            assert_eq!(ended(&watch), Some(Ended::Open), "reset: {reset}");
            // What is read or written after the end changes nothing.
            drop(near.read(&mut [0; 1]).await);
            fails(&mut near).await;
            assert_eq!(ended(&watch), Some(Ended::Open), "reset: {reset}");
        }
    }

    #[tokio::test]
    async fn a_request_that_reached_the_servers_kernel_proves_nothing() {
        let (mut near, watch, far) = used().await;
        assert!(watch.begin_again(&Method::GET));
        near.write_all(b"second").await.unwrap();
        far.peek(&mut [0]).await.unwrap();
        drop(far);
        drop(near.read_to_end(&mut Vec::new()).await);
        assert_eq!(ended(&watch), Some(Ended::Open));
    }

    #[tokio::test]
    async fn an_answer_that_began_proves_nothing() {
        let (mut near, watch, mut far) = used().await;
        assert!(watch.begin_again(&Method::GET));
        far.write_all(b"HTTP/1.1 4").await.unwrap();
        drop(far);
        fails(&mut near).await;
        assert_eq!(ended(&watch), Some(Ended::Open));
    }

    #[tokio::test]
    async fn a_server_that_only_stops_writing_may_read_on() {
        let (mut near, watch, mut far) = used().await;
        assert!(watch.begin_again(&Method::GET));
        far.shutdown().await.unwrap();
        near.write_all(b"second").await.unwrap();
        far.peek(&mut [0]).await.unwrap();
        drop(near.read_to_end(&mut Vec::new()).await);
        assert_eq!(ended(&watch), Some(Ended::Open));
    }

    #[tokio::test]
    async fn a_connection_that_was_used_just_now_is_known_to_be_closed_once_the_event_loop_knows() {
        for speaks in [false, true] {
            let (_near, watch, mut far) = used().await;
            if speaks {
                far.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
            }
            drop(far);
            // A round of the event loop, in which nothing polls the stream.
            sleep(Duration::from_millis(2)).await;
            watch.conn.lock().turn = Turn::Idle(Instant::now());
            assert!(!watch.begin_again(&Method::GET), "speaks: {speaks}");
        }
    }

    #[tokio::test]
    async fn a_closed_connection_is_known_before_the_codec_hears_of_it() {
        for speaks in [false, true] {
            let (_near, watch, mut far) = used().await;
            if speaks {
                far.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
            }
            drop(far);
            // The kernel has a moment, and nothing polls the stream in between, nor does the event loop have a round.
            std::thread::sleep(Duration::from_millis(2));
            watch.conn.lock().turn = Turn::Idle(Instant::now().checked_sub(PEEK_AFTER).unwrap());
            assert!(!watch.begin_again(&Method::GET), "speaks: {speaks}");
            let bound = watch.endpoint.lock().bound(Instant::now());
            assert!(bound < PEEK_AFTER, "that it closes so soon was learned: {bound:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_used_within_its_servers_bound_only() {
        for (field, idle, expected) in
            [("timeout=60", 14_000, true), ("timeout=60", 15_000, false), ("timeout=5", 3_999, true), ("timeout=5", 4_000, false)]
        {
            let (near, _far) = tokio::io::duplex(64);
            let (_near, watch) = Singles::default().watch("192.0.2.1:80".parse().unwrap(), Box::new(near), seat());
            watch.endpoint.lock().told(field.as_bytes());
            assert!(watch.rest());
            tokio::time::advance(Duration::from_millis(idle)).await;
            assert_eq!((watch.fresh(), watch.begin_again(&Method::GET)), (expected, expected), "{field}, {idle} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_be_done_once_only_is_not_sent_where_connections_end_at_once() {
        for (closed_after, method, expected) in [
            (1, Method::GET, true),
            (1, Method::PUT, true),
            (1, Method::POST, false),
            (1, Method::PATCH, false),
            (19, Method::POST, false),
            (20, Method::POST, true),
        ] {
            let (near, _far) = tokio::io::duplex(64);
            let (_near, watch) = Singles::default().watch("192.0.2.1:80".parse().unwrap(), Box::new(near), seat());
            watch.endpoint.lock().closed(Duration::from_millis(closed_after), Instant::now());
            assert!(watch.rest());
            assert_eq!(watch.begin_again(&method), expected, "{method}, closed after {closed_after} ms");
        }
    }

    #[tokio::test]
    async fn what_is_not_acknowledged_is_told_by_the_kernel() {
        let (near, _watch, far) = used().await;
        let watched = near.watch.conn.lock();
        let near = watched.io.as_ref().and_then(socket).unwrap();
        assert_eq!(unacknowledged(&near.as_fd()).unwrap(), 0);
        drop(far);
        near.try_write(b"lost").unwrap();
        assert_eq!(unacknowledged(&near.as_fd()).unwrap(), 4);
    }
}

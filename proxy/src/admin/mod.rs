//! What a process tells whoever operates it, on a thread of its own: an operator gets answers from a process whose
//! workers are busy or stuck.
//!
//! Three doors, each with more behind it: what the network may see (`/metrics`, `/ready`), what whoever shares the loopback
//! interface may see (`/snapshot`, `/log`), and what an operator may change (`POST /log`, `POST /drain`).
//! The last one is a Unix socket, for a pod's application shares its sidecar's loopback interface: the kernel says who calls
//! (unix(7), `SO_PEERCRED`), and only root and the process's own user are let in. Every role uses this room.
//!
//! Invariant: connections and the time that each may take are bounded, and who asks nothing makes room for who does, so that a
//! scraper that hangs costs nothing and nobody keeps the kubelet out.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::response::Response;
use axum::{Extension, Router};
use http::header::CONNECTION;
use http::{HeaderValue, Request, Version};
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::base::places::Places;
use crate::base::room::{Room, Work};

pub(crate) mod routes;

/// Serves until it is dropped.
#[derive(Debug)]
pub(crate) struct Admin {
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Where people and programs come in.
#[derive(Debug)]
pub(crate) enum Door {
    /// For whoever reaches the address.
    Address(TcpListener),
    /// For root and the own user.
    Operator(UnixListener),
}

/// Who asks, as an extension of each request that comes over the network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller(pub(crate) SocketAddr);

/// Why the doors do not open. Always the environment's fault.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    #[error("cannot listen on {address} for operators")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("cannot listen at {} for operators", path.display())]
    Socket {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the operators' thread")]
    Start(#[source] io::Error),
}

impl AdminError {
    /// Does the kernel say that the port is not for this process?
    pub(crate) fn is_denied(&self) -> bool {
        matches!(self, Self::Listen { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

impl Admin {
    /// Serves each listener's routes, on one thread.
    ///
    /// # Errors
    /// The thread or its runtime cannot be started.
    pub(crate) fn start(doors: Vec<(Door, Router)>) -> Result<Self, AdminError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AdminError::Start)?;
        let doors = {
            let _inside = runtime.enter();
            doors
                .into_iter()
                .map(|(door, routes)| {
                    let door = match door {
                        Door::Address(listener) => Listening::Address(tokio::net::TcpListener::from_std(listener)?),
                        Door::Operator(listener) => Listening::Operator(tokio::net::UnixListener::from_std(listener)?),
                    };
                    Ok((door, routes))
                })
                .collect::<Result<Vec<_>, io::Error>>()
                .map_err(AdminError::Start)?
        };
        let (stop, stopped) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("admin".to_owned())
            .spawn(move || runtime.block_on(serve_all(doors, stopped)))
            .map_err(AdminError::Start)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        // A panic there was already told by the panic hook.
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {}
    }
}

/// Listens; `[::]` takes IPv4 too, and falls back to `0.0.0.0` where there is no IPv6.
///
/// # Errors
/// The address is taken or not ours.
pub(crate) fn listen(address: SocketAddr) -> Result<TcpListener, AdminError> {
    let open = |address: SocketAddr| -> io::Result<TcpListener> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(address.ip() != Ipv6Addr::UNSPECIFIED)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    let opened = match open(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && no_ipv6(&error) => {
            open(SocketAddr::from(([0, 0, 0, 0], address.port())))
        }
        other => other,
    };
    opened.map_err(|source| AdminError::Listen { address, source })
}

/// Listens at a path, in place of what an earlier life left there. Only root and the own user are let in.
///
/// # Errors
/// The folder is missing or not writable, or the path is too long for a socket.
pub(crate) fn listen_operator(path: &Path) -> Result<UnixListener, AdminError> {
    let open = || {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _gone => {}
        }
        let listener = UnixListener::bind(path)?;
        // So that others are told at once. It is not what keeps them out: they might come before it.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    open().map_err(|source| AdminError::Socket { path: path.to_owned(), source })
}

fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// Serves one listener until the future is dropped. For doors on a runtime that exists already.
pub(crate) async fn serve(listener: tokio::net::TcpListener, routes: Router) {
    serve_from(listener, routes).await;
}

/// A listener as the runtime of the caller has it.
///
/// # Errors
/// The runtime does not take it.
pub(crate) fn on_this_runtime(listener: TcpListener, address: SocketAddr) -> Result<tokio::net::TcpListener, AdminError> {
    tokio::net::TcpListener::from_std(listener).map_err(|source| AdminError::Listen { address, source })
}

/// Serves one listener over TLS, HTTP/1.1 and HTTP/2, until the future is dropped. Its caller comes from few addresses, so each may hold
/// as many connections as there is room for, and who asks nothing makes room. Once `stop` is told, callers are still answered
/// and asked to go elsewhere.
pub(crate) async fn serve_tls(
    listener: tokio::net::TcpListener,
    config: Arc<rustls::ServerConfig>,
    routes: Router,
    stop: watch::Receiver<bool>,
) {
    let mut room = Room::new(TLS_CONNECTIONS_MAX);
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _peer)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if !room.make() {
            tracing::debug!("a connection too many was closed");
            continue;
        }
        let (acceptor, work) = (TlsAcceptor::from(Arc::clone(&config)), Work::new());
        let (routes, at_work, stop) = (routes.clone(), work.clone(), stop.clone());
        let task = connections.spawn(async move {
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_AT_MOST, acceptor.accept(stream)).await else { return };
            let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            if let Err(error) = serve_kept(stream, is_http2, routes, at_work, stop).await {
                tracing::debug!(error, "connection ended");
            }
        });
        room.add(task, work);
    }
}

/// Serves a connection that its caller keeps, until it is old or all are to end. Then the caller is told before it is closed: over
/// HTTP/2 at once, over HTTP/1.1 with the next answer, for there a question may be under way that nobody would ask again.
async fn serve_kept(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    is_http2: bool,
    routes: Router,
    work: Work,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_AT_MOST).max_headers(64).max_buf_size(BUFFER_MAX);
    let mut http2 = server.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(IDLE_AT_MOST).max_concurrent_streams(STREAMS_MAX);
    http2.initial_connection_window_size(WINDOW).initial_stream_window_size(WINDOW);
    let leaving = Arc::new(AtomicBool::new(false));
    let service = at_work(routes, work, Arc::clone(&leaving));
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
    // It shall be answered once, too.
    let is_late = *stop.borrow();
    // Cancel-safe: the one connection goes on.
    tokio::select! {
        ended = connection.as_mut() => return ended,
        // An error means that the one who tells is gone, which is the same news.
        _told = stop.wait_for(|stop| *stop) => {}
        () = tokio::time::sleep(CONNECTION_AT_MOST) => {}
    }
    leaving.store(true, Ordering::Relaxed);
    if (is_late || !is_http2)
        && let Ok(ended) = tokio::time::timeout(TOLD_WITHIN, connection.as_mut()).await
    {
        return ended;
    }
    connection.as_mut().graceful_shutdown();
    tokio::time::timeout(ANSWERED_WITHIN, connection).await.unwrap_or(Ok(()))
}

/// A door that stands open.
enum Listening {
    Address(tokio::net::TcpListener),
    Operator(tokio::net::UnixListener),
}

/// Where connections come from.
trait Accept: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection; none if its caller may not come in. Cancel-safe.
    fn next(&self) -> impl Future<Output = io::Result<Option<Self::Stream>>> + Send;

    /// Who is at the other end, if it is a place in the network.
    fn caller(stream: &Self::Stream) -> Option<SocketAddr>;
}

impl Accept for tokio::net::TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn next(&self) -> io::Result<Option<Self::Stream>> {
        self.accept().await.map(|(stream, _peer)| Some(stream))
    }

    fn caller(stream: &Self::Stream) -> Option<SocketAddr> {
        // One listener takes both families, and shows IPv4 in its mapped form.
        stream.peer_addr().ok().map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()))
    }
}

impl Accept for tokio::net::UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn next(&self) -> io::Result<Option<Self::Stream>> {
        let (stream, _unnamed) = self.accept().await?;
        let caller = stream.peer_cred()?.uid();
        if caller == 0 || caller == rustix::process::geteuid().as_raw() {
            return Ok(Some(stream));
        }
        tracing::warn!(user = caller, "somebody else's connection to the operator's socket was closed");
        Ok(None)
    }

    fn caller(_stream: &Self::Stream) -> Option<SocketAddr> {
        None
    }
}

async fn serve_from<A: Accept>(listener: A, routes: Router) {
    let mut room = Room::new(CONNECTIONS_MAX);
    // Of each address of the network.
    let places: Arc<Places<IpAddr>> = Places::new(CONNECTIONS_OF_ONE_MAX);
    let mut connections = JoinSet::new();
    loop {
        // Connections that ended are taken out of the set as new ones come.
        while connections.try_join_next().is_some() {}
        let stream = match listener.next().await {
            Ok(Some(stream)) => stream,
            Ok(None) => continue,
            Err(error) => {
                // Out of descriptors, most likely: trying again at once would spin.
                tracing::warn!(%error, "cannot accept an operator's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let mut routes = routes.clone();
        let mut place = None;
        if let Some(caller) = A::caller(&stream) {
            // Who holds too many is let go of, so that the kubelet and others always find room.
            place = places.take(caller.ip());
            if place.is_none() {
                tracing::debug!(%caller, "a caller's connection too many was closed");
                continue;
            }
            routes = routes.layer(Extension(Caller(caller)));
        }
        if !room.make() {
            tracing::debug!("an operator's connection too many was closed");
            continue;
        }
        let work = Work::new();
        let service = at_work(routes, work.clone(), Arc::default());
        let task = connections.spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(IDLE_AT_MOST)
                .max_headers(64)
                .serve_connection(TokioIo::new(stream), service);
            // What a scraper does wrong is its own affair; the connection ends.
            if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_AT_MOST, connection).await {
                tracing::debug!(%error, "operator's connection ended");
            }
            drop(place);
        });
        room.add(task, work);
    }
}

/// Answers by `routes`, and has `work` know while it does. Once it is `leaving`, an answer is the last one of its connection.
fn at_work(
    routes: Router,
    work: Work,
    leaving: Arc<AtomicBool>,
) -> impl Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send + 'static> + Send + 'static {
    let service = TowerToHyperService::new(routes);
    service_fn(move |request: Request<Incoming>| {
        let is_http1 = request.version() < Version::HTTP_2;
        let (answering, answer, leaving) = (work.begin(), service.call(request), Arc::clone(&leaving));
        async move {
            let mut answer = answer.await;
            drop(answering);
            if let Ok(answer) = &mut answer
                && is_http1
                && leaving.load(Ordering::Relaxed)
            {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            answer
        }
    })
}

async fn serve_all(doors: Vec<(Listening, Router)>, mut stopped: watch::Receiver<bool>) {
    let mut serving = JoinSet::new();
    for (door, routes) in doors {
        match door {
            Listening::Address(listener) => serving.spawn(serve_from(listener, routes)),
            Listening::Operator(listener) => serving.spawn(serve_from(listener, routes)),
        };
    }
    // An error means that the owner is gone, which is the same news; dropping the set ends the rest.
    if stopped.wait_for(|stop| *stop).await.is_err() {}
}

const BACKLOG: i32 = 128;
/// Connections of one door at a time; then who is silent the longest makes room for the next.
const CONNECTIONS_MAX: usize = 256;
/// Connections of one address of the network at a time; the next is closed.
const CONNECTIONS_OF_ONE_MAX: usize = 64;
/// How long a connection may be silent before its next request head is complete.
const IDLE_AT_MOST: Duration = Duration::from_secs(65);
/// How long a connection may live: a reader that never reads gives its place back.
const CONNECTION_AT_MOST: Duration = Duration::from_secs(3_600);
/// Connections over TLS at a time; then it is the same.
const TLS_CONNECTIONS_MAX: usize = 512;
/// Requests at a time of one such connection over HTTP/2.
const STREAMS_MAX: u32 = 256;
/// What of such a connection stands in memory before it is read.
const BUFFER_MAX: usize = 64 << 10;
const WINDOW: u32 = 256 << 10;
const HANDSHAKE_AT_MOST: Duration = Duration::from_secs(5);
/// For how long an HTTP/1.1 connection that shall end waits for a question, with whose answer its caller is told.
const TOLD_WITHIN: Duration = Duration::from_secs(3);
/// What is being answered then has this long. Longer than the API server waits for a webhook at most.
const ANSWERED_WITHIN: Duration = Duration::from_secs(31);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::net::{TcpSocket, TcpStream};
    use tokio::time::Instant;

    use super::*;

    /// A connection from a place of its own at loopback.
    async fn from(place: u8, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 1, place), 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    #[tokio::test]
    async fn silent_connections_of_many_places_keep_nobody_out() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Router::new().route("/ready", get(|| async { "ready" }))));
        let mut silent = Vec::new();
        for place in 1..=5 {
            for _ in 0..CONNECTIONS_OF_ONE_MAX {
                silent.push(from(place, at).await);
            }
        }
        let asked = async {
            let mut kubelet = from(200, at).await;
            kubelet.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            kubelet.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = tokio::time::timeout(Duration::from_secs(5), asked).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ready"), "{answer}");
        let read = tokio::time::timeout(Duration::from_secs(5), silent[0].read(&mut [0])).await;
        assert_eq!(read.unwrap().unwrap_or(0), 0, "the oldest made room");
    }

    /// How long an answer takes.
    const ANSWER: Duration = Duration::from_millis(100);

    /// A caller's end of a kept connection to a door that answers `ready`, and what tells it to stop.
    fn kept(is_http2: bool) -> (DuplexStream, watch::Sender<bool>, JoinSet<bool>) {
        let (caller, door) = tokio::io::duplex(4096);
        let (stop, stopped) = watch::channel(false);
        let ready = async || {
            tokio::time::sleep(ANSWER).await;
            "ready"
        };
        let routes = Router::new().route("/ready", get(ready));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { serve_kept(door, is_http2, routes, Work::new(), stopped).await.is_ok() });
        (caller, stop, tasks)
    }

    async fn asked(caller: &mut DuplexStream) -> String {
        caller.write_all(b"GET /ready HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"ready") {
            assert_ne!(caller.read_buf(&mut answer).await.unwrap(), 0);
        }
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_keeps_a_connection_is_told_with_an_answer_that_it_ends() {
        let (mut caller, stop, mut tasks) = kept(false);
        assert!(!asked(&mut caller).await.contains("connection: close"));
        stop.send_replace(true);
        tokio::time::sleep(TOLD_WITHIN / 2).await;
        let answer = asked(&mut caller).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("connection: close\r\n"), "{answer}");
        assert_eq!(caller.read(&mut [0]).await.unwrap(), 0);
        assert!(tasks.join_next().await.unwrap().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_asks_no_more_is_let_go_of_at_a_stop_and_after_an_hour() {
        for is_stopped in [true, false] {
            let (mut caller, stop, _tasks) = kept(false);
            let begun = Instant::now();
            let mut span = TOLD_WITHIN;
            if is_stopped {
                asked(&mut caller).await;
                stop.send_replace(true);
            } else {
                // One that asks now and then, and not after the hour.
                while begun.elapsed() + IDLE_AT_MOST < CONNECTION_AT_MOST {
                    assert!(!asked(&mut caller).await.contains("connection: close"));
                    tokio::time::sleep(IDLE_AT_MOST / 2).await;
                }
                asked(&mut caller).await;
                span += CONNECTION_AT_MOST;
            }
            assert_eq!(caller.read(&mut [0]).await.unwrap(), 0);
            assert!(begun.elapsed() >= span && begun.elapsed() < span + Duration::from_secs(1), "{:?}", begun.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn over_http2_a_caller_is_told_at_once_and_what_it_asked_is_answered() {
        let (caller, stop, mut tasks) = kept(true);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(caller)).await.unwrap();
        tokio::spawn(connection);
        let ask = || Request::get("http://a/ready").body(axum::body::Body::empty()).unwrap();
        assert_eq!(sender.send_request(ask()).await.unwrap().status(), 200);
        let begun = Instant::now();
        let under_way = sender.send_request(ask());
        let stopped = async {
            tokio::time::sleep(ANSWER / 2).await;
            stop.send_replace(true);
            tokio::time::sleep(ANSWER / 4).await;
        };
        let mut late = sender.clone();
        let (answered, late) = tokio::join!(under_way, async move {
            stopped.await;
            late.send_request(ask()).await
        });
        assert_eq!(answered.unwrap().status(), 200);
        assert!(late.unwrap_err().is_canceled(), "who asks by hyper's client is told that it was not asked");
        assert!(tasks.join_next().await.unwrap().unwrap() && begun.elapsed() < TOLD_WITHIN);
    }
}

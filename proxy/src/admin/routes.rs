//! What the doors answer: paths, methods and forms are the same for every role.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::Value;

use crate::telemetry::log;

/// What a role can tell. What it leaves out is answered with 404. No method may block: they run on the operators' thread.
pub(crate) trait Inspect: Send + Sync + 'static {
    /// The text that Prometheus reads.
    fn metrics(&self) -> String;

    /// May traffic come? Otherwise, what is missing: one cause a line.
    fn ready(&self) -> Result<(), String>;

    /// The configuration in force: its resources, and the problems of those that were refused.
    fn snapshot(&self) -> Option<Value> {
        None
    }

    /// Finish what is under way and stop; `false` where this role has nothing to drain.
    fn drain(&self) -> bool {
        false
    }
}

/// The read-only door: `/metrics` and `/ready`.
pub(crate) fn public(process: Arc<dyn Inspect>) -> Router {
    Router::new().route("/metrics", get(metrics)).route("/ready", get(ready)).with_state(process)
}

/// The door on the loopback interface, which a pod's application shares: all there is to see, and nothing to change.
pub(crate) fn loopback(process: Arc<dyn Inspect>) -> Router {
    let changed_elsewhere =
        async || (StatusCode::FORBIDDEN, "changes are asked for at the socket operator.sock in the state folder, as root\n");
    Router::new()
        .route("/metrics", get(metrics))
        .route("/ready", get(ready))
        .route("/snapshot", get(snapshot))
        .route("/log", get(show_log).post(changed_elsewhere))
        .route("/drain", post(changed_elsewhere))
        .with_state(process)
}

/// The operator's door, which also changes things.
pub(crate) fn operator(process: Arc<dyn Inspect>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/ready", get(ready))
        .route("/snapshot", get(snapshot))
        .route("/log", get(show_log).post(set_log))
        .route("/drain", post(drain))
        .with_state(process)
}

/// The operator's socket, in the state folder.
pub(crate) const OPERATOR_SOCKET: &str = "operator.sock";

#[derive(Deserialize)]
struct LogQuery {
    level: Option<String>,
}

async fn metrics(State(process): State<Arc<dyn Inspect>>) -> Response {
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], process.metrics()).into_response()
}

async fn ready(State(process): State<Arc<dyn Inspect>>) -> Response {
    match process.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, missing + "\n").into_response(),
    }
}

async fn snapshot(State(process): State<Arc<dyn Inspect>>) -> Response {
    json(process.snapshot())
}

async fn show_log() -> String {
    log::filter() + "\n"
}

async fn set_log(Query(query): Query<LogQuery>) -> Response {
    let Some(level) = query.level else {
        return (StatusCode::BAD_REQUEST, "which level? POST /log?level=debug\n").into_response();
    };
    match log::set_filter(&level) {
        Ok(()) => {
            tracing::info!(filter = %level, "log filter changed");
            (log::filter() + "\n").into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

async fn drain(State(process): State<Arc<dyn Inspect>>) -> Response {
    if process.drain() {
        (StatusCode::ACCEPTED, "draining\n").into_response()
    } else {
        (StatusCode::NOT_FOUND, "nothing to drain here\n").into_response()
    }
}

fn json(value: Option<Value>) -> Response {
    match value {
        Some(value) => axum::Json(value).into_response(),
        None => (StatusCode::NOT_FOUND, "this process has nothing of that\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::admin::{Admin, Door, listen, listen_operator};

    #[derive(Default)]
    struct Halfway(AtomicBool);

    impl Inspect for Halfway {
        fn metrics(&self) -> String {
            "outrigger_up 1\n".to_owned()
        }

        fn ready(&self) -> Result<(), String> {
            Err("no certificate yet".to_owned())
        }

        fn drain(&self) -> bool {
            self.0.store(true, Ordering::Relaxed);
            true
        }
    }

    fn ask(address: std::net::SocketAddr, method: &str, path: &str) -> String {
        exchange(TcpStream::connect(address).unwrap(), method, path)
    }

    fn exchange(mut stream: impl std::io::Read + std::io::Write, method: &str, path: &str) -> String {
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn the_network_gets_metrics_and_readiness_and_nothing_else() {
        let process: Arc<dyn Inspect> = Arc::new(Halfway::default());
        let doors = [public(Arc::clone(&process)), loopback(process)].map(|routes| {
            let listener = listen("[::]:0".parse().unwrap()).unwrap();
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
            (address, (Door::Address(listener), routes))
        });
        let [(network, first), (own, second)] = doors;
        let admin = Admin::start(vec![first, second]).unwrap();
        assert!(ask(network, "GET", "/metrics").ends_with("outrigger_up 1\n"));
        let unready = ask(network, "GET", "/ready");
        assert!(unready.starts_with("HTTP/1.1 503") && unready.ends_with("no certificate yet\n"), "{unready}");
        for path in ["/snapshot", "/connections", "/log", "/drain", "/"] {
            for method in ["GET", "POST"] {
                assert!(ask(network, method, path).starts_with("HTTP/1.1 404"), "{method} {path}");
            }
        }
        assert!(ask(own, "GET", "/log").starts_with("HTTP/1.1 200"));
        assert!(ask(own, "GET", "/drain").starts_with("HTTP/1.1 405"));
        drop(admin);
        assert!(TcpStream::connect(network).is_err());
    }

    #[test]
    fn one_caller_cannot_take_all_the_places_of_a_door() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let _admin = Admin::start(vec![(Door::Address(listener), public(Arc::new(Halfway::default())))]).unwrap();
        let mut held: Vec<TcpStream> = Vec::new();
        while held.len() < 200 {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n").unwrap();
            let mut first = [0];
            // Closed without a word.
            if !stream.read(&mut first).is_ok_and(|read| read == 1) {
                break;
            }
            held.push(stream);
        }
        assert_eq!(held.len(), 64);
        // Another address of the same machine finds room.
        let other = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        other.bind(&std::net::SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
        other.connect(&address.into()).unwrap();
        assert!(exchange(TcpStream::from(other), "GET", "/metrics").ends_with("outrigger_up 1\n"));
        drop(held);
        let free = || {
            let mut stream = TcpStream::connect(address).unwrap();
            let mut answer = String::new();
            let asked = stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
            asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.ends_with("outrigger_up 1\n")
        };
        assert!((0..1_000).any(|_| free()), "places are not given back");
    }

    #[test]
    fn a_change_is_taken_at_the_operators_socket_alone() {
        let process = Arc::new(Halfway::default());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(OPERATOR_SOCKET);
        // An earlier life left its socket.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = listen_operator(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let shared: Arc<dyn Inspect> = Arc::<Halfway>::clone(&process);
        let doors = vec![
            (Door::Address(listener), loopback(Arc::clone(&shared))),
            (Door::Operator(socket), operator(Arc::clone(&shared))),
        ];
        let admin = Admin::start(doors).unwrap();
        for path in ["/log?level=trace", "/drain"] {
            let refused = ask(address, "POST", path);
            assert!(refused.starts_with("HTTP/1.1 403") && refused.contains(OPERATOR_SOCKET), "{refused}");
        }
        assert!(!process.0.load(Ordering::Relaxed));
        let operate = |method: &str, to: &str| exchange(UnixStream::connect(&path).unwrap(), method, to);
        assert!(operate("GET", "/ready").starts_with("HTTP/1.1 503"));
        assert!(operate("POST", "/log?level==x=").starts_with("HTTP/1.1 400"));
        assert!(operate("POST", "/drain").starts_with("HTTP/1.1 202"));
        assert!(process.0.load(Ordering::Relaxed));
        drop(admin);
        assert!(UnixStream::connect(&path).is_err());
    }
}

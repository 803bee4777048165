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

    /// Connections that are open now.
    fn connections(&self) -> Option<Value> {
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

/// The operator's door, which also changes things: for loopback only.
pub(crate) fn operator(process: Arc<dyn Inspect>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/ready", get(ready))
        .route("/snapshot", get(snapshot))
        .route("/connections", get(connections))
        .route("/log", get(show_log).post(set_log))
        .route("/drain", post(drain))
        .with_state(process)
}

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

async fn connections(State(process): State<Arc<dyn Inspect>>) -> Response {
    json(process.connections())
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

    use super::*;
    use crate::admin::{Admin, listen};

    struct Halfway;

    impl Inspect for Halfway {
        fn metrics(&self) -> String {
            "outrigger_up 1\n".to_owned()
        }

        fn ready(&self) -> Result<(), String> {
            Err("no certificate yet".to_owned())
        }
    }

    fn ask(address: std::net::SocketAddr, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn the_network_gets_metrics_and_readiness_and_nothing_else() {
        let process: Arc<dyn Inspect> = Arc::new(Halfway);
        let doors = [public(Arc::clone(&process)), operator(process)].map(|routes| {
            let listener = listen("[::]:0".parse().unwrap()).unwrap();
            let address = std::net::SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
            (address, (listener, routes))
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
        assert!(ask(own, "POST", "/log?level==x=").starts_with("HTTP/1.1 400"));
        drop(admin);
        assert!(TcpStream::connect(network).is_err());
    }
}

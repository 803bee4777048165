//! Plain HTTP/1.1 both ways: a server for a service, and a client that opens a connection for each call.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use crate::services::Service;

/// How long one call of another service may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves until the process is ended.
pub(crate) async fn serve(port: u16, service: Service) -> Result<()> {
    let listener = TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}"))?;
    println!("{} listens on port {port}", service.name());
    let service = Arc::new(service);
    loop {
        let (socket, peer) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let service = Arc::clone(&service);
        let answer = hyper::service::service_fn(move |request| {
            let service = Arc::clone(&service);
            async move { Ok::<_, Infallible>(service.answer(request, peer).await) }
        });
        tokio::spawn(async move {
            // A caller that leaves early is no event in a shop.
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), answer).await.ok();
        });
    }
}

/// Calls `http://HOST[:PORT]PATH` and returns status and body.
pub(crate) async fn call(method: Method, host: &str, path: &str, headers: &[(String, String)]) -> Result<(StatusCode, String)> {
    tokio::time::timeout(PATIENCE, exchange(method, host, path, headers)).await.with_context(|| format!("{host} is silent"))?
}

async fn exchange(method: Method, host: &str, path: &str, headers: &[(String, String)]) -> Result<(StatusCode, String)> {
    let address = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let socket = TcpStream::connect(&address).await.with_context(|| format!("cannot reach {host}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    let driver = tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header("host", host);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let response = sender.send_request(request.body(Full::new(Bytes::new()))?).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    drop(sender);
    driver.abort();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

/// An answer with a text.
pub(crate) fn text(status: StatusCode, text: impl Into<String>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.into())));
    *response.status_mut() = status;
    response
}

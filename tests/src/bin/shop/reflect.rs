//! Says what it was asked, in HTTP/1.1 and HTTP/2 on every port, and to calls of gRPC in gRPC's own shape, whatever is
//! called: for cases that only ask what arrived where.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use tokio::net::TcpListener;

use crate::services::{Service, seen};

/// Serves on all of these ports until the process is ended.
pub(crate) async fn serve(ports: &[u16], service: Service) -> Result<()> {
    let service = Arc::new(service);
    let mut servers = tokio::task::JoinSet::new();
    for port in ports {
        let listener = TcpListener::bind(("::", *port)).await.with_context(|| format!("cannot listen on port {port}"))?;
        servers.spawn(accept(listener, Arc::clone(&service)));
    }
    println!("{} listens on ports {ports:?}", service.name());
    while let Some(ended) = servers.join_next().await {
        ended??;
    }
    Ok(())
}

async fn accept(listener: TcpListener, service: Arc<Service>) -> Result<()> {
    loop {
        let (socket, peer) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let service = Arc::clone(&service);
        let answer = hyper::service::service_fn(move |request| {
            let service = Arc::clone(&service);
            async move { Ok::<_, Infallible>(answer(&service, request, peer).await) }
        });
        tokio::spawn(async move {
            // A caller that leaves early is no event.
            Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), answer).await.ok();
        });
    }
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn answer(service: &Service, request: Request<Incoming>, peer: SocketAddr) -> Response<Body> {
    let kind = request.headers().get(CONTENT_TYPE).cloned();
    let is_health = request.uri().path() == HEALTH;
    let said = seen(service, request, peer).await.to_string();
    let Some(kind) = kind.filter(|kind| kind.as_bytes().starts_with(b"application/grpc")) else {
        return Response::new(Full::new(Bytes::from(said)).boxed());
    };
    let said = if is_health { health().to_vec() } else { said.into_bytes() };
    // One message, not compressed, and how the call ended behind it.
    let mut message = BytesMut::new();
    message.put_u8(0);
    message.put_u32(u32::try_from(said.len()).unwrap_or(u32::MAX));
    message.put_slice(&said);
    let mut ended = HeaderMap::new();
    ended.insert("grpc-status", HeaderValue::from_static("0"));
    let body = Full::new(message.freeze()).with_trailers(std::future::ready(Some(Ok(ended)))).boxed();
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

/// The health check that gRPC has a protocol for.
const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// A HealthCheckResponse, of which the first field is the status: SERVING, or NOT_SERVING where the environment says so.
fn health() -> [u8; 2] {
    [8, if std::env::var("HEALTH").is_ok_and(|health| health == "NOT_SERVING") { 2 } else { 1 }]
}

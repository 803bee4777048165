//! A gRPC probe: `grpc.health.v1.Health/Check` in clear, as the kubelet asks it.
//!
//! Sources: the gRPC health checking protocol; gRPC over HTTP/2, messages with five bytes before them.

use std::net::SocketAddr;

use axum::http::{HeaderMap, Method, Request, Version};
use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;

use crate::base::net::BoxedIo;

/// Is the app, or one service of it, serving?
pub(super) async fn probe(io: BoxedIo, at: SocketAddr, service: &str) -> Result<(), String> {
    let failed = |error: h2::Error| format!("no gRPC with the app: {error}");
    let (sender, connection) = h2::client::handshake(io).await.map_err(failed)?;
    let exchange = async {
        let mut sender = sender.ready().await.map_err(failed)?;
        let request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("http://{at}/grpc.health.v1.Health/Check"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(());
        let request = request.map_err(|error| error.to_string())?;
        let (answer, mut body) = sender.send_request(request, false).map_err(failed)?;
        body.send_data(framed(&HealthCheckRequest { service: service.to_owned() }), true).map_err(failed)?;
        let answer = answer.await.map_err(failed)?;
        if answer.status() != 200 {
            return Err(format!("the app answered a gRPC call with HTTP status {}", answer.status().as_u16()));
        }
        // An answer without a message has its status in its head.
        status(answer.headers())?;
        let mut body = answer.into_body();
        let mut message = BytesMut::new();
        while let Some(piece) = body.data().await {
            let piece = piece.map_err(failed)?;
            body.flow_control().release_capacity(piece.len()).map_err(failed)?;
            if message.len() + piece.len() > ANSWER_BYTES_MAX {
                return Err("the app's answer is no health check's: it is too long".to_owned());
            }
            message.extend_from_slice(&piece);
        }
        status(&body.trailers().await.map_err(failed)?.unwrap_or_default())?;
        serving(&message)
    };
    tokio::select! {
        verdict = exchange => verdict,
        // It may end with the answer; who waits for one is told by the exchange.
        ended = async { drop(connection.await); std::future::pending().await } => ended,
    }
}

/// The status of the call, where these headers tell it.
fn status(headers: &HeaderMap) -> Result<(), String> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(UNIMPLEMENTED) => Err("the app has no gRPC health service (grpc.health.v1)".to_owned()),
        Some(NOT_FOUND) => Err("the app's health service knows no such service".to_owned()),
        Some(code) => Err(format!("the app's health service failed with status {code}: {}", text("grpc-message").unwrap_or(""))),
    }
}

fn serving(message: &[u8]) -> Result<(), String> {
    let body = message.get(PREFIX..).ok_or("the app's answer is no gRPC message")?;
    let answer = HealthCheckResponse::decode(body).map_err(|error| format!("the app's answer is no health check's: {error}"))?;
    match answer.status {
        1 => Ok(()),
        0 => Err("the app's health is unknown".to_owned()),
        2 => Err("the app is not serving".to_owned()),
        3 => Err("the app's health service knows no such service".to_owned()),
        other => Err(format!("the app's health is {other}, which is none")),
    }
}

fn framed(message: &HealthCheckRequest) -> Bytes {
    let body = message.encode_to_vec();
    let mut framed = BytesMut::with_capacity(PREFIX + body.len());
    // Not compressed.
    framed.put_u8(0);
    framed.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    framed.put_slice(&body);
    framed.freeze()
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

const PREFIX: usize = 5;
const ANSWER_BYTES_MAX: usize = 4096;
const NOT_FOUND: &str = "5";
const UNIMPLEMENTED: &str = "12";

//! How the people's commands talk to the control plane: one HTTP/1.1 request on a loopback connection.

use std::net::SocketAddr;
use std::time::Duration;

use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::Failure;

/// Asks the control plane's API and returns its answer.
pub(crate) fn get(api: SocketAddr, path: &str) -> Result<Value, Failure> {
    let (status, answer) = call(api, Method::GET, path, Vec::new())?;
    if status.is_success() { Ok(answer) } else { Err(objection(status, &answer)) }
}

/// Sends a change. An answer that names problems of documents is an answer, not a failure.
pub(crate) fn post(api: SocketAddr, path: &str, body: &impl serde::Serialize) -> Result<Value, Failure> {
    let body = serde_json::to_vec(body).map_err(|error| Failure::from(anyhow::Error::from(error)))?;
    let (status, answer) = call(api, Method::POST, path, body)?;
    if status.is_success() || status == StatusCode::UNPROCESSABLE_ENTITY { Ok(answer) } else { Err(objection(status, &answer)) }
}

fn objection(status: StatusCode, answer: &Value) -> Failure {
    let text = answer.get("error").and_then(Value::as_str).unwrap_or("it gave no reason");
    Failure::invalid([format!("the control plane refuses ({status}): {text}")])
}

fn call(api: SocketAddr, method: Method, path: &str, body: Vec<u8>) -> Result<(StatusCode, Value), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async { tokio::time::timeout(ANSWER_MAX, exchange(api, method, path, body)).await });
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(unreachable(api, &format!("{error:#}"))),
        Err(_elapsed) => Err(unreachable(api, "it took too long")),
    }
}

fn unreachable(api: SocketAddr, reason: &str) -> Failure {
    Failure::environment(
        format!("the control plane does not answer at {api}: {reason}"),
        "start the mesh with `outrigger up`, or name the API of a running one with --api",
    )
}

async fn exchange(api: SocketAddr, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<(StatusCode, Value)> {
    let stream = TcpStream::connect(api).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, api.to_string())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(anyhow::Error::from_boxed)?;
        let bytes = bytes.to_bytes();
        let value = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes)? };
        anyhow::Ok((status, value))
    };
    // The connection is driven beside the request, and dropped with its answer.
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        ended = connection => {
            ended?;
            answer.await
        }
    }
}

const ANSWER_MAX: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: usize = 256 << 20;

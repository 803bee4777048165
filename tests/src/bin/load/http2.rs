//! HTTP/2 with prior knowledge, and gRPC's unary calls on it: a server that answers at once, and one connection of a client.

use anyhow::{Context as _, Result, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::RecvStream;
use h2::client::SendRequest;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::net::{TcpListener, TcpStream};

use crate::asked;
use crate::plan::{Plan, Protocol};

/// Bytes of a call's message.
const MESSAGE: usize = 1024;
/// Wide enough that no answer of a measurement waits for a window.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 24;

/// Answers every request at once with so many bytes, or as many as its path says, and every call with its own message.
pub(crate) async fn serve(listener: TcpListener, bytes: usize) -> Result<()> {
    let usual = Bytes::from(vec![b'x'; bytes]);
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let usual = usual.clone();
        tokio::task::spawn_local(async move {
            let mut builder = h2::server::Builder::new();
            builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
            // A client that leaves ends its connection, nothing else.
            let Ok(mut connection) = builder.handshake::<_, Bytes>(socket).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::task::spawn_local(answer(request, respond, usual.clone()));
            }
        });
    }
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, usual: Bytes) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let received = read(&mut body).await?;
    let kind = head.headers.get(http::header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if kind.is_some_and(|kind| kind.starts_with(b"application/grpc")) {
        let head = Response::builder().header("content-type", "application/grpc").body(())?;
        let mut stream = respond.send_response(head, false)?;
        stream.send_data(received, false)?;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        stream.send_trailers(trailers)?;
        return Ok(());
    }
    let bytes = asked(head.uri.path()).map_or(usual, |bytes| vec![b'x'; bytes].into());
    let head = Response::builder().header("content-type", "text/plain").header("content-length", bytes.len()).body(())?;
    respond.send_response(head, false)?.send_data(bytes, true)?;
    Ok(())
}

/// A client's connection; clones share it.
#[derive(Clone)]
pub(crate) struct Connection {
    sender: SendRequest<Bytes>,
    request: Request<()>,
    /// What a call sends; none for a plain request.
    message: Option<Bytes>,
}

impl Connection {
    pub(crate) async fn open(plan: &Plan) -> Result<Self> {
        let socket = TcpStream::connect(&plan.target).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW).enable_push(false);
        let (sender, connection) = builder.handshake(socket).await.context("no HTTP/2")?;
        // How it ends is told to the requests on it.
        tokio::task::spawn_local(connection);
        let uri = |path: &str| format!("http://{}{path}", plan.target);
        let (request, message) = if plan.protocol == Protocol::Grpc {
            let head =
                Request::post(uri("/bench.Echo/Unary")).header("content-type", "application/grpc").header("te", "trailers");
            (head.body(())?, Some(message()?))
        } else {
            (Request::get(uri(&plan.path)).header("accept", "*/*").body(())?, None)
        };
        Ok(Self { sender, request, message })
    }

    /// Sends one request and reads its answer whole; a call must succeed and bring its message back.
    pub(crate) async fn exchange(&self) -> Result<u16> {
        let mut sender = self.sender.clone().ready().await.context("the connection is closed")?;
        let (answer, mut stream) = sender.send_request(self.request.clone(), self.message.is_none()).context("cannot send")?;
        if let Some(message) = &self.message {
            stream.send_data(message.clone(), true).context("cannot send")?;
        }
        let (head, mut body) = answer.await.context("no answer")?.into_parts();
        let received = read(&mut body).await.context("the answer broke off")?;
        if let Some(message) = &self.message {
            let trailers = body.trailers().await.context("the trailers broke off")?;
            let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
            ensure!(status.is_some_and(|status| status == "0"), "a call failed: {} {:?} {trailers:?}", head.status, head.headers);
            ensure!(received == *message, "a call brought {} bytes instead of its message", received.len());
        }
        Ok(head.status.as_u16())
    }
}

/// gRPC's frame of a message: not compressed, its length, itself.
fn message() -> Result<Bytes> {
    let mut frame = BytesMut::with_capacity(5 + MESSAGE);
    frame.put_u8(0);
    frame.put_u32(MESSAGE.try_into()?);
    frame.put_bytes(b'g', MESSAGE);
    Ok(frame.freeze())
}

async fn read(body: &mut RecvStream) -> Result<Bytes> {
    let mut first = Bytes::new();
    let mut more = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        if first.is_empty() && more.is_empty() {
            first = part;
        } else {
            if more.is_empty() {
                more.extend_from_slice(&first);
            }
            more.extend_from_slice(&part);
        }
    }
    Ok(if more.is_empty() { first } else { more.freeze() })
}

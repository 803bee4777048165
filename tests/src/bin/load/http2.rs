//! HTTP/2 with prior knowledge, and gRPC's unary calls on it: a server that answers at once, and one connection of a client.

use anyhow::{Context as _, Result, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use tokio::net::{TcpListener, TcpStream};

use crate::plan::{Plan, Protocol};
use crate::stream::Turn;
use crate::{Service, asked, book};

/// Bytes of a call's message.
const MESSAGE: usize = 1024;
const UNARY: &str = "/bench.Echo/Unary";
const STREAM: &str = "/bench.Echo/Stream";
/// Wide enough that no answer of a measurement waits for a window.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 24;

/// Answers every request at once with so many bytes, or as many as its path says, and every call with its own message.
pub(crate) async fn serve(listener: TcpListener, service: Service) -> Result<()> {
    let usual = Bytes::from(vec![b'x'; service.bytes]);
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let (usual, service) = (usual.clone(), service.clone());
        tokio::task::spawn_local(async move {
            let mut builder = h2::server::Builder::new();
            builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
            // A client that leaves ends its connection, nothing else.
            let Ok(mut connection) = builder.handshake::<_, Bytes>(socket).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::task::spawn_local(answer(request, respond, usual.clone(), service.clone()));
            }
        });
    }
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, usual: Bytes, service: Service) -> Result<()> {
    let (head, mut body) = request.into_parts();
    let order = head.headers.get(book::FIELD).and_then(|order| order.to_str().ok());
    if let (Some(pen), Some(order)) = (&service.pen, order) {
        pen.note(order).await;
    }
    if head.uri.path() == STREAM {
        return echo(body, respond, &service).await;
    }
    let received = read(&mut body).await?;
    let kind = head.headers.get(http::header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if kind.is_some_and(|kind| kind.starts_with(b"application/grpc")) {
        let mut stream = respond.send_response(grpc_head()?, false)?;
        stream.send_data(received, false)?;
        return succeeded(&mut stream);
    }
    let bytes = asked(head.uri.path()).map_or(usual, |bytes| vec![b'x'; bytes].into());
    let head = Response::builder().header("content-type", "text/plain").header("content-length", bytes.len()).body(())?;
    respond.send_response(head, false)?.send_data(bytes, true)?;
    Ok(())
}

fn grpc_head() -> Result<Response<()>> {
    Ok(Response::builder().header("content-type", "application/grpc").body(())?)
}

fn succeeded(stream: &mut SendStream<Bytes>) -> Result<()> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    Ok(stream.send_trailers(trailers)?)
}

/// Sends back what comes, until the caller ends, or until this one leaves.
async fn echo(mut body: RecvStream, mut respond: SendResponse<Bytes>, service: &Service) -> Result<()> {
    let held = service.leaving.hold();
    let mut stream = respond.send_response(grpc_head()?, false)?;
    loop {
        let part = tokio::select! {
            part = body.data() => part,
            () = held.asked() => None,
        };
        let Some(part) = part.transpose()? else { break };
        body.flow_control().release_capacity(part.len())?;
        stream.send_data(part, false)?;
    }
    succeeded(&mut stream)?;
    // What is written goes out while the caller's end is waited for; it is the caller's to come.
    while let Some(Ok(_)) = body.data().await {}
    Ok(())
}

/// A call that goes on.
pub(crate) struct Call {
    stream: SendStream<Bytes>,
    answers: RecvStream,
    message: Bytes,
}

impl Call {
    /// Says something and hears it, or hears that the other end has done with the call.
    pub(crate) async fn turn(&mut self) -> Result<Turn> {
        self.stream.send_data(self.message.clone(), false).context("cannot send in a call")?;
        let mut heard = 0;
        while heard < self.message.len() {
            let Some(part) = self.answers.data().await else {
                let trailers = self.answers.trailers().await.context("the trailers broke off")?;
                let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
                ensure!(status.is_some_and(|status| status == "0"), "a call ended with {trailers:?}");
                self.stream.send_data(Bytes::new(), true).ok();
                return Ok(Turn::Closed);
            };
            let part = part.context("a call broke off")?;
            self.answers.flow_control().release_capacity(part.len())?;
            heard += part.len();
        }
        ensure!(heard == self.message.len(), "a call brought {heard} bytes back");
        Ok(Turn::Answered)
    }
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
            let head = Request::post(uri(UNARY)).header("content-type", "application/grpc").header("te", "trailers");
            (head.body(())?, Some(message()?))
        } else {
            (Request::get(uri(&plan.path)).header("accept", "*/*").body(())?, None)
        };
        Ok(Self { sender, request, message })
    }

    /// Begins a call that goes on.
    pub(crate) async fn call(self) -> Result<Call> {
        let message = self.message.context("a call is gRPC's")?;
        let mut request = self.request;
        let path = request.uri().to_string().replace(UNARY, STREAM);
        *request.uri_mut() = path.parse()?;
        let mut sender = self.sender.ready().await.context("the connection is closed")?;
        let (answer, stream) = sender.send_request(request, false).context("cannot send")?;
        let (head, answers) = answer.await.context("no answer")?.into_parts();
        ensure!(head.status == StatusCode::OK && !head.headers.contains_key("grpc-status"), "a call was refused: {head:?}");
        Ok(Call { stream, answers, message })
    }

    /// Sends one request and reads its answer whole; a call must succeed and bring its message back.
    pub(crate) async fn exchange(&self, plan: &Plan) -> Result<u16> {
        let mut request = self.request.clone();
        if let Some(order) = plan.order() {
            *request.method_mut() = Method::POST;
            request.headers_mut().insert(book::FIELD, HeaderValue::from_str(&order)?);
        }
        let mut sender = self.sender.clone().ready().await.context("the connection is closed")?;
        let (answer, mut stream) = sender.send_request(request, self.message.is_none()).context("cannot send")?;
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

//! HTTP/1.1 by hand: a server that answers at once, and one connection of a client.

use std::rc::Rc;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::plan::Plan;
use crate::{Service, asked, book, websocket};

/// Answers every request at once; the head is read to its end, a body by its length. A WebSocket goes on.
pub(crate) async fn serve(listener: TcpListener, service: Service) -> Result<()> {
    let answer = move |bytes: usize| -> Rc<[u8]> {
        let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {bytes}\r\n\r\n").into_bytes();
        answer.resize(answer.len() + bytes, b'x');
        answer.into()
    };
    let usual = answer(service.bytes);
    loop {
        let (mut socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let (usual, service) = (Rc::clone(&usual), service.clone());
        tokio::task::spawn_local(async move {
            let mut buffer = Buffer::default();
            let mut last: (String, Rc<[u8]>) = (String::new(), Rc::clone(&usual));
            // A client that leaves ends its connection, nothing else.
            while let Ok(Some(head)) = buffer.message(&mut socket).await {
                if let (Some(pen), Some(order)) = (&service.pen, field(&head, book::FIELD)) {
                    pen.note(&order).await;
                }
                if websocket::is_asked(&head) {
                    return drop(websocket::serve(&mut socket, &head, &service.leaving).await);
                }
                let line = head.lines().next().unwrap_or_default();
                if line != last.0 {
                    let bytes = line.split(' ').nth(1).and_then(asked);
                    last = (line.to_owned(), bytes.map_or_else(|| Rc::clone(&usual), answer));
                }
                if socket.write_all(&last.1).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// A client's connection.
pub(crate) struct Connection {
    socket: TcpStream,
    buffer: Buffer,
    request: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(plan: &Plan) -> Result<Self> {
        let socket = TcpStream::connect(&plan.target).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        let request = format!("GET {} HTTP/1.1\r\nhost: {}\r\naccept: */*\r\n\r\n", plan.path, plan.target).into_bytes();
        Ok(Self { socket, buffer: Buffer::default(), request })
    }

    /// Sends one request and reads its answer whole.
    pub(crate) async fn exchange(&mut self, plan: &Plan) -> Result<u16> {
        if let Some(order) = plan.order() {
            self.request = format!(
                "POST {} HTTP/1.1\r\nhost: {}\r\n{}: {order}\r\ncontent-length: 0\r\n\r\n",
                plan.path,
                plan.target,
                book::FIELD
            )
            .into_bytes();
        }
        self.socket.write_all(&self.request).await.context("cannot send")?;
        let head = self.buffer.message(&mut self.socket).await?.context("the connection was closed before the answer")?;
        head.split(' ').nth(1).and_then(|status| status.parse().ok()).with_context(|| format!("no status in {head:?}"))
    }
}

/// Bytes that arrived and are not used yet.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    /// Reads one message with its body and returns its head; none where the peer closed between two messages.
    async fn message(&mut self, socket: &mut TcpStream) -> Result<Option<String>> {
        let mut from = 0;
        loop {
            if let Some(end) = find(self.bytes.get(from..).unwrap_or_default(), b"\r\n\r\n").map(|at| from + at + 4) {
                let head = String::from_utf8_lossy(self.bytes.get(..end).unwrap_or_default()).into_owned();
                self.body(socket, &head, end).await?;
                return Ok(Some(head));
            }
            from = self.bytes.len().saturating_sub(3);
            if !self.more(socket).await? {
                ensure!(self.bytes.is_empty(), "the connection was closed within a head");
                return Ok(None);
            }
        }
    }

    /// Drops the head and the body behind it.
    async fn body(&mut self, socket: &mut TcpStream, head: &str, end: usize) -> Result<()> {
        if field(head, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            // No server of the measurements answers in chunks; refusals without a length end with the last, empty one.
            while find(&self.bytes, b"\r\n0\r\n\r\n").is_none() && !self.bytes.ends_with(b"\r\n\r\n0\r\n\r\n") {
                ensure!(self.more(socket).await?, "the connection was closed within a body");
            }
            self.bytes.clear();
            return Ok(());
        }
        let length: usize = field(head, "content-length").map_or(Ok(0), |value| value.parse()).context("a bad content-length")?;
        while self.bytes.len() < end + length {
            ensure!(self.more(socket).await?, "the connection was closed within a body");
        }
        self.bytes.drain(..end + length);
        Ok(())
    }

    async fn more(&mut self, socket: &mut TcpStream) -> Result<bool> {
        self.bytes.reserve(16 << 10);
        Ok(socket.read_buf(&mut self.bytes).await.context("cannot read")? > 0)
    }
}

/// The value of a head's field.
fn field(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    })
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

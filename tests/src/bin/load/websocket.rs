//! WebSockets by hand (RFC 6455): short messages in frames of their own, echoed, and closed in order.

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::stream::{Leaving, Turn};

/// The key of the RFC's own example and the answer to it (section 1.3), which are as good as any.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
/// Opcodes with the bit of a last fragment.
const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;
/// Going away (section 7.4.1).
const AWAY: [u8; 2] = 1001_u16.to_be_bytes();
const MASK: [u8; 4] = [1, 2, 3, 4];
const SAID: &[u8] = b"are you there?";

/// Is this head the request of one?
pub(crate) fn is_asked(head: &str) -> bool {
    head.lines().any(|line| line.to_ascii_lowercase().replace(' ', "") == "upgrade:websocket")
}

/// Echoes until the other end closes, or until this one leaves, which then closes it and hears the answer.
pub(crate) async fn serve(socket: &mut TcpStream, head: &str, leaving: &Leaving) -> Result<()> {
    ensure!(head.contains(KEY), "a key that is not the example's");
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: {ACCEPT}\r\n\r\n"
    );
    socket.write_all(answer.as_bytes()).await?;
    let held = leaving.hold();
    // A frame that has begun to arrive is read whole: what waits is the first byte alone.
    loop {
        let first = tokio::select! {
            first = socket.read_u8() => first?,
            () = held.asked() => break,
        };
        let said = rest(socket).await?;
        if first == CLOSE {
            return frame(socket, CLOSE, &said, None).await;
        }
        frame(socket, first, &said, None).await?;
    }
    frame(socket, CLOSE, &AWAY, None).await?;
    while socket.read_u8().await? != CLOSE {
        rest(socket).await?;
    }
    rest(socket).await.map(drop)
}

/// A client's.
pub(crate) struct Client {
    socket: TcpStream,
}

impl Client {
    pub(crate) async fn open(target: &str) -> Result<Self> {
        let mut socket = TcpStream::connect(target).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        let asked = format!(
            "GET /chat HTTP/1.1\r\nhost: {target}\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: {KEY}\r\n\r\n"
        );
        socket.write_all(asked.as_bytes()).await.context("cannot send")?;
        let mut head = Vec::new();
        // Byte by byte: what comes behind the head is a frame.
        while !head.ends_with(b"\r\n\r\n") {
            head.push(socket.read_u8().await.context("a WebSocket was not answered")?);
        }
        let head = String::from_utf8_lossy(&head);
        ensure!(head.starts_with("HTTP/1.1 101 ") && head.contains(ACCEPT), "a WebSocket was refused: {head}");
        Ok(Self { socket })
    }

    /// Says something and hears it; a close is answered.
    pub(crate) async fn turn(&mut self) -> Result<Turn> {
        frame(&mut self.socket, TEXT, SAID, Some(MASK)).await.context("cannot send on a WebSocket")?;
        let first = self.socket.read_u8().await.context("a WebSocket ended without being closed")?;
        let heard = rest(&mut self.socket).await.context("a WebSocket ended within a frame")?;
        match first {
            TEXT if heard == SAID => Ok(Turn::Answered),
            CLOSE if heard == AWAY => {
                frame(&mut self.socket, CLOSE, &AWAY, Some(MASK)).await.context("cannot answer a close")?;
                Ok(Turn::Closed)
            }
            other => bail!("a WebSocket says {other:#x} {heard:?}"),
        }
    }
}

async fn frame(socket: &mut TcpStream, first: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Result<()> {
    let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).context("a message that is not short")?;
    let mut bytes = vec![first, length | if mask.is_some() { 0x80 } else { 0 }];
    match mask {
        Some(mask) => {
            bytes.extend(mask);
            bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        }
        None => bytes.extend(payload),
    }
    Ok(socket.write_all(&bytes).await?)
}

/// What of a frame comes behind its first byte: the payload as it was before it was masked.
async fn rest(socket: &mut TcpStream) -> Result<Vec<u8>> {
    let length = socket.read_u8().await?;
    ensure!(length & 0x7f < 126, "a message that is not short");
    let mut mask = [0; 4];
    if length & 0x80 != 0 {
        socket.read_exact(&mut mask).await?;
    }
    let mut payload = vec![0; usize::from(length & 0x7f)];
    socket.read_exact(&mut payload).await?;
    payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    Ok(payload)
}

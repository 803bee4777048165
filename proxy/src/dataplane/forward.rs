//! The explicit rung of capture: an application that was told of its sidecar as its proxy names in each request where it
//! wants to go. That takes the place of what capture would have told; from there on a connection goes as every other.
//!
//! Sources: RFC 9112 3.2.2 (absolute form) and 3.2.3 (authority form), RFC 9110 9.3.6 (CONNECT). Invariant: one
//! connection, one destination. Beyond its first request a proxy's client may ask for another, so each request in absolute
//! form closes its connection.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::uri::{Authority, Scheme};
use http::{StatusCode, Uri};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use tracing::debug;

use super::Proxy;
use super::connection::{self, Accepted};
use super::http::record::ConnectionRecord;
use super::http::reject::{REASON, Reject};
use super::sniff::Prefixed;
use crate::base::net::BoxedIo;
use crate::telemetry::{Direction, Protocol};

/// What the head of a first request asks a proxy for.
#[derive(Debug, Eq, PartialEq)]
enum Asks {
    /// A tunnel to there.
    Tunnel { host: String, port: u16 },
    /// An answer from there, to the request that is written again with this head.
    Request { host: String, port: u16, head: String },
}

/// Serves a connection whose client speaks to its proxy.
pub(crate) async fn outbound(proxy: Arc<Proxy>, accepted: Accepted) {
    let Accepted { mut io, peer, original: _, drain } = accepted;
    let limits = proxy.published.current().mesh.limits;
    let met = timeout(limits.header_timeout, meet(&mut io)).await;
    let refused = match met {
        Ok(Ok((original, first))) => {
            let io = Prefixed::join(first, io);
            return connection::outbound(proxy, Accepted { io, peer, original, drain }).await;
        }
        Ok(Err(Unmet::Left(error))) => return debug!(%error, "a client left before it asked for anything"),
        Ok(Err(Unmet::Refused(reject))) => reject,
        Err(_elapsed) => Reject::RequestTimeout,
    };
    let mut record = ConnectionRecord::start(&proxy, Direction::Outbound, peer);
    record.protocol = Protocol::Http1;
    record.refused(&refused);
    // Who left meanwhile needs no answer.
    drop(timeout(ANSWER_MAX, refuse(&mut io, &refused)).await);
}

/// Why there is no destination.
enum Unmet {
    Left(io::Error),
    Refused(Reject),
}

impl From<io::Error> for Unmet {
    fn from(error: io::Error) -> Self {
        Self::Left(error)
    }
}

/// Reads the first head; where it leads, and what is to be read from there on.
async fn meet(io: &mut BoxedIo) -> Result<(SocketAddr, Bytes), Unmet> {
    let mut read = BytesMut::with_capacity(READ);
    let end = loop {
        if let Some(end) = end_of_head(&read) {
            break end;
        }
        if read.len() > HEAD_MAX {
            return Err(Unmet::Refused(Reject::BadRequest("the head of a request to the proxy is too long")));
        }
        if io.read_buf(&mut read).await? == 0 {
            return Err(Unmet::Left(io::ErrorKind::UnexpectedEof.into()));
        }
    };
    let rest = read.split_off(end).freeze();
    match asks(&read).map_err(|why| Unmet::Refused(Reject::BadRequest(why)))? {
        Asks::Tunnel { host, port } => {
            let to = resolve(&host, port).await?;
            io.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
            io.flush().await?;
            Ok((to, rest))
        }
        Asks::Request { host, port, head } => {
            let to = resolve(&host, port).await?;
            Ok((to, [head.as_bytes(), &rest].concat().into()))
        }
    }
}

/// The address of a name, as the pod resolves it.
async fn resolve(host: &str, port: u16) -> Result<SocketAddr, Unmet> {
    let found = timeout(RESOLVE_MAX, tokio::net::lookup_host((host, port))).await;
    let first = found.ok().and_then(Result::ok).and_then(|mut addresses| addresses.next());
    first.ok_or(Unmet::Refused(Reject::ConnectFailed))
}

async fn refuse(io: &mut BoxedIo, reject: &Reject) -> io::Result<()> {
    let told = reject.told();
    let status = if matches!(reject, Reject::ConnectFailed) { StatusCode::BAD_GATEWAY } else { told.status };
    let text = format!(
        "HTTP/1.1 {} {}\r\n{REASON}: {}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        status.as_str(),
        status.canonical_reason().unwrap_or_default(),
        told.reason.as_str(),
    );
    io.write_all(text.as_bytes()).await?;
    io.shutdown().await
}

/// Behind the empty line.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(END.len()).position(|window| window == END).map(|place| place + END.len())
}

/// Reads a head to its empty line.
fn asks(head: &[u8]) -> Result<Asks, &'static str> {
    let head = std::str::from_utf8(head).map_err(|_no_text| "the head of a request to the proxy is no text")?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next()) else {
        return Err("no request line");
    };
    if !version.starts_with("HTTP/1.") {
        return Err("a proxy is asked in HTTP/1");
    }
    if method == "CONNECT" {
        let authority: Authority = target.parse().map_err(|_none| "CONNECT names no host and port")?;
        let port = authority.port_u16().ok_or("CONNECT names no port")?;
        return Ok(Asks::Tunnel { host: bare(&authority), port });
    }
    let uri: Uri = target.parse().map_err(|_none| "the target is no address")?;
    if uri.scheme() != Some(&Scheme::HTTP) {
        return Err("a proxy is asked with a whole address, http://HOST/PATH, or with CONNECT");
    }
    let authority = uri.authority().ok_or("the target names no host")?;
    let (host, port) = (bare(authority), authority.port_u16().unwrap_or(80));
    let upgrades = lines.clone().any(|line| is_field(line, "upgrade"));
    let mut written = format!("{method} {target} {version}\r\n");
    for line in lines.filter(|line| !line.is_empty() && !FOR_THE_PROXY.iter().any(|name| is_field(line, name))) {
        // Writing to a string does not fail.
        write!(written, "{line}\r\n").ok();
    }
    written.push_str(if upgrades { "Connection: upgrade, close\r\n\r\n" } else { "Connection: close\r\n\r\n" });
    Ok(Asks::Request { host, port, head: written })
}

/// A host without the brackets of an IPv6 address.
fn bare(authority: &Authority) -> String {
    authority.host().trim_start_matches('[').trim_end_matches(']').to_owned()
}

fn is_field(line: &str, name: &str) -> bool {
    line.split_once(':').is_some_and(|(field, _value)| field.eq_ignore_ascii_case(name))
}

/// What is between the client and its proxy, and is written anew or left out.
const FOR_THE_PROXY: [&str; 4] = ["connection", "keep-alive", "proxy-connection", "proxy-authorization"];
const END: &[u8] = b"\r\n\r\n";
const READ: usize = 4 * 1024;
/// As much as the line takes by default; what is longer has no business with a proxy.
const HEAD_MAX: usize = 64 * 1024;
const RESOLVE_MAX: Duration = Duration::from_secs(5);
const ANSWER_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Asks, &'static str> {
        asks(text.as_bytes())
    }

    #[test]
    fn a_tunnel_leads_to_the_host_that_is_named() {
        assert_eq!(
            of("CONNECT api.shop:443 HTTP/1.1\r\nHost: other\r\n\r\n"),
            Ok(Asks::Tunnel { host: "api.shop".into(), port: 443 })
        );
        assert_eq!(of("CONNECT [fd64::5]:80 HTTP/1.1\r\n\r\n"), Ok(Asks::Tunnel { host: "fd64::5".into(), port: 80 }));
    }

    #[test]
    fn a_request_leads_to_its_target_whatever_its_host_says_and_closes_its_connection() {
        let asked = "GET http://web.shop:8080/a?b HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\n\
                     Proxy-Authorization: Basic eA==\r\nConnection: keep-alive\r\nx-a: 1\r\n\r\n";
        let head = "GET http://web.shop:8080/a?b HTTP/1.1\r\nHost: other\r\nx-a: 1\r\nConnection: close\r\n\r\n".to_owned();
        assert_eq!(of(asked), Ok(Asks::Request { host: "web.shop".into(), port: 8080, head }));
        let Ok(Asks::Request { port, head, .. }) =
            of("GET http://web/ HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
        else {
            panic!("no request");
        };
        assert_eq!((port, head.ends_with("Upgrade: websocket\r\nConnection: upgrade, close\r\n\r\n")), (80, true));
    }

    #[test]
    fn what_names_no_destination_is_refused() {
        for text in [
            "GET / HTTP/1.1\r\nHost: web\r\n\r\n",
            "GET https://web/ HTTP/1.1\r\n\r\n",
            "CONNECT web HTTP/1.1\r\n\r\n",
            "GET http://web/\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\n",
            "\r\n\r\n",
        ] {
            assert!(of(text).is_err(), "{text:?}");
        }
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(end_of_head(b"a\r\n\r\nrest"), Some(5));
    }
}

//! Names inside a local pod: answered by the pod's own supervisor, from the table that the control plane wrote last, so
//! that they resolve with the control plane and the node agent gone.
//!
//! Sources: RFC 1035 (messages, truncation, TCP framing), RFC 6891 (payload size), RFC 8020 (a name above others exists).
//! Only the mesh's own domain is answered for; everything else is refused rather than forwarded, so that a pod never
//! depends on what the machine resolves. [`answer`] is pure.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::model::name_table::{NameAnswer, NameTable};
use crate::node::netns;

/// Where it answers, as the pod's `resolv.conf` says.
pub(crate) const ADDRESS: &str = "127.0.0.53:53";

/// What a pod sees behind a name.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum View {
    /// The Service's own addresses, which the pod's sidecar knows.
    Meshed,
    /// The addresses behind the Service: nobody would answer at the Service's own.
    Outside,
}

/// The sockets, made inside the pod.
#[derive(Debug)]
pub(crate) struct Sockets {
    udp: std::net::UdpSocket,
    tcp: std::net::TcpListener,
}

impl Sockets {
    /// Binds both inside `namespace`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or something listens there already.
    pub(crate) fn bind(namespace: &File) -> io::Result<Self> {
        netns::inside(namespace, || {
            let (udp, tcp) = (std::net::UdpSocket::bind(ADDRESS)?, std::net::TcpListener::bind(ADDRESS)?);
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok(Self { udp, tcp })
        })
    }
}

/// Answers until it is dropped.
///
/// # Errors
/// The sockets cannot be waited on.
pub(crate) async fn serve(sockets: Sockets, table: PathBuf, view: View) -> io::Result<()> {
    let (udp, tcp) = (UdpSocket::from_std(sockets.udp)?, TcpListener::from_std(sockets.tcp)?);
    let table = Arc::new(Table { path: table, seen: Mutex::default() });
    let mut connections = JoinSet::new();
    let mut datagram = vec![0; UDP_MAX];
    loop {
        // Cancel-safe: none of the three loses anything when another one is first.
        tokio::select! {
            received = udp.recv_from(&mut datagram) => {
                let Ok((length, from)) = received else { continue };
                datagram_answer(&udp, datagram.get(..length).unwrap_or_default(), from, &table, view).await;
            }
            accepted = tcp.accept() => match accepted {
                Ok((stream, _from)) if connections.len() < CONNECTIONS_MAX => {
                    let table = Arc::clone(&table);
                    connections.spawn(async move { drop(tokio::time::timeout(TCP_AT_MOST, connection(stream, &table, view)).await) });
                }
                Ok(_one_too_many) => {}
                Err(error) => {
                    warn!(%error, "cannot accept a question for a name");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

/// The answer to one question, as long as its carrier takes; `None` for what is no question.
fn answer(question: &[u8], table: &NameTable, view: View, carrier: Carrier) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok().filter(|message| message.message_type() == MessageType::Query)?;
    let mut reply = Message::new();
    reply.set_id(question.id()).set_message_type(MessageType::Response).set_op_code(question.op_code());
    reply.set_recursion_desired(question.recursion_desired()).set_recursion_available(true);
    reply.add_queries(question.queries().to_vec());
    let code = match question.queries() {
        _any if question.op_code() != OpCode::Query => ResponseCode::NotImp,
        [query] if query.query_class() == DNSClass::IN => match look_up(query.name(), table) {
            Looked::Found(found) => {
                reply.set_authoritative(true);
                let addresses = match view {
                    View::Meshed => &found.service,
                    View::Outside => &found.endpoints,
                };
                let mut records: Vec<Record> =
                    addresses.iter().filter_map(|address| record(query.name(), query.query_type(), *address)).collect();
                // Who takes the first of several takes another one with each question.
                let turn = usize::from(question.id()).checked_rem(records.len()).unwrap_or_default();
                records.rotate_left(turn);
                reply.add_answers(records);
                ResponseCode::NoError
            }
            Looked::AboveOthers => ResponseCode::NoError,
            Looked::Unknown => ResponseCode::NXDomain,
            Looked::Foreign => ResponseCode::Refused,
        },
        [_another_class] => ResponseCode::Refused,
        _none_or_several => ResponseCode::FormErr,
    };
    reply.set_response_code(code);
    let mut payload = PAYLOAD_PLAIN;
    if let Some(edns) = question.extensions() {
        payload = usize::from(edns.max_payload()).clamp(PAYLOAD_PLAIN, PAYLOAD_MAX);
        let mut ours = Edns::new();
        ours.set_max_payload(u16::try_from(PAYLOAD_MAX).unwrap_or(u16::MAX));
        reply.set_edns(ours);
    }
    let bytes = reply.to_vec().ok()?;
    // Too long for a datagram: the asker comes again over TCP (RFC 1035 section 4.2.1, RFC 2181 section 9).
    if carrier == Carrier::Datagram && bytes.len() > payload { reply.truncate().to_vec().ok() } else { Some(bytes) }
}

/// What carries question and answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Carrier {
    Datagram,
    Stream,
}

enum Looked<'a> {
    Found(&'a NameAnswer),
    AboveOthers,
    Unknown,
    Foreign,
}

fn look_up<'a>(name: &Name, table: &'a NameTable) -> Looked<'a> {
    let text = name.to_lowercase().to_utf8();
    let text = text.trim_end_matches('.');
    if text != DOMAIN && !text.strip_suffix(DOMAIN).is_some_and(|above| above.ends_with('.')) {
        return Looked::Foreign;
    }
    if let Some(found) = table.0.get(text) {
        return Looked::Found(found);
    }
    let below = |known: &String| known.strip_suffix(text).is_some_and(|above| above.ends_with('.'));
    if text == DOMAIN || table.0.keys().any(below) { Looked::AboveOthers } else { Looked::Unknown }
}

fn record(name: &Name, asked: RecordType, address: IpAddr) -> Option<Record> {
    let wants = |kind| asked == kind || asked == RecordType::ANY;
    let data = match address {
        IpAddr::V4(v4) if wants(RecordType::A) => RData::A(A(v4)),
        IpAddr::V6(v6) if wants(RecordType::AAAA) => RData::AAAA(AAAA(v6)),
        _other_family => return None,
    };
    Some(Record::from_rdata(name.clone(), TTL_SECONDS, data))
}

/// The table as it was read last, and what told that it had changed.
struct Table {
    path: PathBuf,
    seen: Mutex<(Option<Stamp>, Arc<NameTable>)>,
}

type Stamp = (u64, i64, i64, u64);

impl Table {
    /// The table now: read again when the file is another one. What cannot be read leaves the last good one in force.
    fn current(&self) -> Arc<NameTable> {
        let stamp = stamp(&self.path);
        let mut seen = self.seen.lock();
        if stamp.is_some() && seen.0 != stamp {
            match read(&self.path) {
                Ok(table) => *seen = (stamp, Arc::new(table)),
                Err(error) => warn!(%error, path = %self.path.display(), "the table of names cannot be read"),
            }
        }
        Arc::clone(&seen.1)
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

fn read(path: &Path) -> io::Result<NameTable> {
    Ok(serde_json::from_slice(&std::fs::read(path)?)?)
}

async fn datagram_answer(udp: &UdpSocket, question: &[u8], from: SocketAddr, table: &Table, view: View) {
    if let Some(bytes) = answer(question, &table.current(), view, Carrier::Datagram)
        && let Err(error) = udp.send_to(&bytes, from).await
    {
        debug!(%error, "an answer for a name was not sent");
    }
}

async fn connection(mut stream: TcpStream, table: &Table, view: View) -> io::Result<()> {
    loop {
        let length = stream.read_u16().await?;
        let mut question = vec![0; usize::from(length)];
        stream.read_exact(&mut question).await?;
        let Some(bytes) = answer(&question, &table.current(), view, Carrier::Stream) else { return Ok(()) };
        let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), bytes.as_slice()].concat()).await?;
    }
}

const DOMAIN: &str = "cluster.local";
/// Short: an address may change with the next document.
const TTL_SECONDS: u32 = 5;
const UDP_MAX: usize = 4096;
const PAYLOAD_PLAIN: usize = 512;
/// What crosses any link in one piece.
const PAYLOAD_MAX: usize = 1232;
const CONNECTIONS_MAX: usize = 64;
const TCP_AT_MOST: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;

    use super::*;

    fn table() -> NameTable {
        serde_json::from_str(
            r#"{"web.shop.svc.cluster.local":{"service":["10.65.0.3","fd65::3"],"endpoints":["10.64.0.5","fd64::5"]},
                "alone.shop.svc.cluster.local":{"service":["10.65.0.4"]}}"#,
        )
        .unwrap()
    }

    fn ask(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new();
        message.set_id(7).set_recursion_desired(true);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message
    }

    #[track_caller]
    fn check(view: View, name: &str, kind: RecordType, code: ResponseCode, addresses: &[&str]) {
        let bytes = answer(&ask(name, kind).to_vec().unwrap(), &table(), view, Carrier::Datagram).unwrap();
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!((reply.id(), reply.response_code()), (7, code), "{name}");
        let got: Vec<String> = reply.answers().iter().map(|record| record.data().to_string()).collect();
        assert_eq!(got, addresses, "{name}");
    }

    #[test]
    fn a_service_is_found_by_its_full_name_in_any_case() {
        use ResponseCode::NoError;
        check(View::Meshed, "web.shop.svc.cluster.local.", RecordType::A, NoError, &["10.65.0.3"]);
        check(View::Meshed, "WEB.Shop.svc.cluster.local.", RecordType::AAAA, NoError, &["fd65::3"]);
        check(View::Outside, "web.shop.svc.cluster.local.", RecordType::A, NoError, &["10.64.0.5"]);
        check(View::Meshed, "alone.shop.svc.cluster.local.", RecordType::AAAA, NoError, &[]);
        check(View::Meshed, "web.shop.svc.cluster.local.", RecordType::MX, NoError, &[]);
    }

    #[test]
    fn what_the_mesh_does_not_know_is_told_apart() {
        check(View::Meshed, "gone.shop.svc.cluster.local.", RecordType::A, ResponseCode::NXDomain, &[]);
        check(View::Meshed, "shop.svc.cluster.local.", RecordType::A, ResponseCode::NoError, &[]);
        check(View::Meshed, "example.com.", RecordType::A, ResponseCode::Refused, &[]);
        check(View::Meshed, "notcluster.local.", RecordType::A, ResponseCode::Refused, &[]);
    }

    #[test]
    fn an_answer_too_long_for_a_datagram_is_cut_and_comes_whole_over_tcp() {
        let many = (0..100).map(|n| format!("10.64.1.{n}").parse().unwrap()).collect();
        let found = NameAnswer { service: many, endpoints: Vec::new() };
        let table = NameTable([("web.shop.svc.cluster.local".to_owned(), found)].into());
        let question = ask("web.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
        let cut = Message::from_vec(&answer(&question, &table, View::Meshed, Carrier::Datagram).unwrap()).unwrap();
        assert!(cut.truncated());
        let whole = Message::from_vec(&answer(&question, &table, View::Meshed, Carrier::Stream).unwrap()).unwrap();
        assert!(!whole.truncated() && whole.answers().len() == 100);
    }

    #[test]
    fn of_several_addresses_another_one_stands_first_with_each_question() {
        let found = NameAnswer {
            service: ["10.64.0.5", "fd64::5", "10.64.0.6"].map(|it| it.parse().unwrap()).into(),
            ..NameAnswer::default()
        };
        let table = NameTable([("db.shop.svc.cluster.local".to_owned(), found)].into());
        let firsts = [7, 8].map(|id| {
            let mut question = ask("db.shop.svc.cluster.local.", RecordType::A);
            question.set_id(id);
            let bytes = answer(&question.to_vec().unwrap(), &table, View::Meshed, Carrier::Datagram).unwrap();
            let reply = Message::from_vec(&bytes).unwrap();
            assert_eq!(reply.answers().len(), 2);
            reply.answers()[0].data().to_string()
        });
        assert_eq!(firsts, ["10.64.0.6", "10.64.0.5"]);
    }

    #[test]
    fn what_is_no_question_gets_no_answer() {
        assert!(answer(b"", &table(), View::Meshed, Carrier::Datagram).is_none());
        assert!(answer(&[0xff; 40], &table(), View::Meshed, Carrier::Datagram).is_none());
        let mut reply = ask("web.shop.svc.cluster.local.", RecordType::A);
        reply.set_message_type(MessageType::Response);
        assert!(answer(&reply.to_vec().unwrap(), &table(), View::Meshed, Carrier::Datagram).is_none());
    }

    #[test]
    fn the_table_is_read_again_when_it_changes_and_kept_when_it_breaks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("names.json");
        let table = Table { path: path.clone(), seen: Mutex::default() };
        assert!(table.current().0.is_empty());
        crate::base::state::write_atomic(&path, br#"{"a.b.svc.cluster.local":{}}"#, 0o600).unwrap();
        assert_eq!(table.current().0.len(), 1);
        crate::base::state::write_atomic(&path, b"{", 0o600).unwrap();
        assert_eq!(table.current().0.len(), 1);
        crate::base::state::write_atomic(&path, b"{}", 0o600).unwrap();
        assert_eq!(table.current().0.len(), 0);
    }
}

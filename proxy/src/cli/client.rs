//! How the people's commands talk to the control plane: one HTTP/1.1 request on a loopback connection, with the API's
//! token, which lies in the mesh's state folder for root alone.
//!
//! Invariant: the token of the mesh that is up is shown at that mesh's own address alone; for any other address somebody
//! has to name the file.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::Failure;
use super::local::{self, STATE, UpRecord, read_up_record};
use super::patience::{Part, Patience};
use crate::control::API_TOKEN;
use crate::control::source::file::read_at_most;

/// Where the control plane answers, and what proves to it that it may be asked.
#[derive(Args, Debug)]
pub(crate) struct ApiArgs {
    /// The control plane's API [default: 127.0.0.1:14080]
    #[arg(long = "api", env = "OUTRIGGER_API", value_name = "ADDR")]
    address: Option<SocketAddr>,
    /// The file that holds the API's token; by default `api-token` in the state folder of the mesh that is up
    #[arg(long, env = "OUTRIGGER_API_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl ApiArgs {
    /// The control plane of this mesh.
    ///
    /// # Errors
    /// What the mesh wrote names no address.
    pub(crate) fn of_mesh(mesh: &UpRecord) -> Result<Self, Failure> {
        let address = mesh.api.strip_prefix("http://").and_then(|address| address.parse().ok());
        let address = address.ok_or_else(|| Failure::environment(format!("{:?} is no API", mesh.api), "start the mesh anew"))?;
        Ok(Self { address: Some(address), token_file: Some(mesh.state.join(API_TOKEN)) })
    }

    /// Is it the control plane of the mesh that is up on this machine?
    pub(crate) fn is_of_this_machine(&self) -> bool {
        local::supervised(self.address()).is_some()
    }

    /// Did somebody say which API it is?
    pub(crate) fn is_named(&self) -> bool {
        self.address.is_some() || self.token_file.is_some()
    }

    /// Does anybody listen there?
    pub(crate) fn is_served(&self) -> bool {
        std::net::TcpStream::connect_timeout(&self.address(), CONNECT_MAX).is_ok()
    }

    fn address(&self) -> SocketAddr {
        self.address.unwrap_or(API)
    }

    /// The file that holds the token for this address; none where nobody told.
    fn token_path(&self) -> Option<PathBuf> {
        if let Some(named) = &self.token_file {
            return Some(named.clone());
        }
        match read_up_record() {
            Some(mesh) => (mesh.api == format!("http://{}", self.address())).then(|| mesh.state.join(API_TOKEN)),
            None => (self.address() == API).then(|| Path::new(STATE).join(API_TOKEN)),
        }
    }

    /// The token, as a header carries it.
    ///
    /// # Errors
    /// Why there is none, and what to do.
    fn credentials(&self) -> Result<HeaderValue, Failure> {
        let Some(path) = self.token_path() else {
            return Err(Failure::environment(
                format!("nothing tells which token the API at {} wants", self.address()),
                "name its file with --token-file, or leave --api to the mesh that is up",
            ));
        };
        let text = read_at_most(&path, TOKEN_BYTES_MAX).map_err(|error| {
            let what = format!("cannot read the API's token in {}: {error}", path.display());
            match error.kind() {
                io::ErrorKind::PermissionDenied => Failure::environment(
                    what,
                    "run as root, for example with sudo, or name a copy that you may read with --token-file",
                ),
                _ => Failure::environment(what, "name the file with --token-file; a control plane keeps it in its state folder"),
            }
        })?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", text.trim()))
            .map_err(|_not_text| Failure::invalid([format!("{} holds no token", path.display())]))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// Asks the control plane's API and returns its answer.
pub(crate) fn get(api: &ApiArgs, path: &str) -> Result<Value, Failure> {
    runtime()?.block_on(fetch(api, path))
}

/// The same, for who has a runtime. Cancel-safe: nothing is changed.
pub(crate) async fn fetch(api: &ApiArgs, path: &str) -> Result<Value, Failure> {
    let (status, answer) = insist(api, &Method::GET, path, &[], || local::supervised(api.address())).await?;
    if status.is_success() { Ok(answer) } else { Err(objection(status, &answer)) }
}

/// Sends a change. An answer that names problems of documents is an answer, not a failure.
pub(crate) fn post(api: &ApiArgs, path: &str, body: &impl serde::Serialize) -> Result<Value, Failure> {
    let body = serde_json::to_vec(body).map_err(|error| Failure::from(anyhow::Error::from(error)))?;
    let asked = insist(api, &Method::POST, path, &body, || local::supervised(api.address()));
    let (status, answer) = runtime()?.block_on(asked)?;
    if status.is_success() || status == StatusCode::UNPROCESSABLE_ENTITY { Ok(answer) } else { Err(objection(status, &answer)) }
}

fn objection(status: StatusCode, answer: &Value) -> Failure {
    let text = answer.get("error").and_then(Value::as_str).unwrap_or("it gave no reason");
    let what = format!("the control plane refuses ({status}): {text}");
    if status == StatusCode::UNAUTHORIZED {
        return Failure::environment(what, "it makes a new token whenever it starts; take the one in its state folder now");
    }
    Failure::invalid([what])
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Asks until there is an answer, for as long as a supervisor is about to start the control plane again.
async fn insist(
    api: &ApiArgs,
    method: &Method,
    path: &str,
    body: &[u8],
    supervised: impl Fn() -> Option<UpRecord>,
) -> Result<(StatusCode, Value), Failure> {
    // A change may take the control plane a while; what is only read is there.
    let at_most = if *method == Method::GET { READ_MAX } else { CHANGE_MAX } + within(path);
    let mut patience = Patience::with(Part::Control);
    let mut path = path.to_owned();
    loop {
        let outcome = match tokio::time::timeout(at_most, ask(api, method, &path, body)).await {
            Ok(outcome) => outcome?,
            Err(_elapsed) => {
                Err(NotAnswered { reason: format!("nothing came for {} s", at_most.as_secs()), again: false, doubtful: true })
            }
        };
        let supervisor = supervised();
        match outcome {
            Ok(answer) => return Ok(answer),
            Err(NotAnswered { reason, again, doubtful }) => {
                if !again || supervisor.is_none() || !patience.wait().await {
                    return Err(unreachable(api.address(), &reason, supervisor.as_ref()));
                }
                // What is deleted twice is not there the second time, and that is as it should be.
                if doubtful && path == DELETE {
                    path.push_str("?again=true");
                }
            }
        }
    }
}

/// Why there is no answer.
struct NotAnswered {
    reason: String,
    /// May the same be asked again?
    again: bool,
    /// May what was asked have been done all the same?
    doubtful: bool,
}

/// Asks once. A failure is one that asking again does not mend.
async fn ask(
    api: &ApiArgs,
    method: &Method,
    path: &str,
    body: &[u8],
) -> Result<Result<(StatusCode, Value), NotAnswered>, Failure> {
    let stream = match TcpStream::connect(api.address()).await {
        Ok(stream) => stream,
        Err(error) => {
            // Reset: it ended while the connection was still waiting to be taken.
            let again = matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset);
            return Ok(Err(NotAnswered { reason: error.to_string(), again, doubtful: false }));
        }
    };
    // After the connection: where nobody listens, that is what to tell. And a control plane that has just been started has
    // made a token of its own.
    let credentials = api.credentials()?;
    let shown = credentials.clone();
    match exchange(stream, api.address(), credentials, method.clone(), path, body.to_vec()).await {
        Ok((StatusCode::UNAUTHORIZED, _)) if api.credentials().is_ok_and(|now| now != shown) => {
            Ok(Err(NotAnswered { reason: "it made another token just now".to_owned(), again: true, doubtful: false }))
        }
        Ok(answer) => Ok(Ok(answer)),
        // Whether a change was made is not known. Applying or deleting the same documents twice does what doing it once does.
        Err(error) => Ok(Err(NotAnswered { reason: format!("{error:#}"), again: true, doubtful: true })),
    }
}

/// How long the control plane itself was asked to wait.
fn within(path: &str) -> Duration {
    let millis = path.split(['?', '&']).find_map(|part| part.strip_prefix("within=")?.parse().ok());
    Duration::from_millis(millis.unwrap_or(0))
}

fn unreachable(api: SocketAddr, reason: &str, mesh: Option<&UpRecord>) -> Failure {
    let what = format!("the control plane does not answer at {api}: {reason}");
    match mesh {
        Some(mesh) => Failure::environment(
            what,
            format!(
                "the mesh is up, but its control plane hangs or is being started again; look into {}{}",
                mesh.state.join("log/control.log").display(),
                Part::Control.told(Some(mesh)),
            ),
        ),
        None => Failure::environment(what, "start the mesh with `outrigger up`, or name the API of a running one with --api"),
    }
}

async fn exchange(
    stream: TcpStream,
    api: SocketAddr,
    credentials: HeaderValue,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> anyhow::Result<(StatusCode, Value)> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, api.to_string())
        .header(header::AUTHORIZATION, credentials)
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

const READ_MAX: Duration = Duration::from_secs(10);
const CHANGE_MAX: Duration = Duration::from_secs(30);
pub(crate) const ANSWER_BYTES_MAX: usize = 256 << 20;
const TOKEN_BYTES_MAX: u64 = 4 << 10;
/// The only request of which the answer depends on whether it was made before.
const DELETE: &str = "/api/delete";
/// How long a connection on this machine may take.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// Where `up` has the API served, and a control plane in a pod.
pub(crate) const API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 14080);

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn api(address: SocketAddr, token_file: Option<PathBuf>) -> ApiArgs {
        ApiArgs { address: Some(address), token_file }
    }

    #[test]
    fn the_token_of_the_mesh_that_is_up_is_not_shown_elsewhere() {
        let elsewhere = api("127.0.0.1:9".parse().unwrap(), None);
        assert_eq!(elsewhere.token_path(), None);
        let told = format!("{:?}", elsewhere.credentials().unwrap_err());
        assert!(told.contains("--token-file"), "{told}");
    }

    #[test]
    fn what_the_control_plane_was_asked_to_wait_is_waited_for() {
        assert_eq!(within("/api/proxies?revision=3&within=2500"), Duration::from_millis(2500));
        assert_eq!(within("/api/status"), Duration::ZERO);
    }

    #[test]
    fn where_no_mesh_is_up_nobody_is_waited_for_and_the_remedy_is_to_start_one() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let begun = Instant::now();
        let told = format!("{:?}", get(&api(address, None), "/api/status").unwrap_err());
        assert!(told.contains("outrigger up") && begun.elapsed() < Duration::from_secs(2), "{told}");
    }

    #[test]
    fn a_control_plane_that_ends_before_it_answers_is_asked_again_and_told_that_it_is() {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(&token, "0123abc").unwrap();
        let control_plane = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for answers in [false, true] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = [0; 4096];
                let read = stream.read(&mut bytes).unwrap();
                asked.push(String::from_utf8_lossy(&bytes[..read]).lines().next().unwrap().to_owned());
                if answers {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
                }
            }
            asked
        });
        let record = || {
            serde_json::from_value(serde_json::json!({
                "supervisor": 1, "control": 1, "node": 1, "state": "/", "trustDomain": "t", "stream": "127.0.0.1:1", "api": "", "dashboard": ""
            }))
            .ok()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let api = api(address, Some(token));
        let answer = runtime.block_on(insist(&api, &Method::POST, DELETE, b"[]", record)).unwrap();
        assert_eq!(answer.0, StatusCode::OK);
        assert_eq!(control_plane.join().unwrap(), ["POST /api/delete HTTP/1.1", "POST /api/delete?again=true HTTP/1.1"]);
    }

    #[test]
    fn a_token_file_is_read_for_any_address_and_its_content_is_not_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let api = api("127.0.0.1:9".parse().unwrap(), Some(path.clone()));
        let told = format!("{:?}", api.credentials().unwrap_err());
        assert!(told.contains(&path.display().to_string()) && told.contains("remedy"), "{told}");
        std::fs::write(&path, "0123abc\n").unwrap();
        let value = api.credentials().unwrap();
        assert_eq!(value, "Bearer 0123abc");
        assert!(!format!("{value:?}").contains("0123"));
    }
}

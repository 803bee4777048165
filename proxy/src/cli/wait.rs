//! `outrigger wait`: ends when the sidecar of this pod serves. The kubelet runs it in the sidecar's container before it starts
//! what comes after (`lifecycle.postStart`), and shows what it wrote where it fails. With `--app-ended` it ends when the pod's
//! application has: the kubelet tells a classic sidecar to stop when that hook (`lifecycle.preStop`) is over.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::time::Instant;

use super::Failure;
use crate::base::names::Named;
use crate::base::units::Span;
use crate::dataplane::app_runs;

#[derive(Args, Debug)]
#[command(after_help = "Example:
  outrigger wait --timeout 30s
  outrigger wait --app-ended

Exit codes: 0 the sidecar serves, or the application has ended; 3 it did not in time, and what is missing.")]
pub(crate) struct WaitArgs {
    /// How long to wait
    #[arg(long, env = "OUTRIGGER_WAIT_TIMEOUT", value_name = "DURATION", default_value = "2m")]
    timeout: Span,
    /// Wait until the other containers of the pod have ended, for as long as the kubelet lets it
    #[arg(long, requires_all = ["namespace", "name"], conflicts_with = "timeout")]
    app_ended: bool,
    /// The pod's namespace
    #[arg(long, env = "OUTRIGGER_NAMESPACE", value_name = "NS")]
    namespace: Option<String>,
    /// The pod's name
    #[arg(long, env = "OUTRIGGER_NAME", value_name = "NAME")]
    name: Option<String>,
    /// The node agent's enrolment socket
    #[arg(long, env = "OUTRIGGER_NODE", value_name = "PATH", default_value = "/run/outrigger/node.sock")]
    node: PathBuf,
}

/// Runs `outrigger wait`.
pub(crate) fn run(args: &WaitArgs) -> Result<ExitCode, Failure> {
    if let (true, Some(namespace), Some(name)) = (args.app_ended, &args.namespace, &args.name) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let pod = Named::new(namespace.as_str(), name.as_str());
        return runtime.block_on(app_ended(&args.node, &pod)).map(|()| ExitCode::SUCCESS);
    }
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, proxy_common::PORT_METRICS));
    ready_within(at, args.timeout.0).map(|()| ExitCode::SUCCESS)
}

fn ready_within(at: SocketAddr, at_most: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + at_most;
    loop {
        let missing = match ask(at) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(missing)) => missing,
            Err(error) => format!("nothing answers at {at}: {error}"),
        };
        if Instant::now() + POLL > deadline {
            let causes = [format!("the sidecar does not serve after {}", Span(at_most))];
            let causes = causes.into_iter().chain(missing.lines().map(str::to_owned));
            return Err(Failure::environment_of(causes.chain(["remedy: look at the sidecar's log".to_owned()])));
        }
        std::thread::sleep(POLL);
    }
}

/// Returns when no process of the pod's application runs. An agent that does not answer may be about to be replaced.
async fn app_ended(node: &Path, pod: &Named) -> Result<(), Failure> {
    let mut heard = Instant::now();
    loop {
        match app_runs(node, pod).await {
            Ok(true) => heard = Instant::now(),
            Ok(false) => return Ok(()),
            Err(error) if heard.elapsed() > UNHEARD_MAX => {
                let remedy = "look whether the node agent runs; connections of the pod's application are refused from now on";
                return Err(Failure::environment(format!("whether the pod's application runs is not known: {error}"), remedy));
            }
            Err(_not_now) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Is it ready? If not, what is missing.
fn ask(at: SocketAddr) -> std::io::Result<Result<(), String>> {
    let mut stream = TcpStream::connect_timeout(&at, ANSWER_MAX)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok(if head.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(body.trim_end().to_owned()) })
}

/// Each moment is one by which the app starts later.
const POLL: Duration = Duration::from_millis(5);
/// By this much a pod may end later.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// As long as it takes to replace an agent, and then some.
const UNHEARD_MAX: Duration = Duration::from_secs(10);
const ANSWER_MAX: Duration = Duration::from_secs(1);
const ANSWER_BYTES_MAX: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

    use super::*;
    use crate::admin::routes::{Inspect, public};
    use crate::admin::{Admin, Door, listen};

    /// Ready from the question of this number on.
    struct After(u32, AtomicU32);

    impl Inspect for After {
        fn metrics(&self) -> String {
            String::new()
        }

        fn ready(&self) -> Result<(), String> {
            let asked = self.1.fetch_add(1, Ordering::Relaxed);
            if asked >= self.0 { Ok(()) } else { Err("no identity yet\nnot enrolled yet".to_owned()) }
        }
    }

    fn wait_for(process: After, at_most: Duration) -> Result<(), Failure> {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let at = listener.local_addr().unwrap();
        let _admin = Admin::start(vec![(Door::Address(listener), public(Arc::new(process)))]).unwrap();
        ready_within(at, at_most)
    }

    #[test]
    fn the_wait_ends_when_the_sidecar_is_ready() {
        wait_for(After(3, AtomicU32::new(0)), Duration::from_secs(10)).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_application_is_waited_for_and_an_agent_that_is_away_not_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node.sock");
        let pod = Named::new("shop", "web-1");
        let begun = Instant::now();
        let causes = app_ended(&path, &pod).await.unwrap_err().causes;
        assert!(causes[0].starts_with("whether the pod's application runs is not known: "), "{causes:?}");
        assert!(begun.elapsed() >= UNHEARD_MAX && begun.elapsed() < UNHEARD_MAX * 2);
        let agent = tokio::net::UnixListener::bind(&path).unwrap();
        let answers = async {
            for answer in [
                r#"{"last":{"appRuns":true}}"#,
                r#"{"error":{"text":"later","remedy":"ask again"}}"#,
                r#"{"last":{"appRuns":false}}"#,
            ] {
                let (mut stream, _) = agent.accept().await.unwrap();
                let mut line = String::new();
                BufReader::new(&mut stream).read_line(&mut line).await.unwrap();
                assert!(line.contains(r#""purpose":"last""#), "{line}");
                stream.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
            }
        };
        let (ended, ()) = tokio::join!(app_ended(&path, &pod), answers);
        ended.unwrap();
    }

    #[test]
    fn a_sidecar_that_is_not_ready_in_time_is_told_with_what_is_missing() {
        let causes = wait_for(After(u32::MAX, AtomicU32::new(0)), Duration::from_millis(50)).unwrap_err().causes;
        let expected =
            ["the sidecar does not serve after 50ms", "no identity yet", "not enrolled yet", "remedy: look at the sidecar's log"];
        assert_eq!(causes, expected);
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let causes = ready_within(nobody, Duration::from_millis(20)).unwrap_err().causes;
        assert!(causes[1].starts_with("nothing answers at 127.0.0.1:"), "{causes:?}");
    }
}

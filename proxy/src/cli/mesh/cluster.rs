//! The control planes of a cluster, each asked where it runs: its API is at its pod's loopback address alone, behind a token in
//! that pod.
//!
//! `kubectl exec` runs `outrigger get --raw` in each pod, with the rights of whoever asks: nothing is opened in the cluster for
//! it, and who may enter those pods could read as much anyway. Only reading goes this way.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::super::client::{ANSWER_BYTES_MAX, API};
use super::super::install::manifest::NAMESPACE;
use super::super::{Failure, warn};
use super::merge::{self, STATUS};

/// The replicas that answer, by their pods' names.
#[derive(Debug)]
pub(crate) struct Cluster(Vec<String>);

impl Cluster {
    /// Those of the cluster that kubectl works with.
    ///
    /// # Errors
    /// There is no kubectl, the cluster does not let pods be listed, or none of them serves.
    pub(super) fn find() -> Result<Self, Failure> {
        let said = runtime()?.block_on(kubectl(&["get", "pods", &format!("--selector={PODS}"), "--output=json"]))?;
        let pods: Value = serde_json::from_slice(&said).map_err(|error| {
            Failure::environment(format!("kubectl does not list pods: {error}"), "see what `kubectl get pods --output=json` says")
        })?;
        let pods = serving(&pods);
        if pods.is_empty() {
            let what = format!("no control plane serves in the namespace {NAMESPACE} of this cluster");
            return Err(Failure::environment(
                what,
                "`outrigger doctor --kubernetes` tells why, and `outrigger install` installs one; the kubeconfig says which cluster it is",
            ));
        }
        Ok(Self(pods))
    }

    /// What all of them say.
    ///
    /// # Errors
    /// None of them answers: what the first one's pod said.
    pub(super) fn get(&self, path: &str) -> Result<Value, Failure> {
        let said = runtime()?.block_on(join_all(self.0.iter().map(|pod| ask(pod, path))));
        let (mut answers, mut silent) = (Vec::new(), Vec::new());
        for (pod, said) in self.0.iter().zip(said) {
            match said {
                Ok(answer) => answers.push((pod.clone(), answer)),
                Err(failure) => silent.push((pod.clone(), failure)),
            }
        }
        if answers.is_empty() {
            // There is one, for there is a pod.
            return silent.into_iter().next().map_or(Ok(Value::Null), |(_pod, failure)| Err(failure));
        }
        let silent: Vec<_> = silent.into_iter().map(|(pod, failure)| (pod, failure.to_string())).collect();
        if path != STATUS {
            for (pod, reason) in &silent {
                warn(&format!("{pod} does not answer, and what it alone knows is missing: {reason}"));
            }
        }
        Ok(merge::merged(path, answers, silent))
    }
}

/// Asks one replica.
async fn ask(pod: &str, path: &str) -> Result<Value, Failure> {
    let api = API.to_string();
    let words = ["exec", pod, "--container=control", "--", "/outrigger", "get", "--api", &api, "--raw", path];
    let said = kubectl(&words).await?;
    serde_json::from_slice(&said).map_err(|error| {
        Failure::environment(format!("{pod}: its answer cannot be read: {error}"), "use the command of the mesh's version")
    })
}

/// Runs kubectl in the namespace of the mesh, and returns what it prints. Cancel-safe: the program ends with the future.
async fn kubectl(words: &[&str]) -> Result<Vec<u8>, Failure> {
    let mut command = Command::new("kubectl");
    command.args(["--namespace", NAMESPACE]).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let ran = async {
        let mut child = command.spawn()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = tokio::try_join!(whole(stdout, ANSWER_BYTES_MAX), whole(stderr, COMPLAINT_BYTES_MAX))?;
        io::Result::Ok((child.wait().await?.success(), stdout, stderr))
    };
    match tokio::time::timeout(ANSWER_AT_MOST, ran).await {
        Ok(Ok((true, stdout, _))) => Ok(stdout),
        Ok(Ok((false, _, stderr))) => Err(complaint(&String::from_utf8_lossy(&stderr))),
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Err(Failure::environment(
            "kubectl is not in PATH: it is how the control plane of a cluster is asked",
            "install kubectl; or name the API of a mesh outside of Kubernetes with --api",
        )),
        Ok(Err(error)) => Err(Failure::environment(format!("cannot run kubectl: {error}"), "see that kubectl can be run")),
        Err(_elapsed) => Err(Failure::environment(
            format!("kubectl did not end within {} s", ANSWER_AT_MOST.as_secs()),
            format!("see whether `kubectl --namespace {NAMESPACE} get pods` answers"),
        )),
    }
}

/// All that comes, up to a limit, and no more.
async fn whole(from: Option<impl AsyncRead + Unpin>, bytes_max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        from.take(u64::try_from(bytes_max).unwrap_or(u64::MAX)).read_to_end(&mut bytes).await?;
    }
    Ok(bytes)
}

/// What kubectl, or our command in the pod, said as it failed; and what to do.
fn complaint(stderr: &str) -> Failure {
    // What the command in the pod would have done about it is for who is in the pod.
    let is_told = |line: &&str| !line.is_empty() && !line.starts_with(ENDED) && !line.starts_with("remedy: ");
    let lines: Vec<&str> = stderr.lines().map(str::trim).filter(is_told).collect();
    let remedy = if lines.iter().any(|line| line.contains("forbidden")) {
        format!("it takes the rights to get and list pods, and to get and create pods/exec, in the namespace {NAMESPACE}")
    } else {
        format!(
            "see whether `kubectl --namespace {NAMESPACE} get pods` answers; `outrigger doctor --kubernetes` tells what does not run"
        )
    };
    let lines = lines.into_iter().map(|line| line.strip_prefix("outrigger: ").unwrap_or(line).to_owned());
    Failure::environment_of(
        std::iter::once("the mesh of the cluster cannot be asked".to_owned()).chain(lines).chain([format!("remedy: {remedy}")]),
    )
}

/// The pods among those listed whose control plane serves.
fn serving(pods: &Value) -> Vec<String> {
    let items = pods.pointer("/items").and_then(Value::as_array).into_iter().flatten();
    let is_serving = |pod: &&Value| {
        let mut conditions = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
        let is = |condition: &Value, field: &str, text: &str| condition.get(field).is_some_and(|value| value == text);
        let is_ready = conditions.any(|condition| is(condition, "type", "Ready") && is(condition, "status", "True"));
        is_ready && pod.pointer("/metadata/deletionTimestamp").is_none()
    };
    items.filter(is_serving).filter_map(|pod| pod.pointer("/metadata/name")?.as_str().map(str::to_owned)).collect()
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// How the pods of the control plane are labelled.
const PODS: &str = "app.kubernetes.io/part-of=outrigger,app.kubernetes.io/name=control";
/// How long a question may take: more than the command in the pod gives its own.
const ANSWER_AT_MOST: Duration = Duration::from_secs(30);
const COMPLAINT_BYTES_MAX: usize = 64 << 10;
/// What kubectl says behind what the command itself said.
const ENDED: &str = "command terminated with exit code";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn replicas_that_are_not_ready_or_on_their_way_out_are_not_asked() {
        let pod = |name: &str, ready: &str| {
            let conditions = json!([{ "type": "PodScheduled", "status": "True" }, { "type": "Ready", "status": ready }]);
            json!({ "metadata": { "name": name }, "status": { "conditions": conditions } })
        };
        let mut leaving = pod("control-c", "True");
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let pods = [pod("control-a", "True"), pod("control-b", "False"), leaving];
        assert_eq!(serving(&json!({ "items": pods })), ["control-a"]);
        assert_eq!(serving(&Value::Null), Vec::<String>::new());
    }

    #[test]
    fn who_may_not_is_told_which_rights_it_takes() {
        let said =
            "Error from server (Forbidden): pods \"control-a\" is forbidden: User \"ada\" cannot create resource \"pods/exec\"\n";
        let told = complaint(said).to_string();
        assert!(told.contains("User \"ada\"") && told.contains("pods/exec, in the namespace outrigger-system"), "{told}");
    }

    #[test]
    fn what_the_command_in_the_pod_said_is_told_without_its_exit_code_and_with_one_remedy() {
        let told =
            complaint("outrigger: the control plane does not answer\n  remedy: wait\ncommand terminated with exit code 3\n");
        let told = told.to_string();
        assert!(told.contains("the control plane does not answer") && !told.contains("exit code"), "{told}");
        assert!(told.contains("doctor --kubernetes") && told.matches("remedy: ").count() == 1, "{told}");
    }
}

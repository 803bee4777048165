//! Namespaces and pods of the usual shape: what a team would write that knows nothing of a mesh.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, PATIENCE, TESTS_IMAGE};
use e2e::mesh::{Said, finish, wait_for};
use serde_json::{Map, Value, json};

/// What Pod Security `restricted` asks of a container.
fn restricted() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "runAsNonRoot": true,
        "capabilities": { "drop": ["ALL"] },
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// A container of the tests' image; `more` is what else it says.
pub(super) fn container(name: &str, more: Value) -> Value {
    let usual = json!({
        "name": name,
        "image": TESTS_IMAGE,
        "imagePullPolicy": "Never",
        "securityContext": restricted(),
    });
    with(usual, more)
}

/// A container that does nothing, and where commands are run.
pub(super) fn idle(name: &str) -> Value {
    container(name, json!({ "command": ["/bin/busybox", "sleep", "infinity"] }))
}

/// A pod of these containers, with its name as its label `app`; `more` is what else its spec says.
pub(super) fn pod(name: &str, containers: &[Value], more: Value) -> Value {
    let usual = json!({ "containers": containers, "terminationGracePeriodSeconds": 2 });
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "labels": { "app": name } },
        "spec": with(usual, more),
    })
}

/// A Service `name` of the pods with the label `app: APP`; `more` is what else its spec says.
pub(super) fn service(name: &str, app: &str, port: u16, target: &Value, more: Value) -> Value {
    let usual = json!({ "selector": { "app": app }, "ports": [{ "name": "http", "port": port, "targetPort": target }] });
    json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": name }, "spec": with(usual, more) })
}

/// An object with the fields of another one.
pub(super) fn with(object: Value, more: Value) -> Value {
    let fields = |value| if let Value::Object(fields) = value { fields } else { Map::new() };
    let mut object = fields(object);
    object.extend(fields(more));
    object.into()
}

/// A request of this machine's, which is in no mesh: what came of it, and the body.
pub(super) fn from_node(url: &str) -> Result<Said> {
    finish(Command::new("curl").args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--max-time", "3", url]), PATIENCE)
}

/// A namespace of the cluster, which is deleted when this is dropped.
pub(super) struct Namespace<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) name: &'static str,
}

impl<'a> Namespace<'a> {
    /// One whose pods are injected, and which lets none in that is not `restricted`.
    pub(super) fn injected(cluster: &'a Cluster, name: &'static str) -> Result<Self> {
        Self::labelled(cluster, name, "outrigger.dev/inject: enabled, pod-security.kubernetes.io/enforce: restricted")
    }

    /// One that says nothing of a mesh.
    pub(super) fn plain(cluster: &'a Cluster, name: &'static str) -> Result<Self> {
        Self::labelled(cluster, name, "")
    }

    /// One with these labels, in flow style.
    pub(super) fn labelled(cluster: &'a Cluster, name: &'static str, labels: &str) -> Result<Self> {
        cluster.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{ name: {name}, labels: {{ {labels} }} }}\n"))?;
        wait_for("the namespace's service account", PATIENCE, || {
            cluster.run(&["--namespace", name, "get", "serviceaccount", "default"])
        })?;
        Ok(Self { cluster, name })
    }

    /// A Deployment `app` of the tests' image, with a service account of its own. `container` is what else its container
    /// says, lines of YAML.
    pub(super) fn deployment(&self, app: &str, replicas: usize, container: &str) -> Result<()> {
        let Self { cluster, name: namespace } = self;
        let restricted = restricted();
        let container: String = container.lines().map(|line| format!("          {}\n", line.trim_end())).collect();
        cluster.apply(&format!(
            "apiVersion: v1
kind: ServiceAccount
metadata: {{ name: {app}, namespace: {namespace} }}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{ name: {app}, namespace: {namespace} }}
spec:
  replicas: {replicas}
  selector: {{ matchLabels: {{ app: {app} }} }}
  template:
    metadata: {{ labels: {{ app: {app} }} }}
    spec:
      serviceAccountName: {app}
      terminationGracePeriodSeconds: 10
      containers:
        - name: {app}
          image: {TESTS_IMAGE}
          imagePullPolicy: Never
          securityContext: {restricted}
{container}"
        ))
    }

    /// `web`, an echo service behind a Service at port 80.
    pub(super) fn web(&self, replicas: usize) -> Result<()> {
        let ready = "readinessProbe: { httpGet: { path: /served, port: 8080 }, periodSeconds: 1 }\nlivenessProbe: { tcpSocket: { port: 8080 }, periodSeconds: 1, failureThreshold: 2 }";
        self.deployment("web", replicas, &format!("args: [echo]\nports: [{{ name: http, containerPort: 8080 }}]\n{ready}"))?;
        self.cluster.apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: web, namespace: {} }}\nspec:\n  selector: {{ app: web }}\n  ports: [{{ name: http, port: 80, targetPort: http }}]\n",
            self.name
        ))
    }

    /// A pod for commands.
    pub(super) fn client(&self, app: &str) -> Result<()> {
        self.deployment(app, 1, "command: [/bin/busybox, sleep, infinity]")
    }

    /// Makes these objects in it, whatever comes of it.
    pub(super) fn try_make(&self, objects: &[Value]) -> Result<Said> {
        self.cluster.try_apply_in(self.name, &json!({ "apiVersion": "v1", "kind": "List", "items": objects }).to_string())
    }

    /// Makes these objects in it.
    pub(super) fn make(&self, objects: &[Value]) -> Result<()> {
        self.try_make(objects)?.ok().map(drop)
    }

    /// Runs `kubectl` in it, which must succeed.
    pub(super) fn run(&self, words: &[&str]) -> Result<String> {
        self.cluster.run(&[&["--namespace", self.name], words].concat())
    }

    /// One object of it, as it is now: `pod/NAME`.
    pub(super) fn get(&self, what: &str) -> Result<Value> {
        self.cluster.get(&["--namespace", self.name, what])
    }

    /// Waits until objects have a condition; tells of the namespace where they do not.
    pub(super) fn wait(&self, condition: &str, limit: Duration, what: &[&str]) -> Result<()> {
        let (condition, timeout) = (format!("--for=condition={condition}"), format!("--timeout={}s", limit.as_secs()));
        let words = [&["--namespace", self.name, "wait", &condition, &timeout], what].concat();
        let said = finish(&mut self.cluster.kubectl(words), limit + PATIENCE)?;
        ensure!(said.code == 0, "{}{}", said.all(), self.cluster.story(self.name));
        Ok(())
    }

    /// The address of a pod.
    pub(super) fn address_of(&self, pod: &str) -> Result<String> {
        let pod = self.get(&format!("pod/{pod}"))?;
        pod["status"]["podIP"].as_str().map(str::to_owned).with_context(|| format!("no address in {pod}"))
    }

    /// `curl` in a container of a pod: status and body.
    pub(super) fn ask(&self, pod: &str, container: &str, words: &[&str]) -> Result<(u16, String)> {
        let base = ["/bin/curl", "--silent", "--show-error", "--max-time", "5", "--write-out", "\n%{http_code}"];
        let said = self.cluster.exec(self.name, pod, container, &[&base, words].concat())?;
        let (body, status) = said.stdout.rsplit_once('\n').with_context(|| format!("curl said {}", said.all()))?;
        Ok((status.parse().with_context(|| format!("curl said {}", said.all()))?, body.to_owned()))
    }

    /// Waits until all of a Deployment runs.
    pub(super) fn ready(&self, app: &str) -> Result<()> {
        self.cluster.rolled_out(self.name, &format!("deployment/{app}"), PATIENCE)
    }

    /// The pods of a Deployment that are not about to end.
    pub(super) fn pods(&self, app: &str) -> Result<Vec<Value>> {
        let list = self.cluster.get(&["--namespace", self.name, "pods", "--selector", &format!("app={app}")])?;
        let pods = list["items"].as_array().context("no items")?;
        Ok(pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).cloned().collect())
    }

    /// The address of the first pod of a Deployment.
    pub(super) fn address(&self, app: &str) -> Result<String> {
        let pods = self.pods(app)?;
        let pod = pods.first().with_context(|| format!("{app} has no pod"))?;
        pod["status"]["podIP"].as_str().map(str::to_owned).with_context(|| format!("no address in {pod}"))
    }

    /// Runs a command in the first pod of a Deployment.
    pub(super) fn exec(&self, app: &str, words: &[&str]) -> Result<Said> {
        self.cluster.exec(self.name, &format!("deployment/{app}"), app, words)
    }

    /// `curl` in the first pod of a Deployment: status and body.
    pub(super) fn curl(&self, app: &str, words: &[&str]) -> Result<(u16, String)> {
        self.ask(&format!("deployment/{app}"), app, words)
    }

    /// Waits until a call is answered with `status`.
    pub(super) fn until(&self, app: &str, words: &[&str], status: u16) -> Result<String> {
        let called = wait_for(&format!("status {status} of {}", words.join(" ")), PATIENCE, || {
            let (seen, body) = self.curl(app, words)?;
            ensure!(seen == status, "it is {seen}: {body}");
            Ok(body)
        });
        called.with_context(|| self.cluster.story(self.name))
    }

    /// What a sidecar counts, as the pod `from` may read it.
    pub(super) fn metrics(&self, from: &str, of: &str) -> Result<String> {
        let (status, text) = self.curl(from, &[&format!("http://{}:14021/metrics", self.address(of)?)])?;
        ensure!(status == 200, "the sidecar of {of} answers {status}");
        Ok(text)
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        // Not waited for: pods take their time to end.
        self.cluster.run(&["delete", "namespace", self.name, "--wait=false"]).ok();
    }
}

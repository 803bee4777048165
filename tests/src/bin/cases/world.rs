//! What cases share: documents, and pods of the usual shape.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Answer, Mesh, PATIENCE, Pod, Said, binary, finish, wait_for};
use e2e::programs;
use e2e::rung::Rung;
use serde_json::Value;

/// A user of this machine without any right.
pub(crate) struct Nobody(tempfile::TempDir);

impl Nobody {
    /// The build folder need not be open to others: the binary is copied to where it can be run.
    pub(crate) fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("outrigger-nobody-").tempdir()?;
        let open = || std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open())?;
        let copy = folder.path().join("outrigger");
        std::fs::copy(binary(), &copy)?;
        std::fs::set_permissions(&copy, open())?;
        Ok(Self(folder))
    }

    /// Runs `outrigger` to its end.
    pub(crate) fn finish(&self, arguments: &[&str]) -> Result<Said> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(self.0.path().join("outrigger")).args(arguments);
        finish(command.stdin(Stdio::null()), PATIENCE)
    }

    /// A file that it may read.
    pub(crate) fn file(&self, name: &str, text: &str) -> Result<String> {
        let path = self.0.path().join(name);
        std::fs::write(&path, text)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        Ok(path.to_string_lossy().into_owned())
    }
}

/// A server and its caller, in a mesh that comes down behind them.
pub(crate) struct Pair {
    pub(crate) web: Pod,
    pub(crate) caller: Pod,
    pub(crate) mesh: Mesh,
}

impl Pair {
    /// In `namespace`, the server behind a Service at port 80; the first call is answered.
    pub(crate) fn make(mesh: Mesh, namespace: &str) -> Result<Self> {
        mesh.apply(&service(namespace, "web", 80, 8080))?;
        let web = echo(&mesh, &format!("{namespace}/web"), "web")?;
        let caller = client(&mesh, &format!("{namespace}/caller"))?;
        until(&caller, "http://web/", 200)?;
        Ok(Self { web, caller, mesh })
    }
}

/// A Service that selects `app: NAME`.
pub(crate) fn service(namespace: &str, name: &str, port: u16, target: u16) -> String {
    service_of(namespace, name, name, port, target)
}

/// A Service that selects `app: APP`.
pub(crate) fn service_of(namespace: &str, name: &str, app: &str, port: u16, target: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec:\n  selector: {{ app: {app} }}\n  ports: [{{ port: {port}, targetPort: {target} }}]\n"
    )
}

/// An HTTPRoute on a Service of its own namespace; `rules` is the YAML of its list, in flow style.
pub(crate) fn route(namespace: &str, name: &str, service: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec:\n  parentRefs: [{{ group: '', kind: Service, name: {service} }}]\n  rules: {rules}\n"
    )
}

/// A document of one of our own kinds; `spec` is its YAML, in flow style.
pub(crate) fn own(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: outrigger.dev/v1alpha1\nkind: {kind}\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {spec}\n"
    )
}

/// A pod that runs the echo service, listening.
pub(crate) fn echo(mesh: &Mesh, name: &str, app: &str) -> Result<Pod> {
    let pod = mesh
        .pod(name)
        .label("app", app)
        .account(app)
        .env("NAME", name)
        .run([programs::shop().into_os_string(), "echo".into()])?;
    pod.wait_listening(8080)?;
    Ok(pod)
}

/// A pod for commands.
pub(crate) fn client(mesh: &Mesh, name: &str) -> Result<Pod> {
    let account = name.rsplit('/').next().unwrap_or(name).to_owned();
    mesh.pod(name).account(&account).idle()
}

/// Waits until a GET of `url` from the pod is answered with `status`.
pub(crate) fn until(pod: &Pod, url: &str, status: u16) -> Result<Answer> {
    wait_for(&format!("status {status} of {url}"), PATIENCE, || expect(pod, &[url], status))
}

/// A `curl` that must be answered with `status`.
pub(crate) fn expect(pod: &Pod, arguments: &[&str], status: u16) -> Result<Answer> {
    let answer = pod.curl(arguments)?;
    ensure!(
        answer.status == status,
        "curl {} was answered with {}, not {status}: {}",
        arguments.join(" "),
        answer.status,
        answer.said.all()
    );
    Ok(answer)
}

/// The client that an app behind the sidecar of `server` sees of one at `client`: nftables shows it its sidecar.
pub(crate) fn seen_client(client: &Pod, server: &Pod) -> Result<String> {
    match Rung::asked() {
        Rung::Ebpf => client.address(),
        Rung::Nftables => server.address(),
    }
}

/// How many pins stand of the kernel programs; none on another rung.
pub(crate) fn pins() -> usize {
    std::fs::read_dir("/run/outrigger/bpf").map_or(0, |pins| pins.count())
}

/// What the echo service said.
pub(crate) fn said(answer: &Answer) -> Result<Value> {
    serde_json::from_str(&answer.body).with_context(|| format!("no JSON: {}", answer.body))
}

/// A metric of a sidecar: the sum of the samples of `name` whose labels hold all of `parts`.
pub(crate) fn metric(pod: &Pod, name: &str, parts: &[&str]) -> Result<f64> {
    let text = pod.metrics()?;
    Ok(text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| parts.iter().all(|part| line.contains(part)))
        .filter_map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()))
        .sum())
}

//! Who the cluster's parts are to each other: one authority, a certificate for each, and the configuration of its clients.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use super::{NODE, NODE_ADDRESS, STATE};
use crate::shell;

/// Who talks to the API server: the file's name, then organisation and name as Kubernetes' authorizers read them.
const CLIENTS: [(&str, &str); 5] = [
    ("admin", "/O=system:masters/CN=admin"),
    ("controller-manager", "/CN=system:kube-controller-manager"),
    ("scheduler", "/CN=system:kube-scheduler"),
    ("proxy", "/CN=system:kube-proxy"),
    ("node", "/O=system:nodes/CN=system:node:node1"),
];
/// The first address of the Services' range is the API server's.
const API_SERVICE: &str = "10.96.0.1";
const CURVE: &str = "ec_paramgen_curve:prime256v1";

/// Makes all of them, unless they are there.
pub(super) fn make(root: &Path) -> Result<()> {
    let folder = folder();
    if folder.join("done").exists() {
        return Ok(());
    }
    std::fs::create_dir_all(&folder)?;
    // What a certificate says stands on the command line alone: the host's configuration adds nothing.
    std::fs::write(folder.join("openssl.cnf"), "[req]\ndistinguished_name = name\n[name]\n")?;
    let authority = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"];
    certify(root, "ca", "/CN=outrigger-kube", &authority, false)?;
    let names = format!("subjectAltName=IP:{NODE_ADDRESS},IP:{API_SERVICE},DNS:kubernetes.default.svc");
    certify(root, "api", "/CN=kube-apiserver", &[&names, "extendedKeyUsage=serverAuth"], true)?;
    let names = format!("subjectAltName=IP:{NODE_ADDRESS},DNS:{NODE}");
    certify(root, "kubelet", &format!("/CN={NODE}"), &[&names, "extendedKeyUsage=serverAuth"], true)?;
    for (name, subject) in CLIENTS {
        certify(root, name, subject, &["extendedKeyUsage=clientAuth"], true)?;
        configure(name)?;
    }
    let key = path("accounts.key");
    let new = ["genpkey", "-algorithm", "EC", "-pkeyopt", CURVE, "-out", &key];
    shell::output(shell::command(root, "openssl", &new))?;
    let public = ["pkey", "-in", &key, "-pubout", "-out", &path("accounts.pub")];
    shell::output(shell::command(root, "openssl", &public))?;
    Ok(std::fs::write(folder.join("done"), "")?)
}

/// The path of one of their files.
pub(super) fn path(file: &str) -> String {
    folder().join(file).to_string_lossy().into_owned()
}

/// The configuration of the client `name`.
pub(super) fn client(name: &str) -> PathBuf {
    Path::new(STATE).join(format!("{name}.conf"))
}

fn folder() -> PathBuf {
    Path::new(STATE).join("certificates")
}

/// Writes `NAME.key` and `NAME.crt`, signed by the authority or by itself.
fn certify(root: &Path, name: &str, subject: &str, extensions: &[&str], by_authority: bool) -> Result<()> {
    let mut command = shell::command(root, "openssl", &["req", "-x509", "-newkey", "ec", "-pkeyopt", CURVE, "-nodes"]);
    command.args(["-days", "30", "-subj", subject, "-config", &path("openssl.cnf")]);
    command.args(["-keyout", &path(&format!("{name}.key")), "-out", &path(&format!("{name}.crt"))]);
    if by_authority {
        command.args(["-CA", &path("ca.crt"), "-CAkey", &path("ca.key"), "-addext", "basicConstraints=critical,CA:FALSE"]);
    }
    for extension in extensions {
        command.args(["-addext", extension]);
    }
    shell::output(command).map(drop)
}

/// Writes what `name` needs to reach the API server, as JSON, which is YAML.
fn configure(name: &str) -> Result<()> {
    let configuration = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "cluster",
        "clusters": [{ "name": "cluster", "cluster": {
            "server": format!("https://{NODE_ADDRESS}:6443"),
            "certificate-authority": path("ca.crt"),
        } }],
        "users": [{ "name": name, "user": {
            "client-certificate": path(&format!("{name}.crt")),
            "client-key": path(&format!("{name}.key")),
        } }],
        "contexts": [{ "name": "cluster", "context": { "cluster": "cluster", "user": name } }],
    });
    Ok(std::fs::write(client(name), serde_json::to_string_pretty(&configuration)?)?)
}

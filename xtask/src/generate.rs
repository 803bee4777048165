//! `cargo xtask gen`: what is generated is committed, so that a build needs neither protoc nor this step.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::{Stop, setup, shell};

/// One protocol: where its source stands, what the generator calls its code, and where that code is committed.
struct Protocol {
    folder: &'static str,
    source: &'static str,
    generated: &'static str,
    destination: &'static str,
}

const PROTOCOLS: [Protocol; 6] = [
    Protocol {
        folder: "proxy/proto",
        source: "delta.proto",
        generated: "outrigger.delta.v1.rs",
        destination: "proxy/src/delta/envelope.rs",
    },
    Protocol {
        folder: "proxy/proto",
        source: "authority.proto",
        generated: "outrigger.authority.v1.rs",
        destination: "proxy/src/delta/authority.rs",
    },
    Protocol {
        folder: "proxy/proto",
        source: "workload.proto",
        generated: "_.rs",
        destination: "proxy/src/node/workload_proto.rs",
    },
    Protocol {
        folder: "proxy/proto",
        source: "csi.proto",
        generated: "csi.v1.rs",
        destination: "proxy/src/node/kubernetes/csi_proto.rs",
    },
    Protocol {
        folder: "proxy/proto",
        source: "registration.proto",
        generated: "pluginregistration.rs",
        destination: "proxy/src/node/kubernetes/registration_proto.rs",
    },
    Protocol {
        folder: "tests/proto",
        source: "inventory.proto",
        generated: "shop.inventory.v1.rs",
        destination: "tests/src/bin/shop/inventory_proto.rs",
    },
];

/// Writes all generated files below `root`, the workspace's folder; with `check` compares instead.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let mut stale = Vec::new();
    for protocol in &PROTOCOLS {
        let code = generate(root, protocol)?;
        let destination = root.join(protocol.destination);
        if !check {
            std::fs::write(&destination, code).with_context(|| format!("cannot write {}", destination.display()))?;
        } else if std::fs::read_to_string(&destination).unwrap_or_default() != code {
            stale.push(protocol.destination);
        }
    }
    if stale.is_empty() {
        return if check { Ok(()) } else { references(root) };
    }
    Err(Stop::No(format!("generated code is stale: {}; run `cargo xtask gen`", stale.join(", "))).into())
}

/// Writes what is made from the documents' structs: the reference of fields and the resource definitions. The structs are
/// the library's own, so it is a test of the library that writes them; as a test it compares them.
fn references(root: &Path) -> Result<()> {
    let mut test = shell::cargo(root, &["test", "--quiet", "--lib"]);
    test.args(setup::SELECTION).args(["--", "model::reference", "model::definition"]);
    test.env("UPDATE_EXPECT", "1");
    shell::run(test)
}

/// The code of one protocol, formatted as it is committed.
fn generate(root: &Path, protocol: &Protocol) -> Result<String> {
    let Protocol { folder, source, generated, destination: _ } = protocol;
    let descriptors =
        protox::compile([source], [root.join(folder)]).with_context(|| format!("cannot compile {folder}/{source}"))?;
    let out = root.join("target/gen");
    std::fs::create_dir_all(&out)?;
    tonic_prost_build::configure().out_dir(&out).compile_fds(descriptors)?;
    let file = out.join(generated);
    let code = std::fs::read_to_string(&file).with_context(|| format!("{source} generated no {generated}"))?;
    let text = format!(
        "// Generated from {folder}/{source} by `cargo xtask gen`; edits are lost.\n#![allow(clippy::all, clippy::pedantic, clippy::restriction, unreachable_pub, dead_code, unused_qualifications, missing_docs, reason = \"generated code\")]\n\n{code}"
    );
    std::fs::write(&file, text)?;
    let path = file.to_string_lossy().into_owned();
    let config = root.join(".rustfmt.toml").to_string_lossy().into_owned();
    shell::output(shell::command(root, "rustfmt", &["--edition", "2024", "--config-path", &config, &path]))?;
    Ok(std::fs::read_to_string(&file)?)
}

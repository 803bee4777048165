//! `cargo xtask gen`: what is generated is committed, so that a build needs neither protoc nor this step.

use std::path::Path;

use anyhow::{Context as _, Result};

/// Where each protocol's generated code stands, by its package.
const PROTOCOLS: [(&str, &str, &str); 3] = [
    ("delta.proto", "outrigger.delta.v1.rs", "delta/envelope.rs"),
    ("authority.proto", "outrigger.authority.v1.rs", "delta/authority.rs"),
    ("workload.proto", "_.rs", "node/workload_proto.rs"),
];

/// Writes all generated files below `root`, the workspace's folder.
pub(crate) fn run(root: &Path) -> Result<()> {
    let protocols = root.join("proxy/proto");
    for (source, generated, destination) in PROTOCOLS {
        let descriptors = protox::compile([source], [&protocols]).with_context(|| format!("cannot compile {source}"))?;
        let out = root.join("target/gen");
        std::fs::create_dir_all(&out)?;
        tonic_prost_build::configure().out_dir(&out).compile_fds(descriptors)?;
        let code = std::fs::read_to_string(out.join(generated)).with_context(|| format!("{source} generated no {generated}"))?;
        let text = format!(
            "// Generated from proxy/proto/{source} by `cargo xtask gen`; edits are lost.\n#![allow(clippy::all, clippy::pedantic, unreachable_pub, dead_code, unused_qualifications, missing_docs, reason = \"generated code\")]\n\n{code}"
        );
        std::fs::write(root.join("proxy/src").join(destination), text)?;
    }
    Ok(())
}

//! Where the programs stand that run inside pods: the third-party ones under `target/`, and the demo's own.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::mesh::target;

/// The unpacked root of third-party programs.
pub fn third_party() -> PathBuf {
    target().join("third-party/root")
}

/// A third-party program by its path below the unpacked root, as `usr/sbin/nginx`.
pub fn third(path: &str) -> Result<PathBuf> {
    let file = third_party().join(path);
    ensure!(file.exists(), "{} is not there; run `cargo xtask setup`", file.display());
    Ok(file)
}

/// Where third-party programs find their libraries: the value of `LD_LIBRARY_PATH`.
pub fn libraries() -> String {
    libraries_below(&third_party())
}

/// The same where the unpacked root is seen at `root`.
pub fn libraries_below(root: &Path) -> String {
    let folders = ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "lib/x86_64-linux-gnu"];
    let list: Vec<String> = folders.iter().map(|folder| root.join(folder).display().to_string()).collect();
    list.join(":")
}

/// The Python of the tests' environment.
pub fn python() -> Result<PathBuf> {
    let file = target().join("venv/bin/python");
    ensure!(file.exists(), "{} is not there; run `cargo xtask setup`", file.display());
    Ok(file)
}

/// The demo's shop, one binary with a role argument.
pub fn shop() -> PathBuf {
    target().join("debug/shop")
}

/// The server that hangs up, and its client.
pub fn ledger() -> PathBuf {
    target().join("debug/ledger")
}

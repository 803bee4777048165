//! The cluster's programs, from pinned Go modules.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::programs;
use crate::{Stop, setup, shell};

/// A module below `tests/kube`, and what its build needs.
struct Module {
    name: &'static str,
    /// The runtime's interpreter of seccomp profiles is a library in C; without its tag no pod starts.
    with_c: bool,
}

const MODULES: [Module; 3] =
    [Module { name: "kubernetes", with_c: false }, Module { name: "node", with_c: true }, Module { name: "dns", with_c: false }];

/// Builds what is not there in the version that its module names.
pub(super) fn run(root: &Path) -> Result<()> {
    setup::cluster(root)?;
    std::fs::create_dir_all(programs(root))?;
    for module in &MODULES {
        build(root, module).with_context(|| format!("tests/kube/{}", module.name))?;
    }
    Ok(())
}

/// Is there what the cluster is built with?
pub(super) fn has_go() -> bool {
    shell::has("go")
}

fn build(root: &Path, module: &Module) -> Result<()> {
    let folder = root.join("tests/kube").join(module.name);
    let wanted = std::fs::read(folder.join("go.sum"))?;
    let built = programs(root).join(format!("{}.sum", module.name));
    if std::fs::read(&built).is_ok_and(|sum| sum == wanted) {
        return Ok(());
    }
    if !has_go() {
        return Err(Stop::Missing("Go builds the cluster's programs, and is not there; see https://go.dev/dl".to_owned()).into());
    }
    setup::step(&format!("building {} (minutes, the first time)", module.name), || {
        let mut go = shell::command(&folder, "go", &["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"]);
        if module.with_c {
            go.arg("-tags=seccomp");
        }
        go.arg("-o").arg(programs(root).join("")).arg("tool");
        go.env("CGO_ENABLED", if module.with_c { "1" } else { "0" });
        shell::output(go).map(drop)
    })?;
    std::fs::write(&built, wanted).context("cannot note what was built")
}

//! The cluster's programs, from pinned Go modules.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::programs;
use crate::{Stop, setup, shell};

/// A module below `tests/kube`, and what its build needs.
struct Module {
    name: &'static str,
    built: Built,
    /// The runtime's interpreter of seccomp profiles is a library in C; without its tag no pod starts.
    with_c: bool,
    /// The module whose version its programs shall say that they are of.
    speaks_for: &'static str,
    /// The variables that hold that version. Others compare it, and one of no release is older than any.
    whole: &'static [&'static str],
    /// The variables of its first and of its second number.
    parts: [&'static [&'static str]; 2],
}

/// What is built of a module.
enum Built {
    /// Its tools, into a folder below that of all programs; with no name, into that one.
    Tools(&'static str),
    /// Its tests, as a program of this name.
    Tests(&'static str),
}

/// The cluster's own.
const MODULES: [Module; 4] = [
    Module {
        name: "kubernetes",
        built: Built::Tools(""),
        with_c: false,
        speaks_for: "k8s.io/kubernetes",
        whole: &["k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion"],
        parts: [
            &["k8s.io/component-base/version.gitMajor", "k8s.io/client-go/pkg/version.gitMajor"],
            &["k8s.io/component-base/version.gitMinor", "k8s.io/client-go/pkg/version.gitMinor"],
        ],
    },
    Module { with_c: true, ..Module::plain("node", Built::Tools("")) },
    Module::plain("dns", Built::Tools("")),
    Module {
        name: "helm",
        built: Built::Tools(""),
        with_c: false,
        speaks_for: "helm.sh/helm/v4",
        whole: &["helm.sh/helm/v4/internal/version.version"],
        parts: [&[], &[]],
    },
];

/// The published suite of Gateway API, and the application to which its mesh tests talk.
const SUITE: [Module; 2] =
    [Module::plain("gateway", Built::Tests("gateway-api.test")), Module::plain("echo", Built::Tools("echo"))];

/// SPIRE's server and agent, and what brings the agent's socket into pods. The server's store is a library in C.
const SPIRE: [Module; 2] = [
    Module { with_c: true, ..Module::plain("spire", Built::Tools("spire")) },
    Module::plain("spiffe-csi", Built::Tools("spire")),
];

/// Builds what the cluster runs on and is not there in the version that its module names.
pub(crate) fn run(root: &Path) -> Result<()> {
    setup::cluster(root)?;
    all(root, &MODULES)
}

/// The same for the published suite of Gateway API.
pub(crate) fn suite(root: &Path) -> Result<()> {
    all(root, &SUITE)
}

/// The same for SPIRE.
pub(crate) fn spire(root: &Path) -> Result<()> {
    all(root, &SPIRE)
}

fn all(root: &Path, modules: &[Module]) -> Result<()> {
    std::fs::create_dir_all(programs(root))?;
    for module in modules {
        build(root, module).with_context(|| format!("tests/kube/{}", module.name))?;
    }
    Ok(())
}

/// Is there what the cluster is built with?
pub(crate) fn has_go() -> bool {
    shell::has("go")
}

/// The sources of a module that the one below `tests/kube` requires.
pub(super) fn sources(root: &Path, of: &str, module: &str) -> Result<PathBuf> {
    let folder = root.join("tests/kube").join(of);
    // It is fetched where it is not there yet; only then its folder is known.
    let said = shell::output(shell::command(&folder, "go", &["mod", "download", "-json", module]))?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    said.get("Dir")
        .and_then(serde_json::Value::as_str)
        .map(PathBuf::from)
        .with_context(|| format!("go does not say where {module} is"))
}

fn build(root: &Path, module: &Module) -> Result<()> {
    let folder = root.join("tests/kube").join(module.name);
    let flags = module.flags(&std::fs::read_to_string(folder.join("go.mod"))?)?;
    let wanted = format!("{}{flags}\n", std::fs::read_to_string(folder.join("go.sum"))?);
    let built = programs(root).join(format!("{}.sum", module.name));
    if std::fs::read_to_string(&built).is_ok_and(|sum| sum == wanted) {
        return Ok(());
    }
    if !has_go() {
        return Err(Stop::Missing("Go builds the cluster's programs, and is not there; see https://go.dev/dl".to_owned()).into());
    }
    setup::step(&format!("building {} (minutes, the first time)", module.name), || {
        let (verb, to, what) = match module.built {
            Built::Tools(below) => (&["build"][..], programs(root).join(below).join(""), "tool"),
            Built::Tests(program) => (&["test", "-c"][..], programs(root).join(program), "."),
        };
        let mut go = shell::command(&folder, "go", verb);
        go.args(["-trimpath", "-buildvcs=false"]).arg(format!("-ldflags={flags}"));
        if module.with_c {
            go.arg("-tags=seccomp");
        }
        go.arg("-o").arg(to).arg(what);
        go.env("CGO_ENABLED", if module.with_c { "1" } else { "0" });
        shell::output(go).map(drop)
    })?;
    std::fs::write(&built, wanted).context("cannot note what was built")
}

impl Module {
    const fn plain(name: &'static str, built: Built) -> Self {
        Self { name, built, with_c: false, speaks_for: "", whole: &[], parts: [&[], &[]] }
    }

    /// What the linker is told, by the versions in `go.mod`.
    fn flags(&self, go_mod: &str) -> Result<String> {
        let mut flags = "-s -w".to_owned();
        if self.speaks_for.is_empty() {
            return Ok(flags);
        }
        let version = version(go_mod, self.speaks_for).with_context(|| format!("go.mod requires no {}", self.speaks_for))?;
        let mut numbers = version.trim_start_matches('v').split('.');
        let mut set = |variables: &[&str], value: &str| {
            // Writing to a string does not fail.
            variables.iter().for_each(|variable| write!(flags, " -X {variable}={value}").unwrap_or_default());
        };
        set(self.whole, version);
        for variables in self.parts {
            set(variables, numbers.next().unwrap_or_default());
        }
        Ok(flags)
    }
}

/// The version of a module that `go.mod` requires.
fn version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| line.trim().strip_prefix(module)?.strip_prefix(' ')?.split(' ').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_say_the_version_that_their_module_requires() {
        let go_mod = "module m\n\ntool k8s.io/kubernetes/cmd/kubelet\n\nrequire (\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n";
        let [kubernetes, node, ..] = &MODULES;
        let flags = kubernetes.flags(go_mod).unwrap();
        assert!(flags.contains(" -X k8s.io/component-base/version.gitVersion=v1.36.3"), "{flags}");
        assert!(flags.contains(" -X k8s.io/component-base/version.gitMinor=36"), "{flags}");
        assert_eq!(node.flags(go_mod).unwrap(), "-s -w");
        assert!(kubernetes.flags("module m\n").is_err());
    }
}

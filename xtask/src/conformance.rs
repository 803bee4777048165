//! `cargo xtask conformance`: the published suites of others, each unmodified.
//!
//! Each is one of the end-to-end cases; here it runs alone and whole, and what came of it is written down.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use crate::{Stop, kube, setup, shell, test};

/// What to run.
#[derive(clap::Args, Debug)]
pub(crate) struct Wish {
    /// Which; all of them where none is named
    suites: Vec<Suite>,
    /// One test of Gateway API's suite, by its name there
    #[arg(long, value_name = "TEST", requires = "suites")]
    only: Option<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Suite {
    /// HTTP/2
    H2spec,
    /// Routes, in a mesh
    GatewayApi,
}

impl Suite {
    /// The end-to-end case that is it.
    fn case(self) -> &'static str {
        match self {
            Self::H2spec => "conformance::",
            Self::GatewayApi => "cluster::the_mesh_tests_of_the_published_gateway_api_suite_pass",
        }
    }

    /// What it means that it failed.
    fn lost(self) -> &'static str {
        match self {
            Self::H2spec => "Envoy passes cases of h2spec that a sidecar fails",
            Self::GatewayApi => {
                "mesh tests of Gateway API's suite fail; all that it said is in target/conformance/gateway-api.log"
            }
        }
    }

    fn prepare(self, root: &Path) -> Result<()> {
        match self {
            Self::H2spec => setup::run(root, setup::Need::Peers),
            Self::GatewayApi if kube::build::has_go() => {
                kube::build::run(root)?;
                kube::build::suite(root)
            }
            Self::GatewayApi => {
                Err(Stop::Missing("Go builds the suite and a cluster, and is not there; see https://go.dev/dl".to_owned()).into())
            }
        }
    }
}

/// Runs each; the first that fails ends it.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    let suites = if wish.suites.is_empty() { Suite::value_variants() } else { &wish.suites };
    if wish.only.is_some() && suites != [Suite::GatewayApi] {
        return Err(Stop::Usage("--only names a test of gateway-api, and of nothing else".to_owned()).into());
    }
    for suite in suites {
        suite.prepare(root)?;
    }
    setup::build(root)?;
    for suite in suites {
        let mut command = shell::command(root, "target/debug/cases", &[suite.case(), "--long"]);
        match &wish.only {
            Some(test) => command.env("OUTRIGGER_CONFORMANCE_TEST", test),
            None => command.env("OUTRIGGER_CONFORMANCE_RECORD", "1"),
        };
        let (counts, left_out) = test::watched(command)?;
        if let Some(reason) = left_out {
            return Err(Stop::Missing(reason).into());
        }
        if counts.failed > 0 {
            return Err(Stop::No(suite.lost().to_owned()).into());
        }
    }
    Ok(())
}

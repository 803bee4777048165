//! The published suite of Gateway API, unmodified, in the pods that it makes itself: its mesh tests all pass, and none is
//! skipped. `cargo xtask conformance` writes down what came of it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::Cluster;
use e2e::mesh::{root, target};
use e2e::runner::{Case, Wish};

use super::OnCluster;

pub(super) const CASES: &[OnCluster] = &[Case { name: "the_mesh_tests_of_the_published_gateway_api_suite_pass", run: published }];

/// What the mesh tests want somebody to have. Without one of them its tests are skipped, and the case fails.
const FEATURES: [&str; 17] = [
    "GRPCRoute",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];
/// How many mesh tests a suite has at least that was not read wrongly.
const TESTS_LEAST: usize = 22;
/// Names of the namespaces that the suite makes.
const NAMESPACES: [&str; 2] = ["gateway-conformance-mesh", "gateway-conformance-mesh-consumer"];
/// Where an outcome is kept.
const RECORDS: &str = "docs/conformance";
/// How long the suite may take before it ends itself; it takes less than a minute.
const AT_MOST: &str = "5m";

fn published(cluster: &Cluster, _wish: &Wish) -> Result<()> {
    let folder = target().join("conformance");
    std::fs::create_dir_all(&folder)?;
    let (report, log) = (folder.join("gateway-api.yaml"), folder.join("gateway-api.log"));
    let only = std::env::var("OUTRIGGER_CONFORMANCE_TEST").ok();
    let pattern = only.as_ref().map_or_else(|| "^TestConformance$".to_owned(), |test| format!("^TestConformance$/^{test}$"));
    let mut suite = cluster.gateway_suite()?;
    suite.args(["-test.v", "-test.timeout", AT_MOST, "-test.run", &pattern]).args(options());
    suite.arg(format!("-report-output={}", report.display()));
    let outcome = watched(suite, &log)?;
    let mesh: BTreeMap<_, _> = outcome.iter().filter(|(test, _)| test.starts_with("Mesh")).collect();
    let passed = mesh.values().filter(|outcome| **outcome == "PASS").count();
    let least = if only.is_some() { 1 } else { TESTS_LEAST };
    println!("    {passed} of {} mesh tests pass", mesh.len());
    if passed < mesh.len() || mesh.len() < least {
        let others = mesh.iter().filter(|(_, outcome)| **outcome != "PASS").map(|(test, outcome)| format!("{outcome} {test}\n"));
        anyhow::bail!(
            "{passed} of {} mesh tests pass, and there are {least} at least; all that was said is in {}\n{}{}{}",
            mesh.len(),
            log.display(),
            others.collect::<String>(),
            last_words(&log),
            NAMESPACES.map(|namespace| cluster.story(namespace)).concat(),
        );
    }
    if only.is_some() {
        return Ok(());
    }
    let text = sound(&report)?;
    if std::env::var_os("OUTRIGGER_CONFORMANCE_RECORD").is_some() {
        let records = root().join(RECORDS);
        std::fs::write(records.join("gateway-api-mesh.yaml"), text)?;
        let list: String = mesh.iter().map(|(test, outcome)| format!("{outcome} {test}\n")).collect();
        std::fs::write(records.join("gateway-api-mesh.txt"), list)?;
    }
    Ok(())
}

/// Who is tested, and of what.
fn options() -> Vec<String> {
    vec![
        "-organization=outrigger".to_owned(),
        "-project=outrigger".to_owned(),
        // A report has both; there are none.
        "-url=-".to_owned(),
        format!("-version={}", env!("CARGO_PKG_VERSION")),
        "-contact=-".to_owned(),
        "-conformance-profiles=MESH-HTTP,MESH-GRPC".to_owned(),
        format!("-supported-features={}", FEATURES.join(",")),
        // The suite's namespaces get sidecars as anybody's do.
        "-namespace-labels=outrigger.dev/inject=enabled".to_owned(),
    ]
}

/// Runs the suite, tells of each test when it has ended, and returns what came of them. All that it says is kept in `log`.
fn watched(mut suite: std::process::Command, log: &Path) -> Result<BTreeMap<String, String>> {
    let mut file = std::fs::File::create(log)?;
    suite.stdout(Stdio::piped()).stderr(file.try_clone()?);
    let mut child = suite.spawn().context("cannot run the suite")?;
    let mut outcome = BTreeMap::new();
    // It ends itself when its time is over.
    for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let line = line?;
        std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes())?;
        if let Some((what, test, took)) = ended(&line) {
            if what != "SKIP" {
                println!("    {what} {test} {took}");
            }
            outcome.insert(test.to_owned(), what.to_owned());
        }
    }
    child.wait()?;
    Ok(outcome)
}

/// What a line says of a test that has ended: `--- PASS: TestConformance/NAME (1.23s)`, below the one that holds them all.
fn ended(line: &str) -> Option<(&str, &str, &str)> {
    let (what, rest) = line.strip_prefix("    --- ")?.split_once(": TestConformance/")?;
    let (test, took) = rest.split_once(' ')?;
    Some((what, test, took))
}

/// The report, which says of both profiles that nothing failed and nothing was left out.
fn sound(report: &Path) -> Result<String> {
    let text = std::fs::read_to_string(report).context("the suite wrote no report")?;
    for profile in ["MESH-HTTP", "MESH-GRPC"] {
        ensure!(text.contains(&format!("name: {profile}")), "the report says nothing of {profile}:\n{text}");
    }
    let bad = ["result: failure", "result: partial", "unsupportedFeatures"].into_iter().find(|bad| text.contains(bad));
    ensure!(bad.is_none(), "the report is not sound:\n{text}");
    Ok(text)
}

/// What the suite said of what it did not like.
fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let wanted = |line: &&str| ["not ready yet", "Fatal", "Error", "timeout", "panic"].iter().any(|word| line.contains(word));
    let lines: Vec<String> =
        text.lines().filter(wanted).map(|line| line.chars().take(LINE_MAX).chain(['\n']).collect()).collect();
    lines.iter().skip(lines.len().saturating_sub(LINES_MAX)).map(String::as_str).collect()
}

/// How much of it is told.
const LINES_MAX: usize = 20;
const LINE_MAX: usize = 400;

//! `outrigger doctor`: looks at everything that capture and a local mesh need of this machine, and says what to do about
//! what is not as it has to be. It changes nothing, and works with and without a mesh. Of a mesh that is up it tells as well
//! whether capture is complete, pod by pod. With `--kubernetes` it looks at a cluster instead.
//!
//! Exit codes: 0 nothing fails (there may be warnings), 1 something does.

mod agents;
mod authority;
mod capture;
mod cluster;
mod machine;
mod mesh;
mod proof;
mod sidecars;
mod wanted;
mod webhooks;

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::table::{self, Output};
use super::{Failure, print};
use crate::node::kernel::KernelError;

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger doctor -o json
  outrigger doctor --kubernetes

It looks at the kernel and its programs, capabilities, cgroups and file systems, at programs of others at the same hooks, and at the ports and remains of a local mesh. Of a mesh that is up it asks whether every program is attached, and has each pod's sidecar prove that connections out of the pod and into it come to it. Run it as root: others may not ask the kernel. How the identities and the configuration of a mesh are that is up, `outrigger status` tells.

With --kubernetes it asks the API server that KUBECONFIG names: whether the cluster can have a mesh, whether all parts of it run, on every node, and are known to kubelets and API server by the root that the mesh has, which pods ask for a sidecar and have none or have one that does not serve (a minute after its turn came, or ended again and again), which documents are refused, and which routes are not accepted, count in part only (both fail) or lead to what is not there (a warning).

Exit codes: 0 nothing fails; 1 something does.")]
pub(crate) struct DoctorArgs {
    /// Look at the mesh of the cluster that KUBECONFIG names, in place of this machine
    #[arg(long)]
    pub(crate) kubernetes: bool,
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
}

/// What one look came to.
#[derive(Debug, Eq, PartialEq)]
struct Finding {
    /// What was looked at.
    check: &'static str,
    verdict: Verdict,
    /// What was found.
    text: String,
    /// What to do, where something is to be done.
    remedy: Option<String>,
}

/// Whether it is as it has to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Ok,
    /// The mesh works, and somebody should know.
    Warn,
    /// The mesh, or a part of it, does not work.
    Fail,
}

/// Runs `outrigger doctor`.
pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let findings = if args.kubernetes { cluster::look()? } else { of_machine() };
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Fail);
    match args.output {
        Some(Output::Json) => table::json(&answer(&findings))?,
        Some(Output::Yaml) => table::yaml(&answer(&findings))?,
        Some(Output::Wide) | None => {
            let width = table::width();
            print(&findings.iter().map(|finding| finding.line(width)).collect::<String>())?;
        }
    }
    Ok(if failed { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

fn of_machine() -> Vec<Finding> {
    let mut findings = machine::look();
    findings.extend(capture::look());
    findings.extend(mesh::look());
    findings.extend(proof::look());
    findings
}

fn answer(findings: &[Finding]) -> Value {
    let well = findings.iter().all(|finding| finding.verdict != Verdict::Fail);
    json!({ "well": well, "checks": findings.iter().map(Finding::data).collect::<Vec<_>>() })
}

impl Finding {
    fn ok(check: &'static str, text: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, text: text.into(), remedy: None }
    }

    fn warn(check: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, text: text.into(), remedy: Some(remedy.into()) }
    }

    fn fail(check: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, text: text.into(), remedy: Some(remedy.into()) }
    }

    /// The same, where something else takes the place of what fails.
    fn bearable(self) -> Self {
        match self.verdict {
            Verdict::Fail => Self { verdict: Verdict::Warn, ..self },
            Verdict::Ok | Verdict::Warn => self,
        }
    }

    /// From what the kernel's room says.
    fn of_kernel(check: &'static str, error: &KernelError) -> Self {
        Self::fail(check, crate::node::chain(error), error.remedy())
    }

    /// One line, and one more for the remedy, each folded where it is wider than the terminal.
    fn line(&self, width: Option<usize>) -> String {
        let fold = |line: String| table::fold(&line, width, 20);
        let remedy = self.remedy.as_ref().map(|remedy| fold(format!("{:6}{:<14}remedy: {remedy}", "", ""))).unwrap_or_default();
        fold(format!("{:<6}{:<14}{}", self.verdict.word(), self.check, self.text)) + &remedy
    }

    fn data(&self) -> Value {
        json!({ "check": self.check, "verdict": self.verdict.word(), "text": self.text, "remedy": self.remedy })
    }
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_with_its_remedy_below() {
        assert_eq!(Finding::ok("kernel", "6.18").line(None), "ok    kernel        6.18\n");
        let finding = Finding::fail("btf", "none", "use another kernel than this one");
        assert_eq!(
            finding.line(None),
            "fail  btf           none\n                    remedy: use another kernel than this one\n"
        );
        let narrow = finding.line(Some(40));
        assert!(narrow.lines().count() > 2 && narrow.lines().all(|line| line.chars().count() <= 40), "{narrow}");
    }

    #[test]
    fn warnings_leave_the_machine_well_and_failures_do_not() {
        let warning = Finding::warn("hooks", "others", "look");
        assert_eq!(answer(&[warning])["well"], true);
        assert_eq!(answer(&[Finding::fail("kernel", "old", "a newer one")])["well"], false);
    }
}

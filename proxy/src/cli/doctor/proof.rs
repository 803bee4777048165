//! The mesh that is up: is every kernel program attached, do connections come to each pod's sidecar, has the agent no more rights
//! than it needs? The sidecars are asked to probe now, so that what is told is of this moment.

use std::io;

use rustix::thread::CapabilitySet;
use tokio::net::UnixStream;

use super::super::node::needed;
use super::super::{agent, local};
use super::Finding;
use crate::base::handover::{self, Answer, Purpose, Question};
use crate::base::names::Named;
use crate::node::ladder::Rung;
use crate::node::report::{CaptureReport, PodReport};

pub(super) fn look() -> Vec<Finding> {
    if !matches!(local::is_up(), Ok(true)) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    let asked = rustix::process::geteuid().is_root().then(prove);
    if let Some(Err(error)) = &asked {
        findings.push(Finding::fail("probes", format!("the node agent has no sidecar probe: {error}"), LOOK));
    }
    match agent::capture() {
        Ok(report) => {
            findings.push(rights(report.standing.rung));
            findings.extend(judge(&report));
        }
        Err(error) => findings.push(Finding::fail("attested", format!("the node agent does not tell: {error}"), LOOK)),
    }
    findings
}

fn judge(report: &CaptureReport) -> Vec<Finding> {
    let off = "it is put back by itself, programs three times an hour at most; `bpftool link`, `bpftool prog` and `nft list ruleset` \
               show who else is there, and `outrigger down` and `outrigger up` make all of it anew";
    let mut findings: Vec<Finding> = report.faults.iter().map(|fault| Finding::fail("attested", fault, off)).collect();
    let (pods, rung) = (report.pods.len(), report.standing.rung);
    if findings.is_empty() {
        findings.push(Finding::ok(
            "attested",
            match rung {
                Rung::Ebpf => format!("every program of the node and of {pods} pods is attached"),
                Rung::Nftables => format!("the rulesets of {pods} pods are as they were laid"),
                Rung::Explicit => "nothing is captured, so nothing can be taken off".to_owned(),
            },
        ));
    }
    let ended = "end connections that were opened meanwhile, where that matters: restart their pods";
    findings.extend(report.mended.iter().map(|mended| Finding::warn("attested", agent::mended(mended), ended)));
    let lost = "no connection of that way is the sidecar's: look whether firewall rules, routes or the pod's `lo` are in the way \
                (`ip netns exec`, `nft list ruleset`), then for programs of others (`hooks`, `pods` above)";
    let before = findings.len();
    findings.extend(agent::unproven(report).map(|fault| Finding::fail("probes", fault, lost)));
    let failed = findings.len() > before;
    let is_silent = |pod: &&PodReport| pod.proven.as_ref().is_none_or(|proven| proven.seconds_ago > SILENT_S);
    let silent: Vec<String> = report.pods.iter().filter(is_silent).map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect();
    if !silent.is_empty() {
        let text = format!("nothing is known of {}", silent.join(", "));
        findings.push(Finding::warn("probes", text, "their sidecars are not there, or have only begun: `outrigger status`"));
    } else if !failed {
        let oldest = report.pods.iter().filter_map(|pod| Some(pod.proven.as_ref()?.seconds_ago)).max().unwrap_or(0);
        findings.push(Finding::ok(
            "probes",
            match rung {
                Rung::Ebpf => format!("what {pods} pods dial and what others dial there comes to their sidecars, {oldest} s ago"),
                Rung::Nftables => format!(
                    "what others dial at {pods} pods comes to their sidecars, {oldest} s ago; what the pods dial is not probed: a \
                     ruleset lets out whatever a sidecar dials"
                ),
                Rung::Explicit => "nothing is captured, so nothing is probed".to_owned(),
            },
        ));
    }
    findings
}

/// Has every sidecar probe, and waits for them.
fn prove() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = UnixStream::connect(local::node_socket()).await?;
        handover::send(&stream, &Question::new(&Named::new("", ""), Purpose::Prove), &[]).await?;
        let (line, _none) = handover::receive(&stream).await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match serde_json::from_slice(&line)? {
            Answer::Error { text, remedy } => Err(io::Error::other(format!("{text}; {remedy}"))),
            _heard => Ok(()),
        }
    })
}

/// What the agent may do.
fn rights(rung: Rung) -> Finding {
    let agent = local::read_up_record().map_or(0, |record| record.node);
    let status = match std::fs::read_to_string(format!("/proc/{agent}/status")) {
        Ok(status) => status,
        Err(error) => return Finding::warn("agent", format!("its rights cannot be read: {error}"), "run it as root"),
    };
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).map(CapabilitySet::from_bits_retain);
    let needed = needed(rung);
    match held {
        Some(held) if !held.contains(needed) => {
            let text = format!("the node agent lacks {}", names(needed - held));
            Finding::fail("agent", text, "start the mesh as root")
        }
        Some(held) if held == needed => {
            Finding::ok("agent", format!("the node agent has {}, and no other capability", names(needed)))
        }
        Some(held) => Finding::ok("agent", format!("the node agent has {}, and also {}", names(needed), names(held - needed))),
        None => Finding::warn("agent", "its rights are not told", "mount procfs at /proc"),
    }
}

fn names(capabilities: CapabilitySet) -> String {
    capabilities.iter_names().map(|(name, _)| format!("CAP_{name}")).collect::<Vec<_>>().join(", ")
}

/// A sidecar that is there tells every minute.
const SILENT_S: u64 = 120;
const LOOK: &str = "look into the log of the node agent, log/node.log in the mesh's state";

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::node::report::{Mended, Proven};

    fn pod(name: &str, faults: Option<&[&str]>) -> PodReport {
        let told = |faults: &[&str]| Proven { seconds_ago: 4, faults: faults.iter().map(|fault| (*fault).to_owned()).collect() };
        PodReport { namespace: "shop".into(), name: name.into(), proven: faults.map(told), ..PodReport::default() }
    }

    fn report(pods: Vec<PodReport>) -> CaptureReport {
        CaptureReport { pods, ..CaptureReport::default() }
    }

    fn verdicts(report: &CaptureReport) -> Vec<(&'static str, Verdict)> {
        judge(report).iter().map(|finding| (finding.check, finding.verdict)).collect()
    }

    #[test]
    fn what_every_pod_proves_is_one_line() {
        let found = judge(&report(vec![pod("web", Some(&[])), pod("api", Some(&[]))]));
        assert_eq!(found[1].text, "what 2 pods dial and what others dial there comes to their sidecars, 4 s ago");
        assert!(found.iter().all(|finding| finding.verdict == Verdict::Ok));
    }

    #[test]
    fn what_a_lower_rung_cannot_prove_is_not_said_to_be_proven() {
        let mut told = report(vec![pod("web", Some(&[]))]);
        told.standing.rung = Rung::Nftables;
        assert!(judge(&told)[1].text.contains("what the pods dial is not probed"));
        told.standing.rung = Rung::Explicit;
        assert!(judge(&told).iter().all(|finding| finding.text.starts_with("nothing is captured")));
    }

    #[test]
    fn each_fault_fails_with_what_to_do_and_who_has_not_told_is_a_warning() {
        let mut told = report(vec![pod("web", Some(&["inbound IPv4: x"])), pod("api", None)]);
        assert_eq!(verdicts(&told), [("attested", Verdict::Ok), ("probes", Verdict::Fail), ("probes", Verdict::Warn)]);
        told.faults = vec!["the program or_bind4 is not attached any more; it is put back".into()];
        told.mended = vec![Mended { fault: "the program or_bind6 is not attached any more".into(), seconds_ago: 9 }];
        assert_eq!(verdicts(&told)[..2], [("attested", Verdict::Fail), ("attested", Verdict::Warn)]);
        assert!(judge(&told).iter().all(|finding| finding.verdict == Verdict::Ok || finding.remedy.is_some()));
    }
}

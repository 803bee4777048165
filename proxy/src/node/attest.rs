//! Whether every program stands where it was attached: looked at again and again, told, and put right.
//!
//! What is missing is told before it is put back, and stays told until the next look finds it in its place: connections that
//! were opened meanwhile may have got past their sidecars, and somebody has to know. Invariant: nothing is put back more than
//! [`MENDED_MOST`] times an hour: who takes it off again and again is stronger, and is not fought for ever.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::capture::Capture;
use super::kernel::{Fault, Kernel, KernelError};
use super::nftables::Nftables;
use super::pods::Pod;
use super::{Agent, NodeError, admission, chain, device};
use crate::base::names::Named;

/// What is not as it was attached, each in a sentence.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Faults {
    node: Vec<String>,
    pods: BTreeMap<Named, Vec<String>>,
    /// Of pods that nobody describes, which bear upon no other.
    undescribed: Vec<String>,
}

impl Faults {
    /// All of them; those of a pod with its name.
    pub(crate) fn all(&self) -> Vec<String> {
        let of_pods = self.pods.iter().flat_map(|(pod, faults)| faults.iter().map(move |fault| format!("{pod}: {fault}")));
        self.node.iter().cloned().chain(of_pods).chain(self.undescribed.iter().cloned()).collect()
    }

    /// What of them bears upon one pod.
    pub(crate) fn of(&self, pod: &Named) -> Vec<String> {
        self.node.iter().chain(self.pods.get(pod).into_iter().flatten()).cloned().collect()
    }
}

/// Something that was put back.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mended {
    /// What had been wrong.
    pub(crate) fault: String,
    pub(crate) seconds_ago: u64,
}

/// What was put back within the last hour.
#[derive(Debug, Default)]
pub(crate) struct Mends {
    /// By place (a pod's, or the node's) and program.
    times: BTreeMap<(Option<u64>, &'static str), VecDeque<Instant>>,
    told: VecDeque<(String, Instant)>,
}

impl Mends {
    /// May this be put back? Then it counts.
    fn admit(&mut self, pod: Option<u64>, program: &'static str, now: Instant) -> bool {
        let times = self.times.entry((pod, program)).or_default();
        while times.front().is_some_and(|time| now.duration_since(*time) >= MENDED_WITHIN) {
            times.pop_front();
        }
        let may = times.len() < MENDED_MOST;
        if may {
            times.push_back(now);
        }
        may
    }

    fn mended(&mut self, fault: String, now: Instant) {
        if self.told.len() == TOLD_MOST {
            self.told.pop_front();
        }
        self.told.push_back((fault, now));
    }

    /// The pod is gone.
    pub(super) fn forget(&mut self, pod: u64) {
        self.times.retain(|(place, _program), _times| *place != Some(pod));
    }

    /// For people: what was put back within the last hour, the newest last.
    pub(super) fn list(&self, now: Instant) -> Vec<Mended> {
        let of =
            |(fault, at): &(String, Instant)| Mended { fault: fault.clone(), seconds_ago: now.duration_since(*at).as_secs() };
        self.told.iter().filter(|(_fault, at)| now.duration_since(*at) < MENDED_WITHIN).map(of).collect()
    }
}

/// Looks `every` so often, until the agent ends.
pub(super) async fn keep(agent: Arc<Agent>, every: Duration) {
    loop {
        let looking = Arc::clone(&agent);
        // To look at a ruleset is to run a program and to wait for it: nothing for a thread that serves others.
        let looked = tokio::task::spawn_blocking(move || look(&looking)).await;
        let faults = looked.unwrap_or_else(|error| Faults {
            node: vec![format!("whether capture is whole is not known: {error}")],
            ..Faults::default()
        });
        publish(&agent, faults);
        tokio::time::sleep(every).await;
    }
}

/// Puts right what is not as it was made, and tells what was.
fn look(agent: &Agent) -> Faults {
    let pods: Vec<Arc<Pod>> = agent.pods.borrow().values().map(Arc::clone).collect();
    let mut faults = Faults { undescribed: agent.undescribed.lock().faults().collect(), ..Faults::default() };
    match &agent.capture {
        Capture::Ebpf(kernel) => look_at_programs(agent, kernel, &pods, &mut faults),
        Capture::Nftables(nftables) => {
            look_at_rulesets(nftables, &pods, &mut faults);
            let strangers = agent.undescribed.lock().all();
            faults.undescribed.extend(strangers.iter().filter_map(|(cookie, stranger)| {
                let told = look_at_ruleset(nftables, *cookie, stranger.netns.as_deref())?;
                Some(format!("{}: {told}", stranger.who))
            }));
        }
        Capture::Explicit => {}
    }
    faults
}

fn look_at_programs(agent: &Agent, kernel: &Mutex<Kernel>, pods: &[Arc<Pod>], faults: &mut Faults) {
    let found = kernel.lock().attest_node();
    faults.node = judge(agent, None, found, || kernel.lock().mend_node().map_err(NodeError::from));
    let devices = device::Links::of_node();
    for pod in pods {
        let (name, cookie) = (pod.record.named(), pod.record.netns_cookie);
        if let Some(fault) = astray(agent, kernel, pod, devices.as_ref()) {
            faults.pods.entry(name.clone()).or_default().push(fault);
        }
        // One that was withdrawn meanwhile has none.
        let mut found = kernel.lock().attest_pod(cookie);
        // A container that ended took what hung at it along, and the one that takes its place gets all anew.
        if is_gone(&pod.record.sidecar_cgroup())
            && let Ok(found) = &mut found
        {
            found.retain(|fault| !fault.is_of_sidecar());
        }
        if found.as_ref().is_ok_and(Vec::is_empty) || is_going(pod) {
            continue;
        }
        let told = judge(agent, Some((cookie, &name)), found, || match admission::enrol(agent, &pod.record)? {
            Some(_watch) => Ok(()),
            None => Err(NodeError::Unseen),
        });
        faults.pods.entry(name).or_default().extend(told);
    }
}

/// Whether a device of the pod's left its namespace. Nothing puts it back: who took it away is root in the pod, and what is there
/// in its place leads past the node, if anywhere.
fn astray(agent: &Agent, kernel: &Mutex<Kernel>, pod: &Pod, devices: Result<&device::Links, &io::Error>) -> Option<String> {
    let look = || {
        let ends = kernel.lock().links_of(pod.record.netns_cookie).map_err(|error| chain(&error))?;
        let netns = admission::namespace(agent, &pod.record).map_err(|error| chain(&error))?;
        let (Some(netns), false) = (netns, ends.is_empty()) else { return Ok(Vec::new()) };
        let devices = devices.map_err(ToString::to_string)?;
        devices.astray(&netns, &ends).map_err(|error| error.to_string())
    };
    match look() {
        Ok(ends) if ends.is_empty() => None,
        Ok(_ends) if is_going(pod) => None,
        Ok(ends) => {
            let ends: Vec<String> = ends.iter().map(u32::to_string).collect();
            Some(format!(
                "the pod's device whose other end on the node is number {} is not in the pod any more; find who moved it, and start \
                 the pod again",
                ends.join(", ")
            ))
        }
        Err(_gone) if is_going(pod) => None,
        Err(error) => Some(format!("whether the pod's devices are where they were is not known: {error}")),
    }
}

/// A ruleset that was changed is laid again by who looks at it.
fn look_at_rulesets(nftables: &Nftables, pods: &[Arc<Pod>], faults: &mut Faults) {
    for pod in pods {
        if let Some(told) = look_at_ruleset(nftables, pod.record.netns_cookie, pod.record.netns.as_deref()) {
            faults.pods.insert(pod.record.named(), vec![told]);
        }
    }
}

/// Where there is no file that stands for the namespace, rulesets are not laid.
fn look_at_ruleset(nftables: &Nftables, cookie: u64, netns: Option<&Path>) -> Option<String> {
    let netns = netns?;
    match nftables.attest(cookie, netns) {
        Ok(told) => told,
        Err(_gone) if is_gone(netns) => None,
        Err(error) => Some(format!("whether capture is whole is not known: {}", chain(&error))),
    }
}

/// A pod whose namespace went, and whose record is about to.
fn is_going(pod: &Pod) -> bool {
    pod.record.netns.as_deref().is_some_and(is_gone)
}

fn is_gone(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Puts right what was found, where that may be, and says all of it.
fn judge(
    agent: &Agent,
    pod: Option<(u64, &Named)>,
    found: Result<Vec<Fault>, KernelError>,
    mend: impl FnOnce() -> Result<(), NodeError>,
) -> Vec<String> {
    let found = match found {
        Ok(found) if found.is_empty() => return Vec::new(),
        Ok(found) => found,
        Err(error) => return vec![format!("whether the programs are attached is not known: {}", chain(&error))],
    };
    let now = Instant::now();
    let may: Vec<bool> = {
        let mut mends = agent.mends.lock();
        found.iter().map(|fault| mends.admit(pod.map(|(cookie, _name)| cookie), fault.program, now)).collect()
    };
    let outcome = may.contains(&true).then(mend);
    let mut told = Vec::new();
    for (fault, may) in found.iter().zip(may) {
        let what = pod.map_or_else(|| fault.to_string(), |(_cookie, name)| format!("{name}: {fault}"));
        let word = match &outcome {
            Some(Ok(())) if may => {
                agent.metrics.mends.with_label_values(&[fault.program, "attached"]).inc();
                agent.mends.lock().mended(what.clone(), now);
                warn!(
                    fault = what,
                    "what was missing of capture is put back; connections of meanwhile may have got past their sidecars"
                );
                "it is put back, and looked at again".to_owned()
            }
            Some(Err(error)) if may => {
                agent.metrics.mends.with_label_values(&[fault.program, "failed"]).inc();
                format!("it cannot be put back ({}): {}", chain(error), error.remedy())
            }
            _not_any_more => {
                agent.metrics.mends.with_label_values(&[fault.program, "given_up"]).inc();
                format!(
                    "it was put back {MENDED_MOST} times within an hour and is off again: find who does that (`bpftool link`)"
                )
            }
        };
        told.push(format!("{fault}; {word}"));
    }
    told
}

fn publish(agent: &Agent, faults: Faults) {
    let all = faults.all();
    agent.metrics.faults.set(i64::try_from(all.len()).unwrap_or(i64::MAX));
    let changed = agent.faults.send_if_modified(|known| {
        let changed = *known != faults;
        if changed {
            for fault in &all {
                error!(fault, "capture is not complete");
            }
            if all.is_empty() {
                info!("capture is complete again");
            }
            *known = faults;
        }
        changed
    });
    if changed {
        // Whose pods are concerned hears it by the next probe, which is due at once.
        agent.prove.send_modify(|round| *round += 1);
    }
}

const MENDED_MOST: usize = 3;
const MENDED_WITHIN: Duration = Duration::from_secs(3_600);
const TOLD_MOST: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_off_again_and_again_is_put_back_three_times_an_hour() {
        let (begin, mut mends) = (Instant::now(), Mends::default());
        let minutes = |count: u64| begin + Duration::from_secs(60 * count);
        let mut admit = |pod, program, minute| mends.admit(pod, program, minutes(minute));
        assert!(admit(None, "or_connect4", 0) && admit(None, "or_connect4", 1) && admit(None, "or_connect4", 2));
        assert!(!admit(None, "or_connect4", 3));
        // Of another program, and of a pod, this says nothing.
        assert!(admit(None, "or_connect6", 3) && admit(Some(7), "or_connect4", 3));
        assert!(!admit(None, "or_connect4", 59) && admit(None, "or_connect4", 60) && !admit(None, "or_connect4", 60));
        mends.forget(7);
        assert!(mends.times.keys().all(|(pod, _program)| pod.is_none()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_put_back_is_told_for_an_hour_and_the_list_does_not_grow_without_end() {
        let (begin, mut mends) = (Instant::now(), Mends::default());
        for number in 0..40 {
            mends.mended(format!("fault {number}"), begin + Duration::from_secs(number));
        }
        let told = mends.list(begin + Duration::from_secs(60));
        assert_eq!((told.len(), told[31].fault.as_str(), told[31].seconds_ago), (TOLD_MOST, "fault 39", 21));
        assert_eq!(mends.list(begin + Duration::from_secs(3_600 + 38)).len(), 1);
    }

    #[test]
    fn a_pod_is_concerned_by_its_own_faults_and_by_those_of_the_node() {
        let (web, api) = (Named::new("shop", "web"), Named::new("shop", "api"));
        let faults = Faults {
            node: vec!["a".to_owned()],
            pods: [(web.clone(), vec!["b".to_owned()])].into(),
            undescribed: vec!["c".to_owned()],
        };
        assert_eq!(faults.all(), ["a", "shop/web: b", "c"]);
        assert_eq!((faults.of(&web).len(), faults.of(&api).len()), (2, 1));
    }
}

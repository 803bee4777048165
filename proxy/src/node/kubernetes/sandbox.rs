//! A pod whose sandbox has ended is closed until its sidecar is enrolled in the next one: init containers that come before a
//! classic sidecar would run in a network that nobody has enrolled.
//!
//! Sources: `SyncPod` of the kubelet (pkg/kubelet/kuberuntime/kuberuntime_manager.go of Kubernetes 1.36), which ends all that runs in
//! a pod before it has its sandbox made anew; cgroup-v2.rst of the kernel, `cgroup.events`: this file of a pod's cgroup says
//! whether a process of it is left, and who watches it is told of each change. A sandbox's own container runs for as long as the
//! sandbox is there, so where nothing of the pod runs it has ended. A runtime that makes no such container (CRI-O) has a pod closed
//! of which all containers have ended at once, until its sidecar is back. Invariant: what is captured of the network that is left
//! stays captured.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tracing::{debug, warn};

use super::admission::is_populated;
use super::quarantine::{self, Got};
use super::volume::Owner;
use crate::model::pod_record::PodRecord;
use crate::node::pods::Pod;
use crate::node::{Agent, chain};

/// Watches until the agent ends.
pub(super) async fn follow(agent: Arc<Agent>) {
    let told = Arc::new(Told::default());
    let mut watcher = match watcher(&told) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(%error, "cannot be told of pods whose sandbox ends, looking for them every moment instead");
            None
        }
    };
    let every = if watcher.is_some() { LOOK_EVERY } else { LOOK_WITHOUT_NOTICE };
    let (mut enrolled, mut watched) = (agent.pods.subscribe(), BTreeMap::new());
    loop {
        let mut pods: Vec<Arc<Pod>> = enrolled.borrow_and_update().values().map(Arc::clone).collect();
        pods.retain(|pod| pod.record.uid.is_some());
        if let Some(watcher) = &mut watcher {
            watch(watcher, &mut watched, &pods);
        }
        let changed = std::mem::take(&mut *told.files.lock());
        // One that is about to be gone gets no other sandbox.
        for pod in pods.iter().filter(|pod| !pod.is_left() && !pod.record.terminating) {
            if has_ended(&pod.record, changed.contains(&events_of(&pod.record))) {
                leave(&agent, pod);
            }
        }
        // Cancel-safe: all of them are looked at whatever the reason.
        let heard = tokio::select! {
            () = told.news.notified() => Ok(()),
            heard = enrolled.changed() => heard,
            () = tokio::time::sleep(every) => Ok(()),
        };
        if heard.is_err() {
            return;
        }
    }
}

/// Files that changed since they were looked at.
#[derive(Debug, Default)]
struct Told {
    files: Mutex<BTreeSet<PathBuf>>,
    news: Notify,
}

fn watcher(told: &Arc<Told>) -> notify::Result<RecommendedWatcher> {
    let told = Arc::clone(told);
    notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // To read such a file is an access, which is told of as well.
        if let Ok(event) = event
            && !event.kind.is_access()
        {
            told.files.lock().extend(event.paths);
            told.news.notify_one();
        }
    })
}

/// Has the files of these pods watched and no others. `watched`: by file, for which network of its pod that was asked.
fn watch(watcher: &mut RecommendedWatcher, watched: &mut BTreeMap<PathBuf, u64>, pods: &[Arc<Pod>]) {
    let now: BTreeMap<PathBuf, u64> = pods.iter().map(|pod| (events_of(&pod.record), pod.record.netns_cookie)).collect();
    // In a pod's next network too: its cgroup may have been made anew, and another file is there.
    for (file, _cookie) in watched.extract_if(.., |file, cookie| now.get(file) != Some(&*cookie)) {
        // That one is watched no more already.
        if watcher.unwatch(&file).is_err() {}
    }
    for (file, cookie) in now {
        if watched.contains_key(&file) {
            continue;
        }
        if let Err(error) = watcher.watch(&file, RecursiveMode::NonRecursive) {
            debug!(%error, file = %file.display(), "it is not told when a pod's sandbox ends, but looked for every second");
        }
        watched.insert(file, cookie);
    }
}

fn events_of(record: &PodRecord) -> PathBuf {
    record.cgroup.join("cgroup.events")
}

/// Has all ended that ran in the network of the record? `told`: what says so has changed. The next sandbox may have begun before it
/// is looked at, but then the sidecar of the former one runs no more.
fn has_ended(record: &PodRecord, told: bool) -> bool {
    !is_populated(&record.cgroup) || told && !is_populated(&record.sidecar_cgroup())
}

fn leave(agent: &Agent, pod: &Pod) {
    // First: who closes pods and who lets them out go by it.
    pod.expelled.cancel();
    if let (Some(kernel), Some(owner)) = (agent.capture.kernel(), Owner::of_record(&pod.record)) {
        let folder = &pod.record.cgroup;
        let closed = quarantine::close(agent, &kernel.lock(), &owner, folder);
        let pod = owner.named();
        match closed {
            // In its next network, meanwhile.
            Ok(Got::Captured) => {}
            Ok(_another) => debug!(%pod, "a pod's sandbox has ended: the pod is closed until its sidecar asks again"),
            // Who closes pods waits for the next one.
            Err(_gone) if !folder.exists() => {}
            Err(error) => warn!(%pod, error = chain(&error), "a pod whose sandbox has ended cannot be closed yet"),
        }
    }
    // Who closes pods looks now.
    agent.pods.send_modify(|_pods| {});
}

/// A notification may be lost.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between two sandboxes a pod's network is taken down and made.
const LOOK_WITHOUT_NOTICE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::node::pods::tests::{known, record};

    fn pods(cgroup: &Path, cookie: u64) -> Vec<Arc<Pod>> {
        let record = PodRecord { cgroup: cgroup.to_owned(), uid: Some("0a-1".to_owned()), ..record("web-1", cookie) };
        known(&[record]).into_values().collect()
    }

    #[test]
    fn a_sandbox_has_ended_when_nothing_of_its_pod_runs_or_did_not_before_the_next_one_began() {
        let root = tempfile::tempdir().unwrap();
        let sidecar = root.path().join("c0ffee");
        std::fs::create_dir(&sidecar).unwrap();
        let record = PodRecord { cgroup: root.path().to_owned(), sidecar: Some(sidecar.clone()), ..record("web-1", 7) };
        let says = |folder: &Path, runs: bool| {
            std::fs::write(folder.join("cgroup.events"), format!("populated {}\nfrozen 0\n", u8::from(runs))).unwrap();
        };
        let ended = |pod: bool, of_sidecar: bool, told: bool| {
            says(root.path(), pod);
            says(&sidecar, of_sidecar);
            has_ended(&record, told)
        };
        assert!(!ended(true, true, false));
        assert!(!ended(true, false, false), "a sidecar that ended is started anew in the same sandbox");
        assert!(ended(false, false, false) && ended(false, false, true));
        assert!(ended(true, false, true), "what runs has begun since");
        assert!(!ended(true, true, true), "it was told of the former one, and this one's sidecar is enrolled");
        std::fs::remove_dir_all(&sidecar).unwrap();
        assert!(!has_ended(&record, false) && has_ended(&record, true));
        std::fs::remove_file(root.path().join("cgroup.events")).unwrap();
        assert!(has_ended(&record, false), "its cgroup is gone");
    }

    #[tokio::test]
    async fn a_change_is_told_in_each_network_of_a_pod() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cgroup.events");
        std::fs::write(&file, "populated 1\n").unwrap();
        let told = Arc::new(Told::default());
        let (mut watcher, mut watched) = (watcher(&told).unwrap(), BTreeMap::new());
        for cookie in [7, 8] {
            watch(&mut watcher, &mut watched, &pods(folder.path(), cookie));
            assert_eq!(watched, [(file.clone(), cookie)].into());
            std::fs::write(&file, "populated 0\n").unwrap();
            let heard = async {
                while !told.files.lock().remove(&file) {
                    told.news.notified().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), heard).await.expect("it is told");
        }
        watch(&mut watcher, &mut watched, &[]);
        assert!(watched.is_empty());
    }

    #[test]
    fn a_pod_whose_network_is_left_is_known_by_it() {
        let [pod] = pods(Path::new("/sys/fs/cgroup/gone"), 7).try_into().unwrap();
        assert!(!pod.is_left());
        pod.expelled.cancel();
        assert!(pod.is_left());
    }
}

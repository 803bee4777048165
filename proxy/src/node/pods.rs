//! Who lives on this node: the pods that records in `STATE/pods/` describe, and what the agent has done for each.
//!
//! Reading the folder and deciding what follows are separate: the decision is a pure function of what was found and
//! what is known. A record that cannot be read changes nothing about a pod that is known.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::identities::Svid;
use super::kernel::Watch;
use crate::base::names::Named;
use crate::identity::spiffe::SpiffeId;
use crate::model::pod_record::PodRecord;

/// An enrolled pod.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) record: PodRecord,
    pub(crate) id: SpiffeId,
    /// Is its link watched for what gets past its sidecar?
    pub(crate) watch: Watch,
    /// Its certificate, once there is one; replaced by each rotation.
    pub(crate) svid: watch::Sender<Option<Arc<Svid>>>,
    /// Told when it is enrolled no more though it is described, or its sandbox has ended: its sidecar has to ask anew.
    pub(crate) expelled: CancellationToken,
}

impl Pod {
    /// Is it in its network namespace no more? What of it runs has another one, and is closed until its sidecar has asked anew.
    pub(crate) fn is_left(&self) -> bool {
        self.expelled.is_cancelled()
    }
}

/// Enrolled pods by the cookie of their network namespace.
pub(crate) type Pods = BTreeMap<u64, Arc<Pod>>;

/// What the folder holds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) records: Vec<PodRecord>,
    /// Files that are no record, by file name without its ending, and why.
    pub(crate) faults: BTreeMap<String, String>,
}

/// What must be done to get from what is known to what was found.
#[derive(Debug, Default, Eq, PartialEq)]
pub(crate) struct Changes {
    /// Cookies of pods that are gone.
    pub(crate) withdraw: Vec<u64>,
    /// Pods that are new, or whose addresses or cgroup changed.
    pub(crate) enrol: Vec<PodRecord>,
    /// Pods of which only the description changed.
    pub(crate) describe: Vec<PodRecord>,
}

/// Reads every record of `folder`. Hidden files are another writer's work in progress.
///
/// # Errors
/// The folder cannot be listed.
pub(crate) fn read(folder: &Path) -> io::Result<Found> {
    let mut found = Found::default();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(stem) = name.strip_suffix(".json").filter(|stem| !stem.starts_with('.')) else { continue };
        let record = match std::fs::read(folder.join(&name)) {
            // Removed between the listing and the reading.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => Err(error.to_string()),
            Ok(bytes) => PodRecord::parse(&bytes).map_err(|error| error.to_string()),
        };
        match record {
            Ok(record) if PodRecord::file_stem(&record.named()) == stem => found.records.push(record),
            Ok(record) => {
                found.faults.insert(stem.to_owned(), format!("it describes the pod {}", record.named()));
            }
            Err(error) => {
                found.faults.insert(stem.to_owned(), error);
            }
        }
    }
    Ok(found)
}

/// The namespace cookie that the record of `pod` says, if there is one that can be read.
pub(crate) fn cookie(folder: &Path, pod: &Named) -> Option<u64> {
    let bytes = std::fs::read(folder.join(format!("{}.json", PodRecord::file_stem(pod)))).ok()?;
    Some(PodRecord::parse(&bytes).ok()?.netns_cookie)
}

/// Compares what was found with what is known.
pub(crate) fn compare(found: &Found, known: &Pods) -> Changes {
    let meshed = |record: &&PodRecord| record.meshed;
    let present: BTreeSet<u64> = found.records.iter().filter(meshed).map(|record| record.netns_cookie).collect();
    let unreadable = |pod: &Pod| found.faults.contains_key(&PodRecord::file_stem(&pod.record.named()));
    let withdraw = known
        .iter()
        .filter(|(cookie, pod)| !present.contains(cookie) && !unreadable(pod))
        .map(|(cookie, _pod)| *cookie)
        .collect();
    let mut changes = Changes { withdraw, ..Changes::default() };
    for record in found.records.iter().filter(meshed) {
        match known.get(&record.netns_cookie).map(|pod| &pod.record) {
            Some(old) if old == record => {}
            Some(old) if places(old) == places(record) => changes.describe.push(record.clone()),
            _new_or_moved => changes.enrol.push(record.clone()),
        }
    }
    changes
}

/// What the kernel knows of a pod, and what its certificate says.
fn places(record: &PodRecord) -> impl PartialEq + '_ {
    let PodRecord { namespace, name, service_account, addresses, uid, netns, cgroup, sidecar, annotations, .. } = record;
    ((namespace, name, service_account, uid), addresses, netns, cgroup, sidecar, annotations)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn record(name: &str, cookie: u64) -> PodRecord {
        PodRecord {
            namespace: "shop".into(),
            name: name.into(),
            service_account: name.into(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            ports: Vec::new(),
            addresses: vec!["10.64.0.5".parse().unwrap(), "fd64::5".parse().unwrap()],
            former_addresses: Vec::new(),
            uid: None,
            netns: Some(format!("/run/netns/outrigger-shop.{name}").into()),
            netns_cookie: cookie,
            cgroup: format!("/sys/fs/cgroup/outrigger/pods/shop.{name}").into(),
            sidecar: None,
            meshed: true,
            terminating: false,
            hold_ms: 10_000,
            unprotected: false,
            supervisor: 1,
            started_ms: 0,
        }
    }

    pub(in super::super) fn known(records: &[PodRecord]) -> Pods {
        let pod = |record: &PodRecord| Pod {
            record: record.clone(),
            id: format!("spiffe://cluster.local/ns/shop/sa/{}", record.service_account).parse().unwrap(),
            watch: Watch::Watched,
            svid: watch::Sender::new(None),
            expelled: CancellationToken::new(),
        };
        records.iter().map(|record| (record.netns_cookie, Arc::new(pod(record)))).collect()
    }

    fn found(records: &[PodRecord]) -> Found {
        Found { records: records.to_vec(), ..Found::default() }
    }

    #[test]
    fn a_new_pod_is_enrolled_and_a_gone_one_withdrawn() {
        let (web, api) = (record("web", 1), record("api", 2));
        let changes = compare(&found(std::slice::from_ref(&api)), &known(&[web]));
        assert_eq!(changes, Changes { withdraw: vec![1], enrol: vec![api], describe: vec![] });
    }

    #[test]
    fn a_pod_made_again_under_its_name_is_another_pod() {
        let again = record("web", 9);
        let changes = compare(&found(std::slice::from_ref(&again)), &known(&[record("web", 1)]));
        assert_eq!(changes, Changes { withdraw: vec![1], enrol: vec![again], describe: vec![] });
    }

    #[test]
    fn an_unreadable_record_changes_nothing() {
        let mut nothing = found(&[]);
        nothing.faults.insert("shop.web".into(), "cut short".into());
        assert_eq!(compare(&nothing, &known(&[record("web", 1)])), Changes::default());
    }

    #[test]
    fn a_pod_outside_the_mesh_is_not_enrolled() {
        let outside = PodRecord { meshed: false, ..record("web", 1) };
        assert_eq!(compare(&found(&[outside]), &Pods::new()), Changes::default());
    }

    #[test]
    fn a_pod_whose_addresses_were_taken_from_it_is_to_be_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let enrolled = PodRecord { uid: Some("0a-1".to_owned()), ..record("web", 1) };
        let emptied = PodRecord { addresses: Vec::new(), ..enrolled.clone() };
        std::fs::write(folder.path().join("shop.web.json"), serde_json::to_vec(&emptied).unwrap()).unwrap();
        let changes = compare(&read(folder.path()).unwrap(), &known(&[enrolled]));
        assert_eq!(changes, Changes { withdraw: vec![], enrol: vec![emptied], describe: vec![] });
    }

    #[test]
    fn a_changed_label_is_no_reason_to_enrol_again() {
        let labelled = PodRecord { terminating: true, ..record("web", 1) };
        let changes = compare(&found(std::slice::from_ref(&labelled)), &known(&[record("web", 1)]));
        assert_eq!(changes, Changes { withdraw: vec![], enrol: vec![], describe: vec![labelled] });
    }

    #[test]
    fn a_folder_is_read_past_what_is_no_record() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        let web = record("web", 1);
        write("shop.web.json", &serde_json::to_vec(&web).unwrap());
        write("shop.other.json", &serde_json::to_vec(&web).unwrap());
        write("shop.cut.json", b"{");
        write(".shop.new.json.tmp7", b"{");
        let found = read(folder.path()).unwrap();
        assert_eq!(found.records, [web]);
        assert_eq!(found.faults.keys().collect::<Vec<_>>(), ["shop.cut", "shop.other"]);
        assert!(read(&folder.path().join("missing")).is_err());
    }
}

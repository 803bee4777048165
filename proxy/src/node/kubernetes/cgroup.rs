//! Which container of which pod a process runs in, by its cgroup: the kernel's word on what the kubelet said.
//!
//! Sources: the kubelet's cgroup drivers (`kubepods/[QOS/]podUID/ID` of cgroupfs,
//! `kubepods.slice/kubepods-QOS.slice/kubepods-QOS-podUID_WITH_UNDERSCORES.slice/RUNTIME-ID.scope` of systemd) and cgroups(7). A
//! process cannot leave its cgroup without rights over the hierarchy, which no container has.
//!
//! Where the agent is in a cgroup namespace of its own, the kernel writes paths as seen from there, with `..` in front. Their
//! ends are the same; the folder itself is looked for where the node's hierarchy is mounted.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::backoff::Backoff;

/// A container of a pod, as a path of a cgroup names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Container {
    pub(crate) uid: String,
    pub(crate) id: String,
    /// The two last parts of the path: the pod's folder and the container's.
    folders: [String; 2],
}

/// The folders of a container, in the node's cgroup2.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Folders {
    pub(crate) pod: PathBuf,
    pub(crate) container: PathBuf,
}

impl Container {
    /// Reads a `/proc/PID/cgroup`. `None`: the process is in no container of a pod.
    pub(crate) fn of(proc_cgroup: &str) -> Option<Self> {
        let path = proc_cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let mut parts = path.rsplit('/');
        let (container, pod) = (parts.next()?, parts.next()?);
        Some(Self { uid: uid_of(pod)?, id: id_of(container)?, folders: [pod.to_owned(), container.to_owned()] })
    }

    /// Its folders below `root`, where the node's cgroup2 is mounted.
    pub(crate) fn folders(&self, root: &Path) -> Option<Folders> {
        let [pod, container] = &self.folders;
        let pod = find(root, pod)?;
        let container = pod.join(container);
        container.is_dir().then_some(Folders { pod, container })
    }
}

/// The folder of the pod `uid`, wherever the kubelet has it.
pub(crate) fn folder_of(uid: &str, root: &Path) -> Option<PathBuf> {
    places(root).find(|folder| name_of(folder).and_then(uid_of).as_deref() == Some(uid))
}

/// The containers of the pod with this folder, each with its own.
pub(crate) fn containers_in(pod: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    folders_in(pod).into_iter().filter_map(|folder| Some((name_of(&folder).and_then(id_of)?, folder)))
}

/// A pod's UID of the name of its cgroup.
fn uid_of(folder: &str) -> Option<String> {
    let uid = match folder.strip_suffix(".slice") {
        // `kubepods-pod…`, `kubepods-burstable-pod…`: the last `-pod` ends what names the class.
        Some(slice) => slice.rsplit_once("-pod").filter(|(class, _uid)| class.starts_with("kubepods"))?.1.replace('_', "-"),
        None => folder.strip_prefix("pod")?.to_owned(),
    };
    super::volume::is_plain(&uid).then_some(uid)
}

/// A container's id of the name of its cgroup: the runtime writes its own name before it where systemd names the cgroup.
fn id_of(folder: &str) -> Option<String> {
    let id = match folder.strip_suffix(".scope") {
        Some(scope) => scope.rsplit_once('-').map_or(scope, |(_runtime, id)| id),
        None => folder,
    };
    let is_id = id.len() >= ID_LETTERS_MIN && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

fn find(root: &Path, pod: &str) -> Option<PathBuf> {
    places(root).find(|folder| name_of(folder) == Some(pod))
}

/// Folders in which the kubelet puts pods, and what is in them: of the guaranteed class directly, of the others by class.
fn places(root: &Path) -> impl Iterator<Item = PathBuf> {
    let tops = ["kubepods", "kubepods.slice"].map(|top| root.join(top));
    tops.into_iter().flat_map(|top| {
        let inside = folders_in(&top);
        let classes: Vec<PathBuf> = inside.iter().filter(|folder| is_class(folder)).flat_map(|class| folders_in(class)).collect();
        inside.into_iter().chain(classes)
    })
}

fn is_class(folder: &Path) -> bool {
    name_of(folder)
        .is_some_and(|name| matches!(name, "burstable" | "besteffort" | "kubepods-burstable.slice" | "kubepods-besteffort.slice"))
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn name_of(folder: &Path) -> Option<&str> {
    folder.file_name()?.to_str()
}

/// Between looks for the folder of a pod that the kubelet is about to make: it makes one within milliseconds as a rule, and much
/// later where it is busy or away.
pub(super) const LOOKS: Backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(100));
/// Of a runtime's ids; 64 are usual.
const ID_LETTERS_MIN: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "6f1c2c3e-8a7e-4f5b-9a40-0d8a9d0f2b11";

    fn id() -> String {
        "c0ffee".repeat(10) + "beef"
    }

    #[track_caller]
    fn is(path: &str) {
        let container = Container::of(&format!("12:memory:/elsewhere\n0::/{path}\n")).unwrap();
        assert_eq!((container.uid.as_str(), container.id), (UID, id()), "{path}");
    }

    #[test]
    fn both_of_the_kubelets_drivers_name_pod_and_container() {
        let (id, flat) = (id(), UID.replace('-', "_"));
        is(&format!("kubepods/pod{UID}/{id}"));
        is(&format!("kubepods/burstable/pod{UID}/{id}"));
        is(&format!("kubepods.slice/kubepods-pod{flat}.slice/cri-containerd-{id}.scope"));
        is(&format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{flat}.slice/crio-{id}.scope"));
        // As an agent sees it that is in a cgroup namespace of its own.
        is(&format!("../../besteffort/pod{UID}/{id}"));
        is(&format!("../../kubepods-burstable-pod{flat}.slice/cri-containerd-{id}.scope"));
    }

    #[test]
    fn what_is_no_container_of_a_pod_is_none() {
        let id = id();
        for path in [
            String::new(),
            "init.scope".to_owned(),
            "user.slice/user-0.slice/session-1.scope".to_owned(),
            format!("docker/{id}"),
            format!("kubepods/pod{UID}"),
            format!("kubepods/pod{UID}/{id}/below"),
            format!("kubepods/pod{UID}/app"),
            format!("kubepods/pod/{id}"),
            format!("other-pod{}.slice/cri-containerd-{id}.scope", UID.replace('-', "_")),
        ] {
            assert_eq!(Container::of(&format!("0::/{path}\n")), None, "{path}");
        }
        assert_eq!(Container::of(&format!("3:cpu:/kubepods/pod{UID}/{id}\n")), None);
    }

    #[test]
    fn the_folders_are_found_where_the_hierarchy_is_mounted() {
        let root = tempfile::tempdir().unwrap();
        let (id, flat) = (id(), UID.replace('-', "_"));
        let slice = format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{flat}.slice");
        let path = format!("{slice}/cri-containerd-{id}.scope");
        std::fs::create_dir_all(root.path().join(&path)).unwrap();
        let container =
            Container::of(&format!("0::/../../kubepods-burstable-pod{flat}.slice/cri-containerd-{id}.scope\n")).unwrap();
        let found = container.folders(root.path()).unwrap();
        assert_eq!(found, Folders { pod: root.path().join(&slice), container: root.path().join(&path) });
        assert_eq!(folder_of(UID, root.path()), Some(root.path().join(&slice)));
        assert_eq!(folder_of("another", root.path()), None);
        let gone = Container::of(&format!("0::/kubepods/pod{UID}/{id}\n")).unwrap();
        assert_eq!(gone.folders(root.path()), None);
    }
}

//! A volume's folder with its sockets, made and removed without a mount.
//!
//! Sources: openat2(2), unix(7). Everything is reached from a descriptor of the kubelet's folder of pods, below which no
//! symbolic link is followed; a socket is bound through the descriptor of its folder, because the kubelet's paths are longer
//! than a socket's address may be. Invariant: a socket appears at its name by rename(2), listening and open to all, so that
//! whoever connects finds the former one or the new one.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use tokio::net::UnixListener;

use super::volume::{MOUNT, Place};

/// The folder of one volume, open.
#[derive(Debug)]
pub(crate) struct Folder(OwnedFd);

impl Folder {
    /// Makes it, or takes the one that is there. `pods` is the kubelet's folder of pods.
    ///
    /// # Errors
    /// The kubelet did not make what is above it, or a symbolic link is on the way.
    pub(crate) fn make(pods: &Path, place: &Place) -> io::Result<Self> {
        let parent = below(pods, &place.parent())?;
        match rustix::fs::mkdirat(&parent, MOUNT, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let folder = beneath(&parent, Path::new(MOUNT))?;
        // Whatever the mask of this process is; the sidecar is another user.
        rustix::fs::fchmod(&folder, Mode::from_raw_mode(0o755))?;
        Ok(Self(folder))
    }

    /// The one that is there.
    ///
    /// # Errors
    /// None is, or a symbolic link is on the way.
    pub(crate) fn open(pods: &Path, place: &Place) -> io::Result<Self> {
        below(pods, &place.parent().join(MOUNT)).map(Self)
    }

    /// Is it there with both of its sockets?
    pub(crate) fn is_whole(pods: &Path, place: &Place) -> bool {
        let is_socket = |folder: &Self, name: &str| {
            let found = rustix::fs::statat(&folder.0, name, AtFlags::SYMLINK_NOFOLLOW);
            found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Socket)
        };
        Self::open(pods, place).is_ok_and(|folder| SOCKETS.iter().all(|name| is_socket(&folder, name)))
    }

    /// A socket at `name`, in the place of one that stood there.
    ///
    /// # Errors
    /// It cannot be bound.
    pub(crate) fn bind(&self, name: &str) -> io::Result<UnixListener> {
        let fresh = fresh(name);
        gone(rustix::fs::unlinkat(&self.0, fresh.as_str(), AtFlags::empty()))?;
        let path = self.path(&fresh);
        let listener = UnixListener::bind(&path)?;
        // Who connects is looked at; which user it is says nothing.
        std::fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        rustix::fs::renameat(&self.0, fresh.as_str(), &self.0, name)?;
        Ok(listener)
    }

    /// Removes it with its sockets, and nothing else. One that is not there was removed before.
    ///
    /// # Errors
    /// Something of it stays.
    pub(crate) fn remove(pods: &Path, place: &Place) -> io::Result<()> {
        let parent = match below(pods, &place.parent()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            parent => parent?,
        };
        let folder = match beneath(&parent, Path::new(MOUNT)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            folder => folder?,
        };
        for name in SOCKETS {
            for name in [name.to_owned(), fresh(name)] {
                gone(rustix::fs::unlinkat(&folder, name, AtFlags::empty()))?;
            }
        }
        gone(rustix::fs::unlinkat(&parent, MOUNT, AtFlags::REMOVEDIR))
    }

    fn path(&self, name: &str) -> PathBuf {
        path_in(&self.0, name)
    }
}

/// The name of a socket that is not open to all yet.
fn fresh(name: &str) -> String {
    format!(".{name}")
}

/// What is not there was removed before.
fn gone(removed: rustix::io::Result<()>) -> io::Result<()> {
    match removed {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A short way to what an open folder holds.
fn path_in(folder: &OwnedFd, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

fn below(pods: &Path, relative: &Path) -> io::Result<OwnedFd> {
    // The operator's own path: it may lead by links.
    let top = rustix::fs::openat(CWD, pods, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    beneath(&top, relative)
}

fn beneath(top: &OwnedFd, relative: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(top, relative, flags, Mode::empty(), resolve)?)
}

/// The socket of enrolment.
pub(super) const ENROLMENT: &str = "node.sock";
/// The socket of the SPIFFE Workload API.
pub(super) const WORKLOAD_API: &str = "workload.sock";
const SOCKETS: [&str; 2] = [ENROLMENT, WORKLOAD_API];

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    fn place() -> Place {
        Place { uid: "0a-1".into(), volume: "outrigger".into() }
    }

    #[tokio::test]
    async fn a_socket_is_bound_in_a_folder_of_any_depth_and_again_in_the_same_one() {
        let top = tempfile::tempdir().unwrap();
        // Deeper than a socket's address is long.
        let pods = top.path().join("k".repeat(120));
        std::fs::create_dir_all(pods.join(place().parent())).unwrap();
        let first = Folder::make(&pods, &place()).unwrap().bind("node.sock").unwrap();
        let mount = pods.join(place().parent()).join(MOUNT);
        let held = OwnedFd::from(std::fs::File::open(&mount).unwrap());
        drop(first);
        assert!(UnixStream::connect(path_in(&held, "node.sock")).await.is_err(), "nobody listens");
        let again = Folder::make(&pods, &place()).unwrap().bind("node.sock").unwrap();
        let (connected, accepted) = tokio::join!(UnixStream::connect(path_in(&held, "node.sock")), again.accept());
        assert!(connected.is_ok() && accepted.is_ok(), "who mounted the folder finds the new socket in it");
        let names: Vec<_> = std::fs::read_dir(&mount).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["node.sock"]);
        assert_eq!(mount.join("node.sock").metadata().unwrap().permissions().mode() & 0o777, 0o666);
        Folder::remove(&pods, &place()).unwrap();
        Folder::remove(&pods, &place()).unwrap();
        assert!(!mount.exists() && mount.parent().unwrap().exists(), "what is above is the kubelet's");
    }

    #[test]
    fn no_link_is_followed() {
        let top = tempfile::tempdir().unwrap();
        let (pods, other) = (top.path().join("pods"), top.path().join("other"));
        let parent = pods.join(place().parent());
        std::fs::create_dir_all(&parent).unwrap();
        std::fs::create_dir_all(&other).unwrap();
        std::fs::write(other.join("kept"), "").unwrap();
        std::os::unix::fs::symlink(&other, parent.join(MOUNT)).unwrap();
        assert!(Folder::make(&pods, &place()).is_err());
        assert!(Folder::remove(&pods, &place()).is_err() && Folder::open(&pods, &place()).is_err());
        assert!(other.join("kept").exists());
        std::fs::remove_dir_all(&parent).unwrap();
        std::os::unix::fs::symlink(&other, &parent).unwrap();
        assert!(Folder::make(&pods, &place()).is_err() && Folder::remove(&pods, &place()).is_err());
        assert!(other.join("kept").exists());
    }

    #[test]
    fn a_pod_that_the_kubelet_has_no_folder_of_gets_none() {
        let top = tempfile::tempdir().unwrap();
        assert_eq!(Folder::make(top.path(), &place()).unwrap_err().kind(), io::ErrorKind::NotFound);
        Folder::remove(top.path(), &place()).unwrap();
    }
}

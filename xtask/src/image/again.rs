//! Whether equal sources make equal bytes: the image once more, of a copy of the sources in another folder.
//!
//! The copy has what is under version control, as it stands here, and the profile of the last release.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::released;
use crate::{Stop, release, shell};

/// Where the copy is made: the build of a release is too large for a folder in memory.
const ELSEWHERE: &str = "/var/tmp";

/// Builds it again, and compares it with `first`, by which a registry would know it. What differs is left to be looked at.
pub(super) fn check(root: &Path, first: &str) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("outrigger-again-").tempdir_in(ELSEWHERE)?;
    copy(root, folder.path())?;
    let second = released(folder.path())?.write(folder.path(), &folder.path().join("image.tar"))?;
    if second == first {
        shell::say(&format!("built again in another folder, it is the same: {first}"));
        return Ok(());
    }
    let kept = folder.keep();
    Err(Stop::No(format!("the same sources made {first} here and {second} in {}", kept.display())).into())
}

fn copy(root: &Path, to: &Path) -> Result<()> {
    let listed = shell::output(shell::command(root, "git", &["ls-files", "-z"]))?;
    let profile = release::profile(root);
    let names = listed.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from);
    for name in names.chain(profile.and_then(|profile| Some(profile.strip_prefix(root).ok()?.to_owned()))) {
        let (from, to) = (root.join(&name), to.join(&name));
        // One that was deleted here is not part of the sources.
        let Ok(metadata) = from.symlink_metadata() else { continue };
        std::fs::create_dir_all(to.parent().context("a file without a folder")?)?;
        let copied = if metadata.is_symlink() {
            std::fs::read_link(&from).and_then(|leads| std::os::unix::fs::symlink(leads, &to))
        } else {
            std::fs::copy(&from, &to).map(drop)
        };
        copied.with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_what_is_under_version_control_and_nothing_else() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let git = |words: &[&str]| shell::output(shell::command(here.path(), "git", words)).map(drop).unwrap();
        git(&["init", "--quiet"]);
        std::fs::create_dir(here.path().join("src")).unwrap();
        for name in ["src/kept", "gone", "other"] {
            std::fs::write(here.path().join(name), name).unwrap();
        }
        std::os::unix::fs::symlink("src", here.path().join("link")).unwrap();
        git(&["add", "src/kept", "gone", "link"]);
        std::fs::remove_file(here.path().join("gone")).unwrap();
        copy(here.path(), there.path()).unwrap();
        assert_eq!(std::fs::read_to_string(there.path().join("src/kept")).unwrap(), "src/kept");
        assert_eq!(std::fs::read_link(there.path().join("link")).unwrap(), Path::new("src"));
        assert!(!there.path().join("gone").exists() && !there.path().join("other").exists());
    }
}

//! A file system in memory for a kernel to start from: a cpio archive of the form `newc`.
//!
//! Source: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use anyhow::{Context as _, Result};

/// An archive under construction.
#[derive(Debug, Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    /// The folders that stand in it.
    folders: BTreeSet<String>,
    /// Every entry has a number of its own: entries that share one would be taken for one file with several names.
    entries: u32,
}

impl Archive {
    /// A folder, and those above it.
    pub(super) fn folder(&mut self, path: &Path) -> Result<()> {
        let mut name = String::new();
        for part in path.components() {
            if let Component::Normal(part) = part {
                if !name.is_empty() {
                    name.push('/');
                }
                name.push_str(part.to_str().context("a path that is no text")?);
                if self.folders.insert(name.clone()) {
                    self.entry(&name, 0o040_755, &[])?;
                }
            }
        }
        Ok(())
    }

    /// A file that may be run, in a folder that is made if missing.
    pub(super) fn file(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        self.folder(path.parent().unwrap_or_else(|| Path::new("")))?;
        let name = path.strip_prefix("/").unwrap_or(path).to_str().context("a path that is no text")?;
        self.entry(name, 0o100_755, content)
    }

    /// A file of this machine, at the same place or elsewhere.
    pub(super) fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(to, &content)
    }

    /// The whole archive.
    pub(super) fn end(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).context("a file of more than 4 GiB")?;
        let name_size = u32::try_from(name.len() + 1).context("a name of more than 4 GiB")?;
        // Inode, mode, user, group, links, time, size, device (2), device that it is (2), size of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    /// Every part begins at a multiple of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_is_as_the_kernel_reads_it() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b"), b"hello").unwrap();
        archive.folder(Path::new("/a")).unwrap();
        let bytes = archive.end().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let heads: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(heads.len(), 3, "a folder, a file, the end");
        assert!(heads.iter().all(|at| at % 4 == 0) && bytes.len() % 4 == 0);
        // Mode and size of the file, then its name and content, each with its padding.
        assert_eq!(&text[heads[1] + 14..heads[1] + 22], "000081ed");
        assert_eq!(&text[heads[1] + 54..heads[1] + 62], "00000005");
        assert_eq!(&bytes[heads[1] + 110..heads[2]], b"a/b\0\0\0hello\0\0\0");
    }
}

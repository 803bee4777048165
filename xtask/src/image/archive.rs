//! An image without an engine: an OCI archive, reproducible to the byte.
//!
//! Sources: the OCI image specification 1.1 (image-layout.md, manifest.md, config.md, annotations.md).
//!
//! Invariant: equal files and names make equal bytes. No time, owner or folder of the machine that made it is in it.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::shell;

/// An image of one layer.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// Where it belongs and its tag: `localhost/outrigger:dev`.
    pub(crate) name: String,
    pub(crate) entrypoint: Vec<String>,
    /// `UID:GID` of who runs it where nobody says otherwise.
    pub(crate) user: String,
    /// A file of this machine, and where it stands in the image, without the first slash. All may be run.
    pub(crate) files: Vec<(PathBuf, String)>,
    /// Folders that it has besides, without the first slash.
    pub(crate) folders: Vec<String>,
}

/// Folders that programs expect.
const FOLDERS: [(&str, u32); 5] = [("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("sys", 0o755), ("tmp", 0o1777)];
const PASSWORDS: &str = "root:x:0:0::/:/bin/sh\nnobody:x:65532:65532::/:/sbin/nologin\n";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

impl Image {
    /// Writes the archive to `to`. Returns the digest by which a registry would know it.
    pub(crate) fn write(&self, root: &Path, to: &Path) -> Result<String> {
        let work = tempfile::tempdir()?;
        let layout = work.path().join("layout");
        let blobs = Blobs { root, folder: layout.join("blobs/sha256") };
        std::fs::create_dir_all(&blobs.folder)?;
        let layer = work.path().join("layer.tar");
        archive(root, &self.files(work.path())?, &layer)?;
        let plain = digest(root, &layer)?;
        shell::output(shell::command(root, "gzip", &["--no-name", "-9", &layer.to_string_lossy()]))?;
        let layer = blobs.file(&layer.with_extension("tar.gz"), LAYER)?;
        let config = blobs.json(
            &json!({
                "architecture": architecture(),
                "os": "linux",
                "config": { "User": self.user, "Entrypoint": self.entrypoint, "Env": ["PATH=/bin"] },
                "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{plain}")] },
            }),
            CONFIG,
        )?;
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer] });
        let mut manifest = blobs.json(&manifest, MANIFEST)?;
        let (_, tag) = self.name.rsplit_once(':').context("an image without a tag")?;
        manifest.annotations =
            [("io.containerd.image.name", self.name.clone()), ("org.opencontainers.image.ref.name", tag.to_owned())].into();
        let digest = manifest.digest.clone();
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });
        std::fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive(root, &layout, to)?;
        Ok(digest)
    }

    /// Puts the files where the image has them, below `work`.
    fn files(&self, work: &Path) -> Result<PathBuf> {
        let top = work.join("files");
        for (folder, mode) in FOLDERS {
            make(&top, &top.join(folder))?;
            std::fs::set_permissions(top.join(folder), Permissions::from_mode(mode))?;
        }
        for folder in &self.folders {
            make(&top, &top.join(folder))?;
        }
        put(&top, "etc/passwd", PASSWORDS.as_bytes(), 0o644)?;
        for (from, to) in &self.files {
            let bytes = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            put(&top, to, &bytes, 0o755)?;
        }
        Ok(top)
    }
}

/// What names one of the contents of an archive.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: &'static str,
    digest: String,
    size: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'static str, String>,
}

/// The contents of an archive, named by their digests.
struct Blobs<'a> {
    root: &'a Path,
    folder: PathBuf,
}

impl Blobs<'_> {
    /// Takes a file in, and returns its descriptor.
    fn file(&self, file: &Path, media_type: &'static str) -> Result<Descriptor> {
        let digest = digest(self.root, file)?;
        let size = std::fs::metadata(file)?.len();
        std::fs::rename(file, self.folder.join(&digest))?;
        Ok(Descriptor { media_type, digest: format!("sha256:{digest}"), size, annotations: BTreeMap::new() })
    }

    fn json(&self, value: &Value, media_type: &'static str) -> Result<Descriptor> {
        let file = self.folder.join("new");
        std::fs::write(&file, serde_json::to_vec(value)?)?;
        self.file(&file, media_type)
    }
}

/// The name of this machine's processor as Go spells it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn put(top: &Path, name: &str, bytes: &[u8], mode: u32) -> Result<()> {
    let path = top.join(name);
    make(top, path.parent().unwrap_or(top))?;
    std::fs::write(&path, bytes)?;
    Ok(std::fs::set_permissions(&path, Permissions::from_mode(mode))?)
}

/// Makes a folder and those above it up to `top`, whatever the mask of this process is.
fn make(top: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    for part in folder.ancestors().take_while(|part| part.starts_with(top)) {
        std::fs::set_permissions(part, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// An archive of what is in `folder`, in the order of names and without anything of this machine.
fn archive(root: &Path, folder: &Path, to: &Path) -> Result<()> {
    let mut tar = shell::command(root, "tar", &["--create", "--format=ustar", "--sort=name", "--mtime=@0", "--numeric-owner"]);
    tar.args(["--owner=0", "--group=0", "--no-xattrs", "--no-acls", "--no-selinux"]);
    tar.arg("--file").arg(to).arg("--directory").arg(folder);
    // Named one by one, since an entry for the top itself would say who may enter the image.
    let mut names: Vec<_> =
        std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
    names.sort_unstable();
    tar.arg("--").args(names);
    shell::output(tar).map(drop)
}

/// SHA-256 in hexadecimal digits.
fn digest(root: &Path, file: &Path) -> Result<String> {
    let said = shell::output(shell::command(root, "sha256sum", &[&file.to_string_lossy()]))?;
    Ok(said.split(' ').next().context("sha256sum said nothing")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(files: &[(&Path, &str)]) -> Image {
        Image {
            name: "localhost/some:1".to_owned(),
            entrypoint: vec!["/bin/some".to_owned()],
            user: "65532:65532".to_owned(),
            folders: Vec::new(),
            files: files.iter().map(|(from, to)| (from.to_path_buf(), (*to).to_owned())).collect(),
        }
    }

    #[test]
    fn equal_files_make_equal_bytes_whenever_and_wherever() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [one, other] = folders.each_ref().map(|folder| {
            let (file, archive) = (folder.path().join("program"), folder.path().join("image.tar"));
            std::fs::write(&file, "#!/bin/sh\n").unwrap();
            image(&[(&file, "bin/some")]).write(folder.path(), &archive).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1_100));
            std::fs::read(&archive).unwrap()
        });
        assert!(one == other);
    }

    #[test]
    fn what_the_index_names_is_there_under_its_digest() {
        let folder = tempfile::tempdir().unwrap();
        let (file, archive) = (folder.path().join("program"), folder.path().join("image.tar"));
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        image(&[(&file, "usr/bin/some")]).write(folder.path(), &archive).unwrap();
        let tar = |words: &[&str]| {
            let mut command = shell::command(folder.path(), "tar", words);
            command.arg("--file").arg(&archive);
            shell::output(command).unwrap()
        };
        assert!(tar(&["--list"]).lines().any(|name| name == "oci-layout"));
        shell::output(shell::command(folder.path(), "tar", &["--extract", "--file", &archive.to_string_lossy()])).unwrap();
        let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(folder.path().join(name)).unwrap()).unwrap() };
        let blob = |digest: &Value| format!("blobs/sha256/{}", digest.as_str().unwrap().strip_prefix("sha256:").unwrap());
        let index = read("index.json");
        let manifest = read(&blob(&index["manifests"][0]["digest"]));
        let config = read(&blob(&manifest["config"]["digest"]));
        assert_eq!(config["config"]["Entrypoint"], json!(["/bin/some"]));
        let layer = folder.path().join(blob(&manifest["layers"][0]["digest"]));
        let size = std::fs::metadata(&layer).unwrap().len();
        assert_eq!(manifest["layers"][0]["size"], size);
        assert_eq!(digest(folder.path(), &layer).unwrap().len(), 64);
        let listed = shell::output(shell::command(folder.path(), "tar", &["-tvzf", &layer.to_string_lossy()])).unwrap();
        assert!(listed.lines().any(|line| line.starts_with("-rwxr-xr-x 0/0") && line.ends_with("usr/bin/some")), "{listed}");
        assert!(listed.lines().any(|line| line.starts_with("drwxrwxrwt 0/0") && line.contains(" tmp")), "{listed}");
    }
}

//! `cargo xtask image`: the product's image without a container engine, and the images that its tests run.
//!
//! A user's holds one static binary and folders. A test's holds the binary of development with the libraries of the machine
//! that built it, which costs no second build.

mod again;
mod archive;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

pub(crate) use self::archive::Image;
use crate::{release, setup, shell};

/// What to build.
#[derive(clap::Args, Debug)]
pub(crate) struct Wish {
    /// The binary of development (or `OUTRIGGER_BIN`) instead of a static release, and beside it the image of the programs that tests run in pods
    #[arg(long)]
    dev: bool,
    /// Where the archive is written
    #[arg(long, value_name = "FILE", conflicts_with = "dev")]
    output: Option<PathBuf>,
    /// Build it once more, from a copy of the sources in another folder, and fail where the two differ in a byte
    #[arg(long, conflicts_with = "dev")]
    twice: bool,
}

/// Who runs the product where nobody says otherwise.
const USER: &str = "14000:14000";
/// Who runs a test's program.
const NOBODY: &str = "65532:65532";
/// As container runtimes write the full name of what pods call `outrigger:VERSION`.
const REGISTRY: &str = "docker.io/library";
/// What pods of tests run: the programs, and what a shell and a client need.
const PROGRAMS: [(&str, &str); 3] =
    [("target/debug/shop", "bin/shop"), ("target/debug/load", "bin/load"), ("/usr/bin/curl", "bin/curl")];

/// Builds, writes, and says where the archive is, what its contents are called, and how large it is.
pub(crate) fn run(root: &Path, wish: &Wish) -> Result<()> {
    if wish.dev {
        setup::build(root)?;
        return dev(root).map(drop);
    }
    let written = write(root, &released(root)?, wish.output.as_deref())?;
    if wish.twice { again::check(root, &written.digest) } else { Ok(()) }
}

/// The image as it is released, of the sources in a folder.
fn released(root: &Path) -> Result<Image> {
    let files = with_libraries(root, vec![(release::built_static(root)?, "outrigger".to_owned())])?;
    ensure!(files.len() == 1, "the binary is not static: it loads {:?}", files.iter().skip(1).collect::<Vec<_>>());
    Ok(product(files))
}

/// The product's image with these files in it.
fn product(files: Vec<(PathBuf, String)>) -> Image {
    Image {
        name: format!("{REGISTRY}/outrigger:{}", version()),
        entrypoint: vec!["/outrigger".to_owned()],
        user: USER.to_owned(),
        folders: FOLDERS.map(str::to_owned).to_vec(),
        files,
    }
}

/// The images of the tests, of what was built for development. Returns their archives.
pub(crate) fn dev(root: &Path) -> Result<Vec<PathBuf>> {
    let work = tempfile::tempdir()?;
    let stripped = |from: &Path| -> Result<PathBuf> {
        let to = work.path().join(from.file_name().context("a program without a name")?);
        let mut strip = shell::command(root, "strip", &["--strip-debug", "-o"]);
        strip.arg(&to).arg(from);
        shell::output(strip)?;
        Ok(to)
    };
    // The one that is under test, as for the cases on local pods.
    let binary = stripped(&e2e::mesh::binary())?;
    let product = product(with_libraries(root, vec![(binary, "outrigger".to_owned())])?);
    // A shell, and what `kubectl cp` runs.
    let mut programs = ["bin/busybox", "bin/sh", "bin/tar"].map(|to| (PathBuf::from("/bin/busybox"), to.to_owned())).to_vec();
    for (from, to) in PROGRAMS {
        programs.push((stripped(&root.join(from))?, to.to_owned()));
    }
    let tests = Image {
        name: format!("{REGISTRY}/outrigger-tests:{}", version()),
        entrypoint: vec!["/bin/shop".to_owned()],
        user: NOBODY.to_owned(),
        folders: Vec::new(),
        files: with_libraries(root, programs)?,
    };
    Ok(vec![write(root, &product, None)?.archive, write(root, &tests, None)?.archive])
}

/// The folders that the product expects to be there.
const FOLDERS: [&str; 2] = ["run", "var/lib/outrigger"];

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// An image that was written.
struct Written {
    archive: PathBuf,
    digest: String,
}

fn write(root: &Path, image: &Image, to: Option<&Path>) -> Result<Written> {
    let name = image.name.rsplit('/').next().unwrap_or_default().replace(':', "-");
    let to = to.map_or_else(|| root.join("target/images").join(format!("{name}.tar")), Path::to_path_buf);
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let digest = image.write(root, &to)?;
    let size = std::fs::metadata(&to)?.len();
    println!("{}  {digest}  {:.1} MiB  {}", to.display(), size as f64 / 1_048_576.0, image.name);
    Ok(Written { archive: to, digest })
}

/// The files, and every library of this machine that the dynamic linker would load for one of them.
fn with_libraries(root: &Path, mut files: Vec<(PathBuf, String)>) -> Result<Vec<(PathBuf, String)>> {
    let mut libraries = BTreeSet::new();
    for (file, _) in &files {
        // It fails for a static program, which has none.
        let Ok(said) = shell::output(shell::command(root, "ldd", &[&file.to_string_lossy()])) else { continue };
        libraries.extend(named(&said));
    }
    files.extend(libraries.into_iter().map(|path| (PathBuf::from(&path), path.trim_start_matches('/').to_owned())));
    Ok(files)
}

/// The paths in what ldd(1) says: `NAME => PATH (ADDRESS)`, or `PATH (ADDRESS)` of the linker itself.
fn named(said: &str) -> impl Iterator<Item = String> {
    said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_those_that_the_linker_names() {
        let said = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found: Vec<String> = named(said).collect();
        assert_eq!(found, ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
    }
}

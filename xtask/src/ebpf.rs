//! `cargo xtask ebpf`: the kernel programs' object, built from `ebpf/` and compared with the committed one.

use std::path::Path;

use anyhow::Result;

use crate::Stop;

/// Builds the object into `ebpf/prebuilt`; with `check` compares instead.
pub(crate) fn run(root: &Path, _check: bool) -> Result<()> {
    let folder = root.join("ebpf");
    Err(Stop::Missing(format!("{} holds no kernel programs yet", folder.display())).into())
}

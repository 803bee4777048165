//! What the parts of the mesh hold, read from their processes.

use anyhow::{Context as _, Result, ensure};
use e2e::runner::Case;

use super::OnCluster;

pub(super) const CASES: &[OnCluster] =
    &[Case { name: "the_node_agent_holds_three_capabilities_and_the_control_plane_none", run: |_, _| capabilities() }];

/// CAP_NET_ADMIN, CAP_PERFMON and CAP_BPF, by their numbers.
const OF_THE_AGENT: u64 = 1 << 12 | 1 << 38 | 1 << 39;

fn capabilities() -> Result<()> {
    for (role, expected) in [("node", OF_THE_AGENT), ("control", 0)] {
        let mut found = false;
        for entry in std::fs::read_dir("/proc")? {
            let folder = entry?.path();
            let words = std::fs::read(folder.join("cmdline")).unwrap_or_default();
            if !words.starts_with(format!("/outrigger\0{role}\0--kubernetes\0").as_bytes()) {
                continue;
            }
            found = true;
            let status = std::fs::read_to_string(folder.join("status"))?;
            for set in ["CapPrm", "CapEff", "CapBnd"] {
                let held =
                    status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":")).context("no capabilities")?;
                let held = u64::from_str_radix(held.trim(), 16)?;
                ensure!(held == expected, "{role} holds {set} {held:#x}, not {expected:#x}");
            }
            ensure!(status.contains("NoNewPrivs:\t1"), "{role} may gain rights");
        }
        ensure!(found, "no process of {role} runs");
    }
    Ok(())
}

//! Parts of the mesh that their supervisor is about to start anew: commands wait for them a while, and say so.

use std::time::Duration;

use tokio::time::Instant;

use super::local::{self, LONGEST_PAUSE, Restarted, UpRecord};
use super::warn;
use crate::base::clock::WallClock;

/// What the mesh's supervisor keeps running.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Control,
    Node,
}

impl Part {
    /// The subcommand that it runs as.
    pub(crate) const fn role(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Node => "node",
        }
    }

    /// As people are told of it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Control => "control plane",
            Self::Node => "node agent",
        }
    }

    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Control, Self::Node];

    /// What the supervisor wrote of its last end, if there was one: `; it ended 3s ago (…)`.
    pub(crate) fn told(self, mesh: Option<&UpRecord>) -> String {
        let restarted: Option<&Restarted> = mesh.and_then(|mesh| mesh.restarted.get(self.role()));
        restarted.map(|told| format!("; it {}", told.clause(WallClock::system().since_epoch()))).unwrap_or_default()
    }
}

/// What is left of a command's patience with one part.
pub(crate) struct Patience {
    part: Part,
    until: Instant,
    told: bool,
}

impl Patience {
    /// As long as a part takes to be started anew that ended again and again: the supervisor's longest pause, and its start.
    pub(crate) fn with(part: Part) -> Self {
        Self { part, until: Instant::now() + RESTART_MAX, told: false }
    }

    /// Waits a moment, after which the part may be asked again. `false`: it has been waited for long enough. Cancel-safe.
    pub(crate) async fn wait(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        // First a moment, in which the supervisor sees the end and writes when the next one comes.
        tokio::time::sleep(POLL).await;
        if !std::mem::replace(&mut self.told, true) {
            warn(&waiting(self.part, local::read_up_record().as_ref()));
        }
        true
    }
}

fn waiting(part: Part, mesh: Option<&UpRecord>) -> String {
    let (name, at_most) = (part.name(), RESTART_MAX.as_secs());
    format!("the {name} is being started again; waiting for it, {at_most} s at most{}", part.told(mesh))
}

/// One that is started is ready in less than a second, on a machine that has time for it.
const READY_WITHIN: Duration = Duration::from_secs(5);
const RESTART_MAX: Duration = LONGEST_PAUSE.saturating_add(READY_WITHIN);
const POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_outlasts_the_longest_pause_of_the_supervisor_and_ends() {
        let begun = Instant::now();
        let mut patience = Patience::with(Part::Node);
        while patience.wait().await {}
        assert!((LONGEST_PAUSE + READY_WITHIN..=RESTART_MAX + POLL).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        assert!(patience.told && !patience.wait().await);
    }

    #[test]
    fn who_waits_is_told_why_the_part_ended_and_how_often_it_did() {
        let mut mesh: UpRecord = serde_json::from_value(serde_json::json!({
            "supervisor": 1, "control": 1, "node": 1, "state": "/", "trustDomain": "t", "stream": "127.0.0.1:1", "api": "", "dashboard": "",
            "restarted": { "node": { "times": 2, "ended": "signal: 9 (SIGKILL)", "endedAtMs": 0, "nextAtMs": 1 } }
        }))
        .unwrap();
        let plain = "the node agent is being started again; waiting for it, 10 s at most";
        assert_eq!(waiting(Part::Node, None), plain);
        let told = waiting(Part::Node, Some(&mesh));
        assert!(told.starts_with(&format!("{plain}; it ended ")), "{told}");
        assert!(told.ends_with("(signal: 9 (SIGKILL)), next start now, started anew 2 times before"), "{told}");
        assert!(!waiting(Part::Control, Some(&mesh)).contains("ended"));
        mesh.restarted.clear();
        assert_eq!(waiting(Part::Node, Some(&mesh)), plain);
    }
}

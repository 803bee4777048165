//! Parts of the mesh that their supervisor is about to start again: commands wait for them a while, and say so.

use std::time::Duration;

use tokio::time::Instant;

use super::warn;

/// What is left of a command's patience with one part.
pub(crate) struct Patience {
    part: &'static str,
    until: Instant,
    told: bool,
}

impl Patience {
    /// As long as a part takes to be started again: one that was killed is at once, and is ready in less than a second.
    pub(crate) fn with(part: &'static str) -> Self {
        Self { part, until: Instant::now() + RESTART_MAX, told: false }
    }

    /// Waits a moment, after which the part may be asked again. `false`: it has been waited for long enough. Cancel-safe.
    pub(crate) async fn wait(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        if !std::mem::replace(&mut self.told, true) {
            warn(&format!("the {} is being started again; waiting for it, {} s at most", self.part, RESTART_MAX.as_secs()));
        }
        tokio::time::sleep(POLL).await;
        true
    }
}

const RESTART_MAX: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_ends() {
        let begun = Instant::now();
        let mut patience = Patience::with("node agent");
        while patience.wait().await {}
        assert_eq!(begun.elapsed(), RESTART_MAX);
        assert!(patience.told && !patience.wait().await);
    }
}

//! The ladder of capture: the ways in which a pod's connections can be brought to its sidecar, best first, and why the
//! agent stands on the one that it stands on.
//!
//! Invariant: nobody comes to stand on a lower rung unawares. What the upper one lacked is told for as long as the agent
//! runs, with the hook, the error's number, the kernel and the verifier's last lines, and so is what the lower one costs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::base::names::Named;

/// A way to capture.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Rung {
    /// Kernel programs, at the hooks of sockets.
    #[default]
    Ebpf,
    /// A ruleset in each pod's network namespace.
    Nftables,
    /// None: programs are told of their sidecar by the variables that HTTP clients read.
    Explicit,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Ladder {
    /// The first rung that holds.
    #[default]
    Auto,
    /// This one, or none.
    Only(Rung),
}

/// Why a rung does not hold on this machine.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Fall {
    pub(crate) rung: Rung,
    /// The hook whose program the kernel does not take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hook: Option<String>,
    /// What the kernel answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) errno: Option<i32>,
    /// The running kernel's release.
    pub(crate) kernel: String,
    /// The verifier's last lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) verifier: Option<String>,
    /// All of it in one line.
    pub(crate) text: String,
    pub(crate) remedy: String,
}

/// Where the agent stands.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Standing {
    pub(crate) rung: Rung,
    /// The rungs above that did not hold, best first; none where this one was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) fallen: Vec<Fall>,
    /// It was asked for by name.
    #[serde(default)]
    pub(crate) asked: bool,
}

/// Pods that run were captured otherwise. The user is at fault.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error("{pod} runs, captured by {running}, and cannot be captured by {asked} as well")]
pub(crate) struct Occupied {
    pub(crate) pod: Named,
    pub(crate) running: Rung,
    pub(crate) asked: Rung,
}

impl Rung {
    /// Best first.
    pub(crate) const ALL: [Self; 3] = [Self::Ebpf, Self::Nftables, Self::Explicit];

    /// As it is written on the command line and in answers.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Explicit => "explicit",
        }
    }

    /// As it is told to people.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "eBPF",
            Self::Nftables => "nftables",
            Self::Explicit => "explicit proxy",
        }
    }

    /// What somebody who stands on it does without, in one line.
    pub(crate) const fn cost(self) -> Option<&'static str> {
        match self {
            Self::Ebpf => None,
            Self::Nftables => Some(
                "every connection is tracked (nf_conntrack_max bounds them, and a connection out is rewritten); a program with \
                 CAP_NET_ADMIN in the pod can change the ruleset, which is looked at every 10 s and put back; applications see \
                 their sidecar as the client; packet sockets are not seen, so no pod can enforce; no flow records",
            ),
            Self::Explicit => Some(
                "nothing is captured: only HTTP clients that read http_proxy use the sidecar, nothing that arrives passes \
                 it, and no policy of the pod's own is enforced",
            ),
        }
    }
}

impl Ladder {
    /// The rungs to try, in order, where pods that run stand on `running`. What is asked for by name is not replaced by
    /// another; what is not, goes on as it is: two ways at once would take the same connections.
    ///
    /// # Errors
    /// Pods run that stand on another rung than the one asked for.
    pub(crate) fn rungs(self, running: Option<(Rung, Named)>) -> Result<Vec<Rung>, Occupied> {
        match (self, running) {
            (Self::Auto, None) => Ok(Rung::ALL.to_vec()),
            (Self::Auto, Some((rung, _pod))) => Ok(vec![rung]),
            (Self::Only(asked), Some((running, pod))) if asked != running => Err(Occupied { pod, running, asked }),
            (Self::Only(asked), _same) => Ok(vec![asked]),
        }
    }
}

impl Standing {
    /// One line: on which rung, why not on a better one, and what that costs.
    pub(crate) fn line(&self) -> String {
        let mut line = self.rung.name().to_owned();
        if self.asked && self.rung != Rung::Ebpf {
            line.push_str(", as asked for");
        }
        for fall in &self.fallen {
            line.push_str(&format!("; no {}: {}", fall.rung.name(), fall.text));
        }
        if let Some(cost) = self.rung.cost() {
            line.push_str(&format!("; it costs: {cost}"));
        }
        line
    }
}

impl Occupied {
    /// What to do about it.
    pub(crate) fn remedy(&self) -> String {
        format!("stop the pods that run, or start the mesh with --capture {}", self.running.word())
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Ladder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Only(rung) => rung.word(),
        })
    }
}

impl FromStr for Ladder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rung = || Rung::ALL.into_iter().find(|rung| rung.word() == text).map(Self::Only);
        let known = if text == "auto" { Some(Self::Auto) } else { rung() };
        known.ok_or_else(|| "write auto, ebpf, nftables or explicit".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn web() -> Named {
        Named::new("shop", "web")
    }

    #[test]
    fn without_a_wish_the_rungs_are_tried_from_the_top() {
        assert_eq!(Ladder::Auto.rungs(None), Ok(vec![Rung::Ebpf, Rung::Nftables, Rung::Explicit]));
        assert_eq!(Ladder::Only(Rung::Nftables).rungs(None), Ok(vec![Rung::Nftables]));
    }

    #[test]
    fn pods_that_run_stay_on_their_rung() {
        let running = || Some((Rung::Nftables, web()));
        assert_eq!(Ladder::Auto.rungs(running()), Ok(vec![Rung::Nftables]));
        assert_eq!(Ladder::Only(Rung::Nftables).rungs(running()), Ok(vec![Rung::Nftables]));
        let occupied = Ladder::Only(Rung::Ebpf).rungs(running()).unwrap_err();
        assert_eq!(occupied.to_string(), "shop/web runs, captured by nftables, and cannot be captured by eBPF as well");
        assert!(occupied.remedy().ends_with("--capture nftables"));
    }

    #[test]
    fn words_of_the_command_line_are_read_and_written() {
        for word in ["auto", "ebpf", "nftables", "explicit"] {
            assert_eq!(word.parse::<Ladder>().unwrap().to_string(), word);
        }
        assert_eq!("iptables".parse::<Ladder>().unwrap_err(), "write auto, ebpf, nftables or explicit");
    }

    #[test]
    fn one_line_tells_the_rung_why_and_what_it_costs() {
        assert_eq!(Standing::default().line(), "eBPF");
        let text = "the kernel 5.10 refuses the program or_connect4: Permission denied (os error 13); verifier: bad".to_owned();
        let fall = Fall { kernel: "5.10".to_owned(), text: text.clone(), ..Fall::default() };
        let standing = Standing { rung: Rung::Nftables, fallen: vec![fall], asked: false };
        assert!(standing.line().starts_with(&format!("nftables; no eBPF: {text}; it costs: every connection is tracked")));
        let asked = Standing { rung: Rung::Explicit, fallen: Vec::new(), asked: true };
        assert!(asked.line().starts_with("explicit proxy, as asked for; it costs: nothing is captured"));
    }

    #[test]
    fn every_rung_but_the_first_names_what_it_costs() {
        for rung in Rung::ALL {
            assert_eq!(rung.cost().is_none(), rung == Rung::Ebpf, "{rung}");
        }
    }
}

//! On which rung of capture the cases run: the variable `OUTRIGGER_CAPTURE`, which `outrigger up` reads as well.

use std::fmt;

/// A rung on which the whole suite is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rung {
    /// Also where nothing is asked for: the machines that run this suite take the programs.
    Ebpf,
    Nftables,
}

impl Rung {
    /// That of this process.
    pub fn asked() -> Self {
        match std::env::var("OUTRIGGER_CAPTURE").as_deref() {
            Ok("nftables") => Self::Nftables,
            _otherwise => Self::Ebpf,
        }
    }

    /// Why a case is another rung's, if it is.
    pub fn lacks(self, case: &str) -> Option<&'static str> {
        match self {
            Self::Ebpf => None,
            Self::Nftables => NOT_ON_NFTABLES.iter().find(|(name, _why)| *name == case).map(|(_name, why)| *why),
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
        })
    }
}

/// The cases of what nftables has not, each with the reason. The group `ladder` tests what it has in their place.
const NOT_ON_NFTABLES: [(&str, &str); 11] = [
    (
        "a_crafted_packet_is_counted_within_a_second_and_told_by_status",
        "a packet made by hand is rewritten to the sidecar as any other: there is nothing to count",
    ),
    ("a_crafted_packet_does_not_leave_a_pod_that_enforces", "packet sockets are not seen, so no pod can enforce"),
    ("an_agent_of_another_build_takes_over_and_loses_no_request", "there are no programs to be replaced"),
    ("a_program_that_is_taken_off_is_missed_within_one_interval", "there are no programs; a ruleset is put back"),
    ("rare_events_of_the_kernel_programs_reach_the_log_where_asked_for", "there are no programs to write them"),
    ("a_pod_that_finds_no_room_is_refused_by_name_and_its_program_never_starts", "the room is that of the programs' maps"),
    ("agent_and_sidecars_have_the_rights_that_they_need_and_no_more", "the agent needs others: it enters the pods' namespaces"),
    (
        "a_pod_that_runs_has_proven_both_ways_and_doctor_says_so",
        "a ruleset lets out whatever a sidecar dials, so one way is proven",
    ),
    (
        "a_pod_whose_connections_do_not_come_to_its_sidecar_is_not_ready_until_they_do",
        "a ruleset lets out whatever a sidecar dials, so one way is proven",
    ),
    (
        "each_program_that_is_taken_off_is_told_everywhere_within_an_interval_and_put_back",
        "there are no programs; a ruleset is put back",
    ),
    (
        "what_is_taken_off_again_and_again_stays_off_after_three_times_and_is_told",
        "there are no programs; a ruleset is put back each time",
    ),
];

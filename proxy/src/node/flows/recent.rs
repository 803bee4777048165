//! The latest flow records with the names of the pods at both ends, and what is told of them at `/flows`.
//!
//! Names are found when a record comes: an address may be another pod's a moment later. What is known is who has which
//! address on this node, and who had it last; every other address stays one. Invariant: bounded in records and in names, and
//! what an asker missed is told to them.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_common::flows::Flow;
use serde::{Deserialize, Serialize};

use super::{direction, end};
use crate::base::names::Named;
use crate::model::pod_record::PodRecord;

/// The latest records.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    held: VecDeque<Held>,
    /// Of the record that came last.
    last: u64,
    names: Names,
}

/// One record.
#[derive(Debug)]
struct Held {
    number: u64,
    closed: Duration,
    pod: Named,
    peer: Option<Named>,
    flow: Flow,
}

/// Who has which address.
#[derive(Debug, Default)]
struct Names {
    by_address: BTreeMap<IpAddr, Owner>,
    /// Addresses of pods that are gone, the first of them first.
    gone: VecDeque<IpAddr>,
}

#[derive(Debug)]
struct Owner {
    name: Named,
    is_gone: bool,
}

/// What is asked for.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Question {
    pub(crate) namespace: Option<String>,
    pub(crate) pod: Option<String>,
    /// Only what came behind the record of this number.
    pub(crate) after: Option<u64>,
}

/// Recent connections.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FlowsReport {
    /// The oldest first.
    pub(crate) flows: Vec<FlowReport>,
    /// To be named as `after` by who wants those that come next.
    pub(crate) last: u64,
    /// Records behind the `after` that was named which are not held any more, whoever's they were.
    pub(crate) missed: u64,
    /// Records of which nothing but their number is known, since the pods were enrolled: the kernel had no place for them, or
    /// nobody could be named for them.
    pub(crate) lost: u64,
}

/// One connection that ended.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FlowReport {
    pub(crate) number: u64,
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub(crate) closed_ms: u64,
    pub(crate) namespace: String,
    pub(crate) pod: String,
    /// `inbound` or `outbound`, seen from the pod.
    pub(crate) direction: Cow<'static, str>,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    /// The pod at the other end, as `NAMESPACE/NAME`; absent where the address is none of a pod of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<String>,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    pub(crate) duration_us: u64,
    /// Smoothed, when it closed.
    pub(crate) round_trip_us: u32,
    pub(crate) retransmits: u32,
    /// `finished`, `reset`, `timed_out`, or `unknown`.
    pub(crate) end: Cow<'static, str>,
}

impl Recent {
    /// A pod is enrolled.
    pub(crate) fn came(&mut self, pod: &PodRecord) {
        for address in &pod.addresses {
            self.names.by_address.insert(address.to_canonical(), Owner { name: pod.named(), is_gone: false });
        }
    }

    /// A pod is gone. What its peers had with it closes now.
    pub(crate) fn went(&mut self, pod: &PodRecord) {
        self.names.went(pod);
    }

    /// Takes a record of `pod`; without one, of whoever has or had its address last. `false`: that is nobody.
    pub(super) fn take(&mut self, flow: &Flow, pod: Option<Named>, closed: Duration) -> bool {
        let Some(pod) = pod.or_else(|| self.names.of(flow.local.into())) else { return false };
        let peer = self.names.of(flow.remote.into());
        if self.held.len() >= HELD_MAX {
            self.held.pop_front();
        }
        self.last = self.last.saturating_add(1);
        self.held.push_back(Held { number: self.last, closed, pod, peer, flow: *flow });
        true
    }

    /// Those that were asked for.
    pub(super) fn report(&self, question: &Question) -> FlowsReport {
        let Question { namespace, pod, after } = question;
        // A number that there never was is from before the agent was started again: all of these are new.
        let after = after.filter(|after| *after <= self.last);
        let is_asked_for = |held: &&Held| {
            after.is_none_or(|after| held.number > after)
                && namespace.as_deref().is_none_or(|namespace| *held.pod.namespace == *namespace)
                && pod.as_deref().is_none_or(|pod| *held.pod.name == *pod)
        };
        let first = self.held.front().map_or(self.last, |held| held.number.saturating_sub(1));
        FlowsReport {
            flows: self.held.iter().filter(is_asked_for).map(Held::report).collect(),
            last: self.last,
            missed: after.map_or(0, |after| first.saturating_sub(after)),
            lost: 0,
        }
    }
}

impl Held {
    fn report(&self) -> FlowReport {
        let Self { number, closed, pod, peer, flow } = self;
        FlowReport {
            number: *number,
            closed_ms: u64::try_from(closed.as_millis()).unwrap_or(u64::MAX),
            namespace: pod.namespace.as_ref().to_owned(),
            pod: pod.name.as_ref().to_owned(),
            direction: Cow::Borrowed(direction(flow)),
            local: SocketAddr::new(IpAddr::from(flow.local).to_canonical(), flow.local_port),
            remote: SocketAddr::new(IpAddr::from(flow.remote).to_canonical(), flow.remote_port),
            peer: peer.as_ref().map(ToString::to_string),
            sent_bytes: flow.sent_bytes,
            received_bytes: flow.received_bytes,
            duration_us: flow.duration_ns / 1_000,
            round_trip_us: flow.srtt_us,
            retransmits: flow.retransmits,
            end: Cow::Borrowed(end(flow)),
        }
    }
}

impl Names {
    fn of(&self, address: IpAddr) -> Option<Named> {
        self.by_address.get(&address.to_canonical()).map(|owner| owner.name.clone())
    }

    fn went(&mut self, pod: &PodRecord) {
        let name = pod.named();
        for address in pod.addresses.iter().map(IpAddr::to_canonical) {
            // It may be another pod's already.
            let Some(owner) = self.by_address.get_mut(&address).filter(|owner| owner.name == name) else { continue };
            owner.is_gone = true;
            self.gone.push_back(address);
            if self.gone.len() > GONE_MAX
                && let Some(first) = self.gone.pop_front()
                && self.by_address.get(&first).is_some_and(|owner| owner.is_gone)
            {
                self.by_address.remove(&first);
            }
        }
    }
}

/// Records that are held: less than 2 MiB with all their names.
const HELD_MAX: usize = 4_096;
/// Addresses of pods that are gone whose names are still known.
const GONE_MAX: usize = 1_024;

#[cfg(test)]
mod tests {
    use proxy_common::address::Address;
    use proxy_common::flows::{Direction, End};

    use super::*;
    use crate::node::flows::flow;

    fn pod(name: &str, address: &str) -> PodRecord {
        let json = serde_json::json!({
            "namespace": "shop", "name": name, "serviceAccount": name, "addresses": [address, "fd64::9"], "netns": "/n",
            "netnsCookie": 1, "cgroup": "/c", "meshed": true, "supervisor": 1, "startedMs": 0,
        });
        PodRecord::parse(json.to_string().as_bytes()).unwrap()
    }

    fn between(local: &str, remote: &str) -> Flow {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        Flow { local: address(local), remote: address(remote), ..flow(Direction::Outbound, End::Reset) }
    }

    fn told(recent: &Recent) -> Vec<String> {
        let flows = recent.report(&Question::default()).flows;
        flows.iter().map(|flow| format!("{} {} {}", flow.pod, flow.peer.as_deref().unwrap_or("-"), flow.remote)).collect()
    }

    #[test]
    fn both_ends_are_named_and_a_pod_that_went_is_remembered_until_another_has_its_address() {
        let mut recent = Recent::default();
        let (web, api) = (pod("web", "10.64.0.2"), pod("api", "10.64.0.3"));
        recent.came(&web);
        recent.came(&api);
        let take = |recent: &mut Recent, flow: &Flow| recent.take(flow, None, Duration::from_secs(1));
        assert!(take(&mut recent, &between("10.64.0.2", "10.64.0.3")));
        recent.went(&api);
        assert!(take(&mut recent, &between("10.64.0.2", "10.64.0.3")));
        recent.came(&pod("later", "10.64.0.3"));
        // It cannot take away a name that is another one's by now.
        recent.went(&api);
        assert!(take(&mut recent, &between("10.64.0.2", "10.64.0.3")));
        assert!(take(&mut recent, &between("10.64.0.2", "192.0.2.1")));
        assert!(!take(&mut recent, &between("10.64.0.9", "10.64.0.2")));
        assert_eq!(
            told(&recent),
            [
                "web shop/api 10.64.0.3:40000",
                "web shop/api 10.64.0.3:40000",
                "web shop/later 10.64.0.3:40000",
                "web - 192.0.2.1:40000"
            ]
        );
    }

    #[test]
    fn who_asks_too_seldom_is_told_how_much_was_missed_and_nothing_grows() {
        let mut recent = Recent::default();
        let web = Named::new("shop", "web");
        let more = 1_000;
        for _ in 0..HELD_MAX + more {
            assert!(recent.take(&between("10.64.0.2", "10.64.0.3"), Some(web.clone()), Duration::ZERO));
        }
        let ask = |after: u64| recent.report(&Question { after: Some(after), ..Question::default() });
        let all = ask(0);
        assert_eq!((all.flows.len(), all.missed, all.last), (HELD_MAX, 1_000, 5_096));
        assert_eq!((ask(900).missed, ask(1_000).missed, ask(all.last).missed), (100, 0, 0));
        assert_eq!((ask(5_000).flows.len(), ask(all.last).flows.len()), (96, 0));
        let before_a_restart = ask(9_999);
        assert_eq!((before_a_restart.flows.len(), before_a_restart.missed), (HELD_MAX, 0));
        let other = Question { namespace: Some("other".to_owned()), ..Question::default() };
        assert_eq!(recent.report(&other).flows, []);
        // Pods without number come and go.
        for number in 0..GONE_MAX * 2 {
            let gone = pod(&format!("pod-{number}"), &format!("10.65.{}.{}", number / 250, number % 250 + 1));
            recent.came(&gone);
            recent.went(&gone);
        }
        assert!(
            recent.names.by_address.len() <= GONE_MAX + 1 && recent.names.gone.len() <= GONE_MAX,
            "{}",
            recent.names.gone.len()
        );
    }
}

//! Who calls whom, how often, how well: computed from the sidecars' readings. Pure.
//!
//! The caller's side tells of a call, because it sees retries and what never arrived; the callee's side is taken where
//! the caller has no sidecar. Refusals are told by the side that decided.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use super::reading::{Flow, FlowKey, Reading};
use crate::base::names::Named;
use crate::telemetry::reason::Reason;

/// A sidecar to read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Target {
    pub(crate) workload: Named,
    pub(crate) address: IpAddr,
    /// Services that select the workload.
    pub(crate) services: Vec<Named>,
}

/// What is known of one sidecar.
#[derive(Clone, Debug)]
pub(crate) struct Watched {
    pub(crate) target: Target,
    /// Readings from the oldest to the newest: at most three, some seconds apart.
    pub(crate) readings: Vec<Reading>,
    /// Why the last scrape brought nothing.
    pub(crate) error: Option<String>,
}

/// The page's data.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct Graph {
    /// When the sidecars were last read, RFC 3339; empty before the first time.
    pub(crate) updated: String,
    /// How long ago that was.
    pub(crate) age_seconds: f64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) edges: Vec<Edge>,
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) ejected: Vec<Ejection>,
    pub(crate) sidecars: Vec<Sidecar>,
}

/// A service, a workload that no service selects, or what is outside of the mesh.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Node {
    pub(crate) id: String,
    pub(crate) kind: NodeKind,
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Workloads that stand behind it and were read.
    pub(crate) workloads: usize,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NodeKind {
    Service,
    Workload,
    Outside,
}

/// Calls from one node to another, over the last seconds.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Edge {
    pub(crate) source: String,
    pub(crate) destination: String,
    /// Requests a second.
    pub(crate) rate: f64,
    /// Share of requests that did not fail, 0 to 1; none without requests.
    pub(crate) success: Option<f64>,
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    /// Share of requests and connections under mutual TLS, 0 to 1.
    pub(crate) mtls: Option<f64>,
    /// Requests a second that a rule refused.
    pub(crate) refused_rate: f64,
    /// Retries a second.
    pub(crate) retry_rate: f64,
    /// Opaque connections: ended a second, and open now.
    pub(crate) connection_rate: f64,
    pub(crate) connections_open: f64,
    /// Requests and opaque connections since the sidecars started.
    pub(crate) total: f64,
    /// Copies of requests, whose answers nobody waits for: a second, and since the sidecars started.
    pub(crate) shadow_rate: f64,
    pub(crate) shadow_total: f64,
}

/// What a rule refused.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Refusal {
    pub(crate) source: String,
    pub(crate) destination: String,
    /// Which side decided: `inbound` at the destination, `outbound` at the caller.
    pub(crate) decided: &'static str,
    pub(crate) reason: String,
    /// The reason in a sentence.
    pub(crate) text: &'static str,
    pub(crate) rule: String,
    pub(crate) rate: f64,
    pub(crate) total: f64,
}

/// An endpoint that callers leave out.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Ejection {
    pub(crate) service: String,
    pub(crate) workload: String,
    /// Workloads that leave it out.
    pub(crate) by: Vec<String>,
}

/// How one sidecar is.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Sidecar {
    pub(crate) workload: String,
    pub(crate) identity: String,
    pub(crate) reached: bool,
    pub(crate) error: String,
    /// Seconds since the epoch; none before the first certificate.
    pub(crate) certificate_expiry: Option<f64>,
    pub(crate) config_version: String,
    pub(crate) config_rejected: f64,
    pub(crate) control_connected: bool,
    pub(crate) resident_mib: f64,
}

/// Computes the graph as of `now`. `updated` and `age_seconds` are the caller's to fill in.
pub(crate) fn graph<'a>(watched: impl Iterator<Item = &'a Watched>, now: Instant) -> Graph {
    let watched: Vec<&Watched> = watched.collect();
    let names = Names::of(&watched, now);
    let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
    let mut edges: BTreeMap<(String, String), Sums> = BTreeMap::new();
    let mut refusals: BTreeMap<Refused, Counted> = BTreeMap::new();
    let mut ejected: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    let mut sidecars = Vec::new();
    for one in &watched {
        sidecars.push(sidecar(one, now));
        let own = names.own(&one.target);
        nodes.entry(own.clone()).or_insert_with(|| node(&own)).workloads += 1;
        let Some((newest, oldest, seconds)) = one.span(now) else { continue };
        for (key, flow) in &newest.flows {
            let Some((source, destination)) = names.ends(key, &own) else { continue };
            let before = oldest.map(|oldest| oldest.flows.get(key));
            let sums = edges.entry((source, destination)).or_default();
            sums.add(flow, before, seconds);
        }
        for (service, total) in &newest.retries {
            let before = oldest.and_then(|oldest| oldest.retries.get(service)).copied().unwrap_or_default();
            if let Some(sums) = edges.get_mut(&(own.clone(), service_id(service))) {
                sums.retry_rate += rate(*total, oldest.map(|_| before), seconds);
            }
        }
        for (service, total) in &newest.shadows {
            let before = oldest.map(|oldest| oldest.shadows.get(service).copied().unwrap_or_default());
            let sums = edges.entry((own.clone(), service_id(service))).or_default();
            sums.shadow_rate += rate(*total, before, seconds);
            sums.shadow_total += total;
        }
        for (key, total) in &newest.refusals {
            let before = oldest.map(|oldest| oldest.refusals.get(key).copied().unwrap_or_default());
            let rate = rate(*total, before, seconds);
            let flow = FlowKey {
                outbound: key.outbound,
                source_identity: key.source_identity.clone(),
                destination_service: key.destination_service.clone(),
                destination_identity: String::new(),
            };
            let (source, mut destination) = names.any_ends(&flow, &own);
            // Only who was kept from leaving was about to leave.
            if destination == EGRESS && key.reason != Reason::EgressDenied.as_str() {
                UNKNOWN.clone_into(&mut destination);
            }
            let (reason, rule) = (key.reason.clone(), key.rule.clone());
            let counted = refusals.entry(Refused { source, destination, outbound: key.outbound, reason, rule }).or_default();
            counted.rate += rate;
            counted.total += total;
        }
        for (service, workload) in &newest.ejected {
            let by = ejected.entry((service.clone(), workload.clone())).or_default();
            by.push(one.target.workload.to_string());
        }
    }
    for (refused, counted) in &refusals {
        if let Some(sums) = edges.get_mut(&(refused.source.clone(), refused.destination.clone())) {
            sums.refused_rate += counted.rate;
        }
    }
    let ends = edges.keys().flat_map(|(source, destination)| [source, destination]);
    for id in ends {
        nodes.entry(id.clone()).or_insert_with(|| node(id));
    }
    let mut refusals: Vec<_> = refusals
        .into_iter()
        .map(|(Refused { source, destination, outbound, reason, rule }, Counted { rate, total })| Refusal {
            source,
            destination,
            decided: if outbound { "outbound" } else { "inbound" },
            text: text_of(&reason),
            reason,
            rule,
            rate,
            total,
        })
        .collect();
    refusals.sort_by(|a, b| b.rate.total_cmp(&a.rate).then(b.total.total_cmp(&a.total)));
    refusals.truncate(REFUSALS_MAX);
    Graph {
        nodes: nodes.into_values().collect(),
        edges: edges.into_iter().map(|((source, destination), sums)| sums.edge(source, destination)).collect(),
        refusals,
        ejected: ejected.into_iter().map(|((service, workload), by)| Ejection { service, workload, by }).collect(),
        sidecars,
        ..Graph::default()
    }
}

impl Watched {
    /// The newest reading, what it is compared with, and the seconds between them; `None` when the sidecar has not been
    /// read for so long that what it said is no news.
    fn span(&self, now: Instant) -> Option<(&Reading, Option<&Reading>, f64)> {
        let newest = self.readings.last().filter(|newest| now.duration_since(newest.at) <= NEWS_AT_MOST)?;
        let oldest = self.readings.first().filter(|oldest| oldest.at < newest.at);
        let seconds = oldest.map_or(0.0, |oldest| newest.at.duration_since(oldest.at).as_secs_f64());
        Some((newest, oldest, seconds))
    }
}

/// Which node a workload, a service or an identity is shown as.
struct Names {
    called: BTreeSet<String>,
    by_identity: BTreeMap<String, String>,
}

impl Names {
    fn of(watched: &[&Watched], now: Instant) -> Self {
        let mut names = Self { called: BTreeSet::new(), by_identity: BTreeMap::new() };
        for one in watched {
            if let Some((newest, ..)) = one.span(now) {
                names.called.extend(newest.flows.keys().filter(|key| key.outbound).map(|key| key.destination_service.clone()));
                names.called.extend(newest.shadows.keys().cloned());
            }
        }
        for one in watched {
            if let Some(identity) = one.readings.last().and_then(|newest| newest.identity.clone()) {
                let own = names.own(&one.target);
                names.by_identity.insert(identity, own);
            }
        }
        names
    }

    /// A workload is shown as the service by which others call it, so that its calls leave from where calls arrive.
    fn own(&self, target: &Target) -> String {
        let called = target.services.iter().find(|service| self.called.contains(&service.to_string()));
        match called.or_else(|| target.services.first()) {
            Some(service) => service_id(&service.to_string()),
            None => format!("{WORKLOAD}{}", target.workload),
        }
    }

    /// From where to where a call went; `None` where the caller's side tells of it.
    fn ends(&self, key: &FlowKey, own: &str) -> Option<(String, String)> {
        if !key.outbound && self.by_identity.contains_key(&key.source_identity) {
            return None;
        }
        Some(self.any_ends(key, own))
    }

    fn any_ends(&self, key: &FlowKey, own: &str) -> (String, String) {
        if key.outbound {
            let destination = if !key.destination_service.is_empty() {
                service_id(&key.destination_service)
            } else if !key.destination_identity.is_empty() {
                self.identity(&key.destination_identity)
            } else {
                EGRESS.to_owned()
            };
            return (own.to_owned(), destination);
        }
        let source = if key.source_identity.is_empty() { OUTSIDE.to_owned() } else { self.identity(&key.source_identity) };
        let called = key.destination_service.as_str();
        // The own workload is shown under one name, whichever of its services a port belongs to.
        let destination = if called.is_empty() || !self.called.contains(called) { own.to_owned() } else { service_id(called) };
        (source, destination)
    }

    fn identity(&self, identity: &str) -> String {
        self.by_identity.get(identity).cloned().unwrap_or_else(|| format!("{WORKLOAD}{}", account(identity)))
    }
}

/// What was refused between two nodes.
#[derive(Eq, Ord, PartialEq, PartialOrd)]
struct Refused {
    source: String,
    destination: String,
    outbound: bool,
    reason: String,
    rule: String,
}

/// How often.
#[derive(Default)]
struct Counted {
    rate: f64,
    total: f64,
}

/// Sums of an edge.
#[derive(Default)]
struct Sums {
    seconds: f64,
    window: Flow,
    total: f64,
    rate: f64,
    connection_rate: f64,
    refused_rate: f64,
    retry_rate: f64,
    shadow_rate: f64,
    shadow_total: f64,
}

impl Sums {
    /// Adds one sidecar's view. `before` is its older reading, if there is one, and what that said of the flow.
    fn add(&mut self, flow: &Flow, before: Option<Option<&Flow>>, seconds: f64) {
        self.total += flow.requests + flow.connections;
        let Some(before) = before.filter(|_| seconds > 0.0) else {
            // One reading tells what is open, and no rate.
            self.window.open += flow.open;
            self.window.open_mtls += flow.open_mtls;
            return;
        };
        let since = flow.since(before);
        self.rate += since.requests / seconds;
        self.connection_rate += since.connections / seconds;
        self.seconds = self.seconds.max(seconds);
        self.window.add(&since);
    }

    fn edge(self, source: String, destination: String) -> Edge {
        let window = &self.window;
        let share = |part: f64, whole: f64| (whole > 0.0).then(|| (part / whole).clamp(0.0, 1.0));
        let milliseconds = |share| window.quantile(share).map(|seconds| round(seconds * 1e3));
        Edge {
            source,
            destination,
            rate: round(self.rate),
            success: share(window.requests - window.failed, window.requests),
            p50_ms: milliseconds(0.5),
            p99_ms: milliseconds(0.99),
            mtls: share(window.carried_mtls + window.open_mtls, window.carried + window.open),
            refused_rate: round(self.refused_rate),
            retry_rate: round(self.retry_rate),
            connection_rate: round(self.connection_rate),
            connections_open: window.open,
            total: self.total,
            shadow_rate: round(self.shadow_rate),
            shadow_total: self.shadow_total,
        }
    }
}

fn sidecar(one: &Watched, now: Instant) -> Sidecar {
    let newest = one.readings.last();
    Sidecar {
        workload: one.target.workload.to_string(),
        identity: newest.and_then(|newest| newest.identity.clone()).unwrap_or_default(),
        reached: one.error.is_none() && one.span(now).is_some(),
        error: one.error.clone().unwrap_or_default(),
        certificate_expiry: newest.map(|newest| newest.certificate_expiry).filter(|expiry| *expiry > 0.0),
        config_version: newest.map(|newest| newest.config_version.clone()).unwrap_or_default(),
        config_rejected: newest.map(|newest| newest.config_rejected).unwrap_or_default(),
        control_connected: newest.is_some_and(|newest| newest.control_connected),
        resident_mib: newest.map(|newest| round(newest.resident_bytes / f64::from(1 << 20))).unwrap_or_default(),
    }
}

fn node(id: &str) -> Node {
    let (kind, text) = if let Some(text) = id.strip_prefix(SERVICE) {
        (NodeKind::Service, text)
    } else if let Some(text) = id.strip_prefix(WORKLOAD) {
        (NodeKind::Workload, text)
    } else {
        let text = match id {
            EGRESS => "other addresses",
            UNKNOWN => "unknown destinations",
            _outside => "unknown callers",
        };
        (NodeKind::Outside, text)
    };
    let (namespace, name) = text.split_once('/').unwrap_or(("", text));
    Node { id: id.to_owned(), kind, namespace: namespace.to_owned(), name: name.to_owned(), workloads: 0 }
}

fn service_id(name: &str) -> String {
    format!("{SERVICE}{name}")
}

/// `NAMESPACE/ACCOUNT` of a SPIFFE ID of the usual form; else the ID.
fn account(identity: &str) -> String {
    let path = identity.split_once("/ns/").and_then(|(_, path)| path.split_once("/sa/"));
    path.map_or_else(|| identity.to_owned(), |(namespace, account)| format!("{namespace}/{account}"))
}

fn rate(total: f64, before: Option<f64>, seconds: f64) -> f64 {
    match before {
        Some(before) if seconds > 0.0 => {
            if total < before {
                total / seconds
            } else {
                (total - before) / seconds
            }
        }
        _ => 0.0,
    }
}

fn text_of(reason: &str) -> &'static str {
    Reason::ALL.iter().find(|known| known.as_str() == reason).map_or("", |known| known.text())
}

/// Three digits after the point: more is noise on a screen.
fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

const SERVICE: &str = "service:";
const WORKLOAD: &str = "workload:";
/// Callers without an identity. Apart from the place where calls leave the mesh: no path leads through both.
const OUTSIDE: &str = "outside";
const EGRESS: &str = "egress";
/// Where calls were for of which only the address is known.
const UNKNOWN: &str = "unknown";
/// A sidecar that was not read for longer tells nothing any more.
const NEWS_AT_MOST: Duration = Duration::from_secs(15);
/// Refusals that the page shows.
const REFUSALS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(workload: &str, services: &[&str], texts: &[&str]) -> Watched {
        let start = Instant::now();
        let readings = texts.iter().zip(0u32..).map(|(text, i)| Reading::parse(text, start + Duration::from_secs(10) * i));
        Watched {
            target: Target {
                workload: workload.parse().unwrap(),
                address: "10.64.0.5".parse().unwrap(),
                services: services.iter().map(|service| service.parse().unwrap()).collect(),
            },
            readings: readings.collect(),
            error: None,
        }
    }

    fn requests(direction: &str, source: &str, service: &str, status: u16, count: u32) -> String {
        let mtls = !source.is_empty();
        format!(
            "outrigger_requests_total{{direction=\"{direction}\",source_identity=\"{source}\",destination_service=\"{service}\",\
             mtls=\"{mtls}\",status=\"{status}\",reason=\"answered\"}} {count}\n"
        )
    }

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

    #[tokio::test(start_paused = true)]
    async fn a_call_is_told_once_by_its_caller() {
        let web = [requests("outbound", WEB, "shop/cart", 200, 100), {
            requests("outbound", WEB, "shop/cart", 200, 190) + &requests("outbound", WEB, "shop/cart", 503, 10)
        }];
        let cart = [requests("inbound", WEB, "shop/cart", 200, 100), requests("inbound", WEB, "shop/cart", 200, 190)];
        let all = [
            watched("shop/web-1", &["shop/web"], &[&web[0], &web[1]]),
            watched("shop/cart-1", &["shop/cart"], &[&cart[0], &cart[1]]),
        ];
        let graph = graph(all.iter(), Instant::now() + Duration::from_secs(10));
        let [edge] = graph.edges.as_slice() else { panic!("{:?}", graph.edges) };
        assert_eq!((edge.source.as_str(), edge.destination.as_str()), ("service:shop/web", "service:shop/cart"));
        assert_eq!((edge.rate, edge.success, edge.mtls), (10.0, Some(0.9), Some(1.0)));
        assert_eq!(graph.nodes.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_callers_own_sidecar_answered_is_no_plaintext() {
        let answered = |count| requests("outbound", WEB, "shop/cart", 200, count);
        let fault = |count| requests("outbound", WEB, "shop/cart", 418, count).replace("answered", "fault_injected");
        let never_left = |count| fault(count).replace("mtls=\"true\"", "mtls=\"false\"");
        let web = [answered(0) + &never_left(0), answered(70) + &never_left(30)];
        let all = [watched("shop/web-1", &["shop/web"], &[&web[0], &web[1]])];
        let graph = graph(all.iter(), Instant::now() + Duration::from_secs(10));
        assert_eq!((graph.edges[0].rate, graph.edges[0].mtls), (10.0, Some(1.0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_without_a_sidecar_is_told_by_the_callee() {
        let cart = [requests("inbound", "", "shop/cart", 200, 0), requests("inbound", "", "shop/cart", 200, 50)];
        let all = [watched("shop/cart-1", &["shop/cart"], &[&cart[0], &cart[1]])];
        let graph = graph(all.iter(), Instant::now() + Duration::from_secs(10));
        assert_eq!((graph.edges[0].source.as_str(), graph.edges[0].mtls, graph.edges[0].rate), ("outside", Some(0.0), 5.0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_names_its_rule_and_marks_its_edge() {
        let refusal = |count: u32| {
            format!(
                "outrigger_refusals_total{{direction=\"inbound\",source_identity=\"{WEB}\",destination_service=\"shop/cart\",\
                 protocol=\"http1\",reason=\"denied\",rule=\"AuthorizationPolicy/shop/no-delete rules[0]\"}} {count}\n"
            )
        };
        let web = [requests("outbound", WEB, "shop/cart", 403, 0), requests("outbound", WEB, "shop/cart", 403, 20)];
        let all = [
            watched("shop/web-1", &[], &[&web[0], &web[1]]),
            watched("shop/cart-1", &["shop/cart"], &[&refusal(0), &refusal(20)]),
        ];
        let graph = graph(all.iter(), Instant::now() + Duration::from_secs(10));
        let refusal = &graph.refusals[0];
        assert_eq!((refusal.source.as_str(), refusal.destination.as_str()), ("workload:shop/web-1", "service:shop/cart"));
        assert_eq!((refusal.rule.as_str(), refusal.rate), ("AuthorizationPolicy/shop/no-delete rules[0]", 2.0));
        assert_eq!(refusal.text, "An authorization rule denied, or none allowed.");
        assert_eq!((graph.edges[0].refused_rate, graph.edges[0].success), (2.0, Some(1.0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_without_a_service_is_egress_only_where_egress_was_refused() {
        let refusal = |direction: &str, reason: &str| {
            format!(
                "outrigger_refusals_total{{direction=\"{direction}\",source_identity=\"\",destination_service=\"\",\
                 protocol=\"http1\",reason=\"{reason}\",rule=\"\"}} 1\n"
            )
        };
        let text =
            refusal("outbound", "egress_denied") + &refusal("outbound", "own_port") + &refusal("inbound", "headers_too_large");
        let all = [watched("shop/cart-1", &["shop/cart"], &[&text])];
        let graph = graph(all.iter(), Instant::now());
        let mut ends: Vec<_> =
            graph.refusals.iter().map(|refusal| (&*refusal.reason, &*refusal.source, &*refusal.destination)).collect();
        ends.sort_unstable();
        assert_eq!(
            ends,
            [
                ("egress_denied", "service:shop/cart", "egress"),
                ("headers_too_large", "outside", "service:shop/cart"),
                ("own_port", "service:shop/cart", "unknown"),
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_version_behind_two_services_is_shown_as_the_one_that_is_called() {
        let gate = requests("outbound", "spiffe://cluster.local/ns/shop/sa/gate", "shop/web-v2", 200, 1);
        let web = requests("outbound", WEB, "shop/cart", 200, 1);
        let all = [watched("shop/gate-1", &[], &[&gate]), watched("shop/web-v2-1", &["shop/web", "shop/web-v2"], &[&web])];
        let graph = graph(all.iter(), Instant::now());
        let ends: Vec<_> = graph.edges.iter().map(|edge| (edge.source.as_str(), edge.destination.as_str())).collect();
        assert_eq!(ends, [("service:shop/web-v2", "service:shop/cart"), ("workload:shop/gate-1", "service:shop/web-v2")]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sidecar_that_fell_silent_tells_no_traffic() {
        let web = requests("outbound", WEB, "shop/cart", 200, 1);
        let all = [watched("shop/web-1", &[], &[&web])];
        let graph = graph(all.iter(), Instant::now() + NEWS_AT_MOST + Duration::from_secs(1));
        assert!(graph.edges.is_empty() && !graph.sidecars[0].reached);
        assert_eq!(graph.nodes.len(), 1);
    }
}

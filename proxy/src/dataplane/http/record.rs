//! One request, as it is told when it ended: one access-log line, one set of metrics, one span, on every way out.
//!
//! The record travels with the request and then with the answer's body; dropping it tells it. What was not filled in by
//! then did not happen: a record that is dropped without an answer says that the caller left.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::attempt::GRPC_STATUS;
use super::pipeline::Connection;
use super::reject::{Reject, Told};
use crate::base::names::Named;
use crate::dataplane::Proxy;
use crate::dataplane::hello::{Hello, ServerName};
use crate::dataplane::tcp::Counts;
use crate::identity::spiffe::SpiffeId;
use crate::policy::RuleName;
use crate::policy::retry::WireState;
use crate::telemetry::metrics::{Metrics, OpenConnection};
use crate::telemetry::reason::Reason;
use crate::telemetry::series::TrafficLabels;
use crate::telemetry::trace::TraceContext;
use crate::telemetry::{ConnectionEnd, Direction, Protocol, RequestEnd};

/// What is known of one request so far.
#[derive(Debug)]
pub(crate) struct Record {
    /// On which it came. Held until its end, by which the connection knows that something is under way on it.
    connection: Arc<Connection>,
    started: Instant,
    started_wall: Duration,
    protocol: Protocol,
    logged: bool,
    /// What was asked for, where it will be written down.
    asked: Option<Box<Asked>>,
    status: Option<StatusCode>,
    grpc_status: Option<u32>,
    reason: Reason,
    /// Why another sidecar answered in the destination's place.
    in_its_place: Option<Reason>,
    detail: Option<Cow<'static, str>>,
    counts: Arc<Counts>,
    attempts: u32,
    /// How far the last attempt came.
    wire: Option<WireState>,
    trace: Option<TraceContext>,
    pub(crate) ends: Ends,
}

/// A request's first line, as logs tell it.
#[derive(Debug)]
struct Asked {
    method: http::Method,
    authority: Box<str>,
    path: Box<str>,
}

/// Who talks to whom, by which rule.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ends {
    pub(crate) source: Option<SpiffeId>,
    pub(crate) destination: Option<SpiffeId>,
    pub(crate) service: Option<Named>,
    pub(crate) route: Option<RuleName>,
    /// The rule that decided.
    pub(crate) rule: Option<RuleName>,
    /// The endpoint's workload.
    pub(crate) endpoint: Option<Named>,
    pub(crate) mtls: bool,
}

impl Record {
    /// Begins at the whole request head.
    pub(crate) fn start(connection: &Arc<Connection>, protocol: Protocol) -> Self {
        Self {
            connection: Arc::clone(connection),
            started: Instant::now(),
            started_wall: connection.proxy.clock.since_epoch(),
            protocol,
            logged: false,
            asked: None,
            status: None,
            grpc_status: None,
            reason: Reason::CallerLeft,
            in_its_place: None,
            detail: None,
            counts: Arc::default(),
            attempts: 0,
            wire: None,
            trace: None,
            ends: Ends::default(),
        }
    }

    /// The span of this hop, whether the request is written to the access log, and what it asks for in normal form. Most
    /// requests are in neither log nor trace: of those nothing is kept.
    pub(crate) fn drawn(&mut self, trace: TraceContext, logged: bool, method: &http::Method, authority: &str, path: &str) {
        if logged || trace.sampled() {
            self.asked = Some(Box::new(Asked { method: method.clone(), authority: authority.into(), path: path.into() }));
        }
        self.logged = logged;
        self.trace = Some(trace);
    }

    /// It was refused before it was understood: told as it came, and always.
    pub(crate) fn unread(&mut self, method: &http::Method, authority: &str, path: &str) {
        self.asked = Some(Box::new(Asked { method: method.clone(), authority: authority.into(), path: path.into() }));
        self.logged = true;
    }

    /// It is written to the access log, whatever was drawn.
    pub(crate) fn logged(&mut self, logged: bool) {
        self.logged = logged;
    }

    /// One more attempt. Until it ends, it cannot be known how far it came.
    pub(crate) fn attempt(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
        self.wire = Some(WireState::Sent);
    }

    /// How far the attempt came.
    pub(crate) fn wire(&mut self, state: WireState) {
        self.wire = Some(state);
    }

    /// More about how it went, in fixed words.
    pub(crate) fn detail(&mut self, detail: impl Into<Cow<'static, str>>) {
        self.detail = Some(detail.into());
    }

    /// Bytes of the request, which its bodies count.
    pub(crate) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    pub(crate) fn is_grpc(&self) -> bool {
        self.protocol == Protocol::Grpc
    }

    /// The destination's answer arrived.
    pub(crate) fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
        // Until its body is through, leaving is the caller's doing.
        self.reason = Reason::CallerLeft;
    }

    /// The answer is another sidecar's, in its application's place.
    pub(crate) fn answered_in_its_place(&mut self, reason: Reason) {
        self.in_its_place = Some(reason);
    }

    /// The answer went out whole.
    pub(crate) fn body_ended(&mut self) {
        let default_allow = || self.ends.rule.as_ref().is_some_and(|rule| rule.as_str() == DEFAULT_ALLOW);
        self.reason = match self.in_its_place {
            Some(reason) => reason,
            None if default_allow() => Reason::DefaultAllow,
            None => Reason::Answered,
        };
    }

    /// The caller was given up because it reads nothing.
    pub(crate) fn slow_reader(&mut self) {
        self.reason = Reason::SlowReader;
        self.logged = true;
    }

    /// The answer broke off, for this reason.
    pub(crate) fn body_broke(&mut self, reason: Reason) {
        self.reason = reason;
    }

    /// `grpc-status`, from an answer's head or from its trailers.
    pub(crate) fn grpc_status(&mut self, headers: &HeaderMap) {
        if let Some(status) = headers.get(&GRPC_STATUS).and_then(|status| status.to_str().ok()?.parse().ok()) {
            self.grpc_status = Some(status);
        }
    }

    /// We answered in the destination's place.
    pub(crate) fn refused(&mut self, reject: &Reject, told: &Told<'_>) {
        self.status = Some(told.status);
        self.reason = told.reason;
        if self.protocol == Protocol::Grpc {
            self.grpc_status = Some(told.grpc_status);
        }
        if let Some(rule) = told.rule {
            self.ends.rule = Some(rule.clone());
        }
        // Why there was no retry is said already, where there was an attempt.
        self.detail = self.detail.take().or_else(|| reject.detail(told));
    }

    /// What the destination accepted is ended: it is let through no more.
    pub(crate) fn cut(&mut self, reject: &Reject) {
        let status = self.status;
        self.refused(reject, &reject.told());
        (self.status, self.detail, self.logged) = (status, Some(Cow::Borrowed(REVOKED)), true);
    }

    /// The caller broke the rules before it had the whole answer.
    pub(crate) fn caller_broke(&mut self, reject: &Reject) {
        let (status, grpc_status) = (self.status, self.grpc_status);
        self.refused(reject, &reject.told());
        (self.status, self.grpc_status) = (status, grpc_status);
    }

    /// When the request's head was there.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.reason == Reason::CallerLeft
            && let Some(reject) = self.connection.revoked.get().cloned()
        {
            self.cut(&reject);
        }
        let Connection { proxy, direction, peer, .. } = &*self.connection;
        let traffic = proxy.series.resolve(*direction, &self.ends, || {
            let texts = self.ends.texts();
            proxy.telemetry.metrics.traffic(&self.ends.labels(*direction, &texts))
        });
        let asked = self.asked.as_deref();
        let endpoint = asked.and(self.ends.endpoint.as_ref()).map(ToString::to_string);
        proxy.telemetry.request(&RequestEnd {
            traffic: &traffic,
            logged: self.logged,
            started: self.started_wall,
            duration: self.started.elapsed(),
            protocol: self.protocol,
            method: asked.map_or("", |asked| asked.method.as_str()),
            authority: asked.map_or("", |asked| &asked.authority),
            path: asked.map_or("", |asked| &asked.path),
            status: self.status.map_or(0, |status| status.as_u16()),
            grpc_status: self.grpc_status,
            reason: self.reason,
            rule: self.ends.rule.as_ref().map(RuleName::as_str),
            detail: self.detail.as_deref(),
            endpoint: endpoint.as_deref(),
            attempts: self.attempts,
            wire: self.wire.map(WireState::as_str),
            bytes_received: self.counts.received.load(Ordering::Relaxed),
            bytes_sent: self.counts.sent.load(Ordering::Relaxed),
            peer: Some(peer.address),
            trace: self.trace.as_ref(),
        });
    }
}

/// Names as telemetry takes them.
#[derive(Debug)]
pub(crate) struct Texts {
    source: String,
    destination: String,
    service: String,
    endpoint: Option<String>,
}

impl Ends {
    /// What is known of a connection before it says anything: who is at its ends, and the service that it is for.
    pub(crate) fn of(proxy: &Proxy, direction: Direction, peer: Option<&SpiffeId>, original: SocketAddr) -> Self {
        let own = proxy.identity.own().map(|own| own.id.clone());
        let snapshot = proxy.published.current();
        match direction {
            Direction::Inbound => Self {
                source: peer.cloned(),
                destination: own,
                service: snapshot.inbound.port(original.port()).service.clone(),
                mtls: peer.is_some(),
                ..Self::default()
            },
            Direction::Outbound => {
                let service = snapshot.outbound.service_at(original).map(|port| port.service.clone());
                let endpoint = snapshot.outbound.workloads.get(&original.ip()).map(|endpoint| endpoint.workload.clone());
                Self { source: own, service, endpoint, ..Self::default() }
            }
        }
    }

    /// Adds what is known of the connection to what a request that was refused early says of itself.
    pub(crate) fn fill(&mut self, proxy: &Proxy, direction: Direction, peer: Option<&SpiffeId>, original: SocketAddr) {
        if self.service.is_some() && self.source.is_some() {
            return;
        }
        let Self { source, destination, service, endpoint, route: _, rule: _, mtls: _ } =
            Self::of(proxy, direction, peer, original);
        self.source = self.source.take().or(source);
        self.destination = self.destination.take().or(destination);
        self.service = self.service.take().or(service);
        self.endpoint = self.endpoint.take().or(endpoint);
    }

    fn texts(&self) -> Texts {
        let text = |id: &Option<SpiffeId>| id.as_ref().map(ToString::to_string).unwrap_or_default();
        Texts {
            source: text(&self.source),
            destination: text(&self.destination),
            service: self.service.as_ref().map(ToString::to_string).unwrap_or_default(),
            endpoint: self.endpoint.as_ref().map(ToString::to_string),
        }
    }

    fn labels<'a>(&'a self, direction: Direction, texts: &'a Texts) -> TrafficLabels<'a> {
        TrafficLabels {
            direction,
            source_identity: &texts.source,
            destination_identity: &texts.destination,
            destination_service: &texts.service,
            route: self.route.as_ref().map_or("", RuleName::as_str),
            mtls: self.mtls,
        }
    }
}

/// An opaque connection, or one that was refused before it carried a request; told when it is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionRecord {
    proxy: Arc<Proxy>,
    started: Instant,
    started_wall: Duration,
    direction: Direction,
    peer: SocketAddr,
    logged: bool,
    pub(crate) protocol: Protocol,
    pub(crate) reason: Reason,
    pub(crate) detail: Option<&'static str>,
    pub(crate) counts: Arc<Counts>,
    /// What the application's own TLS asked for.
    pub(crate) hello: Arc<Hello>,
    pub(crate) ends: Ends,
}

impl ConnectionRecord {
    /// Begins now. Until something else is said it ends as answered.
    pub(crate) fn start(proxy: &Arc<Proxy>, direction: Direction, peer: SocketAddr) -> Self {
        let share = proxy.published.current().mesh.access_log.fraction();
        Self {
            proxy: Arc::clone(proxy),
            started: Instant::now(),
            started_wall: proxy.clock.since_epoch(),
            direction,
            peer,
            logged: proxy.draw(share),
            protocol: Protocol::Opaque,
            reason: Reason::Answered,
            detail: None,
            counts: Arc::default(),
            hello: Arc::default(),
            ends: Ends::default(),
        }
    }

    /// It was accepted at this moment of the past.
    pub(crate) fn begun(&mut self, at: Instant) {
        self.started_wall = self.started_wall.saturating_sub(self.started.saturating_duration_since(at));
        self.started = at;
    }

    /// It is open, between these ends, until the answer is dropped.
    pub(crate) fn open(&self) -> OpenConnection {
        let texts = self.ends.texts();
        self.proxy.telemetry.metrics.traffic(&self.ends.labels(self.direction, &texts)).open_opaque()
    }

    /// It was refused.
    pub(crate) fn refused(&mut self, reject: &Reject) {
        let told = reject.told();
        self.reason = told.reason;
        if let Some(rule) = told.rule {
            self.ends.rule = Some(rule.clone());
        }
        self.logged();
    }

    /// It is written, for a refusal is rare and somebody asks for it.
    pub(crate) fn logged(&mut self) {
        self.logged = true;
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        let texts = self.ends.texts();
        let metrics: &Metrics = &self.proxy.telemetry.metrics;
        let traffic = metrics.traffic(&self.ends.labels(self.direction, &texts));
        let server_name = self.hello.get().map(|ServerName(name)| name.as_deref());
        if let Some(name) = server_name {
            let snapshot = self.proxy.published.current();
            metrics.tls_passed(self.direction, name, name.and_then(|name| snapshot.service_called(name)));
        }
        self.proxy.telemetry.connection(&ConnectionEnd {
            traffic: &traffic,
            logged: self.logged,
            started: self.started_wall,
            duration: self.started.elapsed(),
            protocol: self.protocol,
            reason: self.reason,
            rule: self.ends.rule.as_ref().map(RuleName::as_str),
            detail: self.detail,
            tls_server_name: server_name.flatten(),
            endpoint: texts.endpoint.as_deref(),
            bytes_received: self.counts.received.load(Ordering::Relaxed),
            bytes_sent: self.counts.sent.load(Ordering::Relaxed),
            peer: Some(self.peer),
        });
    }
}

/// The built-in rule for a port on which there is no policy.
pub(crate) fn default_allow() -> RuleName {
    DEFAULT_ALLOW_RULE.clone()
}

/// What the log says of what was under way when a policy shut its peer out.
pub(crate) const REVOKED: &str = "revoked";
/// Its name.
pub(crate) const DEFAULT_ALLOW: &str = "default_allow";
static DEFAULT_ALLOW_RULE: LazyLock<RuleName> = LazyLock::new(|| RuleName::new(DEFAULT_ALLOW));

//! `outrigger explain`: what would happen to a request, and by which rule.
//!
//! It compiles the very snapshots that the two sidecars would read, and asks the very decisions that they would ask; nothing
//! is sent. What is drawn by chance (a backend, a fault, a copy) is told as its share; what depends on the past (budgets,
//! limits, ejections) is told by its rule. Exit codes: 0 the request would be let in wherever it may go, 1 it would be refused
//! somewhere, 2 the question is wrong, 3 the control plane does not answer.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde_json::{Value, json};

use super::check::Loaded;
use super::client::{self, ApiArgs};
use super::table::{self, Output};
use super::{Failure, print};
use crate::base::clock::WallClock;
use crate::base::names::{Named, nearest};
use crate::base::units::Span;
use crate::control::source::file::read_at_most;
use crate::dataplane::http::normalize;
use crate::identity::spiffe::{SpiffeId, TrustDomain};
use crate::model::object::Object;
use crate::model::service::{PortRef, ServiceSpec};
use crate::model::workload::{WorkloadPort, WorkloadSpec, WorkloadTransport};
use crate::model::{Resource, ResourceKey, Resources};
use crate::policy::authorization::Verdict;
use crate::policy::{Peer, RequestView};
use crate::snapshot::compile::{self, Own};
use crate::snapshot::{AppProtocol, Egress, Endpoint, Plaintext, RoutePolicies, Snapshot, Transport};

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  outrigger explain --from shop/front-1 --to payments --method POST --path /charge --token token.jwt
  outrigger explain --from shop/front-1 --to reviews.shop:80 --header 'x-user: ada' -f ./mesh -o json

Exit codes: 0 it would be let in wherever it may go; 1 it would be refused somewhere; 2 the question is wrong;
3 the control plane does not answer.")]
pub(crate) struct ExplainArgs {
    /// The pod that calls
    #[arg(long, value_name = "NS/POD")]
    pub(crate) from: Named,
    /// What it calls: a Service by name (`web`, `web.shop`) or an address, with a port where it has several
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) to: String,
    #[arg(long, default_value = "GET")]
    pub(crate) method: Method,
    /// With its query
    #[arg(long, default_value = "/")]
    pub(crate) path: String,
    /// A header of the request; may be given several times
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub(crate) headers: Vec<String>,
    /// A file with a token, sent as `Authorization: Bearer`
    #[arg(long, value_name = "FILE")]
    pub(crate) token: Option<PathBuf>,
    /// Ask documents instead of the control plane: a file or a folder; may be given several times
    #[arg(short, long = "file", value_name = "DIR|FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// With -f: the account of a calling pod that the documents do not hold
    #[arg(long, default_value = "default")]
    pub(crate) service_account: String,
    /// With -f: the trust domain
    #[arg(long, default_value = "cluster.local")]
    pub(crate) trust_domain: String,
    /// How to write it
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) output: Option<Output>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

/// Runs `outrigger explain`.
pub(crate) fn run(args: ExplainArgs) -> Result<ExitCode, Failure> {
    let (mut resources, domain) =
        if args.files.is_empty() { ask(&args.api)? } else { (load(&args.files)?, args.trust_domain.clone()) };
    let trust_domain: TrustDomain = domain.parse().map_err(|error| Failure::invalid([error]))?;
    let question = Question::read(&args)?;
    let mut told = Told::default();
    prepare(&mut resources, &args.from, &args.service_account, !args.files.is_empty(), &mut told)?;
    let now = WallClock::system().since_epoch();
    explain(&resources, &args.from, &question, &trust_domain, now, &mut told)?;
    match args.output {
        None => print(&told.text())?,
        Some(Output::Json) => table::json(&told.json())?,
        Some(Output::Yaml | Output::Wide) => return Err(Failure::invalid(["explain writes text or json"])),
    }
    Ok(if told.refused { ExitCode::from(1) } else { ExitCode::SUCCESS })
}

/// The request.
#[derive(Debug)]
struct Question {
    host: String,
    port: Option<u16>,
    method: Method,
    path: String,
    query: Option<String>,
    headers: HeaderMap,
    /// The connection is not looked into: there is no request.
    opaque: bool,
}

/// What is said, step by step.
#[derive(Debug, Default)]
struct Told {
    steps: Vec<Step>,
    refused: bool,
}

#[derive(Debug)]
struct Step {
    what: &'static str,
    says: String,
    /// The rule that decided, where one did.
    rule: Option<String>,
    /// The endpoint that it is about, where it is about one.
    endpoint: Option<String>,
}

impl Told {
    fn say(&mut self, what: &'static str, says: impl Into<String>, rule: Option<String>) {
        self.steps.push(Step { what, says: says.into(), rule, endpoint: None });
    }

    fn refuse(&mut self, what: &'static str, says: impl Into<String>, rule: Option<String>) {
        self.say(what, says, rule);
        self.refused = true;
    }

    /// What was said from this step on is about one endpoint.
    fn about(&mut self, from: usize, endpoint: &str) {
        for step in self.steps.iter_mut().skip(from) {
            step.endpoint = Some(endpoint.to_owned());
        }
    }

    fn text(&self) -> String {
        let lines = self.steps.iter().map(|Step { what, says, rule, endpoint }| {
            let indent = if endpoint.is_some() && *what != "endpoint" { "  " } else { "" };
            let rule = rule.as_ref().map(|rule| format!("  [{rule}]")).unwrap_or_default();
            format!("{:<15} {says}{rule}\n", format!("{indent}{what}"))
        });
        let outcome = if self.refused { "refused" } else { "let in" };
        format!("{}{:<15} {outcome}\n", lines.collect::<String>(), "outcome")
    }

    fn json(&self) -> Value {
        let steps = self
            .steps
            .iter()
            .map(|Step { what, says, rule, endpoint }| json!({ "step": what, "says": says, "rule": rule, "endpoint": endpoint }));
        json!({ "allowed": !self.refused, "steps": steps.collect::<Vec<_>>() })
    }
}

impl Question {
    fn read(args: &ExplainArgs) -> Result<Self, Failure> {
        let invalid = |text: String| Failure::invalid([text]);
        let to = args.to.to_ascii_lowercase();
        let host = normalize::host(&to);
        let port = match to.get(host.len()..).and_then(|rest| rest.strip_prefix(':')) {
            Some(port) => Some(port.parse().map_err(|_not_a_number| invalid(format!("{port:?} is not a port")))?),
            None => None,
        };
        let (path, query) = args.path.split_once('?').map_or((args.path.as_str(), None), |(path, query)| (path, Some(query)));
        let mut headers = HeaderMap::new();
        for line in &args.headers {
            let parsed = line.split_once(':').and_then(|(name, value)| {
                let name: HeaderName = name.trim().parse().ok()?;
                Some((name, HeaderValue::from_str(value.trim()).ok()?))
            });
            let Some((name, value)) = parsed else { return Err(invalid(format!("{line:?} is not NAME: VALUE"))) };
            headers.append(name, value);
        }
        if let Some(file) = &args.token {
            let token = read_at_most(file, TOKEN_BYTES_MAX)
                .map_err(|error| invalid(format!("cannot read {}: {error}", file.display())))?;
            let value = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
            headers
                .insert(header::AUTHORIZATION, value.map_err(|_not_text| invalid(format!("{} holds no token", file.display())))?);
        }
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            method: args.method.clone(),
            path: normalize::normal_path(path).0.into_owned(),
            query: query.map(str::to_owned),
            headers,
            opaque: false,
        })
    }
}

/// The largest token.
const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// What the control plane has in force.
fn ask(api: &ApiArgs) -> Result<(Resources, String), Failure> {
    let answer = client::get(api, "/api/resources")?;
    let mut resources = Resources::default();
    for item in answer.get("items").and_then(Value::as_array).into_iter().flatten() {
        let kind = item.get("kind").and_then(Value::as_str).unwrap_or_default();
        let Some(kind) = crate::model::Kind::ALL.into_iter().find(|known| known.as_str() == kind) else { continue };
        let resource = Resource::read(kind, item.clone()).map_err(|error| {
            Failure::environment(format!("the control plane's answer cannot be read: {error}"), "use the control plane's version")
        })?;
        resources.by_key.insert(resource.key(), Arc::new(resource));
    }
    let status = client::get(api, "/api/status")?;
    let domain = status.pointer("/control/trustDomain").and_then(Value::as_str).unwrap_or("cluster.local");
    Ok((resources, domain.to_owned()))
}

fn load(files: &[PathBuf]) -> Result<Resources, Failure> {
    let loaded = Loaded::read(files);
    if loaded.unreadable.is_empty() { Ok(loaded.resources) } else { Err(Failure::invalid(&loaded.unreadable)) }
}

/// Adds what only a running mesh has: the calling pod, and addresses of services.
fn prepare(resources: &mut Resources, from: &Named, account: &str, offline: bool, told: &mut Told) -> Result<(), Failure> {
    if resources.workload(from).is_none() {
        let key = ResourceKey { kind: crate::model::Kind::Workload, name: from.clone() };
        if !offline {
            let pods: Vec<String> = resources.workloads().map(|workload| workload.named().to_string()).collect();
            let meant = nearest(&from.to_string(), pods.iter().map(String::as_str)).map(|name| format!("; did you mean {name}?"));
            return Err(Failure::invalid([format!("there is no {key}{}", meant.unwrap_or_default())]));
        }
        let spec = WorkloadSpec {
            addresses: vec![Ipv4Addr::new(192, 0, 2, 1).into()],
            service_account: Some(account.to_owned()),
            ..WorkloadSpec::default()
        };
        let workload = Object::new(from, std::collections::BTreeMap::new(), spec);
        resources.by_key.insert(key, Arc::new(Resource::Workload(workload)));
        told.say("note", format!("the documents do not hold {from}; a pod of service account {account} is assumed"), None);
    }
    if offline {
        assume_endpoints(resources, told);
    }
    // From the range for documentation (RFC 5737), or class E where there are more: these addresses are only looked up here.
    let mut next = u32::from(Ipv4Addr::new(240, 0, 0, 1));
    for resource in resources.by_key.values_mut() {
        if let Resource::Service(service) = Arc::make_mut(resource)
            && service.spec.addresses().next().is_none()
        {
            service.spec.cluster_ip = Some(Ipv4Addr::from(next).to_string());
            next += 1;
        }
    }
    Ok(())
}

/// Documents seldom hold pods: a service that selects none is given one, so that its policies can be asked.
fn assume_endpoints(resources: &mut Resources, told: &mut Told) {
    let is_empty = |service: &&Object<ServiceSpec>| {
        !service.spec.selector.is_empty()
            && !resources
                .workloads_in(&service.metadata.namespace)
                .any(|workload| service.spec.selects(&workload.metadata.labels))
    };
    let mut assumed = Vec::new();
    for (address, service) in (u32::from(Ipv4Addr::new(241, 0, 0, 1))..).zip(resources.services().filter(is_empty)) {
        let named = service.spec.ports.iter().filter_map(|port| match &port.target_port {
            Some(PortRef::Name(name)) => Some(WorkloadPort { name: Some(name.clone()), port: port.port, app_protocol: None }),
            _ => None,
        });
        let spec =
            WorkloadSpec { addresses: vec![Ipv4Addr::from(address).into()], ports: named.collect(), ..WorkloadSpec::default() };
        let name = Named::new(service.metadata.namespace.as_str(), format!("assumed-{}", service.metadata.name));
        assumed.push(Object::new(&name, service.spec.selector.clone(), spec));
    }
    if !assumed.is_empty() {
        let names: Vec<String> = assumed.iter().map(|workload| workload.named().to_string()).collect();
        told.say("note", format!("the documents hold no pods for some services; assumed are {}", names.join(", ")), None);
    }
    for workload in assumed {
        resources.by_key.insert(workload.key(), Arc::new(Resource::Workload(workload)));
    }
}

fn explain(
    resources: &Resources,
    from: &Named,
    question: &Question,
    trust_domain: &TrustDomain,
    now: Duration,
    told: &mut Told,
) -> Result<(), Failure> {
    let own = Own { workload: from.clone(), trust_domain: trust_domain.clone() };
    let (snapshot, _) = compile::compile(resources, &own, &Snapshot::empty());
    let source = resources.workload(from).filter(|workload| workload.spec.transport == WorkloadTransport::MutualTls);
    let identity =
        source.and_then(|workload| trust_domain.service_account(&Named::new(&*from.namespace, workload.spec.account())).ok());
    match &identity {
        Some(identity) => told.say("from", format!("{from} as {identity}"), None),
        None => told.say("from", format!("{from}, which is outside the mesh"), None),
    }
    let Destination { address, service } = destination(resources, from, question)?;
    let caller =
        Caller { identity, address: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 0), domain: trust_domain, now };
    if caller.identity.is_none() {
        // No sidecar: no route, no policy of the caller's side.
        told.say("route", "none: the caller has no sidecar", None);
        for endpoint in service
            .iter()
            .flat_map(|(service, port)| snapshot.outbound.backends.get(&(service.named(), *port)))
            .flat_map(|backend| &backend.endpoints)
        {
            arrive(resources, &caller, endpoint, question, told);
        }
        return Ok(());
    }
    let Some((service, number)) = service else {
        direct(resources, &snapshot, &caller, address, question, told);
        return Ok(());
    };
    let Some(port) = snapshot.outbound.services.get(&address) else {
        told.refuse("to", format!("{} has no TCP port {number}: 503 no_configuration", service.key()), None);
        return Ok(());
    };
    told.say("to", format!("Service/{} port {} ({address}), {:?}", port.service, port.port, port.protocol), None);
    if port.protocol == AppProtocol::Opaque {
        told.say("route", "none: the port is declared opaque, its bytes are not looked into", None);
        let opaque = Question { opaque: true, ..question.again() };
        for endpoint in &port.default_backend.endpoints {
            arrive(resources, &caller, endpoint, &opaque, told);
        }
        return Ok(());
    }
    let view = question.view();
    let Some(rule) = port.rule(&question.host, view) else {
        told.refuse("route", "routes are attached, and none of their rules matches: 404 no_route", None);
        return Ok(());
    };
    told.say("route", "decides", Some(rule.name.to_string()));
    let mut arriving = question.again();
    apply(&rule.policies, &mut arriving, told);
    let total: u64 = rule.backends.iter().map(|backend| u64::from(backend.weight)).sum();
    if total == 0 {
        told.refuse("backend", "none has a weight: 500", Some(rule.name.to_string()));
    }
    let mut asked = BTreeSet::new();
    for backend in rule.backends.iter().filter(|backend| backend.weight > 0) {
        let share = u64::from(backend.weight) * 100 / total.max(1);
        let Some(target) = &backend.backend else {
            told.refuse(
                "backend",
                format!("{share} % to a Service or port that does not exist: 500"),
                Some(rule.name.to_string()),
            );
            continue;
        };
        told.say(
            "backend",
            format!(
                "{share} % to Service/{} port {}, {} endpoints, connect within {}",
                target.service,
                target.port,
                target.endpoints.len(),
                Span(target.connect_timeout)
            ),
            Some(target.breaker.rule.to_string()),
        );
        if target.endpoints.is_empty() {
            told.refuse("endpoint", "there is none: 503 no_endpoint", None);
        }
        let mut arriving = arriving.again();
        if let Some(edit) = &backend.request_headers {
            edit.apply(&mut arriving.headers);
            told.say("headers", "the backend's filter edits the request's", Some(rule.name.to_string()));
        }
        for endpoint in &target.endpoints {
            if asked.insert(endpoint.address) {
                arrive(resources, &caller, endpoint, &arriving, told);
            }
        }
    }
    Ok(())
}

/// Who calls.
struct Caller<'a> {
    identity: Option<SpiffeId>,
    address: SocketAddr,
    domain: &'a TrustDomain,
    now: Duration,
}

impl Question {
    fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            authority: &self.host,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
        }
    }

    fn again(&self) -> Self {
        Self {
            host: self.host.clone(),
            port: self.port,
            method: self.method.clone(),
            path: self.path.clone(),
            query: self.query.clone(),
            headers: self.headers.clone(),
            opaque: self.opaque,
        }
    }
}

/// Where the caller's connection goes.
struct Destination<'a> {
    address: SocketAddr,
    /// The service that has the address, and its port.
    service: Option<(&'a Object<ServiceSpec>, u16)>,
}

/// Finds what the question names.
fn destination<'a>(resources: &'a Resources, from: &Named, question: &Question) -> Result<Destination<'a>, Failure> {
    let invalid = |text: String| Failure::invalid([text]);
    let service = match question.host.parse::<IpAddr>() {
        Ok(address) => {
            let address = address.to_canonical();
            match resources.services().find(|service| compile::addresses(service).contains(&address)) {
                Some(service) => service,
                None => {
                    let port = question.port.ok_or_else(|| invalid(format!("write a port: {address}:PORT")))?;
                    return Ok(Destination { address: SocketAddr::new(address, port), service: None });
                }
            }
        }
        Err(_a_name) => {
            let mut parts = question.host.split('.');
            let name = parts.next().unwrap_or_default();
            let namespace = parts.next().unwrap_or(&from.namespace);
            let named = Named::new(namespace, name);
            resources.service(&named).ok_or_else(|| {
                let names: Vec<String> = resources.services().map(|service| service.named().to_string()).collect();
                let meant = nearest(&named.to_string(), names.iter().map(String::as_str));
                let meant = meant.map(|name| format!("; did you mean Service/{name}?")).unwrap_or_default();
                invalid(format!("there is no Service/{named}{meant}"))
            })?
        }
    };
    let ports: Vec<u16> = service.spec.ports.iter().filter(|port| port.is_tcp()).map(|port| port.port).collect();
    let port = match (question.port, ports.as_slice()) {
        (Some(port), _) => port,
        (None, ports) if ports.contains(&80) => 80,
        (None, [port]) => *port,
        (None, ports) => {
            return Err(invalid(format!("{} has the ports {ports:?}; write one: --to {}:PORT", service.key(), question.host)));
        }
    };
    let address = compile::addresses(service).into_iter().next().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    Ok(Destination { address: SocketAddr::new(address, port), service: Some((service, port)) })
}

/// A connection to an address that is no service's.
fn direct(
    resources: &Resources,
    snapshot: &Snapshot,
    caller: &Caller<'_>,
    address: SocketAddr,
    question: &Question,
    told: &mut Told,
) {
    if let Some(endpoint) = snapshot.outbound.workloads.get(&address.ip()) {
        told.say("to", format!("Workload/{} itself ({address})", endpoint.workload), None);
        let endpoint = Endpoint { address, ..endpoint.as_ref().clone() };
        arrive(resources, caller, &endpoint, question, told);
    } else if snapshot.mesh.ranges.iter().any(|range| range.contains(&address.ip())) {
        told.refuse("to", format!("{address} is an address of the mesh that nothing has: 503 no_configuration"), None);
    } else if snapshot.mesh.egress == Egress::Allow {
        told.say("to", format!("{address} is outside the mesh and is dialled as it is"), Some("Mesh egress Allow".to_owned()));
    } else {
        told.refuse("to", format!("{address} is outside the mesh"), Some("Mesh egress Deny".to_owned()));
    }
}

/// What the caller's sidecar does to the request.
fn apply(policies: &RoutePolicies, question: &mut Question, told: &mut Told) {
    let RoutePolicies {
        jwt: _,
        authorization: _,
        rate_limit: _,
        fault,
        request_headers,
        rewrite,
        shadow,
        timeouts,
        retry,
        response_headers,
    } = policies;
    if let Some(fault) = fault {
        told.say("fault", "a share of requests is delayed or aborted", Some(fault.rule.to_string()));
    }
    if let Some(edit) = request_headers {
        edit.apply(&mut question.headers);
        told.say("headers", "the request's are edited", None);
    }
    if let Some(rewrite) = rewrite {
        if let Some(authority) = &rewrite.authority {
            question.host = authority.to_string();
        }
        if let Some(whole) = rewrite.path(&question.path, question.query.as_deref()) {
            question.path = whole.split('?').next().unwrap_or_default().to_owned();
        }
        told.say("rewrite", format!("the request is for {}{}", question.host, question.path), None);
    }
    for shadow in shadow {
        told.say("shadow", format!("a share is copied to Service/{} port {}", shadow.service, shadow.port), None);
    }
    let limit = |limit: Option<Duration>| limit.map_or_else(|| "no limit".to_owned(), |limit| Span(limit).to_string());
    if timeouts.request.is_some() || timeouts.attempt.is_some() {
        told.say("timeouts", format!("request {}, each attempt {}", limit(timeouts.request), limit(timeouts.attempt)), None);
    }
    if let Some(retry) = retry {
        told.say("retry", retry.to_string(), None);
    }
    if response_headers.is_some() {
        told.say("headers", "the answer's are edited", None);
    }
}

/// What the sidecar of `endpoint` would do.
fn arrive(resources: &Resources, caller: &Caller<'_>, endpoint: &Endpoint, question: &Question, told: &mut Told) {
    let begin = told.steps.len();
    let name = endpoint.workload.to_string();
    match (&endpoint.transport, &caller.identity) {
        (Transport::Plaintext, _) => {
            told.say(
                "endpoint",
                format!("{name} {} in plaintext: it has no sidecar, nothing is asked there", endpoint.address),
                None,
            );
            told.about(begin, &name);
            return;
        }
        (Transport::MutualTls(id), Some(_)) => {
            told.say("endpoint", format!("{name} {} by mutual TLS as {id}", endpoint.address), None);
        }
        (Transport::MutualTls(_), None) => told.say("endpoint", format!("{name} {} in plaintext", endpoint.address), None),
    }
    let own = Own { workload: endpoint.workload.clone(), trust_domain: caller.domain.clone() };
    let (snapshot, _) = compile::compile(resources, &own, &Snapshot::empty());
    let port = snapshot.inbound.port(endpoint.address.port());
    if caller.identity.is_none() {
        match &port.plaintext {
            Plaintext::Refuse(rule) => {
                told.refuse("plaintext", "refused", Some(rule.to_string()));
                told.about(begin, &name);
                return;
            }
            Plaintext::Permit(rule) => told.say("plaintext", "permitted", Some(rule.to_string())),
        }
    }
    let view = question.view();
    let peer = Peer { identity: caller.identity.clone(), address: caller.address, port: endpoint.address.port() };
    let RoutePolicies { jwt, authorization, rate_limit, .. } = &port.policies;
    let verified = jwt.as_ref().map(|jwt| match question.opaque {
        true => jwt.decide_opaque().map(|()| None),
        false => jwt.verify(view, caller.now),
    });
    let claims = match verified {
        Some(Err(refused)) => {
            told.refuse("token", format!("refused: {}", refused.reason), Some(refused.rule.to_string()));
            told.about(begin, &name);
            return;
        }
        Some(Ok(Some(claims))) => {
            told.say("token", format!("accepted, issued by {}", claims.issuer), None);
            Some(claims)
        }
        Some(Ok(None)) => {
            told.say("token", "none was sent, and none is needed", None);
            None
        }
        None => None,
    };
    let verdict = authorization.as_ref().map(|authorization| match question.opaque {
        true => authorization.decide_opaque(&peer),
        false => authorization.decide(&peer, view, claims.as_ref()),
    });
    match verdict {
        Some(Verdict::Allow(rule)) => told.say("authorization", "allowed", Some(rule.to_string())),
        Some(Verdict::Deny(rule)) => {
            told.refuse("authorization", "refused: 403", Some(rule.to_string()));
            told.about(begin, &name);
            return;
        }
        None => {}
    }
    if let Some(limit) = rate_limit {
        told.say("rate limit", "what is over it is refused: 429", Some(limit.rule.to_string()));
    }
    told.about(begin, &name);
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use expect_test::{Expect, expect};

    use super::*;
    use crate::model::yaml;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: ExplainArgs,
    }

    const SHOP: &str = include_str!("../../testdata/explain/shop.yaml");

    fn check(line: &str, expected: Expect) {
        let line = std::iter::once("explain").chain(line.split(' '));
        let args = Line::try_parse_from(line).unwrap().args;
        let mut resources = Resources::default();
        for document in yaml::read(SHOP) {
            let resource = document.unwrap().resource;
            resources.by_key.insert(resource.key(), Arc::new(resource));
        }
        let mut told = Told::default();
        let question = Question::read(&args).unwrap();
        let domain = args.trust_domain.parse().unwrap();
        let said = prepare(&mut resources, &args.from, &args.service_account, true, &mut told)
            .and_then(|()| explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told));
        match said {
            Ok(()) => expected.assert_eq(&told.text()),
            Err(failure) => expected.assert_eq(&format!("{failure:?}\n")),
        }
    }

    #[test]
    fn a_request_is_followed_from_its_route_to_its_verdict() {
        check(
            "--from shop/front-1 --to web --path /cart?x=1 --method POST",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              Service/shop/web port 80 (10.65.0.2:80), Http
                route           decides  [HTTPRoute/shop/web rules[0]]
                timeouts        request 5s, each attempt no limit
                retry           up to 3 attempts, from 25ms apart, after what never left, after silence where the method is idempotent, after 503 likewise
                backend         75 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
                endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
                  authorization allowed  [AuthorizationPolicy/shop/web rules[0]]
                  rate limit    what is over it is refused: 429  [TrafficPolicy/shop/web rateLimit]
                backend         25 % to Service/shop/web-v2 port 80, 1 endpoints, connect within 5s  [default_limits]
                endpoint        shop/assumed-web-v2 241.0.0.1:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
                  authorization allowed  [default_allow]
                outcome         let in
            "#]],
        );
        check(
            "--from shop/front-1 --to web.shop.svc.cluster.local:80 --path /nothing",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              Service/shop/web port 80 (10.65.0.2:80), Http
                route           routes are attached, and none of their rules matches: 404 no_route
                outcome         refused
            "#]],
        );
        check(
            "--from shop/other-1 --to web --path /cart",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/other-1 as spiffe://cluster.local/ns/shop/sa/default
                to              Service/shop/web port 80 (10.65.0.2:80), Http
                route           decides  [HTTPRoute/shop/web rules[0]]
                timeouts        request 5s, each attempt no limit
                retry           up to 3 attempts, from 25ms apart, after what never left, after silence where the method is idempotent, after 503 likewise
                backend         75 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
                endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
                  authorization refused: 403  [no_rule_matched: AuthorizationPolicy/shop/web]
                backend         25 % to Service/shop/web-v2 port 80, 1 endpoints, connect within 5s  [default_limits]
                endpoint        shop/assumed-web-v2 241.0.0.1:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
                  authorization allowed  [default_allow]
                outcome         refused
            "#]],
        );
        check(
            "--from shop/front-1 --to web --path /old/a",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              Service/shop/web port 80 (10.65.0.2:80), Http
                route           decides  [HTTPRoute/shop/web rules[1]]
                rewrite         the request is for web/cart/a
                shadow          a share is copied to Service/shop/db port 5432
                retry           up to 3 attempts, from 25ms apart, after what never left
                backend         100 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
                endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
                  authorization allowed  [AuthorizationPolicy/shop/web rules[0]]
                  rate limit    what is over it is refused: 429  [TrafficPolicy/shop/web rateLimit]
                outcome         let in
            "#]],
        );
    }

    #[test]
    fn addresses_ports_and_protocols_are_followed_too() {
        check(
            "--from shop/front-1 --to 10.64.0.2:9999",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              Workload/shop/web-1 itself (10.64.0.2:9999)
                endpoint        shop/web-1 10.64.0.2:9999 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
                  authorization allowed  [default_allow]
                outcome         let in
            "#]],
        );
        check(
            "--from shop/front-1 --to 10.64.77.1:80",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              10.64.77.1:80 is an address of the mesh that nothing has: 503 no_configuration
                outcome         refused
            "#]],
        );
        check(
            "--from shop/front-1 --to 203.0.113.1:443",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              203.0.113.1:443 is outside the mesh and is dialled as it is  [Mesh egress Allow]
                outcome         let in
            "#]],
        );
        check(
            "--from shop/front-1 --to db",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
                to              Service/shop/db port 5432 (240.0.0.1:5432), Opaque
                route           none: the port is declared opaque, its bytes are not looked into
                endpoint        shop/db-1 10.64.0.5:5432 by mutual TLS as spiffe://cluster.local/ns/shop/sa/db
                  authorization refused: 403  [AuthorizationPolicy/shop/db rules[0]]
                outcome         refused
            "#]],
        );
        check(
            "--from outside/curl --to web.shop",
            expect![[r#"
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            outside/curl, which is outside the mesh
                route           none: the caller has no sidecar
                endpoint        shop/web-1 10.64.0.2:8080 in plaintext
                  plaintext     refused  [strict_default]
                outcome         refused
            "#]],
        );
        check(
            "--from shop/front-1 --to wep",
            expect![[r#"
            Failure { code: 2, causes: ["there is no Service/shop/wep; did you mean Service/shop/web?"] }
        "#]],
        );
        check(
            "--from shop/new-1 --service-account front --to web --path /cart",
            expect![[r#"
                note            the documents do not hold shop/new-1; a pod of service account front is assumed
                note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
                from            shop/new-1 as spiffe://cluster.local/ns/shop/sa/front
                to              Service/shop/web port 80 (10.65.0.2:80), Http
                route           decides  [HTTPRoute/shop/web rules[0]]
                timeouts        request 5s, each attempt no limit
                retry           up to 3 attempts, from 25ms apart, after what never left, after silence where the method is idempotent, after 503 likewise
                backend         75 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
                endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
                  authorization allowed  [AuthorizationPolicy/shop/web rules[0]]
                  rate limit    what is over it is refused: 429  [TrafficPolicy/shop/web rateLimit]
                backend         25 % to Service/shop/web-v2 port 80, 1 endpoints, connect within 5s  [default_limits]
                endpoint        shop/assumed-web-v2 241.0.0.1:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
                  authorization allowed  [default_allow]
                outcome         let in
            "#]],
        );
    }
}

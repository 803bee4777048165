//! The request that is asked about, and where its connection would go.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};

use super::super::Failure;
use super::super::given::cannot_read;
use super::ExplainArgs;
use crate::base::names::{Named, check_name, nearest};
use crate::control::source::file::read_at_most;
use crate::dataplane::http::normalize;
use crate::dataplane::http::reading::{Read, read};
use crate::dataplane::http::reject::Reject;
use crate::model::Resources;
use crate::model::object::Object;
use crate::model::service::ServiceSpec;
use crate::policy::RequestView;
use crate::policy::limits::Limits;
use crate::policy::path::normal_path;
use crate::policy::rewrite::Rewrite;
use crate::snapshot::compile;

/// The request.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) host: String,
    port: Option<u16>,
    pub(super) method: Method,
    /// As a client writes it.
    target: String,
    /// Host and port by which the request calls whom it is for.
    pub(super) authority: String,
    pub(super) path: String,
    pub(super) query: Option<String>,
    pub(super) headers: HeaderMap,
    /// Servers differ about what the path means.
    pub(super) ambiguous: bool,
    /// The connection is not looked into: there is no request.
    pub(super) opaque: bool,
}

impl Question {
    pub(super) fn read(args: &ExplainArgs) -> Result<Self, Failure> {
        let invalid = |text: String| Failure::invalid([text]);
        let to = args.to.to_ascii_lowercase();
        if let Some(meant) = meant(&to) {
            return Err(invalid(format!("--to {:?} is not HOST[:PORT]; write {meant}", args.to)));
        }
        let host = normalize::host(&to);
        let port = match to.get(host.len()..).and_then(|rest| rest.strip_prefix(':')) {
            Some(port) => Some(
                port.parse()
                    .map_err(|_not_a_number| invalid(format!("{port:?} is not a port; write 1 to 65535, as --to web.shop:80")))?,
            ),
            None => None,
        };
        if args.path.chars().any(|letter| letter == ' ' || letter.is_control()) {
            return Err(invalid(format!("--path {:?} is not as a client sends it; write a space as %20", args.path)));
        }
        // Whether a sidecar takes the forms without a slash is not decided here.
        let tunnel = args.method == Method::CONNECT;
        if tunnel && args.path.starts_with('/') {
            return Err(invalid(
                "CONNECT asks for a tunnel to a host and port, and has no path; write --path HOST:PORT".to_owned(),
            ));
        }
        if !tunnel && !args.path.starts_with('/') && args.path != "*" && !args.path.contains("://") {
            return Err(invalid(format!("--path {:?} does not begin with '/'; write --path /{}", args.path, args.path)));
        }
        let (path, query) = args.path.split_once('?').map_or((args.path.as_str(), None), |(path, query)| (path, Some(query)));
        let mut headers = HeaderMap::new();
        for line in &args.headers {
            let parsed = line.split_once(':').and_then(|(name, value)| {
                let name: HeaderName = name.trim().parse().ok()?;
                Some((name, HeaderValue::from_str(value.trim()).ok()?))
            });
            let Some((name, value)) = parsed else {
                return Err(invalid(format!("{line:?} is not NAME: VALUE; write it as --header 'x-user: ada'")));
            };
            headers.append(name, value);
        }
        if let Some(file) = &args.token {
            let token = read_at_most(file, TOKEN_BYTES_MAX).map_err(|error| invalid(cannot_read(file, &error)))?;
            let value = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
            headers
                .insert(header::AUTHORIZATION, value.map_err(|_not_text| invalid(format!("{} holds no token", file.display())))?);
        }
        let (path, ambiguous) = normal_path(path);
        // Clients leave out the port that HTTP has anyway.
        let authority = if port.is_none_or(|port| port == 80) { host } else { to.as_str() };
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port,
            method: args.method.clone(),
            target: args.path.clone(),
            authority: authority.to_owned(),
            path: path.into_owned(),
            query: query.map(str::to_owned),
            headers,
            ambiguous,
            opaque: false,
        })
    }

    /// What the first sidecar reads before anything is decided; or why it refuses to read the request.
    pub(super) fn normalize(&mut self, limits: &Limits) -> Result<(), String> {
        let Read { parts, target } = read(self.written(), limits).map_err(|reject| refusal(&reject))?;
        target.path().clone_into(&mut self.path);
        self.authority = target.authority.map(|authority| authority.to_string()).unwrap_or_default();
        self.query = target.path_and_query.query().map(str::to_owned);
        self.ambiguous = target.ambiguous;
        self.headers = parts.headers;
        Ok(())
    }

    /// The request's head as a client of HTTP/1.1 writes it.
    fn written(&self) -> Bytes {
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        if !self.headers.contains_key(header::HOST) {
            // Writing to a string does not fail.
            let written = write!(head, "host: {}\r\n", self.authority);
            debug_assert!(written.is_ok(), "a string takes what is written");
        }
        let mut head = head.into_bytes();
        for (name, value) in &self.headers {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                head.extend_from_slice(part);
            }
        }
        head.extend_from_slice(b"\r\n");
        head.into()
    }

    /// Is it asked for by a name, which leads somewhere else for a caller without a sidecar?
    pub(super) fn is_by_name(&self) -> bool {
        self.host.parse::<IpAddr>().is_err()
    }

    pub(super) fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
        }
    }

    /// Is it for a tunnel by CONNECT?
    pub(super) fn is_tunnel(&self) -> bool {
        self.method == Method::CONNECT && !self.opaque
    }

    /// Rewrites it, and says what it is for now.
    pub(super) fn rewrite(&mut self, rewrite: &Rewrite) -> String {
        if self.method == Method::CONNECT {
            return "it leads where it was asked to".to_owned();
        }
        if let Some(authority) = &rewrite.authority {
            self.authority = authority.to_string();
        }
        if let Some(whole) = rewrite.path(&self.path, self.query.as_deref()) {
            self.path = whole.split('?').next().unwrap_or_default().to_owned();
        }
        format!("the request is for {}{}", self.authority, self.path)
    }

    pub(super) fn again(&self) -> Self {
        Self {
            host: self.host.clone(),
            port: self.port,
            method: self.method.clone(),
            target: self.target.clone(),
            authority: self.authority.clone(),
            path: self.path.clone(),
            query: self.query.clone(),
            headers: self.headers.clone(),
            ambiguous: self.ambiguous,
            opaque: self.opaque,
        }
    }
}

/// What was probably meant by a destination that is written as something else: a URL, or a document's name.
fn meant(to: &str) -> Option<String> {
    let (_scheme, rest) = to.split_once("://").unwrap_or(("", to));
    if rest.len() < to.len() {
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        return Some(format!("the host, and the path by itself: --to {host} --path /{path}"));
    }
    let named = rest.strip_prefix("service/").unwrap_or(rest);
    let (namespace, name) = named.split_once('/')?;
    Some(match (check_name(namespace), check_name(name)) {
        // A namespace has no dot: what has one there is a host with a path.
        (Ok(()), Ok(())) if !namespace.contains('.') => format!("a Service by its host name: --to {name}.{namespace}"),
        _ => "a Service by its host name, as --to web.shop, and the path with --path".to_owned(),
    })
}

/// What is said of a refusal of a sidecar's.
pub(super) fn refusal(reject: &Reject) -> String {
    let told = reject.told();
    let why = match reject {
        Reject::ReservedHeader(name) => format!("{name} is for sidecars alone"),
        _another => told.text.trim_end_matches('.').to_owned(),
    };
    format!("{why}: {} {}", told.status.as_u16(), told.reason.as_str())
}

/// Where the caller's connection goes.
pub(super) struct Destination<'a> {
    pub(super) address: SocketAddr,
    /// The service that has the address, and its port.
    pub(super) service: Option<(&'a Object<ServiceSpec>, u16)>,
}

/// Finds what the question names.
pub(super) fn destination<'a>(resources: &'a Resources, from: &Named, question: &Question) -> Result<Destination<'a>, Failure> {
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
        Err(_a_name) if question.host.trim_end_matches('.') == LOCALHOST => {
            let port = question.port.ok_or_else(|| invalid(format!("write a port: {LOCALHOST}:PORT")))?;
            return Ok(Destination { address: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port), service: None });
        }
        Err(_a_name) => {
            let name = question.host.trim_end_matches('.');
            if let Some((service, address)) = pod_of_headless(resources, from, name) {
                let address = SocketAddr::new(address, port_of(service, question)?);
                return Ok(Destination { address, service: None });
            }
            let mut parts = name.split('.');
            let name = parts.next().unwrap_or_default();
            let namespace = parts.next().unwrap_or(&from.namespace);
            let named = Named::new(namespace, name);
            resources
                .service(&named)
                .ok_or_else(|| invalid(format!("there is no Service/{named}; {}", instead(resources, &named))))?
        }
    };
    let port = port_of(service, question)?;
    let address = compile::addresses(service).into_iter().next().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    Ok(Destination { address: SocketAddr::new(address, port), service: Some((service, port)) })
}

/// The port that is asked for, or the one that is meant where none is written.
fn port_of(service: &Object<ServiceSpec>, question: &Question) -> Result<u16, Failure> {
    let ports: Vec<u16> = service.spec.ports.iter().filter(|port| port.is_tcp()).map(|port| port.port).collect();
    match (question.port, ports.as_slice()) {
        (Some(port), _) => Ok(port),
        (None, ports) if ports.contains(&80) => Ok(80),
        (None, [port]) => Ok(*port),
        (None, ports) => {
            Err(Failure::invalid([format!("{} has the ports {ports:?}; write one: --to {}:PORT", service.key(), question.host)]))
        }
    }
}

/// The workload that a name below a Service without an address of its own leads to, with that Service: `POD.SERVICE` in the
/// caller's namespace, `POD.SERVICE.NAMESPACE` in any, as a pod's resolver finds them.
fn pod_of_headless<'a>(resources: &'a Resources, from: &Named, host: &str) -> Option<(&'a Object<ServiceSpec>, IpAddr)> {
    let (short, is_short) = match host.strip_suffix(".svc.cluster.local").or_else(|| host.strip_suffix(".svc")) {
        Some(short) => (short, false),
        None => (host, true),
    };
    let mut parts = short.split('.');
    let (pod, service) = (parts.next()?, parts.next()?);
    let namespace = match parts.next() {
        Some(namespace) => namespace,
        None if is_short => &from.namespace,
        None => return None,
    };
    let service = resources.service(&Named::new(namespace, service)).filter(|service| service.spec.is_headless())?;
    let workload = resources.workload(&Named::new(namespace, pod)).filter(|_| parts.next().is_none())?;
    let is_behind = service.spec.leads_to(resources.workloads_in(namespace)).any(|behind| std::ptr::eq(behind, workload));
    let address = workload.spec.addresses.first().filter(|_| is_behind)?;
    Some((service, address.to_canonical()))
}

/// What there is instead of a service that is not there: one of the same name elsewhere, one of a like name, or all.
fn instead(resources: &Resources, wanted: &Named) -> String {
    let host = |service: &Object<ServiceSpec>| format!("{}.{}", service.metadata.name, service.metadata.namespace);
    let elsewhere = resources.services().find(|service| *service.metadata.name == *wanted.name);
    let here = |service: &&Object<ServiceSpec>| *service.metadata.namespace == *wanted.namespace;
    let near = || {
        let names = resources.services().filter(here).map(|service| service.metadata.name.as_str());
        let near = nearest(&wanted.name, names)?;
        resources.service(&Named::new(Arc::clone(&wanted.namespace), near))
    };
    if let Some(meant) = elsewhere.or_else(near) {
        return format!("did you mean --to {}?", host(meant));
    }
    let mut all: Vec<&Object<ServiceSpec>> = resources.services().collect();
    all.sort_by_key(|service| !here(service));
    match all.len() {
        0 => "there is none at all".to_owned(),
        number => {
            let more = if number > HOSTS_TOLD { ", …" } else { "" };
            format!("there are {}{more}", all.into_iter().take(HOSTS_TOLD).map(host).collect::<Vec<_>>().join(", "))
        }
    }
}

/// The name of the caller's own loopback.
const LOCALHOST: &str = "localhost";

/// How many services an answer names.
const HOSTS_TOLD: usize = 8;

/// The largest token.
const TOKEN_BYTES_MAX: u64 = 64 << 10;

//! Which of the routes that are attached to a port of a service count for a caller.
//!
//! Source: GEP-1294. Routes of the caller's own namespace, where there are such, stand for those of the service's. Of several
//! kinds at one port one counts: GRPCRoute before HTTPRoute before TLSRoute before TCPRoute.

use super::route::{self, Route};
use crate::base::names::Named;
use crate::base::problems::Problems;
use crate::model::service::ServicePortSpec;
use crate::model::{Kind, Resources, route as model};

/// A route, and its document.
pub(super) struct Attached<'a> {
    pub(super) document: model::Route<'a>,
    pub(super) route: Route,
}

/// Every route of a set of documents.
pub(super) fn compile_all(resources: &Resources) -> Vec<Attached<'_>> {
    let all = KINDS.into_iter().flat_map(|kind| resources.of_kind(kind));
    all.filter_map(|(key, resource)| {
        let document = resource.route()?;
        route::compile(resource, &mut Problems::of(key)).map(|route| Attached { document, route })
    })
    .collect()
}

/// Is the route attached to this port of the service?
pub(super) fn is_attached(route: &model::Route<'_>, service: &Named, port: &ServicePortSpec) -> bool {
    route.service_parents().any(|(_, parent, name)| name == *service && parent.takes(port.port, port.name.as_deref()))
}

/// The routes that count at this port for callers of a namespace: all of one kind.
pub(super) fn in_force<'r, 'a>(
    routes: &'r [Attached<'a>],
    service: &Named,
    port: &ServicePortSpec,
    caller: &str,
) -> Vec<&'r Attached<'a>> {
    let of = |namespace: &str| -> Vec<&'r Attached<'a>> {
        let theirs = routes.iter().filter(|attached| *attached.route.name.namespace == *namespace);
        theirs.filter(|attached| is_attached(&attached.document, service, port)).collect()
    };
    let consumers = if *service.namespace == *caller { Vec::new() } else { of(caller) };
    let mut counting = if consumers.is_empty() { of(&service.namespace) } else { consumers };
    let first = counting.iter().map(|attached| rank(attached.route.kind)).min();
    counting.retain(|attached| Some(rank(attached.route.kind)) == first);
    counting
}

/// The place of a kind among those of which one counts.
pub(super) fn rank(kind: Kind) -> usize {
    KINDS.iter().position(|known| *known == kind).unwrap_or(KINDS.len())
}

/// The kinds of routes, the one that goes first first.
pub(super) const KINDS: [Kind; 4] = [Kind::GrpcRoute, Kind::HttpRoute, Kind::TlsRoute, Kind::TcpRoute];

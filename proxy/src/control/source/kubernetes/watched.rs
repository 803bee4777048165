//! What is watched of a cluster: every kind of document that means something here, and what the pods, their machines and
//! their networks are learnt from.

use kube::api::ApiResource;
use kube::runtime::watcher;

use crate::model::Kind;

/// One watch.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Watched {
    /// Documents: Services, routes, our own kinds.
    Documents(Kind),
    Pods,
    /// EndpointSlices that people or other controllers write; what Kubernetes makes of pods is known from the pods.
    EndpointSlices,
    Nodes,
    Namespaces,
    /// The networks of cluster addresses.
    ServiceCidrs,
}

impl Watched {
    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let others = [Self::Pods, Self::EndpointSlices, Self::Nodes, Self::Namespaces, Self::ServiceCidrs];
        Kind::ALL.into_iter().map(Self::Documents).chain(others)
    }

    /// Documents that say who may do what.
    pub(super) fn is_security(self) -> bool {
        matches!(self, Self::Documents(kind) if kind.is_security())
    }

    /// As in `kind:` of an object.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Documents(kind) => kind.as_str(),
            Self::Pods => "Pod",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::Namespaces => "Namespace",
            Self::ServiceCidrs => "ServiceCIDR",
        }
    }

    /// As in `apiVersion:` of an object; where there are several, one of them is served, and the newest is wanted.
    pub(super) fn api_versions(self) -> Vec<&'static str> {
        match self {
            Self::Documents(kind) => kind.api_versions().collect(),
            Self::Pods | Self::Nodes | Self::Namespaces => vec!["v1"],
            Self::EndpointSlices => vec!["discovery.k8s.io/v1"],
            Self::ServiceCidrs => vec!["networking.k8s.io/v1"],
        }
    }

    /// As in the paths of the API.
    fn plural(self) -> &'static str {
        match self {
            Self::Documents(kind) => kind.plural(),
            Self::Pods => "pods",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::Namespaces => "namespaces",
            Self::ServiceCidrs => "servicecidrs",
        }
    }

    /// Where it is found in the API.
    pub(crate) fn resource(self, version: &str) -> ApiResource {
        let (group, short) = version.split_once('/').unwrap_or(("", version));
        ApiResource {
            group: group.to_owned(),
            version: short.to_owned(),
            api_version: version.to_owned(),
            kind: self.kind().to_owned(),
            plural: self.plural().to_owned(),
        }
    }

    /// How it is asked for. A watch is asked for anew before a silent connection would be noticed to be dead, and a list comes in
    /// pages, so that an answer has a bound.
    pub(super) fn config(self) -> watcher::Config {
        let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        match self {
            Self::EndpointSlices => config.labels(NOT_OF_PODS),
            _ => config,
        }
    }
}

/// How long one watch lasts; the next one goes on where it ended.
const WATCH_SECONDS: u32 = 110;

/// Objects of one page.
const PAGE: u32 = 250;

/// What the controller of EndpointSlices makes of pods carries its name.
const NOT_OF_PODS: &str = "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_where_the_api_has_it() {
        let path = |watched: Watched, version| {
            let ApiResource { group, version, plural, .. } = watched.resource(version);
            format!("{group}/{version}/{plural}")
        };
        let of_kind = |watched: Watched| watched.api_versions().into_iter().map(move |version| path(watched, version));
        let paths: Vec<String> = Watched::all().flat_map(of_kind).collect();
        for path in [
            "/v1/services",
            "/v1/pods",
            "gateway.networking.k8s.io/v1/httproutes",
            "gateway.networking.k8s.io/v1beta1/referencegrants",
            "outrigger.dev/v1alpha1/meshes",
        ] {
            assert!(paths.iter().any(|known| known == path), "{path} is not among {paths:?}");
        }
    }
}

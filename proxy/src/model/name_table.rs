//! What resolves inside local pods: `STATE/names.json`, written by the control plane, read by each pod's own resolver,
//! which goes on answering from it when the control plane is gone.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Full names without a trailing dot, lower case, as `web.shop.svc.cluster.local`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct NameTable(pub(crate) BTreeMap<String, NameAnswer>);

/// Where one name leads.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct NameAnswer {
    /// The Service's cluster addresses: for a pod of the mesh, whose sidecar knows them.
    pub(crate) service: Vec<IpAddr>,
    /// The addresses behind it: for a pod outside the mesh.
    pub(crate) endpoints: Vec<IpAddr>,
}

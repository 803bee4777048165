//! What a pod's owner took out of capture: connections that pass the pod's sidecar by, on the way out or in.
//!
//! Invariant: it decides as the kernel programs do (`proxy_common::decide`): a pod's own addresses and its loopback are
//! never excluded.

use std::net::SocketAddr;

use super::told::Told;
use super::walk::Caller;
use crate::base::names::Named;
use crate::model::Resources;
use crate::snapshot::Endpoint;

/// The annotation by which a connection of the pod `from` to `target` passes its sidecar by.
pub(super) fn out(resources: &Resources, from: &Named, target: SocketAddr) -> Option<&'static str> {
    let pod = resources.workload(from)?;
    let ip = target.ip().to_canonical();
    let stays = ip.is_loopback() || ip.is_unspecified() || pod.spec.addresses.iter().any(|own| own.to_canonical() == ip);
    if stays { None } else { pod.capture().lets_out(target) }
}

/// What becomes of a connection to a port of a pod with a sidecar that its owner excluded. False: the port is not.
pub(super) fn arrives(resources: &Resources, caller: &Caller<'_>, endpoint: &Endpoint, told: &mut Told) -> bool {
    let (name, address) = (&endpoint.workload, endpoint.address);
    let excluded = resources.workload(name).filter(|_| caller.from != name).and_then(|pod| pod.capture().lets_in(address.port()));
    let Some(annotation) = excluded else { return false };
    let rule = Some(format!("annotation {annotation} of {name}"));
    if caller.identity.is_none() {
        let says = format!("{name} {address} in plaintext, past its sidecar: it goes to the application, no policy applies");
        told.say("endpoint", says, rule);
    } else {
        let says = format!(
            "{name} {address} by mutual TLS, which passes its sidecar by: the application does not speak the mesh's TLS: \
             503 connect_failed"
        );
        told.refuse("endpoint", says, rule);
    }
    true
}

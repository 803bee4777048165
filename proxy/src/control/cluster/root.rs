//! The authority's root in a cluster: a Secret that all replicas read, and a ConfigMap of what everybody may know of it.
//!
//! Who comes first makes the Secret; two at once do so in one order, that of the API server, and the later takes what the
//! earlier made. Nothing ever writes over a Secret that is there: its root is what every sidecar trusts.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Client;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use tracing::{info, warn};

use crate::base::clock::WallClock;
use crate::control::ca::{Authority, CaError, Root};
use crate::control::source::kubernetes::told;
use crate::identity::spiffe::TrustDomain;
use crate::model::object::MESH_NAMESPACE;

/// Loads the root, or makes one. Waits for an API server that is not there yet: without its root, nothing can begin.
///
/// # Errors
/// The Secret holds something else, or may not be read.
pub(crate) async fn open(client: &Client, trust_domain: TrustDomain, clock: WallClock) -> Result<Authority, CaError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), MESH_NAMESPACE);
    let mut pause = PAUSE_MIN;
    let root = loop {
        match find_or_make(&secrets, &trust_domain, &clock).await {
            Ok(root) => break root,
            Err(Trouble::Final(error)) => return Err(error),
            Err(Trouble::Server(error)) => {
                warn!(error = told(&error), secret = SECRET, "the authority's root cannot be read; it is tried again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    };
    Authority::from_root(SECRET.into(), &root, trust_domain, clock)
}

/// Tells everybody in the cluster the root. It is no secret, and node agents must have it before they join.
///
/// # Errors
/// The API server is away or refuses.
pub(crate) async fn publish(client: &Client, authority: &Authority) -> Result<(), kube::Error> {
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), MESH_NAMESPACE);
    let data = BTreeMap::from([(CERTIFICATE.to_owned(), authority.root_pem())]);
    let config = ConfigMap { metadata: metadata(CONFIG), data: Some(data), ..ConfigMap::default() };
    configs.patch(CONFIG, &PatchParams::apply(MANAGER).force(), &Patch::Apply(config)).await?;
    Ok(())
}

enum Trouble {
    /// Nothing changes it.
    Final(CaError),
    /// It may pass.
    Server(kube::Error),
}

async fn find_or_make(secrets: &Api<Secret>, trust_domain: &TrustDomain, clock: &WallClock) -> Result<Root, Trouble> {
    loop {
        if let Some(secret) = secrets.get_opt(SECRET).await.map_err(trouble)? {
            return read(secret).map_err(|reason| Trouble::Final(CaError::Root { path: SECRET.into(), reason }));
        }
        let root = Root::new(trust_domain, clock).map_err(Trouble::Final)?;
        let data = [(CERTIFICATE, &root.certificate), (KEY, &root.key)];
        let data = data.map(|(name, pem)| (name.to_owned(), ByteString(pem.clone().into_bytes())));
        let secret = Secret { metadata: metadata(SECRET), data: Some(data.into()), ..Secret::default() };
        match secrets.create(&PostParams::default(), &secret).await {
            Ok(_made) => {
                info!(secret = SECRET, namespace = MESH_NAMESPACE, "made the authority's root");
                return Ok(root);
            }
            // Another replica was first.
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {}
            Err(error) => return Err(trouble(error)),
        }
    }
}

fn trouble(error: kube::Error) -> Trouble {
    match &error {
        kube::Error::Api(status) if status.code == 403 || status.code == 404 => {
            Trouble::Final(CaError::Root { path: SECRET.into(), reason: status.message.clone() })
        }
        _ => Trouble::Server(error),
    }
}

fn read(secret: Secret) -> Result<Root, String> {
    let mut data = secret.data.unwrap_or_default();
    let mut part = |name: &str| {
        let bytes = data.remove(name).ok_or_else(|| format!("it has no {name}"))?;
        String::from_utf8(bytes.0).map_err(|_not_utf8| format!("its {name} is no text"))
    };
    Ok(Root { certificate: part(CERTIFICATE)?, key: part(KEY)? })
}

pub(super) fn metadata(name: &str) -> ObjectMeta {
    let labels = BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "outrigger".to_owned())]);
    ObjectMeta { name: Some(name.to_owned()), labels: Some(labels), ..ObjectMeta::default() }
}

/// As which the API server knows what this writes.
pub(crate) const MANAGER: &str = "outrigger-control";

/// Where its key is.
pub(crate) const SECRET: &str = "outrigger-ca";
/// Where everybody finds the root, and under which name in it.
pub(crate) const CONFIG: &str = "outrigger-root";
pub(crate) const CERTIFICATE: &str = "root.pem";
const KEY: &str = "root.key";

const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

//! The certificate of the webhooks, which the authority of the mesh signs, made anew at half of its life.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::task::JoinSet;
use tracing::{error, info};

use crate::control::ca::{Authority, CaError};
use crate::model::marks;

/// Why there is no certificate. The environment is at fault.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServingError {
    #[error(transparent)]
    Authority(#[from] CaError),
    #[error("cannot serve TLS")]
    Tls(#[from] rustls::Error),
}

/// A configuration of TLS with a certificate that is renewed by one of `tasks`.
///
/// # Errors
/// The environment has no randomness.
pub(super) fn start(ca: &Arc<Authority>, tasks: &mut JoinSet<()>) -> Result<Arc<ServerConfig>, ServingError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let current = Arc::new(Current(ArcSwap::from_pointee(certified(ca, &provider)?)));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let resolver: Arc<dyn ResolvesServerCert> = Arc::<Current>::clone(&current);
    let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    tasks.spawn(renew(Arc::clone(ca), provider, current));
    Ok(Arc::new(config))
}

/// The certificate of now.
#[derive(Debug)]
struct Current(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

async fn renew(ca: Arc<Authority>, provider: Arc<CryptoProvider>, current: Arc<Current>) {
    let mut pause = LIFETIME / 2;
    loop {
        tokio::time::sleep(pause).await;
        pause = match certified(&ca, &provider) {
            Ok(certified) => {
                current.0.store(Arc::new(certified));
                info!("the certificate of the webhooks was renewed");
                LIFETIME / 2
            }
            Err(error) => {
                error!(%error, "the certificate of the webhooks cannot be renewed");
                AGAIN
            }
        };
    }
}

fn certified(ca: &Authority, provider: &CryptoProvider) -> Result<CertifiedKey, ServingError> {
    // The API server knows a Service by these.
    let host = format!("control.{}.svc", marks::SYSTEM);
    let (signed, key) = ca.issue_for_hosts(&[host], LIFETIME)?;
    Ok(CertifiedKey::from_der(signed.chain, key.into(), provider)?)
}

const LIFETIME: Duration = Duration::from_secs(24 * 3600);
const AGAIN: Duration = Duration::from_secs(60);

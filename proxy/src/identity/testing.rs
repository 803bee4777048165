//! An authority for tests: signs what is asked, good or bad.
#![expect(clippy::unwrap_used, reason = "tests and fuzz targets use it")]
#![cfg_attr(not(test), expect(dead_code, reason = "fuzz targets use a part of what tests use"))]

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::source::Identity;
use super::verify::Bundles;
use crate::base::clock::WallClock;

/// The moment at which tests stand, in seconds since the epoch.
pub(crate) const NOW: i64 = 1_800_000_000;

/// A clock that stands at [`NOW`].
pub(crate) fn clock() -> WallClock {
    WallClock::fixed(Duration::from_secs(NOW.unsigned_abs()))
}

/// A self-signed authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// What a certificate says.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    /// URI names.
    pub(crate) names: Vec<String>,
    /// End of validity, in seconds since the epoch.
    pub(crate) until: i64,
}

impl Leaf {
    /// The workload `name` of the namespace `shop` in `cluster.local`, good for an hour.
    pub(crate) fn workload(name: &str) -> Self {
        Self { names: vec![format!("spiffe://cluster.local/ns/shop/sa/{name}")], until: NOW + 3600 }
    }
}

impl Authority {
    /// A new one with a new key.
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = date_time_ymd(1970, 1, 1) + since_epoch(NOW - 86_400);
        params.not_after = date_time_ymd(1970, 1, 1) + since_epoch(NOW + 86_400 * 365);
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// A chain and its key.
    pub(crate) fn issue(&self, leaf: &Leaf) -> (Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = leaf.names.iter().map(|name| SanType::URI(name.as_str().try_into().unwrap())).collect();
        params.not_before = date_time_ymd(1970, 1, 1) + since_epoch(NOW - 3600);
        params.not_after = date_time_ymd(1970, 1, 1) + since_epoch(leaf.until);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()))
    }

    /// Bundles in which this authority vouches for `domains`.
    pub(crate) fn bundles(&self, domains: &[&str]) -> Bundles {
        let mut bundles = Bundles::default();
        for domain in domains {
            bundles.add(&domain.parse().unwrap(), &self.certificate).unwrap();
        }
        bundles
    }

    /// Gives `identity` a certificate, and trust in `trusted` for every trust domain that a test knows.
    pub(crate) fn issue_to(&self, identity: &Identity, leaf: &Leaf, trusted: &[&Self]) {
        let (chain, key) = self.issue(leaf);
        let mut bundles = Bundles::default();
        for authority in trusted {
            bundles.add(&"cluster.local".parse().unwrap(), &authority.certificate).unwrap();
        }
        identity.publish(chain, key, bundles).unwrap();
    }
}

fn since_epoch(seconds: i64) -> Duration {
    Duration::from_secs(seconds.unsigned_abs())
}

//! An authority and two certificates with SPIFFE IDs, for peers of the benchmark that are configured by files.

use std::path::Path;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// Writes `ca.pem`, and `server` and `client` as `.crt` and `.key`.
pub(crate) fn make(folder: &str) -> Result<()> {
    let folder = Path::new(folder);
    let key = KeyPair::generate()?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    std::fs::write(folder.join("ca.pem"), authority.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(authority, key);
    for name in ["server", "client"] {
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::new(vec!["bench.local".to_owned()])?;
        // Named otherwise than its issuer, or OpenSSL takes it for one that signed itself.
        leaf.distinguished_name.push(DnType::CommonName, name);
        leaf.subject_alt_names.push(SanType::URI(format!("spiffe://bench.local/ns/bench/sa/{name}").try_into()?));
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        std::fs::write(folder.join(format!("{name}.crt")), leaf.signed_by(&key, &issuer)?.pem())?;
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

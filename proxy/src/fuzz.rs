//! What is fuzzed: everything that reads bytes which somebody else wrote. `cargo xtask fuzz` builds and runs it.
//!
//! Each function takes any bytes, and panics where a promise of the code under it is broken.

#![expect(clippy::panic, clippy::missing_panics_doc, reason = "a broken promise is told by a panic")]

pub use crate::dataplane::fuzz::{http1, http2, path, sniff};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method};
use prost::Message as _;

use crate::base::names::Named;
use crate::base::problems::{FieldPath, Problems};
use crate::control::holders::Holders;
use crate::delta::client::{Machine, Rejection};
use crate::delta::envelope::DeltaResponse;
use crate::model::address_book::AddressBook;
use crate::model::object::Object;
use crate::model::{Kind, Resources, yaml};
use crate::policy::jwt::{Jwt, JwtConfig};
use crate::policy::{RequestView, RuleName};
use crate::snapshot::Snapshot;
use crate::snapshot::compile::{Own, addresses, admit, check, compile, forget};

/// Documents as users write them: read, checked by themselves and together, compiled for a sidecar. The first half stands
/// before the second comes, so that who had a cluster address first is known of some.
pub fn documents(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut resources = Resources::default();
    let mut holders = Holders::default();
    let documents: Vec<_> = yaml::read(text).into_iter().flatten().collect();
    let half = documents.len().div_ceil(2);
    for (index, document) in documents.into_iter().enumerate() {
        if index == half {
            drop(holders.hold(|name| resources.service(name)));
        }
        let lines = text.replace("\r\n", "\n").split(['\n', '\r']).count();
        let place = document.position(&FieldPath::root().field("spec"));
        assert!(place.line <= lines, "a place outside of the text");
        // What is written out is read again.
        let resource = document.resource;
        let again = crate::model::Resource::from_json(resource.key().kind, resource.to_json().as_bytes());
        assert!(again.is_ok_and(|again| again == resource), "a document that is not read as it was written");
        let key = resource.key();
        let before = resources.service(&key.name).map(addresses).unwrap_or_default();
        admit(&mut resources, key.clone(), Ok(Arc::new(resource)));
        if key.kind == Kind::Service {
            drop(holders.contest(&key.name, &before, |name| resources.service(name)));
        }
    }
    drop(holders.hold(|name| resources.service(name)));
    claims(&resources, &holders);
    drop(check(&resources, holders.all_lost()));
    drop(compile(&resources, &own(), &Snapshot::empty()));
}

/// Of the Services that write an address one has it, and the next life of the control plane leaves it with that one.
fn claims(resources: &Resources, holders: &Holders) {
    let mut owners = BTreeMap::new();
    for service in resources.services().filter(|service| holders.lost(&service.named()).is_none()) {
        for address in addresses(service) {
            let other = owners.insert(address, service.named());
            assert!(other.is_none(), "an address of two Services");
        }
    }
    let book = AddressBook { held: holders.write().unwrap_or_default(), ..AddressBook::default() };
    let mut next = Holders::read(&book);
    let names: Vec<Named> = resources.services().map(Object::named).collect();
    for name in names.iter().rev() {
        drop(next.contest(name, &BTreeSet::new(), |name| resources.service(name)));
    }
    let lost = |holders: &Holders| holders.all_lost().keys().cloned().collect::<Vec<_>>();
    assert_eq!(lost(&next), lost(holders), "an address that changes hands over a restart");
}

/// Answers of a control plane: decoded, taken by the stream's machine, compiled.
pub fn stream(bytes: &[u8]) {
    let mut machine = Machine::new(own().workload, "fuzz", &BTreeMap::new());
    let mut resources = Resources::default();
    let mut snapshot = Snapshot::empty();
    let wanted = BTreeSet::new();
    machine.connected(&wanted);
    let mut rest = bytes;
    // Several answers stand one behind the other, each with its length, as in gRPC.
    while let Ok(response) = DeltaResponse::decode_length_delimited(&mut rest) {
        assert!(machine.takes_response(), "an answer is stuck");
        let parts = machine.response(response);
        let mut rejections = Vec::new();
        for delivered in parts.resources {
            if admit(&mut resources, delivered.key.clone(), delivered.body).refused() {
                rejections.push(Rejection { key: delivered.key, reason: String::new() });
            }
        }
        for key in &parts.removed {
            forget(&mut resources, key);
        }
        snapshot = compile(&resources, &own(), &snapshot).0;
        machine.published(Some(rejections));
        drop(machine.request(&wanted));
        if rest.is_empty() {
            break;
        }
    }
}

/// Tokens as callers send them: none that was not signed is ever good.
pub fn token(bytes: &[u8]) {
    static JWT: LazyLock<Option<Jwt>> = LazyLock::new(|| {
        let config: JwtConfig = serde_json::from_str(TOKEN_POLICY).ok()?;
        let mut problems = Problems::default();
        let policy = config.compile(RuleName::new("RequestAuthentication/shop/fuzz"), &FieldPath::root(), &mut problems)?;
        Some(Jwt::new([Arc::new(policy)], []))
    });
    let Some(jwt) = JWT.as_ref() else { panic!("the policy of this target does not compile") };
    let Ok(value) = HeaderValue::from_bytes(&[b"Bearer ", bytes].concat()) else { return };
    let mut headers = HeaderMap::new();
    headers.insert(http::header::AUTHORIZATION, value);
    let request = RequestView { method: &Method::GET, authority: "api.shop", path: "/", query: None, headers: &headers };
    let claims = jwt.verify(request, Duration::from_secs(1_800_000_000));
    assert!(!matches!(claims, Ok(Some(_))), "a token that nobody signed was taken");
}

/// The metrics of a pod, as the dashboard reads them.
pub fn exposition(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for sample in crate::control::dashboard::exposition::samples(&text) {
        assert!(text.contains(sample.name), "a name that was never written");
    }
}

fn own() -> Own {
    let Ok(trust_domain) = "cluster.local".parse() else { panic!("this is a trust domain") };
    Own { workload: Named::new("shop", "api-1"), trust_domain }
}

/// The public key's private half was never kept.
const TOKEN_POLICY: &str = r#"{"providers": [{"issuer": "https://issuer.example", "audiences": ["shop"], "jwks": {"keys": [
    {"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "one",
    "x": "QvDCCqDE6ouUaDupz3Yxq1xxuq1aTnH432lLd2sh7L4", "y": "lgxuwf2G6T17ZgrDF1lpzopbdKkYK40qO5ehAQXb_UI"}]}}]}"#;

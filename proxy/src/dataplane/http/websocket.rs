//! The key of a WebSocket, where only one of both ends has one: HTTP/1.1 proves by it that the other end knows the protocol,
//! HTTP/2 has `:protocol` for that.
//!
//! Sources: RFC 6455 1.3, 4.1 and 4.2.2; RFC 8441 5 ("The `Sec-WebSocket-Key` and `Sec-WebSocket-Accept` header fields are not
//! processed"). Invariant: between the sidecars, and within one, a WebSocket is asked for and taken as HTTP/1.1 does it; the key
//! is made where a caller has none, and kept from an application that would not look at it.

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::base::random::Dice;

/// Is that the protocol's name?
pub(super) fn is_meant(protocol: &HeaderValue) -> bool {
    protocol.as_bytes().eq_ignore_ascii_case(WEBSOCKET.as_bytes())
}

/// Gives a request a key, whatever was said of one. It is no secret: it has to be another one each time, so that no answer that
/// was kept passes for a new one.
pub(super) fn ask(headers: &mut HeaderMap, dice: &mut Dice) -> Option<HeaderValue> {
    let key = [dice.bits().to_be_bytes(), dice.bits().to_be_bytes()].concat();
    // What base64 writes is always a value.
    let key = HeaderValue::try_from(STANDARD.encode(key)).ok()?;
    headers.insert(KEY, key.clone());
    Some(key)
}

/// Does an answer know the key? What it says of it goes no further.
pub(super) fn take_proof(answer: &mut HeaderMap, key: &HeaderValue) -> bool {
    let proof = answer.remove(ACCEPT);
    proof.is_some() && proof == proof_of(key)
}

/// Takes the key from a request whose receiver would not look at it.
pub(super) fn take_key(request: &mut HeaderMap) {
    request.remove(KEY);
}

/// Proves in the place of who answered that the protocol is known, to a caller that asked with a key.
pub(super) fn prove(request: &HeaderMap, answer: &mut HeaderMap) {
    match request.get(KEY).and_then(proof_of) {
        Some(proof) => answer.insert(ACCEPT, proof),
        None => answer.remove(ACCEPT),
    };
}

fn proof_of(key: &HeaderValue) -> Option<HeaderValue> {
    let mut hashed = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    hashed.update(key.as_bytes());
    hashed.update(GUID);
    HeaderValue::try_from(STANDARD.encode(hashed.finish())).ok()
}

/// As `:protocol` spells it, whatever the caller of HTTP/1.1 does.
pub(super) const WEBSOCKET: &str = "websocket";
const KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
/// What every server of WebSockets knows (RFC 6455 1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_rfc_is_proven_and_taken() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        let asked = HeaderMap::from_iter([(KEY, key.clone())]);
        let mut answer = HeaderMap::new();
        prove(&asked, &mut answer);
        assert_eq!(answer[ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(!take_proof(&mut answer.clone(), &HeaderValue::from_static("another")));
        assert!(take_proof(&mut answer, &key) && answer.is_empty());
        assert!(!take_proof(&mut answer, &key), "nothing was said");
    }

    #[test]
    fn a_key_has_sixteen_bytes_and_stands_alone() {
        let mut headers = HeaderMap::new();
        headers.append(KEY, HeaderValue::from_static("a"));
        headers.append(KEY, HeaderValue::from_static("b"));
        let key = ask(&mut headers, &mut Dice::from_seed(1)).unwrap();
        assert_eq!((headers.len(), STANDARD.decode(&key).unwrap().len()), (1, 16));
    }
}

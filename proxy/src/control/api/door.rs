//! Who is let in to the API: whoever is listened to here rules the mesh, so every request must show the API's token, but
//! for looking at the dashboard (RFC 6750, `Authorization: Bearer`). A browser must not be made to ask for others: a request
//! must name a loopback host (a page of another origin cannot, whatever its name resolves to) and a change must carry a
//! content type that pages cannot send unasked.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde_json::json;

use super::refusal;
use crate::control::API_TOKEN;
use crate::control::token::Token;

/// Wraps everything that is served beside the API too.
pub(crate) fn guarded(routes: Router, token: Token) -> Router {
    routes.layer(middleware::from_fn_with_state(Arc::new(token), guard))
}

async fn guard(State(token): State<Arc<Token>>, request: Request, next: Next) -> Response {
    match objection(&request, &token) {
        Some((StatusCode::UNAUTHORIZED, text)) => {
            let remedy =
                format!("send `Authorization: Bearer TOKEN`; TOKEN stands in {API_TOKEN} in the state folder, for root alone");
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            (StatusCode::UNAUTHORIZED, challenge, Json(json!({ "error": text, "remedy": remedy }))).into_response()
        }
        Some((status, text)) => refusal(status, text),
        None => next.run(request).await,
    }
}

fn objection(request: &Request, token: &Token) -> Option<(StatusCode, String)> {
    let text = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    if !is_loopback(host) {
        return Some((StatusCode::FORBIDDEN, format!("{host:?} is not this machine; call 127.0.0.1 or localhost")));
    }
    let is_safe = request.method().is_safe();
    if is_safe && OPEN.contains(&request.uri().path()) {
        return None;
    }
    match text(header::AUTHORIZATION).map(|credentials| credentials.split_once(' ').unwrap_or((credentials, ""))) {
        Some((scheme, guess)) if scheme.eq_ignore_ascii_case("bearer") && token.fits(guess) => {}
        Some(_) => return Some((StatusCode::UNAUTHORIZED, "this is not the token of the API, or no longer".to_owned())),
        None => return Some((StatusCode::UNAUTHORIZED, "the API answers whoever shows its token alone".to_owned())),
    }
    if is_safe {
        return None;
    }
    if text(header::ORIGIN).is_some_and(|origin| origin != format!("http://{host}")) {
        return Some((StatusCode::FORBIDDEN, "a page of another origin may not change the mesh".to_owned()));
    }
    let kind = text(header::CONTENT_TYPE).and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
    if matches!(kind, "application/yaml" | "application/json") {
        return None;
    }
    Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, "send application/yaml or application/json".to_owned()))
}

fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// What anybody on this machine may look at, so that a browser shows the dashboard.
const OPEN: [&str; 3] = ["/", "/api/graph", "/ready"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_a_loopback_host() {
        for host in ["127.0.0.1:14080", "localhost:14080", "localhost", "[::1]:14080", "127.0.0.1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "mesh.example:14080", "127.0.0.1.example", "localhost.example", "10.0.0.1:14080", "[::2]:80"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}

//! What each of the shop's services answers.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use crate::inventory;
use crate::web::{call, text};

/// One running service.
pub(crate) struct Service {
    role: Role,
    /// As `NAME` says, for answers and logs.
    name: String,
    version: String,
    served: AtomicU64,
    fail_every: u64,
    seen: Mutex<BTreeSet<String>>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Storefront,
    Catalog,
    Reviews,
    Payments,
    Echo,
}

impl Service {
    /// The service of a role, told its name and temper by its environment.
    pub(crate) fn new(role: &str) -> Result<Self> {
        let variable = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_unset| default.to_owned());
        Ok(Self {
            role: match role {
                "storefront" => Role::Storefront,
                "catalog" => Role::Catalog,
                "reviews" => Role::Reviews,
                "payments" => Role::Payments,
                "echo" => Role::Echo,
                _ => bail!("no service {role}"),
            },
            name: variable("NAME", role),
            version: variable("VERSION", "v1"),
            served: AtomicU64::new(0),
            fail_every: variable("FAIL_EVERY", "0").parse().context("FAIL_EVERY is no number")?,
            seen: Mutex::new(BTreeSet::new()),
        })
    }

    /// The service's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Answers one request.
    pub(crate) async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        if request.uri().path() == "/served" {
            return text(StatusCode::OK, self.served.load(Ordering::Relaxed).to_string());
        }
        let number = self.served.fetch_add(1, Ordering::Relaxed) + 1;
        println!("{} {} {}", self.name, request.method(), request.uri());
        match self.role {
            Role::Storefront => storefront(&request).await,
            Role::Catalog => text(
                StatusCode::OK,
                json!([{ "product": "canoe", "price": 900 }, { "product": "paddle", "price": 40 }]).to_string(),
            ),
            Role::Reviews => text(StatusCode::OK, json!({ "version": self.version, "stars": 5 }).to_string()),
            Role::Payments if self.fail_every > 0 && number.is_multiple_of(self.fail_every) => {
                text(StatusCode::SERVICE_UNAVAILABLE, "the bank does not answer")
            }
            Role::Payments => text(StatusCode::OK, json!({ "paid": true, "by": self.name }).to_string()),
            Role::Echo => self.echo(request, peer).await,
        }
    }

    /// Says what was asked, as it arrived.
    async fn echo(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        let query = query(&request);
        if let Some(delay) = query.get("delay").and_then(|delay| delay.parse().ok()) {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let first = query.get("once").is_some_and(|key| self.seen.lock().is_ok_and(|mut seen| seen.insert(key.clone())));
        let status = query.get("status").and_then(|status| status.parse().ok()).unwrap_or(StatusCode::OK);
        let said = seen(self, request, peer).await;
        text(if first { StatusCode::SERVICE_UNAVAILABLE } else { status }, said.to_string())
    }
}

/// What was asked, as it arrived at a service: several lines of one header are joined.
pub(crate) async fn seen(service: &Service, request: Request<Incoming>, peer: SocketAddr) -> Value {
    let mut headers = Map::new();
    for name in request.headers().keys() {
        let lines = request.headers().get_all(name).iter().map(|line| String::from_utf8_lossy(line.as_bytes()));
        headers.insert(name.to_string(), lines.collect::<Vec<_>>().join(",").into());
    }
    let mut said = json!({
        "service": service.name, "version": service.version, "peer": peer.ip().to_canonical().to_string(),
        "method": request.method().as_str(), "path": request.uri().path(), "query": request.uri().query(), "headers": headers,
        "authority": request.uri().authority().map(ToString::to_string), "http": format!("{:?}", request.version()),
    });
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    if let Some(said) = said.as_object_mut() {
        said.insert("body".to_owned(), String::from_utf8_lossy(&body).into_owned().into());
        said.insert("bytes".to_owned(), body.len().into());
    }
    said
}

/// The page of the shop, put together from what the other services say.
async fn storefront(request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let token = authorization(request.headers());
    let page = match (request.method(), request.uri().path()) {
        (&Method::PUT, "/order") => order(&token).await,
        (_, "/account") => Ok((StatusCode::OK, json!({ "orders": 3 }))),
        _ => front(&token).await,
    };
    match page {
        Ok((status, page)) => text(status, page.to_string()),
        Err(error) => text(StatusCode::BAD_GATEWAY, format!("{error:#}")),
    }
}

async fn front(headers: &[(String, String)]) -> Result<(StatusCode, Value)> {
    let (catalog, products) = call(Method::GET, "catalog", "/products", headers).await?;
    let (reviews, stars) = call(Method::GET, "reviews", "/reviews/canoe", headers).await?;
    let pieces = inventory::stock("http://inventory:50051", "canoe").await?;
    let status = [catalog, reviews].into_iter().find(|status| !status.is_success()).unwrap_or(StatusCode::OK);
    let parsed = |text: &str| serde_json::from_str(text).unwrap_or_else(|_no_json| Value::from(text));
    Ok((status, json!({ "products": parsed(&products), "reviews": parsed(&stars), "pieces": pieces })))
}

async fn order(headers: &[(String, String)]) -> Result<(StatusCode, Value)> {
    let (status, said) = call(Method::PUT, "payments", "/charge", headers).await?;
    Ok((status, json!({ "payment": said })))
}

/// What a service hands on of its caller's headers: the token.
fn authorization(headers: &HeaderMap) -> Vec<(String, String)> {
    let token = headers.get("authorization").and_then(|value| value.to_str().ok());
    token.map(|token| ("authorization".to_owned(), token.to_owned())).into_iter().collect()
}

/// The pairs of a query, not decoded.
fn query(request: &Request<Incoming>) -> std::collections::BTreeMap<String, String> {
    let pairs = request.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

//! Configuration of the peers that the benchmark measures beside Outrigger: as plain as each can be for the same job, one
//! worker, keep-alive, no access log.

use std::path::Path;

use serde_json::{Value, json};

/// Where a peer in the client's pod listens for the load generator.
pub(crate) const OUTBOUND: u16 = 10000;
/// Where a peer in the server's pod listens for the one in the client's.
pub(crate) const INBOUND: u16 = 10001;

/// nginx as a reverse proxy to `server`.
pub(crate) fn nginx(folder: &Path, server: &str) -> String {
    let folder = folder.display();
    format!(
        "daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; tcp_nodelay on;\n\
           client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;\n\
           upstream server {{ server {server}:8080; keepalive 256; keepalive_requests 1000000000; }}\n\
           server {{ listen 127.0.0.1:{OUTBOUND}; location / {{ proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }}\n\
         }}\n"
    )
}

/// HAProxy as a reverse proxy from plaintext to plaintext.
pub(crate) fn haproxy_hop(server: &str) -> String {
    haproxy(&format!("127.0.0.1:{OUTBOUND}"), &format!("{server}:8080"), "http")
}

/// The first of an HAProxy pair: from plaintext to mutual TLS with HTTP/2.
pub(crate) fn haproxy_out(certificates: &Path, server: &str) -> String {
    let there = format!("{server}:{INBOUND} {} alpn h2 pool-max-conn 64", haproxy_tls(certificates, "client"));
    haproxy(&format!("127.0.0.1:{OUTBOUND}"), &there, "http")
}

/// The second of an HAProxy pair: from mutual TLS to the server in its own pod.
pub(crate) fn haproxy_in(certificates: &Path) -> String {
    haproxy(&format!("0.0.0.0:{INBOUND} {} alpn h2", haproxy_tls(certificates, "server")), "127.0.0.1:8080", "http")
}

/// The first of an HAProxy pair that carries each connection in one of mutual TLS.
pub(crate) fn haproxy_tcp_out(certificates: &Path, server: &str) -> String {
    let there = format!("{server}:{INBOUND} {}", haproxy_tls(certificates, "client"));
    haproxy(&format!("127.0.0.1:{OUTBOUND}"), &there, "tcp")
}

/// The second of them.
pub(crate) fn haproxy_tcp_in(certificates: &Path) -> String {
    haproxy(&format!("0.0.0.0:{INBOUND} {}", haproxy_tls(certificates, "server")), "127.0.0.1:8080", "tcp")
}

fn haproxy(listen: &str, to: &str, mode: &str) -> String {
    let reuse = if mode == "http" { "http-reuse always" } else { "" };
    format!(
        "global\n  nbthread 1\n  maxconn 4096\n  tune.ssl.cachesize 0\n\
         defaults\n  mode {mode}\n  timeout connect 5s\n  timeout client 600s\n  timeout server 600s\n\
         frontend in\n  bind {listen}\n  default_backend server\n\
         backend server\n  {reuse}\n  server one {to}\n"
    )
}

/// TLS 1.3 with a certificate of `me`, to a peer of the same authority; no session is resumed.
fn haproxy_tls(certificates: &Path, me: &str) -> String {
    let folder = certificates.display();
    let resume = if me == "client" { " no-ssl-reuse" } else { " no-tls-tickets" };
    format!("ssl crt {folder}/{me}.both.pem ca-file {folder}/ca.pem verify required ssl-min-ver TLSv1.3{resume}")
}

/// The first of an Envoy pair that carries each connection in one of mutual TLS.
pub(crate) fn envoy_tcp_out(certificates: &Path, server: &str) -> Value {
    opaque(envoy_out(certificates, server))
}

/// The second of them.
pub(crate) fn envoy_tcp_in(certificates: &Path) -> Value {
    opaque(envoy_in(certificates))
}

/// The same Envoy, which does not look into what it carries.
fn opaque(mut envoy: Value) -> Value {
    let filter = json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "bench", "cluster": "server" },
    });
    if let Some(place) = envoy.pointer_mut("/static_resources/listeners/0/filter_chains/0/filters") {
        *place = json!([filter]);
    }
    // No session is resumed, as everywhere in this benchmark.
    if let Some(fields) = envoy
        .pointer_mut("/static_resources/listeners/0/filter_chains/0/transport_socket/typed_config")
        .and_then(Value::as_object_mut)
    {
        fields.insert("disable_stateless_session_resumption".to_owned(), true.into());
        fields.insert("disable_stateful_session_resumption".to_owned(), true.into());
    }
    if let Some(fields) =
        envoy.pointer_mut("/static_resources/clusters/0/transport_socket/typed_config").and_then(Value::as_object_mut)
    {
        fields.insert("max_session_keys".to_owned(), 0.into());
    }
    if let Some(cluster) = envoy.pointer_mut("/static_resources/clusters/0").and_then(Value::as_object_mut) {
        cluster.remove("typed_extension_protocol_options");
    }
    envoy
}

/// Envoy as a reverse proxy from plaintext to plaintext.
pub(crate) fn envoy_hop(server: &str) -> Value {
    envoy(("127.0.0.1", OUTBOUND, None), (server, 8080, None))
}

/// The first of an Envoy pair: from plaintext to mutual TLS with HTTP/2.
pub(crate) fn envoy_out(certificates: &Path, server: &str) -> Value {
    envoy(("127.0.0.1", OUTBOUND, None), (server, INBOUND, Some(tls(certificates, "client", "server"))))
}

/// The second of an Envoy pair: from mutual TLS to the server in its own pod.
pub(crate) fn envoy_in(certificates: &Path) -> Value {
    envoy(("0.0.0.0", INBOUND, Some(tls(certificates, "server", "client"))), ("127.0.0.1", 8080, None))
}

/// An end of an Envoy: address, port, and the TLS context where there is TLS.
type End<'a> = (&'a str, u16, Option<Value>);

fn envoy((listen, listen_port, downstream): End<'_>, (to, to_port, upstream): End<'_>) -> Value {
    let typed = |kind: &str, mut value: Value| {
        if let Some(fields) = value.as_object_mut() {
            fields.insert("@type".to_owned(), format!("type.googleapis.com/envoy.{kind}").into());
        }
        value
    };
    let socket = |address: &str, port: u16| json!({ "socket_address": { "address": address, "port_value": port } });
    let manager = typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        json!({
            "stat_prefix": "bench",
            "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": "server" } }] }] },
            "http_filters": [{ "name": "envoy.filters.http.router", "typed_config": typed("extensions.filters.http.router.v3.Router", json!({})) }],
        }),
    );
    let mut chain = json!({ "filters": [{ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager }] });
    let mut cluster = json!({
        "name": "server", "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": { "cluster_name": "server", "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket(to, to_port) } }] }] },
    });
    if let (Some(mut context), Some(chain)) = (downstream, chain.as_object_mut()) {
        if let Some(fields) = context.as_object_mut() {
            fields.insert("require_client_certificate".to_owned(), true.into());
        }
        let context = typed("extensions.transport_sockets.tls.v3.DownstreamTlsContext", context);
        chain.insert("transport_socket".to_owned(), json!({ "name": "envoy.transport_sockets.tls", "typed_config": context }));
    }
    if let (Some(context), Some(cluster)) = (upstream, cluster.as_object_mut()) {
        let context = typed("extensions.transport_sockets.tls.v3.UpstreamTlsContext", context);
        cluster.insert("transport_socket".to_owned(), json!({ "name": "envoy.transport_sockets.tls", "typed_config": context }));
        let options = typed(
            "extensions.upstreams.http.v3.HttpProtocolOptions",
            json!({ "explicit_http_config": { "http2_protocol_options": {} } }),
        );
        let options = json!({ "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options });
        cluster.insert("typed_extension_protocol_options".to_owned(), options);
    }
    json!({
        "node": { "id": "bench", "cluster": "bench" },
        "static_resources": {
            "listeners": [{ "name": "in", "address": socket(listen, listen_port), "filter_chains": [chain] }],
            "clusters": [cluster],
        },
    })
}

/// TLS 1.3 with a certificate of `me`, to a peer whose certificate names `peer`.
fn tls(certificates: &Path, me: &str, peer: &str) -> Value {
    let file = |name: String| json!({ "filename": certificates.join(name) });
    json!({ "common_tls_context": {
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{ "certificate_chain": file(format!("{me}.crt")), "private_key": file(format!("{me}.key")) }],
        "validation_context": {
            "trusted_ca": file("ca.pem".to_owned()),
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": format!("spiffe://bench.local/ns/bench/sa/{peer}") } }],
        },
        "alpn_protocols": ["h2"],
    } })
}

//! Where a rule leads: its backends by their shares, and every endpoint that may be chosen.

use std::collections::BTreeSet;

use super::question::Question;
use super::told::Told;
use super::walk::{Caller, arrive};
use crate::base::units::Span;
use crate::model::Resources;
use crate::policy::RuleName;
use crate::snapshot::{BackendPolicies, ServicePort, WeightedBackend};

/// What becomes of a connection to a port of a service with routes for connections.
pub(super) fn by_stream(resources: &Resources, port: &ServicePort, caller: &Caller<'_>, question: &Question, told: &mut Told) {
    let asks = port.asks_for_server_name();
    if asks {
        told.say("note", format!("the connection is taken to be TLS that asks for {}", question.host), None);
    }
    let Some(rule) = port.stream(asks.then_some(question.host.as_str())) else {
        told.refuse("route", "routes for connections are attached, and none is for this name: closed, no_route", None);
        return;
    };
    told.say("route", "decides about the connection, whose bytes are not looked into", Some(rule.name.to_string()));
    let mut opaque = question.again();
    opaque.opaque = true;
    by_share(resources, (&rule.name, &rule.backends, "closed, no_backend"), caller, &opaque, told);
}

/// What becomes of what a rule sends to its backends; `outcome` is that of a share that cannot be sent.
pub(super) fn by_share(
    resources: &Resources,
    (rule, backends, outcome): (&RuleName, &[WeightedBackend], &str),
    caller: &Caller<'_>,
    arriving: &Question,
    told: &mut Told,
) {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    if total == 0 {
        told.refuse("backend", format!("none has a weight: {outcome}"), Some(rule.to_string()));
    }
    let mut asked = BTreeSet::new();
    for backend in backends.iter().filter(|backend| backend.weight > 0) {
        let share = u64::from(backend.weight) * 100 / total.max(1);
        let Some(target) = &backend.backend else {
            let says = format!("{share} % to a Service or port that does not exist or is not granted: {outcome}");
            told.refuse("backend", says, Some(rule.to_string()));
            continue;
        };
        told.say(
            "backend",
            format!(
                "{share} % to Service/{} port {}, {} endpoints, connect within {}",
                target.service,
                target.port,
                target.endpoints.len(),
                Span(target.connect_timeout)
            ),
            Some(target.breaker.rule.to_string()),
        );
        if target.endpoints.is_empty() {
            told.refuse("endpoint", "there is none: 503 no_endpoint", None);
        }
        let mut arriving = arriving.again();
        let BackendPolicies { request_headers, rewrite, shadow, response_headers } = &backend.policies;
        if let Some(edit) = request_headers {
            edit.apply(&mut arriving.headers);
            told.say("headers", "the backend's filter edits the request's", Some(rule.to_string()));
        }
        if let Some(rewrite) = rewrite {
            let says = format!("by the backend's filter, {}", arriving.rewrite(rewrite));
            told.say("rewrite", says, Some(rule.to_string()));
        }
        for shadow in shadow {
            let says = format!("by the backend's filter, a share is copied to Service/{} port {}", shadow.service, shadow.port);
            told.say("shadow", says, Some(rule.to_string()));
        }
        if response_headers.is_some() {
            told.say("headers", "the backend's filter edits the answer's", Some(rule.to_string()));
        }
        for endpoint in &target.endpoints {
            if asked.insert(endpoint.address) {
                arrive(resources, caller, endpoint, &arriving, told);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::super::tests::check_in;

    const SERVICES: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {selector: {app: web}, clusterIP: 10.65.0.2, ports: [{port: 80}]}\n---\n\
                            apiVersion: v1\nkind: Service\nmetadata: {name: far, namespace: lab}\nspec: {selector: {app: far}, clusterIP: 10.65.0.3, ports: [{port: 80}]}\n";

    fn check(kind: &str, spec: &str, line: &str, expected: Expect) {
        let route = format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\nspec: {{parentRefs: [{{kind: Service, name: web}}], {spec}}}\n"
        );
        check_in(&format!("{SERVICES}{route}"), format!("--from shop/front --to web {line}").trim_end(), expected);
    }

    #[test]
    fn a_redirect_is_told_with_where_it_leads() {
        let rules = "rules: [{filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]}]";
        check(
            "HTTPRoute",
            rules,
            "--path /a?b=c",
            expect![[r#"
            note            the documents do not hold shop/front; a pod of service account default is assumed
            note            the documents hold no pods for some services; assumed are lab/assumed-far, shop/assumed-web
            from            shop/front as spiffe://cluster.local/ns/shop/sa/default
            to              Service/shop/web port 80 (10.65.0.2:80), Detect
            route           decides  [HTTPRoute/shop/r rules[0]]
            retry           up to 3 attempts, from 25ms apart, after what never left
            redirect        301 to https://web/a?b=c  [HTTPRoute/shop/r rules[0]]
            outcome         let in
        "#]],
        );
    }

    #[test]
    fn what_the_filters_of_a_backend_do_is_told_with_it() {
        let rewrite = "{type: URLRewrite, urlRewrite: {hostname: old.example}}";
        let mirror = "{type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}}}";
        let rules = format!("rules: [{{backendRefs: [{{name: web, port: 80, filters: [{rewrite}, {mirror}]}}]}}]");
        check(
            "HTTPRoute",
            &rules,
            "--path /a",
            expect![[r#"
            note            the documents do not hold shop/front; a pod of service account default is assumed
            note            the documents hold no pods for some services; assumed are lab/assumed-far, shop/assumed-web
            from            shop/front as spiffe://cluster.local/ns/shop/sa/default
            to              Service/shop/web port 80 (10.65.0.2:80), Detect
            route           decides  [HTTPRoute/shop/r rules[0]]
            retry           up to 3 attempts, from 25ms apart, after what never left
            backend         100 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [default_limits]
            rewrite         by the backend's filter, the request is for old.example/a  [HTTPRoute/shop/r rules[0]]
            shadow          by the backend's filter, a share is copied to Service/shop/web port 80  [HTTPRoute/shop/r rules[0]]
            endpoint        shop/assumed-web 241.0.0.2:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
              authorization allowed  [default_allow]
            outcome         let in
        "#]],
        );
    }

    #[test]
    fn a_route_for_connections_is_told_by_shares_and_by_name() {
        let backends = "rules: [{backendRefs: [{name: web, port: 80}, {name: far, namespace: lab, port: 80}]}]";
        check(
            "TCPRoute",
            backends,
            "",
            expect![[r#"
            note            the documents do not hold shop/front; a pod of service account default is assumed
            note            the documents hold no pods for some services; assumed are lab/assumed-far, shop/assumed-web
            from            shop/front as spiffe://cluster.local/ns/shop/sa/default
            to              Service/shop/web port 80 (10.65.0.2:80), Opaque
            route           decides about the connection, whose bytes are not looked into  [TCPRoute/shop/r rules[0]]
            backend         50 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [default_limits]
            endpoint        shop/assumed-web 241.0.0.2:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
              authorization allowed  [default_allow]
            backend         50 % to a Service or port that does not exist or is not granted: closed, no_backend  [TCPRoute/shop/r rules[0]]
            outcome         refused
        "#]],
        );
        check(
            "TLSRoute",
            &format!("hostnames: [web.example], {backends}"),
            "",
            expect![[r#"
            note            the documents do not hold shop/front; a pod of service account default is assumed
            note            the documents hold no pods for some services; assumed are lab/assumed-far, shop/assumed-web
            from            shop/front as spiffe://cluster.local/ns/shop/sa/default
            to              Service/shop/web port 80 (10.65.0.2:80), Opaque
            note            the connection is taken to be TLS that asks for web
            route           routes for connections are attached, and none is for this name: closed, no_route
            outcome         refused
        "#]],
        );
    }
}

//! What is said of routes, and which condition of their status it is.

use std::fmt::Write as _;

use expect_test::{Expect, expect};

use super::Loaded;

fn check(text: &str, expected: Expect) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.yaml"), text).unwrap();
    let loaded = Loaded::read(&[folder.path().to_owned()]);
    assert!(loaded.unreadable.is_empty(), "{:?}", loaded.unreadable);
    let mut said = String::new();
    for told in loaded.problems() {
        let problem = &told.problem;
        let condition = problem.condition().map_or_else(String::new, |condition| {
            let parent = problem.parent().map_or_else(String::new, |parent| format!(" of parent {parent}"));
            format!(" [{} {}{parent}]", condition.kind(), condition.reason())
        });
        writeln!(said, "{}: {}: {}{condition}\n    {}", problem.resource, problem.at, problem.text, problem.remedy).unwrap();
    }
    expected.assert_eq(&said);
}

const SERVICES: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{name: http, port: 80}, {name: tcp, port: 90}]}\n---\n\
                        apiVersion: v1\nkind: Service\nmetadata: {name: far, namespace: lab}\nspec: {ports: [{port: 80}]}\n";

fn document(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

const PARENT: &str = "parentRefs: [{group: '', kind: Service, name: web}]";

#[test]
fn a_parent_that_is_not_there_is_told_as_that_parents() {
    let parents = "{parentRefs: [{kind: Service, name: web, port: 80}, {kind: Service, name: wep}, {kind: Service, name: web, port: 81}, \
                   {kind: Service, name: web, sectionName: grpc}, {kind: Service, name: web, port: 90}, {name: gateway}], \
                   rules: [{backendRefs: [{name: web, port: 80}]}]}";
    check(
        &format!("{SERVICES}{}", document("HTTPRoute", "r", parents)),
        expect![[r#"
        HTTPRoute/shop/r: spec.parentRefs[1].name: Service/shop/wep does not exist; no request takes this route [Accepted NoMatchingParent of parent 1]
            did you mean "web"? else create it
        HTTPRoute/shop/r: spec.parentRefs[2].port: Service/shop/web has no port 81; no request takes this route there [Accepted NoMatchingParent of parent 2]
            it has 80, 90
        HTTPRoute/shop/r: spec.parentRefs[3].sectionName: Service/shop/web has no port named "grpc" [Accepted NoMatchingParent of parent 3]
            name one of its ports, or write port
        HTTPRoute/shop/r: spec.parentRefs[4]: the port of Service/shop/web is declared opaque, so that no request of it is seen
            declare the port as http, http2 or grpc, or write a TCPRoute
        HTTPRoute/shop/r: spec.parentRefs[5].kind: the parent is not a Service; for the mesh it is not there
            write kind: Service
    "#]],
    );
}

#[test]
fn what_a_route_leads_to_and_cannot_is_told_as_its_references() {
    let rules = "rules: [{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: far, namespace: lab, port: 80}}}], \
                 backendRefs: [{name: gone, port: 80}, {name: web, port: 81}, {name: far, namespace: lab, port: 80}, {kind: Bucket, name: b}, {name: web, port: 80}]}]";
    let http = document("HTTPRoute", "http", &format!("{{{PARENT}, {rules}}}"));
    let tcp = "{parentRefs: [{kind: Service, name: far, namespace: lab}], rules: [{backendRefs: [{name: gone, port: 80}, {name: far, namespace: lab, port: 80}]}]}";
    let tcp = document("TCPRoute", "tcp", tcp);
    check(
        &format!("{SERVICES}{http}{tcp}"),
        expect![[r#"
        HTTPRoute/shop/http: spec.rules[0].filters[0].requestMirror.backendRef: Service/lab/far is in another namespace, which does not grant it; no copies are sent [ResolvedRefs RefNotPermitted]
            write a ReferenceGrant in lab from HTTPRoute of shop to Service far
        HTTPRoute/shop/http: spec.rules[0].backendRefs[0].name: Service/shop/gone does not exist; its share of requests is answered with 500 [ResolvedRefs BackendNotFound]
            create it, or correct the name
        HTTPRoute/shop/http: spec.rules[0].backendRefs[1].port: Service/shop/web has no port 81; its share of requests is answered with 500 [ResolvedRefs BackendNotFound]
            it has 80, 90
        HTTPRoute/shop/http: spec.rules[0].backendRefs[2]: Service/lab/far is in another namespace, which does not grant it; its share of requests is answered with 500 [ResolvedRefs RefNotPermitted]
            write a ReferenceGrant in lab from HTTPRoute of shop to Service far
        HTTPRoute/shop/http: spec.rules[0].backendRefs[3].kind: the backend is not a Service; its share of requests is answered with 500 [ResolvedRefs InvalidKind]
            lead to a Service
        TCPRoute/shop/tcp: spec.rules[0].backendRefs[0].name: Service/shop/gone does not exist; its share of connections is closed [ResolvedRefs BackendNotFound]
            create it, or correct the name
    "#]],
    );
    let grant = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: lab}\nspec:\n  \
                 from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]\n  to: [{group: '', kind: Service}]\n";
    let granted = document(
        "HTTPRoute",
        "http",
        &format!("{{{PARENT}, rules: [{{backendRefs: [{{name: far, namespace: lab, port: 80}}]}}]}}"),
    );
    check(&format!("{SERVICES}{granted}{grant}"), expect![[""]]);
}

#[test]
fn a_policy_that_a_rule_refers_to_and_cannot_take_from_is_told_as_its_references() {
    let policies = "---\napiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: slow, namespace: shop}\n\
                    spec: {fault: {abort: {percent: 1, status: 503}}}\n---\napiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\n\
                    metadata: {name: more, namespace: shop}\nspec: {targetRefs: [{kind: Service, name: web}], connectTimeout: 1s}\n";
    let rules = ["slow", "slo", "more"].map(|name| {
        format!(
            "{{filters: [{{type: ExtensionRef, extensionRef: {{group: outrigger.dev, kind: TrafficPolicy, name: {name}}}}}], \
             backendRefs: [{{name: web, port: 80}}]}}"
        )
    });
    let [slow, slo, more] = &rules;
    let foreign = slow.replace("group: outrigger.dev, kind: TrafficPolicy", "group: example.com, kind: Guard");
    let http = document(
        "HTTPRoute",
        "http",
        &format!("{{parentRefs: [{{kind: Service, name: web, port: 80}}], rules: [{}]}}", rules.join(", ")),
    );
    let calls = document(
        "GRPCRoute",
        "calls",
        &format!("{{parentRefs: [{{kind: Service, name: far, namespace: lab}}], rules: [{slow}, {slo}, {more}, {foreign}]}}"),
    );
    check(
        &format!("{SERVICES}{policies}{http}{calls}"),
        expect![[r#"
            HTTPRoute/shop/http: spec.rules[1]: spec.rules[0] matches the same requests to Service/shop/web and is asked first [outrigger.dev/OverlappingMatches OverlappingMatches]
                keep one of the two
            HTTPRoute/shop/http: spec.rules[1].filters[0].extensionRef.name: TrafficPolicy/shop/slo does not exist; the rule's requests are answered with 500 [ResolvedRefs BackendNotFound]
                did you mean "slow"? else create it
            HTTPRoute/shop/http: spec.rules[2]: spec.rules[0] matches the same requests to Service/shop/web and is asked first [outrigger.dev/OverlappingMatches OverlappingMatches]
                keep one of the two
            HTTPRoute/shop/http: spec.rules[2].filters[0].extensionRef.name: TrafficPolicy/shop/more is not a fault and nothing else; the rule's requests are answered with 500 [ResolvedRefs InvalidKind]
                write a TrafficPolicy of its own with the fault alone
            GRPCRoute/shop/calls: spec.rules[1]: spec.rules[0] matches the same calls to Service/lab/far and is asked first [outrigger.dev/OverlappingMatches OverlappingMatches]
                keep one of the two
            GRPCRoute/shop/calls: spec.rules[1].filters[0].extensionRef.name: TrafficPolicy/shop/slo does not exist; the rule's calls are ended with UNAVAILABLE [ResolvedRefs BackendNotFound]
                did you mean "slow"? else create it
            GRPCRoute/shop/calls: spec.rules[2]: spec.rules[0] matches the same calls to Service/lab/far and is asked first [outrigger.dev/OverlappingMatches OverlappingMatches]
                keep one of the two
            GRPCRoute/shop/calls: spec.rules[2].filters[0].extensionRef.name: TrafficPolicy/shop/more is not a fault and nothing else; the rule's calls are ended with UNAVAILABLE [ResolvedRefs InvalidKind]
                write a TrafficPolicy of its own with the fault alone
            GRPCRoute/shop/calls: spec.rules[3]: spec.rules[0] matches the same calls to Service/lab/far and is asked first [outrigger.dev/OverlappingMatches OverlappingMatches]
                keep one of the two
            GRPCRoute/shop/calls: spec.rules[3].filters[0].extensionRef: a Guard of "example.com" means nothing here; the rule's calls are ended with UNAVAILABLE [ResolvedRefs InvalidKind]
                name a TrafficPolicy of outrigger.dev, or leave the filter out
        "#]],
    );
}

#[test]
fn what_a_backend_refers_to_is_told_as_a_reference_and_the_route_counts() {
    let filter =
        |group: &str, kind: &str| format!("{{type: ExtensionRef, extensionRef: {{group: {group}, kind: {kind}, name: a}}}}");
    let backends = |filter: &str| {
        format!("{{{PARENT}, rules: [{{backendRefs: [{{name: web, port: 80, filters: [{filter}]}}, {{name: web, port: 80}}]}}]}}")
    };
    let foreign = document("HTTPRoute", "http", &backends(&filter("example.com", "Guard")));
    let own = document(
        "GRPCRoute",
        "calls",
        &backends(&filter("outrigger.dev", "TrafficPolicy")).replace("name: web}]", "name: far, namespace: lab}]"),
    );
    check(
        &format!("{SERVICES}{foreign}{own}"),
        expect![[r#"
            HTTPRoute/shop/http: spec.rules[0].backendRefs[0].filters[0].extensionRef: a Guard of "example.com" means nothing at a backend; its share of requests is answered with 500 [ResolvedRefs InvalidKind]
                leave the filter out; one of the rule's may name a TrafficPolicy of outrigger.dev
            GRPCRoute/shop/calls: spec.rules[0].backendRefs[0].filters[0].extensionRef: a TrafficPolicy of "outrigger.dev" means nothing at a backend; its share of calls is ended with UNAVAILABLE [ResolvedRefs InvalidKind]
                leave the filter out; one of the rule's may name a TrafficPolicy of outrigger.dev
        "#]],
    );
}

#[test]
fn of_several_kinds_at_one_port_the_others_are_told_that_they_do_not_count() {
    let rules = "rules: [{backendRefs: [{name: web, port: 80}]}]";
    let calls = document("GRPCRoute", "calls", &format!("{{parentRefs: [{{kind: Service, name: web, port: 80}}], {rules}}}"));
    let requests = document("HTTPRoute", "requests", &format!("{{{PARENT}, {rules}}}"));
    let rest = document("TCPRoute", "rest", &format!("{{{PARENT}, {rules}}}"));
    check(
        &format!("{SERVICES}{calls}{requests}{rest}"),
        expect![[r#"
        HTTPRoute/shop/requests: spec.parentRefs[0]: GRPCRoute/shop/calls is attached to 80 too, and GRPCRoute goes before HTTPRoute there
            keep routes of one kind there, or name different ports
        TCPRoute/shop/rest: spec.parentRefs[0]: GRPCRoute/shop/calls is attached there too, and GRPCRoute goes before TCPRoute [Accepted Conflicted of parent 0]
            keep routes of one kind there, or name different ports
    "#]],
    );
}

#[test]
fn what_a_route_cannot_say_is_refused_by_name() {
    let redirect = "{type: RequestRedirect, requestRedirect: {statusCode: 300}}";
    let rewrite = "{type: URLRewrite, urlRewrite: {hostname: web}}";
    let cases = [
        document("HTTPRoute", "a", &format!("{{{PARENT}, rules: [{{filters: [{redirect}]}}]}}")),
        document(
            "HTTPRoute",
            "b",
            &format!("{{{PARENT}, rules: [{{filters: [{{type: RequestRedirect, requestRedirect: {{}}}}, {rewrite}]}}]}}"),
        ),
        document(
            "HTTPRoute",
            "c",
            &format!(
                "{{{PARENT}, rules: [{{filters: [{{type: RequestRedirect, requestRedirect: {{}}}}], backendRefs: [{{name: web, port: 80}}]}}]}}"
            ),
        ),
        document(
            "HTTPRoute",
            "d",
            &format!(
                "{{{PARENT}, rules: [{{name: one, backendRefs: [{{name: web, port: 80}}]}}, {{name: one, matches: [{{path: {{value: /a}}}}], backendRefs: [{{name: web, port: 80}}]}}]}}"
            ),
        ),
        document(
            "GRPCRoute",
            "e",
            &format!("{{parentRefs: [], rules: [{{filters: [{rewrite}], backendRefs: [{{name: web, port: 80}}]}}]}}"),
        ),
        document("TLSRoute", "f", "{parentRefs: [], rules: [{backendRefs: []}]}"),
        document("TCPRoute", "g", "{parentRefs: [], rules: []}"),
        document(
            "HTTPRoute",
            "h",
            &format!(
                "{{{PARENT}, rules: [{{matches: [{{path: {{value: /b}}}}], backendRefs: [{{name: web, port: 80, filters: [{{type: CORS, cors: {{}}}}]}}]}}]}}"
            ),
        ),
        document(
            "HTTPRoute",
            "i",
            &format!(
                "{{{PARENT}, rules: [{{filters: [{rewrite}], backendRefs: [{{name: web, port: 80, filters: [{rewrite}]}}]}}]}}"
            ),
        ),
        document(
            "GRPCRoute",
            "j",
            &format!("{{parentRefs: [], rules: [{{backendRefs: [{{name: web, port: 80, filters: [{rewrite}]}}]}}]}}"),
        ),
        document(
            "HTTPRoute",
            "k",
            &format!("{{hostnames: [web.example], {PARENT}, rules: [{{backendRefs: [{{name: web, port: 80}}]}}]}}"),
        ),
    ];
    check(
        &format!("{SERVICES}{}", cases.concat()),
        expect![[r#"
        HTTPRoute/shop/a: spec.rules[0].filters[0].requestRedirect.statusCode: 300 is no status of a redirect [Accepted UnsupportedValue]
            write 301, 302, 303, 307 or 308
        HTTPRoute/shop/b: spec.rules[0].filters: what is redirected is sent nowhere: it can neither be rewritten nor copied [Accepted IncompatibleFilters]
            keep RequestRedirect, or URLRewrite and RequestMirror
        HTTPRoute/shop/c: spec.rules[0].backendRefs: the rule redirects its requests, so that none goes to a backend [Accepted IncompatibleFilters]
            keep the filter or the backends
        HTTPRoute/shop/d: spec.rules[1].name: another rule is named "one" [Accepted UnsupportedValue]
            give each rule a name of its own
        GRPCRoute/shop/e: spec.rules[0].filters[0]: a GRPCRoute has no such filter [Accepted UnsupportedValue]
            leave it out, or write an HTTPRoute
        TLSRoute/shop/f: spec.hostnames: the route names no server [Accepted UnsupportedValue]
            write the names that clients ask for
        TLSRoute/shop/f: spec.rules[0].backendRefs: the rule leads nowhere [Accepted UnsupportedValue]
            name a Service
        TCPRoute/shop/g: spec.rules: the route has 0 rules [Accepted UnsupportedValue]
            write exactly one; for another, write another TCPRoute
        HTTPRoute/shop/h: spec.rules[0].backendRefs[0].filters[0]: this filter cannot stand at a backend [Accepted UnsupportedValue]
            move it to the rule's filters
        HTTPRoute/shop/i: spec.rules[0].backendRefs[0].filters[0]: the rule rewrites its requests already [Accepted IncompatibleFilters]
            keep one of the two
        GRPCRoute/shop/j: spec.rules[0].backendRefs[0].filters[0]: a GRPCRoute has no such filter [Accepted UnsupportedValue]
            leave it out, or write an HTTPRoute
        HTTPRoute/shop/k: spec.hostnames: hostnames mean nothing where the parent is a Service: the route is for every host
            leave them out, or match the header Host in the rules
    "#]],
    );
}

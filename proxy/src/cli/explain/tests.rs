//! What is said of requests to a small shop.

use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use expect_test::{Expect, expect};

use super::*;
use crate::model::{Resources, yaml};

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: ExplainArgs,
}

const SHOP: &str = include_str!("../../../testdata/explain/shop.yaml");

fn check(line: &str, expected: Expect) {
    check_in(SHOP, line, expected);
}

pub(super) fn check_in(documents: &str, line: &str, expected: Expect) {
    let line = std::iter::once("explain").chain(line.split(' '));
    let args = Line::try_parse_from(line).unwrap().args;
    let mut resources = Resources::default();
    for document in yaml::read(documents) {
        let resource = document.unwrap().resource;
        resources.by_key.insert(resource.key(), Arc::new(resource));
    }
    let mut told = Told::default();
    let domain = args.trust_domain.parse().unwrap();
    let said = Question::read(&args).and_then(|question| {
        prepare(&mut resources, &args.from, &args.service_account, true, &mut told)?;
        explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told)
    });
    match said {
        Ok(()) => expected.assert_eq(&told.text(None)),
        Err(failure) => expected.assert_eq(&format!("{failure:?}\n")),
    }
}

#[test]
fn a_request_is_followed_from_its_route_to_its_verdict() {
    check(
        "--from shop/front-1 --to web --path /cart?x=1 --method POST",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              Service/shop/web port 80 (10.65.0.2:80), Http
            route           decides  [HTTPRoute/shop/web rules[0]]
            timeouts        request 5s, each attempt no limit
            retry           up to 3 attempts, from 25ms apart, after what never left, after silence where the method is idempotent, after 503 likewise
            backend         75 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
            endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
              authorization allowed  [AuthorizationPolicy/shop/web rules[0]]
              rate limit    what is over it is refused: 429  [TrafficPolicy/shop/web rateLimit]
            backend         25 % to Service/shop/web-v2 port 80, 1 endpoints, connect within 5s  [default_limits]
            endpoint        shop/assumed-web-v2 241.0.0.1:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
              authorization allowed  [default_allow]
            outcome         let in
        "#]],
    );
    check(
        "--from shop/front-1 --to web.shop.svc.cluster.local:80 --path /nothing",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              Service/shop/web port 80 (10.65.0.2:80), Http
            route           routes are attached, and none of their rules matches: 404 no_route
            outcome         refused
        "#]],
    );
    check(
        "--from shop/other-1 --to web --path /cart",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/other-1 as spiffe://cluster.local/ns/shop/sa/default
            to              Service/shop/web port 80 (10.65.0.2:80), Http
            route           decides  [HTTPRoute/shop/web rules[0]]
            timeouts        request 5s, each attempt no limit
            retry           up to 3 attempts, from 25ms apart, after what never left, after silence where the method is idempotent, after 503 likewise
            backend         75 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
            endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
              authorization refused: 403  [no_rule_matched: AuthorizationPolicy/shop/web]
            backend         25 % to Service/shop/web-v2 port 80, 1 endpoints, connect within 5s  [default_limits]
            endpoint        shop/assumed-web-v2 241.0.0.1:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/default
              authorization allowed  [default_allow]
            outcome         refused
        "#]],
    );
    check(
        "--from shop/front-1 --to web --path /old/a",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              Service/shop/web port 80 (10.65.0.2:80), Http
            route           decides  [HTTPRoute/shop/web rules[1]]
            rewrite         the request is for web/cart/a
            shadow          a share is copied to Service/shop/db port 5432
            retry           up to 3 attempts, from 25ms apart, after what never left
            backend         100 % to Service/shop/web port 80, 1 endpoints, connect within 5s  [TrafficPolicy/shop/web circuitBreaking.limits]
            endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
              authorization allowed  [AuthorizationPolicy/shop/web rules[0]]
              rate limit    what is over it is refused: 429  [TrafficPolicy/shop/web rateLimit]
            outcome         let in
        "#]],
    );
}

#[test]
fn addresses_ports_and_protocols_are_followed_too() {
    check(
        "--from shop/front-1 --to 10.64.0.2:9999",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              Workload/shop/web-1 itself (10.64.0.2:9999)
            endpoint        shop/web-1 10.64.0.2:9999 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
              authorization allowed  [default_allow]
            outcome         let in
        "#]],
    );
    check(
        "--from shop/front-1 --to 10.64.77.1:80",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              10.64.77.1:80 is an address of the mesh that nothing has: 503 no_configuration
            outcome         refused
        "#]],
    );
    check(
        "--from shop/front-1 --to 203.0.113.1:443",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              203.0.113.1:443 is outside the mesh and is dialled as it is  [Mesh egress Allow]
            outcome         let in
        "#]],
    );
    check(
        "--from shop/front-1 --to db",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/front-1 as spiffe://cluster.local/ns/shop/sa/front
            to              Service/shop/db port 5432 (240.0.0.1:5432), Opaque
            route           none: the port is declared opaque, its bytes are not looked into
            endpoint        shop/db-1 10.64.0.5:5432 by mutual TLS as spiffe://cluster.local/ns/shop/sa/db
              authorization refused: 403  [AuthorizationPolicy/shop/db rules[0]]
            outcome         refused
        "#]],
    );
    check(
        "--from outside/curl --to web.shop",
        expect![[r#"
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            outside/curl, which is outside the mesh
            route           none: the caller has no sidecar
            note            the name leads a caller without a sidecar to the pods themselves: port 80 is theirs, and not the 8080 to which Service/shop/web leads; ask for that one by --to web.shop:8080
            endpoint        shop/web-1 10.64.0.2:80 in plaintext
              plaintext     refused: 403 plaintext_refused  [strict_default]
            outcome         refused
        "#]],
    );
    check(
        "--from shop/front-1 --to wep",
        expect![[r#"
        Failure { code: 2, causes: ["there is no Service/shop/wep; did you mean --to web.shop?"] }
    "#]],
    );
    check(
        "--from shop/new-1 --service-account front --to 10.64.0.2:8080 --path /cart",
        expect![[r#"
            note            the documents do not hold shop/new-1; a pod of service account front is assumed
            note            the documents hold no pods for some services; assumed are shop/assumed-web-v2
            from            shop/new-1 as spiffe://cluster.local/ns/shop/sa/front
            to              Workload/shop/web-1 itself (10.64.0.2:8080)
            endpoint        shop/web-1 10.64.0.2:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/web
              authorization allowed  [AuthorizationPolicy/shop/web rules[0]]
              rate limit    what is over it is refused: 429  [TrafficPolicy/shop/web rateLimit]
            outcome         let in
        "#]],
    );
}

#[test]
fn what_is_asked_wrongly_is_told_with_what_there_is() {
    let failure = |line: &str, cause: &str| {
        let line = std::iter::once("explain").chain(line.split(' '));
        let args = Line::try_parse_from(line).unwrap().args;
        let mut resources = Resources::default();
        for document in yaml::read(SHOP) {
            let resource = document.unwrap().resource;
            resources.by_key.insert(resource.key(), Arc::new(resource));
        }
        let domain = args.trust_domain.parse().unwrap();
        let mut told = Told::default();
        let said = Question::read(&args)
            .and_then(|question| explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told));
        match said {
            Ok(()) => assert!(told.refused && told.text(None).contains(cause), "{}", told.text(None)),
            Err(failure) => assert_eq!(failure.causes, [cause]),
        }
    };
    failure("--from shop/front-1 --to nosuch", "there is no Service/shop/nosuch; there are db.shop, web.shop, web-v2.shop");
    failure("--from evil/a --to web", "there is no Service/evil/web; did you mean --to web.shop?");
    failure("--from shop/front-1 --to web --path cart", "--path \"cart\" does not begin with '/'; write --path /cart");
    failure("--from shop/front-1 --to web:99", "Service/shop/web has no TCP port 99, it has 80: 404 no_route");
    failure("--from shop/front-1 --to 10.64.0.2:14020", "10.64.0.2:14020 is a port of its sidecar's own: 421 own_port");
    failure("--from shop/front-1 --to 127.0.0.1:14001", "the caller's own sidecar: 421 own_port");
}

#[test]
fn a_service_without_an_address_is_followed_to_each_of_its_pods() {
    let shop = include_str!("../../../testdata/compile/headless.yaml");
    let told = |to: &str| {
        let args = Line::try_parse_from(["explain", "--from", "shop/db-0", "--to", to]).unwrap().args;
        let mut resources = Resources::default();
        for document in yaml::read(shop) {
            let resource = document.unwrap().resource;
            resources.by_key.insert(resource.key(), Arc::new(resource));
        }
        let mut told = Told::default();
        let domain = args.trust_domain.parse().unwrap();
        let question = Question::read(&args).unwrap();
        prepare(&mut resources, &args.from, &args.service_account, false, &mut told).unwrap();
        explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told).unwrap();
        told.text(None)
    };
    expect![[r#"
        from            shop/db-0 as spiffe://cluster.local/ns/shop/sa/db
        to              Service/shop/db has no address of its own: its name is 10.64.0.5, 10.64.0.6, and one of them is dialled
        to              Service/shop/db port 8080 (10.64.0.5:8080), Http
        route           decides  [HTTPRoute/shop/db rules[1]]
        timeouts        request 5s, each attempt no limit
        retry           up to 3 attempts, from 25ms apart, after what never left
        backend         100 % to Service/shop/db port 8080, 1 endpoints, connect within 3s  [TrafficPolicy/shop/db circuitBreaking.limits]
        endpoint        shop/db-0 10.64.0.5:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/db
          authorization allowed  [default_allow]
        to              Service/shop/db port 8080 (10.64.0.6:8080), Http
        route           decides  [HTTPRoute/shop/db rules[1]]
        timeouts        request 5s, each attempt no limit
        retry           up to 3 attempts, from 25ms apart, after what never left
        backend         100 % to Service/shop/db port 8080, 1 endpoints, connect within 3s  [TrafficPolicy/shop/db circuitBreaking.limits]
        endpoint        shop/db-1 10.64.0.6:8080 by mutual TLS as spiffe://cluster.local/ns/shop/sa/db
          authorization allowed  [default_allow]
        outcome         let in
    "#]].assert_eq(&told("db:8080"));
    expect![[r#"
        from            shop/db-0 as spiffe://cluster.local/ns/shop/sa/db
        to              Service/shop/db-readers has no address of its own: its name is 10.64.0.6, and one of them is dialled
        to              Workload/shop/db-1 itself (10.64.0.6:80)
        endpoint        shop/db-1 10.64.0.6:80 by mutual TLS as spiffe://cluster.local/ns/shop/sa/db
          authorization allowed  [default_allow]
        outcome         let in
    "#]]
    .assert_eq(&told("db-readers"));
    expect![[r#"
        from            shop/db-0 as spiffe://cluster.local/ns/shop/sa/db
        to              Service/shop/none has no address of its own, and its name no address: no workload is behind it
        outcome         refused
    "#]]
    .assert_eq(&told("none"));
    expect![[r#"
        from            shop/db-0 as spiffe://cluster.local/ns/shop/sa/db
        to              Service/shop/db port 7000 (10.64.0.5:7000), Opaque
        route           none: the port is declared opaque, its bytes are not looked into
        endpoint        shop/db-0 10.64.0.5:7000 by mutual TLS as spiffe://cluster.local/ns/shop/sa/db
          authorization allowed  [default_allow]
        outcome         let in
    "#]]
    .assert_eq(&told("10.64.0.5:7000"));
}

#[test]
fn what_no_sidecar_reads_is_refused_as_the_sidecar_refuses_it() {
    let told = |line: &[&str], change: &dyn Fn(&str) -> String| {
        let args = Line::try_parse_from(["explain"].iter().chain(line)).unwrap().args;
        let mut resources = Resources::default();
        for document in yaml::read(&change(SHOP)) {
            let resource = document.unwrap().resource;
            resources.by_key.insert(resource.key(), Arc::new(resource));
        }
        let mut told = Told::default();
        let domain = args.trust_domain.parse().unwrap();
        let question = Question::read(&args).unwrap();
        prepare(&mut resources, &args.from, &args.service_account, true, &mut told).unwrap();
        explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told).unwrap();
        (told.refused, told.text(None))
    };
    let asked = |line: &[&str], refused: bool, cause: &str| {
        let (was, text) = told(line, &str::to_owned);
        assert!(was == refused && text.contains(cause), "{text}");
    };
    let cart = ["--from", "shop/front-1", "--to", "web", "--path", "/cart", "--method", "POST"];
    let with = |more: &[&'static str]| [cart.as_slice(), more].concat();
    asked(&cart, false, "allowed");
    asked(&with(&["--header", "outrigger-upgrade: x"]), true, "outrigger-upgrade is for sidecars alone: 400 reserved_header");
    asked(&with(&["--header", "outrigger-anything: x"]), false, "allowed");
    let connect = ["--from", "shop/front-1", "--method", "CONNECT", "--path", "example.com:443", "--to"];
    for (to, cause) in
        [("web", "404 no_route"), ("10.64.0.2:8080", "authorization refused: 403"), ("web-v2", "by name: 501 connect_refused")]
    {
        let without_port = ["--from", "shop/front-1", "--method", "CONNECT", "--path", "example.com", "--to", to];
        asked(&without_port, true, "CONNECT names a host and a port, and nothing else: 400 bad_request");
        asked(&[connect.as_slice(), &[to]].concat(), true, cause);
    }
    asked(
        &["--from", "shop/front-1", "--to", "10.64.0.2:8080", "--path", "/cart%2Fa"],
        true,
        "servers read this path differently",
    );
    let large = ["--header", &*format!("x-long: {}", LONG.repeat(7_000)).leak()];
    for (more, refusal) in [
        (&["--header", "host:"][..], "a Host that is empty: 400 bad_request"),
        (&["--header", "host: a", "--header", "host: b"], "more than one Host header: 400 bad_request"),
        (&["--header", "transfer-encoding: gzip"], "400 bad_request"),
        (&["--header", "transfer-encoding: gzip, chunked"], "501 bad_request"),
        (&large, "the head of the request is larger than 65536 bytes (headerBytes): 431 headers_too_large"),
    ] {
        asked(&with(more), true, refusal);
        // The first sidecar is that of the pod, where the caller has none; it reads before it asks whether it may.
        let outside = ["--from", "outside/curl", "--to", "10.64.0.2:8080"];
        asked(&[outside.as_slice(), more].concat(), true, refusal);
    }
    // An opaque port's bytes are not looked into.
    asked(&[connect.as_slice(), &["db"]].concat(), true, "AuthorizationPolicy/shop/db");
    asked(&["--from", "shop/front-1", "--to", "10.64.0.2:14021"], false, "its sidecar's own metrics");
    let metrics = |shop: &str| shop.replace("targetPort: 8080", "targetPort: 14021");
    let (refused, text) = told(&cart, &metrics);
    assert!(refused && text.contains("10.64.0.2:14021 is where its sidecar serves metrics"), "{text}");
}

#[test]
fn a_destination_that_is_written_as_something_else_is_told_with_the_right_form() {
    for to in ["shop/web", "Service/shop/web", "http://web.shop/cart", "web.shop/cart", "web.shop:http"] {
        let args = Line::try_parse_from(["explain", "--from", "shop/front-1", "--to", to]).unwrap().args;
        let failure = Question::read(&args).unwrap_err();
        let [cause] = failure.causes.as_slice() else { panic!("{failure:?}") };
        let form = match to {
            "shop/web" | "Service/shop/web" => "write a Service by its host name: --to web.shop",
            "http://web.shop/cart" => "--to web.shop --path /cart",
            "web.shop/cart" => "as --to web.shop, and the path with --path",
            _ => "as --to web.shop:80",
        };
        assert!(failure.code == 2 && cause.ends_with(form), "{cause}");
    }
}

/// Ten letters.
const LONG: &str = "abcdefghij";

/// What is said, with other documents beside the shop's.
fn asked_of(more: &str, line: &str) -> (bool, String) {
    let args = Line::try_parse_from(std::iter::once("explain").chain(line.split(' '))).unwrap().args;
    let mut resources = Resources::default();
    for document in yaml::read(&format!("{SHOP}\n---\n{more}")) {
        let resource = document.unwrap().resource;
        resources.by_key.insert(resource.key(), Arc::new(resource));
    }
    let mut told = Told::default();
    let domain = args.trust_domain.parse().unwrap();
    let question = Question::read(&args).unwrap();
    prepare(&mut resources, &args.from, &args.service_account, true, &mut told).unwrap();
    explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told).unwrap();
    (told.refused, told.text(None))
}

const PERMISSIVE: &str = "apiVersion: outrigger.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: open, namespace: shop}
spec: {targetRefs: [{kind: Service, name: web}], mode: Permissive}";

#[test]
fn a_caller_without_a_sidecar_is_told_what_meets_it_at_every_kind_of_address() {
    for (to, refused, says) in [
        ("10.64.0.2:9999", true, "plaintext     refused: 403 plaintext_refused  [strict_default]"),
        ("10.64.0.2:14001", true, "10.64.0.2:14001 is a port of its sidecar's own: the connection is refused"),
        ("10.64.0.2:14020", true, "10.64.0.2:14020 is a port of its sidecar's own: the connection is refused"),
        ("10.64.0.2:14021", false, "10.64.0.2:14021 is where its sidecar serves metrics"),
        ("10.64.0.9:80", false, "10.64.0.9:80 in plaintext: it has no sidecar, nothing is asked there"),
        ("10.64.0.99:80", true, "10.64.0.99:80 is an address of the mesh that no pod has: nobody answers there"),
        ("10.64.0.1:80", false, "10.64.0.1:80 is of the machine itself: whether anything answers there, the mesh does not know"),
        ("10.65.0.2:80", true, "10.65.0.2:80 is the address of Service/shop/web, which sidecars alone know: nobody answers"),
        ("127.0.0.1:80", false, "127.0.0.1:80 is the caller's own loopback"),
        ("203.0.113.1:443", false, "whether it answers, the mesh does not know"),
        ("db.shop", true, "shop/db-1 10.64.0.5:5432 in plaintext"),
    ] {
        let (was, text) = asked_of(PERMISSIVE, &format!("--from outside/curl --to {to}"));
        assert!(was == refused && text.contains(says), "{to}: {text}");
    }
}

#[test]
fn a_permission_for_a_service_is_one_for_the_port_to_which_it_leads() {
    let (refused, text) = asked_of(PERMISSIVE, "--from outside/curl --to web.shop --path /cart");
    assert!(refused && text.contains("10.64.0.2:80 in plaintext") && text.contains("[strict_default]"), "{text}");
    assert!(text.contains("ask for that one by --to web.shop:8080"), "{text}");
    let (refused, text) = asked_of(PERMISSIVE, "--from outside/curl --to web.shop:8080 --path /cart");
    assert!(text.contains("10.64.0.2:8080 in plaintext") && text.contains("permitted  [PeerAuthentication/shop/open]"), "{text}");
    // The rules ask for an identity, which such a caller has not.
    assert!(refused && text.contains("authorization refused: 403") && !text.contains("note            the name"), "{text}");
}

#[test]
fn loopback_is_never_captured_whatever_the_mesh_lets_out() {
    let deny = "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {name: mesh}\nspec: {egress: Deny}";
    for (to, refused, says) in [
        ("127.0.0.1:80", false, "127.0.0.1:80 is the caller's own loopback, which is never captured"),
        ("0.0.0.0:80", false, "which is never captured"),
        ("localhost:8080", false, "127.0.0.1:8080 is the caller's own loopback, which is never captured"),
        ("127.0.0.1:14006", true, "it closes without an answer, own_port"),
        ("127.0.0.1:14020", false, "which shows itself there and asks no policy"),
        ("203.0.113.1:443", true, "is outside the mesh: 403 egress_denied  [Mesh egress Deny]"),
    ] {
        let (was, text) = asked_of(deny, &format!("--from shop/front-1 --to {to}"));
        assert!(was == refused && text.contains(says), "{to}: {text}");
    }
}

#[test]
fn every_form_of_a_target_is_taken_as_the_sidecar_takes_it() {
    for (more, refused, says) in [
        ("--path * --method OPTIONS", true, "no_rule_matched"),
        ("--path *", true, "only OPTIONS has the target *: 400 bad_request"),
        ("--path http://web/cart?x", false, "allowed  [AuthorizationPolicy/shop/web rules[0]]"),
        ("--path ftp://web/cart", true, "a scheme that is neither http nor https: 400 bad_request"),
    ] {
        let (was, text) = asked_of(PERMISSIVE, &format!("--from shop/front-1 --to 10.64.0.2:8080 {more}"));
        assert!(was == refused && text.contains(says), "{more}: {text}");
    }
    // The rule is for a path, and the request names no path: what is told is what the route says.
    let (_, text) = asked_of(PERMISSIVE, "--from shop/front-1 --to web --path http://web.shop/cart");
    assert!(text.contains("decides  [HTTPRoute/shop/web rules[0]]"), "{text}");
    let args = Line::try_parse_from(["explain", "--from", "shop/front-1", "--to", "web", "--path", "/a b"]).unwrap().args;
    assert!(Question::read(&args).unwrap_err().causes[0].ends_with("write a space as %20"));
}

/// A second Service without an address, at a port of the first one's pods.
const SECOND: &str = "apiVersion: v1
kind: Service
metadata: {name: db-also, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}, {name: tcp, port: 7000}]}";

#[test]
fn the_host_says_which_of_the_services_at_a_pods_address_is_meant_and_a_pod_has_a_name_below_each() {
    let route = "[HTTPRoute/shop/db rules[1]]";
    for (line, says, has_route) in [
        ("db-0.db:8080", "Service/shop/db port 8080 (10.64.0.5:8080)", true),
        ("db-1.db.shop:8080", "Service/shop/db port 8080 (10.64.0.6:8080)", true),
        ("db-1.db.shop.svc.cluster.local:8080", "Service/shop/db port 8080 (10.64.0.6:8080)", true),
        ("db-0.db-also:8080", "Service/shop/db-also port 8080 (10.64.0.5:8080)", false),
        ("db-also:8080", "Service/shop/db-also port 8080 (10.64.0.6:8080)", false),
        ("db-also:8080 --header host:db", "Service/shop/db port 8080 (10.64.0.5:8080)", true),
        ("10.64.0.5:8080 --header host:db-also", "Service/shop/db-also port 8080 (10.64.0.5:8080)", false),
        ("10.64.0.5:8080 --header host:any", "Service/shop/db port 8080 (10.64.0.5:8080)", true),
        ("10.64.0.5:8080", "Workload/shop/db-0 itself", false),
        // Nothing that is sent over it names anybody: the first by name.
        ("db-also:7000", "Service/shop/db port 7000 (10.64.0.5:7000), Opaque", false),
    ] {
        let args = ["explain", "--from", "shop/db-0", "--to"].into_iter().chain(line.split(' '));
        let args = Line::try_parse_from(args).unwrap().args;
        let mut resources = Resources::default();
        for document in yaml::read(&format!("{}\n---\n{SECOND}", include_str!("../../../testdata/compile/headless.yaml"))) {
            let resource = document.unwrap().resource;
            resources.by_key.insert(resource.key(), Arc::new(resource));
        }
        let mut told = Told::default();
        let domain = args.trust_domain.parse().unwrap();
        let question = Question::read(&args).unwrap();
        prepare(&mut resources, &args.from, &args.service_account, false, &mut told).unwrap();
        explain(&resources, &args.from, &question, &domain, Duration::ZERO, &mut told).unwrap();
        let text = told.text(None);
        assert!(text.contains(says) && text.contains(route) == has_route, "{line}: {text}");
    }
    for wrong in ["db-0.db.shop.else.where:80", "db-2.db:80", "nobody.db:80"] {
        let args = Line::try_parse_from(["explain", "--from", "shop/db-0", "--to", wrong]).unwrap().args;
        let question = Question::read(&args).unwrap();
        assert!(pod_named(&question).is_none(), "{wrong}");
    }
}

/// The pod that a name below a Service without an address leads to.
fn pod_named(question: &Question) -> Option<std::net::IpAddr> {
    let mut resources = Resources::default();
    for document in yaml::read(include_str!("../../../testdata/compile/headless.yaml")) {
        let resource = document.unwrap().resource;
        resources.by_key.insert(resource.key(), Arc::new(resource));
    }
    let found = question::destination(&resources, &Named::new("shop", "db-0"), question).ok()?;
    Some(found.address.ip())
}

/// Pods of which one keeps a port out of capture, and others what they send.
const EXCLUDING: &str = "apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: web-2, namespace: shop, labels: {app: web-v2}, annotations: {outrigger.dev/exclude-inbound-ports: '80, 9100'}}
spec: {addresses: [10.64.0.12], serviceAccount: web}
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: by-port, namespace: shop, annotations: {outrigger.dev/exclude-outbound-ports: '8080,80', outrigger.dev/exclude-inbound-ports: '7000'}}
spec: {addresses: [10.64.0.13]}
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: by-network, namespace: shop, annotations: {outrigger.dev/exclude-outbound-cidrs: '10.64.0.0/16'}}
spec: {addresses: [10.64.0.14]}
---
apiVersion: outrigger.dev/v1alpha1
kind: Mesh
metadata: {name: mesh}
spec: {egress: Deny}";

#[test]
fn what_a_pods_owner_took_out_of_capture_passes_its_sidecar_by() {
    for (from, to, refused, says) in [
        // In: the application itself is there, whatever is said of policies and encryption.
        (
            "outside/curl",
            "10.64.0.12:9100",
            false,
            "it goes to the application, no policy applies  [annotation outrigger.dev/exclude-inbound-ports of shop/web-2]",
        ),
        ("outside/curl", "web-v2.shop:80", false, "it goes to the application, no policy applies"),
        (
            "shop/front-1",
            "10.64.0.12:9100",
            true,
            "does not speak the mesh's TLS: 503 connect_failed  [annotation outrigger.dev/exclude-inbound-ports of shop/web-2]",
        ),
        ("shop/front-1", "web-v2", true, "503 connect_failed"),
        ("shop/front-1", "10.64.0.12:9101", false, "by mutual TLS as spiffe://"),
        // Out: as a caller without a sidecar.
        ("shop/by-port", "10.64.0.2:8080", true, "plaintext     refused: 403 plaintext_refused  [strict_default]"),
        ("shop/by-port", "10.64.0.2:8081", false, "by mutual TLS as spiffe://"),
        ("shop/by-port", "10.64.0.12:80", false, "it goes to the application, no policy applies"),
        ("shop/by-port", "web", true, "10.65.0.2:80 is the address of Service/shop/web, which sidecars alone know"),
        ("shop/by-port", "203.0.113.1:80", false, "no sidecar is asked"),
        ("shop/by-port", "203.0.113.1:443", true, "403 egress_denied"),
        ("shop/by-network", "10.64.0.2:9999", true, "[annotation outrigger.dev/exclude-outbound-cidrs of shop/by-network]"),
        ("shop/by-network", "10.64.0.2:9999", true, "403 plaintext_refused"),
        ("shop/by-network", "203.0.113.1:80", true, "403 egress_denied"),
        // A pod's own addresses and its loopback are never excluded.
        ("shop/by-port", "10.64.0.13:8080", false, "by mutual TLS as spiffe://"),
        ("shop/by-port", "10.64.0.13:7000", false, "by mutual TLS as spiffe://"),
        ("shop/by-network", "10.64.0.14:80", false, "by mutual TLS as spiffe://"),
        ("shop/by-port", "127.0.0.1:80", false, "which is never captured"),
    ] {
        let (was, text) = asked_of(EXCLUDING, &format!("--from {from} --to {to}"));
        assert!(was == refused && text.contains(says), "{from} to {to}: {text}");
    }
}

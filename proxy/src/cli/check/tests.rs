//! What is said of documents.

use expect_test::{Expect, expect};

use super::*;

/// What is said about files of these texts.
fn check(files: &[(&str, &str)], expected: Expect) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let loaded = Loaded::read(&[folder.path().to_owned()]);
    let mut text = String::new();
    for told in loaded.problems() {
        writeln!(text, "{told}\n    {}", told.problem.remedy).unwrap();
    }
    for line in &loaded.unreadable {
        writeln!(text, "{line}").unwrap();
    }
    let folder = folder.path().display().to_string();
    expected.assert_eq(&text.replace(&format!("{folder}/"), "").replace(&folder, "FOLDER"));
}

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  selector: {app: web}\n  ports:\n  - port: 80\n---\n";

fn route(name: &str, rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  parentRefs:\n  - {{kind: Service, name: web}}\n  rules:\n{rules}---\n"
    )
}

#[test]
fn a_route_to_a_service_that_does_not_exist_is_told_with_its_place() {
    let route = route("r", "  - backendRefs:\n    - name: wep\n      port: 80\n    - name: web\n      port: 8080\n");
    check(
        &[("a.yaml", &format!("{WEB}{route}"))],
        expect![[r#"
        a.yaml:17:7: warning: HTTPRoute/shop/r: spec.rules[0].backendRefs[0].name: Service/shop/wep does not exist; its share of requests is answered with 500
            did you mean "web"? else create it
        a.yaml:20:7: warning: HTTPRoute/shop/r: spec.rules[0].backendRefs[1].port: Service/shop/web has no port 8080; its share of requests is answered with 500
            it has 80
    "#]],
    );
}

#[test]
fn of_two_routes_that_contradict_the_later_one_is_named() {
    let rule = "  - matches:\n    - path: {type: PathPrefix, value: /x}\n    backendRefs:\n    - {name: web, port: 80}\n";
    check(
        &[("a.yaml", WEB), ("b.yaml", &route("second", rule)), ("c.yaml", &route("first", rule))],
        expect![[r#"
        b.yaml:9:7: warning: HTTPRoute/shop/second: spec.rules[0].matches[0]: HTTPRoute/shop/first spec.rules[0].matches[0] matches the same requests to Service/shop/web and is asked first
            keep one of the two, or let them match different requests
    "#]],
    );
    check(
        &[("a.yaml", &format!("{WEB}{}", route("one", &format!("{rule}{rule}"))))],
        expect![[r#"
        a.yaml:21:7: warning: HTTPRoute/shop/one: spec.rules[1].matches[0]: spec.rules[0].matches[0] matches the same requests to Service/shop/web and is asked first
            keep one of the two
    "#]],
    );
}

#[test]
fn addresses_and_ports_at_which_no_application_is_are_told() {
    let workload = |name: &str, address: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{addresses: [\"{address}\"]}}\n---\n"
        )
    };
    let bad = [
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "fe80::1",
        "::1",
        "::ffff:127.0.0.1",
        "255.255.255.255",
        "0.1.2.3",
        "240.0.0.1",
        "ff02::1",
        "10.64.0.0",
        "10.64.255.255",
        "10.65.255.255",
        "fd64::",
    ];
    let told = |text: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.yaml"), text).unwrap();
        Loaded::read(&[folder.path().to_owned()]).problems()
    };
    for address in bad {
        let service = WEB.replace("spec:\n", &format!("spec:\n  clusterIP: \"{address}\"\n"));
        for text in [workload("a", address), service] {
            let told = told(&text);
            assert!(told.iter().any(|told| told.problem.severity == Severity::Refuses), "{text}: {told:?}");
        }
    }
    // Somewhere else than where pods are given addresses is a place like another.
    assert!(told(&workload("a", "203.0.113.7")).iter().all(|told| told.problem.severity == Severity::Warns));
    let outside = told(&WEB.replace("spec:\n", "spec:\n  clusterIP: 203.0.113.7\n"));
    assert!(outside[0].problem.text.contains("outside of the mesh's ranges"), "{outside:?}");
    check(
        &[("a.yaml", &WEB.replace("port: 80", "port: 80\n    targetPort: 14020"))],
        expect![[r#"
            a.yaml:8:5: Service/shop/web: spec.ports[0].targetPort: 14020 is a port of the sidecar's own; a pod that has one is not reached there: 421 own_port
                write a port of the application, or, where it is one of workloads without a sidecar, its name
        "#]],
    );
}

#[test]
fn of_two_services_with_one_address_the_later_one_by_name_is_refused() {
    let with = |name: &str| {
        let text = WEB.replace("name: web", &format!("name: {name}"));
        text.replace("spec:\n", "spec:\n  clusterIPs: [\"fd65::9\", 10.65.0.9]\n")
    };
    check(
        &[("a.yaml", &with("z")), ("b.yaml", &with("a"))],
        expect![[r#"
            a.yaml:5:27: Service/shop/z: spec.clusterIPs[1]: 10.65.0.9 is the address of Service/shop/a too, which counts: this Service is not in force
                leave it out, and the Service is given an address of its own
        "#]],
    );
}

#[test]
fn ranges_that_together_are_every_address_are_refused() {
    let mesh = |ranges: &str| {
        format!("apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {{name: mesh}}\nspec:\n  ranges: [{ranges}]\n")
    };
    let every = [
        "0.0.0.0/1, 128.0.0.0/1",
        "\"::ffff:0:0/96\"",
        "\"::ffff:0:0/97\", 128.0.0.0/2, 192.0.0.0/2",
        "\"::/1\", \"8000::/1\"",
        "10.0.0.0/8, 0.0.0.0/1, 64.0.0.0/2, 128.0.0.0/1",
    ];
    for (ranges, is_refused) in every.map(|ranges| (ranges, true)).into_iter().chain([("0.0.0.0/1, 128.0.0.0/2", false)]) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("mesh.yaml"), mesh(ranges)).unwrap();
        let told = Loaded::read(&[folder.path().to_owned()]).problems();
        assert_eq!(told.iter().any(|told| told.problem.severity == Severity::Refuses), is_refused, "{ranges}: {told:?}");
    }
}

#[test]
fn ports_of_a_service_have_names_and_numbers_of_their_own() {
    let ports = |ports: &str| WEB.replace("  - port: 80", &format!("  {}", ports.replace('\n', "\n  ")));
    check(
        &[("a.yaml", &ports("- {name: a, port: 53}\n- {name: b, port: 53, protocol: UDP}"))],
        expect![[r#"
        a.yaml:8:25: warning: Service/shop/web: spec.ports[1].protocol: the port is not TCP and means nothing here
            leave it to others
    "#]],
    );
    check(
        &[(
            "a.yaml",
            &ports(
                "- {name: a, port: 80}\n- {name: a, port: 81}\n- {name: b, port: 53, protocol: UDP}\n- {name: c, port: 53, protocol: UDP}",
            ),
        )],
        expect![[r#"
            a.yaml:8:6: Service/shop/web: spec.ports[1].name: a port is named "a" already
                give each port a name of its own
            a.yaml:9:25: warning: Service/shop/web: spec.ports[2].protocol: the port is not TCP and means nothing here
                leave it to others
            a.yaml:10:15: Service/shop/web: spec.ports[3].port: port 53 is there already
                write each port once
            a.yaml:10:25: warning: Service/shop/web: spec.ports[3].protocol: the port is not TCP and means nothing here
                leave it to others
        "#]],
    );
    // As in Kubernetes: one may go without a name, of several none.
    check(
        &[("a.yaml", &ports("- {port: 80}\n- {name: b, port: 81}\n- {port: 82}"))],
        expect![[r#"
            a.yaml:7:5: Service/shop/web: spec.ports[0].name: the port has no name, and is one of several
                give each port a name of its own, as Kubernetes demands it
            a.yaml:9:5: Service/shop/web: spec.ports[2].name: the port has no name, and is one of several
                give each port a name of its own, as Kubernetes demands it
        "#]],
    );
    // Who is outside of the mesh reads the metrics of the pods behind such a Service at the pods.
    check(
        &[("a.yaml", &ports("- {port: 14021}").replace("spec:\n", "spec:\n  clusterIP: None\n"))],
        expect![[r#"
            a.yaml:8:6: warning: Service/shop/web: spec.ports[0].port: 14021 is a port of the sidecar's own; a pod that has one is not reached there: 503, the sidecar's metrics are there
                leave it to callers outside of the mesh
        "#]],
    );
    check(
        &[("a.yaml", &ports("- {port: 80, targetPort: 14021}"))],
        expect![[r#"
            a.yaml:7:16: Service/shop/web: spec.ports[0].targetPort: 14021 is a port of the sidecar's own; a pod that has one is not reached there: 503, the sidecar's metrics are there
                write a port of the application, or, where it is one of workloads without a sidecar, its name
        "#]],
    );
}

#[test]
fn what_a_workload_writes_twice_or_as_nobody_looks_for_it_is_refused() {
    let workload = |name: &str, labels: &str, spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata:\n  name: {name}\n  labels: {labels}\nspec:\n  addresses: {spec}\n---\n"
        )
    };
    let documents = [
        workload("a", "{app: a}", "[10.64.1.1]\n  ports:\n  - {name: http, port: 80}\n  - {name: db, port: 80}"),
        workload("b", "{app: b}", "[10.64.1.2]\n  ports:\n  - {name: http, port: 80}\n  - {name: http, port: 81}"),
        workload("c", "{app: c}", "[10.64.1.3, \"::ffff:10.64.1.3\"]"),
        workload("d", "{app: \"d,e\"}", "[10.64.1.4]\n  ports:\n  - {name: Http, port: 80, appProtocol: x}"),
        workload(&"e".repeat(80), "{}", "[10.64.1.5]"),
        workload("f", "{}", "[10.64.1.6]\n  ports:\n  - {name: http, port: 80}\n  - {name: own, port: 14021}"),
        workload("g", "{}", "[10.64.1.7]\n  transport: Plaintext\n  ports:\n  - {name: own, port: 14021}"),
    ];
    check(
        &[("a.yaml", &documents.concat())],
        expect![[r#"
            a.yaml:10:16: Workload/default/a: spec.ports[1].port: port 80 is there already
                write each port once
            a.yaml:21:6: Workload/default/b: spec.ports[1].name: a port is named "http" already
                give each port a name of its own
            a.yaml:29:26: Workload/default/c: spec.addresses[1]: the address ::ffff:10.64.1.3 is there already
                write each address once
            a.yaml:35:3: Workload/default/d: metadata.labels: "d,e" is not the value of a label
                use at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit, as app: web or example.com/tier: front
            a.yaml:39:6: Workload/default/d: spec.ports[0].name: "Http" is not a name of one part
                use at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit, as web-1
            a.yaml:39:28: warning: Workload/default/d: spec.ports[0].appProtocol: "x" means nothing here; the first bytes tell
                write http, http2, grpc, tcp, or leave it out
            a.yaml:44:3: Workload/default/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee: metadata.name: "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee" has 80 letters
                use at most 63, as a host's name has
            a.yaml:58:17: Workload/default/f: spec.ports[1].port: 14021 is a port of the sidecar's own, which is never the application's
                write a port of the application
        "#]],
    );
}

#[test]
fn of_two_workloads_with_one_address_the_one_that_does_not_count_is_named_with_its_place() {
    let workload = |name: &str, addresses: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  addresses:\n  {addresses}\n---\n"
        )
    };
    check(
        &[("a.yaml", &workload("b", "- 10.64.0.5")), ("b.yaml", &workload("a", "- 10.64.0.6\n  - 10.64.0.5"))],
        expect![[r#"
            a.yaml:6:5: Workload/shop/b: spec.addresses[0]: 10.64.0.5 is the address of Workload/shop/a too, which counts
                write the address at which the workload is, or take Workload/shop/a out
        "#]],
    );
}

#[test]
fn a_port_that_a_service_without_an_address_would_have_to_translate_is_told() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\nspec:\n  clusterIP: None\n  selector: {app: db}\n  ports:\n  - {name: a, port: 80, targetPort: 8080}\n  - {name: b, port: 81, targetPort: http}\n  - {name: c, port: 8080}\n---\n";
    let pod = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: db-0, namespace: shop, labels: {app: db}}\nspec: {addresses: [10.64.0.5], ports: [{name: http, port: 8080}]}\n";
    check(
        &[("a.yaml", &format!("{service}{pod}"))],
        expect![[r#"
        a.yaml:8:25: warning: Service/shop/db: spec.ports[0].targetPort: a Service without an address translates no port: who calls its port 80 reaches that port of a pod, and not 8080
            write port: 8080, or leave clusterIP out
        a.yaml:9:25: warning: Service/shop/db: spec.ports[1].targetPort: a Service without an address translates no port: who calls its port 81 reaches that port of a pod, and not 8080
            write port: 8080, or leave clusterIP out
    "#]],
    );
}

#[test]
fn a_service_has_one_name_one_address_and_labels_that_somebody_can_have() {
    let service = |name: &str, spec: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  {spec}\n---\n")
    };
    let documents = [
        service("a", "clusterIP: 10.65.1.1\n  clusterIPs: [10.65.1.2]"),
        service("b", "clusterIP: None\n  clusterIPs: [10.65.1.3]"),
        service("c", "clusterIPs: [None, 10.65.1.4]"),
        service("d.e", "selector: {app: \"a b\"}"),
        service("f", "clusterIP: None\n  clusterIPs: [None]"),
        service("g", "clusterIP: \"fd65:0::7\"\n  clusterIPs: [\"fd65::7\", 10.65.1.7]"),
    ];
    check(
        &[("a.yaml", &documents.concat())],
        expect![[r#"
        a.yaml:5:3: Service/shop/a: spec.clusterIP: clusterIP is 10.65.1.1 and the first of clusterIPs is 10.65.1.2: they are one address
            write the same in both, or leave one of them out
        a.yaml:12:3: Service/shop/b: spec.clusterIP: clusterIP is None and the first of clusterIPs is 10.65.1.3: they are one address
            write the same in both, or leave one of them out
        a.yaml:19:3: Service/shop/c: spec.clusterIPs: a Service has no address (None) or it has some
            write None alone, or the addresses without it
        a.yaml:23:12: Service/shop/d.e: metadata.name: "d.e" is not a name of one part
            use at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit, as web-1
        a.yaml:25:3: Service/shop/d.e: spec.selector: "a b" is not the value of a label
            use at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit, as app: web or example.com/tier: front
    "#]],
    );
}

#[test]
fn the_ranges_of_a_mesh_are_networks_and_not_all_there_is() {
    let mesh = |ranges: &str| {
        format!("apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {{name: m}}\nspec:\n  ranges: {ranges}\n")
    };
    for (ranges, told) in [
        (
            "[]",
            expect![[r#"
            a.yaml:5:3: Mesh/outrigger-system/m: spec.ranges: the mesh has no range: nothing would be in the mesh
                write the networks of pods and services, or leave it out for those of a local mesh
        "#]],
        ),
        (
            "[10.0.0.0/8, 0.0.0.0/0]",
            expect![[r#"
            a.yaml:5:24: Mesh/outrigger-system/m: spec.ranges[1]: 0.0.0.0/0 is every address there is: nothing would be outside of the mesh
                write the networks of pods and services, or leave it out for those of a local mesh
        "#]],
        ),
        (
            "[\"::/0\"]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: spec.ranges[0]: ::/0 is every address there is: nothing would be outside of the mesh
                write the networks of pods and services, or leave it out for those of a local mesh
        "#]],
        ),
        (
            "[10.0.0.0/33]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: "33" is not the length of a network of IPv4
                write 1 to 32 behind the slash
        "#]],
        ),
        (
            "[\"fd64::/129\"]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: "129" is not the length of a network of IPv6
                write 1 to 128 behind the slash
        "#]],
        ),
        (
            "[10.0.0.0/x]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: "x" is not the length of a network of IPv4
                write 1 to 32 behind the slash
        "#]],
        ),
        (
            "[10.0.0.0]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: "10.0.0.0" is an address without the length of its network
                write 10.0.0.0/32
        "#]],
        ),
        (
            "[pods]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: "pods" is not a network
                write one as 10.64.0.0/16 or fd64::/64
        "#]],
        ),
        (
            "[10.0.0.300/8]",
            expect![[r#"
            a.yaml:5:12: Mesh/outrigger-system/m: "10.0.0.300" is not an IP address
                write one as 10.64.0.0/16 or fd64::/64
        "#]],
        ),
        ("[10.0.0.0/8, \"fd00::/8\"]", expect![[""]]),
    ] {
        check(&[("a.yaml", &mesh(ranges))], told);
    }
}

#[test]
fn workloads_outside_of_the_ranges_are_told_where_the_ranges_are_written() {
    let workload = |name: &str, spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n---\n"
        )
    };
    let workloads = [
        workload("a", "addresses: [10.64.0.5, \"fd64::5\"]"),
        workload("b", "addresses: [192.0.2.7]"),
        workload("c", "addresses: [192.0.2.8], transport: Plaintext"),
    ]
    .concat();
    check(
        &[("a.yaml", &workloads)],
        expect![[r#"
            a.yaml:9:20: warning: Workload/shop/b: spec.addresses[0]: 192.0.2.7 is outside of the mesh's ranges: while such an address is not known to a caller's sidecar, it is dialled as one outside of the mesh, in plaintext where egress is allowed
                write its network into the ranges of a Mesh, beside those of pods and services
        "#]],
    );
    let mesh = "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {name: mesh}\nspec:\n  ranges: [10.64.0.0/15]\n";
    check(
        &[("a.yaml", &workloads), ("mesh.yaml", mesh)],
        expect![[r#"
            mesh.yaml:5:3: warning: Mesh/outrigger-system/mesh: spec.ranges: they do not hold fd64::5 of Workload/shop/a; 192.0.2.7 of Workload/shop/b: while such an address is not known to a caller's sidecar, it is dialled as one outside of the mesh, in plaintext where egress is allowed
                write the networks of the pods too, of both families
        "#]],
    );
    check(
        &[("a.yaml", &workloads), ("mesh.yaml", &mesh.replace("10.64.0.0/15", "10.64.0.0/15, 192.0.2.0/24, \"fd64::/64\""))],
        expect![[""]],
    );
}

#[test]
fn a_policy_at_a_port_that_its_pod_excludes_is_told_with_its_place() {
    let pod = "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata:\n  name: web-1\n  namespace: shop\n  labels: {app: web}\n  annotations: {outrigger.dev/exclude-inbound-ports: '80,81'}\nspec: {addresses: [10.64.0.5]}\n";
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: web}]\n  mode: Strict\n";
    check(
        &[("a.yaml", WEB), ("b.yaml", pod), ("c.yaml", policy)],
        expect![[r#"
            c.yaml:5:3: warning: PeerAuthentication/shop/strict: spec.targetRefs: it does nothing at port 80 of Workload/shop/web-1, to which Service/shop/web leads: the annotation outrigger.dev/exclude-inbound-ports takes that out of capture, and who connects there reaches the application unasked
                take the port out of the annotation and start the pod anew, or let the policy cover other ports alone
        "#]],
    );
}

#[test]
fn an_allow_policy_without_rules_is_a_warning() {
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: shop}\nspec:\n  targetRefs:\n  - {kind: Service, name: web}\n  - {kind: Workload, name: gone}\n  action: ALLOW\n  rules: []\n";
    check(
        &[("a.yaml", &format!("{WEB}{policy}"))],
        expect![[r#"
            a.yaml:17:3: warning: AuthorizationPolicy/shop/none: spec.rules: an ALLOW policy without rules allows nothing
                write rules, or rules: [{}] to allow everything
        "#]],
    );
}

#[test]
fn documents_that_are_there_twice_are_told() {
    check(
        &[("a.yaml", &format!("{WEB}{WEB}")), ("b.yaml", WEB)],
        expect![[r#"
        a.yaml:9:1: Service/shop/web: the file holds this document already; the first one counts
            keep one of the two
        b.yaml:1:1: warning: Service/shop/web: a.yaml holds this document too, and counts
            keep one of the two
    "#]],
    );
}

#[test]
fn a_check_of_nothing_fails_as_its_application_does() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.yaml");
    let code = |text: &str| {
        std::fs::write(&file, text).unwrap();
        run(CheckArgs { files: vec![folder.path().to_owned()], output: None }).err().map(|failure| failure.code)
    };
    assert_eq!(code(""), Some(2));
    assert_eq!(code("# nothing yet\n---\n"), Some(2));
    assert_eq!(code("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"), Some(2));
    assert_eq!(code(WEB), None);
}

#[test]
fn a_folder_without_documents_cannot_be_checked() {
    let loaded = Loaded::read(&[PathBuf::from("/nowhere/at/all")]);
    assert_eq!(loaded.unreadable, ["cannot read /nowhere/at/all: No such file or directory (os error 2); check its name"]);
    check(
        &[("a.txt", "")],
        expect![[r#"
        FOLDER holds no .yaml, .yml or .json file; give its documents names that end so
    "#]],
    );
}

#[test]
fn services_as_kubectl_prints_them_are_read_without_the_addresses_that_their_cluster_gave_them() {
    let service = |name: &str, spec: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  creationTimestamp: \"2026-01-01T00:00:00Z\"\n  name: {name}\n  namespace: shop\n  resourceVersion: \"345\"\n  uid: 5a1d\nspec:\n{spec}  internalTrafficPolicy: Cluster\n  ipFamilies:\n  - IPv4\n  ipFamilyPolicy: SingleStack\n  ports:\n  - port: 80\n    protocol: TCP\n    targetPort: 80\n  selector:\n    app: web\n  sessionAffinity: None\n  type: ClusterIP\nstatus:\n  loadBalancer: {{}}\n"
        )
    };
    let given = service("web", "  clusterIP: 10.96.7.3\n  clusterIPs:\n  - 10.96.7.3\n");
    let headless = service("db", "  clusterIP: None\n  clusterIPs:\n  - None\n");
    check(&[("a.yaml", &given), ("b.yaml", &headless)], expect![[""]]);
    let item = |text: &str| {
        text.lines().enumerate().map(|(at, line)| format!("{}{line}\n", if at == 0 { "- " } else { "  " })).collect::<String>()
    };
    let list =
        format!("apiVersion: v1\nitems:\n{}{}kind: List\nmetadata:\n  resourceVersion: \"\"\n", item(&given), item(&headless));
    check(&[("a.yaml", &list)], expect![[""]]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.yaml"), &list).unwrap();
    let loaded = Loaded::read(&[folder.path().to_owned()]);
    let held: Vec<String> = loaded.resources.by_key.keys().map(ToString::to_string).collect();
    assert_eq!(held, ["Service/shop/db", "Service/shop/web"]);
    // An address that somebody wrote is still looked at.
    let written = given.replace("  uid: 5a1d\n", "");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a.yaml"), &written).unwrap();
    let told = Loaded::read(&[folder.path().to_owned()]).problems();
    assert!(told[0].problem.text.contains("10.96.7.3 is outside of the mesh's ranges"), "{told:?}");
}

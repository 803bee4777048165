//! Documents from YAML text: each by itself, so that a bad one does not take its neighbours with it, and every fault with
//! its line and column.
//!
//! Sources: YAML 1.2.2 (3.2.1.3 keys are unique), Kubernetes API conventions. Pure, and total: no
//! text makes it panic, and a document that refers to itself over and over is refused before it grows.

mod faults;
mod source;
mod tree;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_saphyr::Options;

use self::faults::told;
pub(crate) use self::source::Position;
use self::source::{Source, split};
use super::{Kind, Resource, ResourceKey};
use crate::base::names::{Named, check_name, check_part, nearest};
use crate::base::problems::{FieldPath, Severity};
use crate::model::object::{DEFAULT_NAMESPACE, MESH_NAMESPACE};

/// The largest document, in bytes.
pub(crate) const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// One document.
#[derive(Clone, Debug)]
pub(crate) struct Document {
    pub(crate) resource: Resource,
    /// Is it as an API server gave it (`kubectl get`)? Not everything in it is its writer's then.
    pub(crate) is_given: bool,
    source: Source,
    /// Where in its text it stands: at its root, or among the items of a List.
    at: FieldPath,
}

/// A document that is not taken, or one that means nothing here.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Fault {
    pub(crate) at: Position,
    /// Lower case, no full stop.
    pub(crate) text: String,
    /// What to do about it.
    pub(crate) remedy: String,
    /// `Warns`: the document was skipped because it is none of ours.
    pub(crate) severity: Severity,
    /// Whose document it is, as far as it could be read.
    pub(crate) key: Option<ResourceKey>,
    /// All of the document as JSON, where it is YAML at all and its key could be read.
    pub(crate) body: Option<String>,
}

/// Reads all documents of a text, in their order; a List is the documents in it. What holds no document (comments, blank lines) is
/// passed over.
pub(crate) fn read(text: &str) -> Vec<Result<Document, Box<Fault>>> {
    split(text).into_iter().flat_map(read_source).collect()
}

/// One document of any kind, as it is written and what it says.
#[derive(Debug)]
pub(crate) struct Written {
    /// Without the marker before it.
    pub(crate) text: String,
    pub(crate) value: Result<serde_json::Value, Box<Fault>>,
}

/// All documents of a text, whatever their kind.
pub(crate) fn written(text: &str) -> Vec<Written> {
    let read = |source: Source| {
        let value = serde_saphyr::from_str_with_options(&source.text, options());
        let value = value.map_err(|error| Box::new(told(&source, &error)));
        let text = match source.text.split_once('\n') {
            Some((marker, rest)) if marker.trim_end() == "---" => rest,
            _no_marker => &source.text,
        };
        Written { text: text.to_owned(), value }
    };
    split(text).into_iter().map(read).collect()
}

/// The text of one document, which reads the same with the YAML 1.1 that Kubernetes' tools speak.
///
/// # Errors
/// Never for JSON values.
pub(crate) fn write(value: &serde_json::Value) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string_with_options(value, serde_saphyr::ser_options! { prefer_block_scalars: false })
}

impl Document {
    /// Where the field at `path` stands; where it is not written, where what should hold it stands.
    pub(crate) fn position(&self, path: &FieldPath) -> Position {
        let Self { at, source, .. } = self;
        source.place(&format!("{at}.{path}"))
    }
}

/// What every document begins with.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    #[serde(default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    metadata: Option<HeaderMetadata>,
}

#[derive(Debug, Default, Deserialize)]
struct HeaderMetadata {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
    /// An API server gives one to each object, and nobody writes one.
    #[serde(default)]
    uid: Option<IgnoredAny>,
}

/// The document of a source, or those of its List.
fn read_source(source: Source) -> Vec<Result<Document, Box<Fault>>> {
    let header = match head(&source) {
        Ok(header) => header,
        Err(fault) => return vec![Err(Box::new(fault))],
    };
    if header.kind.as_deref() != Some(LIST) || header.api_version.as_deref() != Some("v1") {
        return vec![read_one(source, header).map_err(Box::new)];
    }
    match serde_saphyr::from_str_with_options::<List>(&source.text, options()) {
        Ok(List { items }) => {
            items.iter().enumerate().map(|(index, item)| read_item(&source, index, item).map_err(Box::new)).collect()
        }
        Err(error) => vec![Err(Box::new(told(&source, &error)))],
    }
}

/// One document of a List. What it says wrong is told at its beginning: once it is read by itself, its fields stand elsewhere.
#[expect(clippy::result_large_err, reason = "boxed by its only caller")]
fn read_item(source: &Source, index: usize, item: &serde_json::Value) -> Result<Document, Fault> {
    let at = FieldPath::root().field("items").index(index);
    let placed = |fault: Fault| Fault { at: source.place(at.as_str()), ..fault };
    // JSON is YAML.
    let own = Source::of(&item.to_string());
    let header = head(&own).map_err(placed)?;
    let document = read_one(own, header).map_err(placed)?;
    Ok(Document { source: source.clone(), at, ..document })
}

/// What `kubectl get` prints of several objects.
#[derive(Debug, Deserialize)]
struct List {
    #[serde(default)]
    items: Vec<serde_json::Value>,
}

#[expect(clippy::result_large_err, reason = "boxed by its callers")]
fn head(source: &Source) -> Result<Header, Fault> {
    if source.text.len() > DOCUMENT_BYTES_MAX {
        return Err(Fault {
            at: source.start(),
            text: format!("the document has {} bytes; at most {DOCUMENT_BYTES_MAX} are read", source.text.len()),
            remedy: "split it into several documents".to_owned(),
            severity: Severity::Refuses,
            key: None,
            body: None,
        });
    }
    serde_saphyr::from_str_with_options(&source.text, options()).map_err(|error| told(source, &error))
}

#[expect(clippy::result_large_err, reason = "boxed by its callers")]
fn read_one(source: Source, header: Header) -> Result<Document, Fault> {
    let fault = |at, text: String, remedy: &str| Fault {
        at,
        text,
        remedy: remedy.to_owned(),
        severity: Severity::Refuses,
        key: None,
        body: None,
    };
    let metadata = header.metadata.unwrap_or_default();
    let Some(kind) = header.kind else {
        return Err(fault(source.start(), "the document does not say its kind".to_owned(), "write apiVersion and kind"));
    };
    let Some(version) = header.api_version else {
        return Err(fault(source.start(), "the document does not say its apiVersion".to_owned(), "write apiVersion and kind"));
    };
    let known = Kind::ALL.into_iter().find(|known| known.as_str() == kind && group(known.api_version()) == group(&version));
    let Some(kind) = known else {
        let name = metadata.name.as_deref().unwrap_or("without a name");
        if is_kubernetes(group(&version), &kind) {
            return Err(Fault {
                severity: Severity::Warns,
                ..fault(
                    source.place("kind"),
                    format!("{kind} {name} means nothing here and is skipped"),
                    "leave it to Kubernetes",
                )
            });
        }
        let remedy = match Kind::ALL.into_iter().find(|known| known.as_str() == kind) {
            Some(known) => format!("write apiVersion: {}", known.api_version()),
            None if group(&version) == "gateway.networking.k8s.io" => {
                "write an HTTPRoute, a GRPCRoute, a TLSRoute or a TCPRoute, or leave it out".to_owned()
            }
            None => match nearest(&kind, Kind::ALL.map(Kind::as_str)) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("the kinds here are {}", Kind::ALL.map(Kind::as_str).join(", ")),
            },
        };
        return Err(fault(source.place("kind"), format!("unknown kind {kind} ({version})"), &remedy));
    };
    if !kind.reads(&version) {
        let text = format!("{kind} is not read as {version}");
        return Err(fault(source.place("apiVersion"), text, &format!("write apiVersion: {}", kind.api_version())));
    }
    let deserialized = serde_saphyr::with_deserializer_from_str_with_options(&source.text, options(), |deserializer| {
        Resource::read(kind, deserializer)
    });
    match deserialized {
        Ok(resource) => Ok(Document { resource, is_given: metadata.uid.is_some(), source, at: FieldPath::root() }),
        Err(error) => {
            let body = serde_saphyr::from_str_with_options::<serde_json::Value>(&source.text, options()).ok();
            let key = key_of(kind, metadata);
            Err(Fault { body: body.filter(|_| key.is_some()).map(|body| body.to_string()), key, ..told(&source, &error) })
        }
    }
}

/// The key of a document that could not be read, from its head.
fn key_of(kind: Kind, metadata: HeaderMetadata) -> Option<ResourceKey> {
    let namespace = match kind {
        Kind::Mesh => MESH_NAMESPACE.to_owned(),
        _ => metadata.namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
    };
    let name = metadata.name?;
    (check_part(&namespace).is_ok() && check_name(&name).is_ok()).then(|| ResourceKey { kind, name: Named::new(namespace, name) })
}

/// How documents are parsed: a hundred thousand nodes are ten times what 1 MiB of sensible YAML holds.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 48, max_nodes: 200_000, max_events: 500_000, max_aliases: 1_000, max_documents: 2 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 20_000, max_replay_stack_depth: 8 },
        with_snippet: false,
        strict_booleans: true,
    }
}

const LIST: &str = "List";

/// The API group of an `apiVersion`.
fn group(version: &str) -> &str {
    version.split_once('/').map_or("", |(group, _)| group)
}

/// Is it a kind of Kubernetes itself, or one of Gateway API that is not the mesh's? (A route of another protocol is no such
/// kind: passed over in silence it would be a hole.)
fn is_kubernetes(group: &str, kind: &str) -> bool {
    match group {
        "" => CORE.contains(&kind),
        "gateway.networking.k8s.io" => matches!(kind, "Gateway" | "GatewayClass" | "ListenerSet" | "BackendTLSPolicy"),
        "apps" | "autoscaling" | "batch" | "policy" => true,
        _ => group.ends_with(".k8s.io") && !group.ends_with(".x-k8s.io"),
    }
}

const CORE: [&str; 18] = [
    "Binding",
    "ComponentStatus",
    "ConfigMap",
    "Endpoints",
    "Event",
    "LimitRange",
    "Namespace",
    "Node",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "Pod",
    "PodStatus",
    "PodTemplate",
    "ReplicationController",
    "ResourceQuota",
    "Secret",
    "ServiceAccount",
    "Status",
];

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, expected: Expect) {
        check_all(&[text], expected);
    }

    fn check_all(texts: &[&str], expected: Expect) {
        let mut found = String::new();
        for document in texts.iter().flat_map(|text| read(text)) {
            match document {
                Ok(document) => writeln!(found, "{}", document.resource.to_json()).unwrap(),
                Err(fault) => {
                    let Fault { at, text, remedy, severity, key, body } = *fault;
                    let key = key.map(|key| format!(" [{key}]")).unwrap_or_default();
                    let body = if body.is_some() { " +body" } else { "" };
                    writeln!(found, "{at} {severity:?}: {text}; {remedy}{key}{body}").unwrap();
                }
            }
        }
        expected.assert_eq(&found);
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {selector: {app: web}, ports: [{port: 80, targetPort: http}], sessionAffinity: None}\n";

    #[test]
    fn documents_are_read_and_written_without_their_defaults() {
        check(
            &format!(
                "# a folder's file\n---\n{SERVICE}---\n\n---\napiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata:\n  name: mesh\n  uid: x\nspec:\n  egress: Allow\n  accessLog: {{sample: 10}}\nstatus: {{}}\n...\n"
            ),
            expect![[r#"
                {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":{"selector":{"app":"web"},"ports":[{"port":80,"targetPort":"http"}]}}
                {"apiVersion":"outrigger.dev/v1alpha1","kind":"Mesh","metadata":{"name":"mesh","namespace":"default"},"spec":{"accessLog":{"sample":10.0}}}
            "#]],
        );
    }

    #[test]
    fn a_list_is_the_documents_in_it_each_with_its_place() {
        let list = "apiVersion: v1\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: web, namespace: shop, uid: x}\n  spec: {ports: [{port: 80}]}\n- apiVersion: v1\n  kind: Service\n  metadata: {name: api}\n  spec: {port: 80}\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\nkind: List\nmetadata: {resourceVersion: \"\"}\n";
        check(
            &format!("{list}---\n{SERVICE}"),
            expect![[r#"
                {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":{"ports":[{"port":80}]}}
                7:3 Refuses: unknown field "port"; did you mean "ports"? [Service/default/api] +body
                11:3 Warns: Pod a means nothing here and is skipped; leave it to Kubernetes
                {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":{"selector":{"app":"web"},"ports":[{"port":80,"targetPort":"http"}]}}
            "#]],
        );
        let read = read(&format!("{list}---\n{SERVICE}"));
        let [Ok(item), .., Ok(alone)] = read.as_slice() else { panic!("{read:?}") };
        assert!(item.is_given && !alone.is_given);
        let ports = FieldPath::root().field("spec").field("ports").index(0);
        assert_eq!([item.position(&ports), alone.position(&ports)].map(|at| at.to_string()), ["6:18", "18:38"]);
        assert_eq!(super::read("apiVersion: v1\nkind: List\nitems: []\n").len(), 0);
    }

    #[test]
    fn a_bad_document_leaves_its_neighbours_alone() {
        check(
            &format!("{SERVICE}---\nkind: [\n---\n{SERVICE}"),
            expect![[r#"
                {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":{"selector":{"app":"web"},"ports":[{"port":80,"targetPort":"http"}]}}
                6:7 Refuses: a list stands where a text is expected; write a text
                {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":{"selector":{"app":"web"},"ports":[{"port":80,"targetPort":"http"}]}}
            "#]],
        );
    }

    #[test]
    fn an_unknown_field_is_named_with_the_one_that_was_meant() {
        check(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata:\n  name: web\nspec:\n  parentRefs:\n  - {kind: Service, name: web}\n  rules:\n  - backendRef:\n    - name: web\n",
            expect![[r#"
                9:5 Refuses: unknown field "backendRef"; did you mean "backendRefs"? [HTTPRoute/default/web] +body
            "#]],
        );
        check(
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: shop}\nspec:\n  action: ALLOW\n  rules:\n  - from:\n    - principal: [x]\n",
            expect![[r#"
                8:7 Refuses: unknown field "principal"; did you mean "principals"? [AuthorizationPolicy/shop/a] +body
            "#]],
        );
        check(
            "apiVersion: v1\nkind: Service\nmetadata:\n  nmae: web\nspec: {}\n",
            expect![[r#"
            4:3 Refuses: unknown field "nmae"; did you mean "name"?
        "#]],
        );
        check(
            "apiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: {name: m}\nspecs: {}\n",
            expect![[r#"
            4:1 Refuses: unknown field "specs"; did you mean "spec"? [Mesh/outrigger-system/m] +body
        "#]],
        );
    }

    #[test]
    fn a_service_may_say_what_kubernetes_knows_and_nothing_else() {
        let service = |spec: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec:\n  {spec}\n");
        let known =
            "{type: ClusterIP, sessionAffinity: None, ipFamilies: [IPv4], ports: [{port: 80, nodePort: 30080}], selector: null}";
        assert!(read(&service(known)).remove(0).is_ok());
        for (spec, place, text, remedy) in [
            ("selektor: {app: web}", "5:3", "unknown field \"selektor\"", "did you mean \"selector\"?"),
            ("ports: [{port: 80, targetport: 8080}]", "5:22", "unknown field \"targetport\"", "did you mean \"targetPort\"?"),
            ("sesionAffinity: None", "5:3", "unknown field \"sesionAffinity\"", "did you mean \"sessionAffinity\"?"),
            ("colour: red", "5:3", "unknown field \"colour\"", "known here: selector, ports, clusterIP, clusterIPs"),
        ] {
            let fault = read(&service(spec)).remove(0).unwrap_err();
            assert_eq!((fault.at.to_string().as_str(), fault.text.as_str(), fault.remedy.as_str()), (place, text, remedy));
        }
    }

    #[test]
    fn a_wrong_value_is_named_with_its_place() {
        let policy = |spec: &str| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata:\n  name: t\nspec:\n  targetRefs:\n  - {{kind: Service, name: web}}\n  {spec}\n"
            )
        };
        let specs = [
            "connectTimeout: 5",
            "connectTimeout: soon",
            "rateLimit: {requests: many}",
            "rateLimit: {per: 1s}",
            "rateLimit: {requests: -1}",
            "rateLimit: []",
            "rateLimit: {requests: 5000000000}",
            "rateLimit: {requests: 1.5} # the limit",
            "rateLimit: {requests: \"ten\"}",
            "rateLimit:\n    - requests",
            "circuitBreaking:\n    a: 1",
            "fault: {delay: {duration: 1s, percent: 101}}",
            "fault: {delay: {duration: 1s, percent: half}}",
            "fault: {delay: {duration: }}",
            "fault: {abort: {status: 65536}}",
        ];
        let policies = specs.map(policy);
        check_all(
            &policies.each_ref().map(String::as_str),
            expect![[r#"
                8:19 Refuses: "5" is not a duration; write it as "250ms", "10s" or "1h30m" [TrafficPolicy/default/t] +body
                8:19 Refuses: "soon" is not a duration; write it as "250ms", "10s" or "1h30m" [TrafficPolicy/default/t] +body
                8:25 Refuses: "many" is not a whole number from 0 to 4294967295; write one [TrafficPolicy/default/t] +body
                8:15 Refuses: the field "requests" is missing; write requests [TrafficPolicy/default/t] +body
                8:25 Refuses: "-1" is not a whole number from 0 to 4294967295; write one [TrafficPolicy/default/t] +body
                8:14 Refuses: a list stands where a mapping is expected; write a mapping [TrafficPolicy/default/t] +body
                8:25 Refuses: "5000000000" is not a whole number from 0 to 4294967295; write one [TrafficPolicy/default/t] +body
                8:25 Refuses: "1.5" is not a whole number from 0 to 4294967295; write one [TrafficPolicy/default/t] +body
                8:25 Refuses: "ten" is not a whole number from 0 to 4294967295; write one [TrafficPolicy/default/t] +body
                9:5 Refuses: a list stands where a mapping is expected; write a mapping [TrafficPolicy/default/t] +body
                9:5 Refuses: unknown field "a"; known here: limits, ejection [TrafficPolicy/default/t] +body
                8:42 Refuses: 101 is not a percentage; write a number from 0 to 100 [TrafficPolicy/default/t] +body
                8:42 Refuses: "half" is not a number; write one [TrafficPolicy/default/t] +body
                8:27 Refuses: the value is empty; write a text, or leave the field out [TrafficPolicy/default/t] +body
                8:27 Refuses: "65536" is not a whole number from 1 to 65535; write one [TrafficPolicy/default/t] +body
            "#]],
        );
        check_all(
            &[
                "apiVersion: outrigger.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: p}\nspec:\n  mode: STRICT\n",
                "apiVersion: v1\nkind: Service\nmetadata: {name: Web}\nspec: {}\n",
                "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - port: 80\n    targetPort: 70000\n",
                "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - port: -80\n",
                "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - port: &p 65536\n    targetPort: *p\n",
                "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {addresses: [10.64.0.300]}\n",
                "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: w}\nspec: {addresses: [10.64.0.3], terminating: maybe}\n",
                "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - port: 80\n  ports: []\n",
                "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n",
            ],
            expect![[r#"
                5:9 Refuses: "STRICT" is not a value of this field; did you mean "Strict"? known here: Strict, Permissive [PeerAuthentication/default/p] +body
                3:18 Refuses: "Web" is not a name; use lower-case letters, digits, '-' and '.', starting and ending with a letter or digit, as web-1
                7:17 Refuses: 70000 is not a port; write 1 to 65535, or a port's name [Service/default/web] +body
                6:11 Refuses: "-80" is not a whole number from 1 to 65535; write one [Service/default/web] +body
                6:14 Refuses: "65536" is not a whole number from 1 to 65535; write one [Service/default/web] +body
                4:20 Refuses: "10.64.0.300" is not an IP address; write one as 10.64.0.5 or fd64::5 [Workload/default/w] +body
                4:45 Refuses: "maybe" is not true or false; write true or false [Workload/default/w] +body
                7:3 Refuses: "ports" is there twice; keep one of the two
                3:1 Refuses: the field "spec" is missing; write spec [Service/default/web] +body
            "#]],
        );
    }

    #[test]
    fn a_kind_is_ours_or_kubernetes_or_an_error() {
        check_all(
            &[
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec: {replicas: 1}\n",
                "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
                "apiVersion: v1\nkind: Servcie\nmetadata: {name: web}\n",
                "apiVersion: gateway.networking.k8s.io/v1\nkind: UDPRoute\nmetadata: {name: web}\n",
                "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: HTTPRoute\nmetadata: {name: web}\n",
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: web}\n",
                "apiVersion: v1\nkind: Mesh\nmetadata: {name: web}\n",
                "metadata: {name: web}\n",
                "kind: Mesh\nmetadata: {name: web}\n",
                "just text\n",
                "- a\n- b\n",
            ],
            expect![[r#"
                2:1 Warns: Deployment web means nothing here and is skipped; leave it to Kubernetes
                2:1 Warns: Namespace shop means nothing here and is skipped; leave it to Kubernetes
                2:1 Refuses: unknown kind Servcie (v1); did you mean Service?
                2:1 Refuses: unknown kind UDPRoute (gateway.networking.k8s.io/v1); write an HTTPRoute, a GRPCRoute, a TLSRoute or a TCPRoute, or leave it out
                1:1 Refuses: HTTPRoute is not read as gateway.networking.k8s.io/v1beta1; write apiVersion: gateway.networking.k8s.io/v1
                2:1 Refuses: unknown kind VirtualService (networking.istio.io/v1); the kinds here are Mesh, Service, Workload, HTTPRoute, GRPCRoute, TLSRoute, TCPRoute, ReferenceGrant, AuthorizationPolicy, RequestAuthentication, PeerAuthentication, TrafficPolicy
                2:1 Refuses: unknown kind Mesh (v1); write apiVersion: outrigger.dev/v1alpha1
                1:1 Refuses: the document does not say its kind; write apiVersion and kind
                1:1 Refuses: the document does not say its apiVersion; write apiVersion and kind
                1:1 Refuses: "just text" stands where a mapping is expected; write a mapping
                1:1 Refuses: a list stands where a mapping is expected; write a mapping
            "#]],
        );
    }

    #[test]
    fn what_gateway_api_knows_and_the_mesh_does_not_is_told_as_that() {
        let route = |rule: &str| {
            format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web}}\nspec:\n  rules:\n  - {rule}\n"
            )
        };
        let routes = ["filters: [{type: ExternalAuth, externalAuth: {}}]", "sessionPersistence: {}"].map(route);
        check_all(
            &routes.each_ref().map(String::as_str),
            expect![[r#"
                6:22 Refuses: Gateway API's ExternalAuth is not carried out here; leave it out [HTTPRoute/default/web] +body
                6:5 Refuses: Gateway API's sessionPersistence is not carried out here; leave it out [HTTPRoute/default/web] +body
            "#]],
        );
    }

    #[test]
    fn what_is_not_yaml_is_named_with_its_place() {
        check_all(
            &["a: b: c\n", "a: \"x\n", "a:\n\t- b\n", "a: *nothing\n", "{", "\u{1}"],
            expect![[r#"
            1:5 Refuses: not YAML: mapping values are not allowed in this context; correct the line
            2:1 Refuses: not YAML: invalid indentation in multiline quoted scalar; correct the line
            2:2 Refuses: not YAML: tabs disallowed within this context (block indentation); correct the line
            1:4 Refuses: not YAML: alias references unknown anchor; correct the line
            1:1 Refuses: not YAML: unclosed bracket '{'; correct the line
            1:1 Refuses: not YAML: unexpected character: `\u{1}'; correct the line
        "#]],
        );
    }

    #[test]
    fn a_document_of_more_than_a_mebibyte_is_refused() {
        let large = format!("{SERVICE}# {}\n", "x".repeat(DOCUMENT_BYTES_MAX));
        check(
            &format!("{large}---\n{SERVICE}"),
            expect![[r#"
            1:1 Refuses: the document has 1048738 bytes; at most 1048576 are read; split it into several documents
            {"apiVersion":"v1","kind":"Service","metadata":{"name":"web","namespace":"shop"},"spec":{"selector":{"app":"web"},"ports":[{"port":80,"targetPort":"http"}]}}
        "#]],
        );
    }

    #[test]
    fn a_document_that_refers_to_itself_over_and_over_is_refused() {
        let mut bomb =
            "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let before = vec![format!("*a{}", level - 1); 9].join(", ");
            writeln!(bomb, "  a{level}: &a{level} [{before}]").unwrap();
        }
        check(
            &bomb,
            expect![[r#"
                5:24 Refuses: the document is too deep or refers to itself too often; write it out, or split it into several documents
            "#]],
        );
        check(
            &"[".repeat(10_000),
            expect![[r#"
            1:256 Refuses: not YAML: recursion limit exceeded; correct the line
        "#]],
        );
    }

    #[test]
    fn a_place_in_the_second_document_counts_from_the_top_of_the_file() {
        let text = format!("{SERVICE}---\n# about it\n{SERVICE}");
        let documents = read(&text);
        let second = documents[1].as_ref().unwrap();
        let ports = FieldPath::root().field("spec").field("ports").index(0).field("port");
        assert_eq!(second.position(&ports).to_string(), "10:39");
    }

    #[test]
    fn a_carriage_return_ends_a_line() {
        let broken = SERVICE.replace("spec:", "nothing: {}\nspec:");
        for ending in ["\n", "\r\n", "\r"] {
            let both = format!("{SERVICE}---\n{broken}").replace('\n', ending);
            let read = read(&both);
            let [Ok(first), Err(fault)] = &read[..] else { panic!("{ending:?}: {read:?}") };
            let spec = first.position(&FieldPath::root().field("spec")).line;
            let lines = SERVICE.lines().count();
            assert_eq!(
                (spec, fault.at.line),
                (line_of(SERVICE, "spec:"), lines + 1 + line_of(&broken, "nothing:")),
                "{ending:?}"
            );
        }
    }

    fn line_of(text: &str, beginning: &str) -> usize {
        text.lines().position(|line| line.starts_with(beginning)).unwrap() + 1
    }

    #[test]
    fn every_document_survives_writing_and_reading() {
        for document in read(SERVICE) {
            let resource = document.unwrap().resource;
            let json = resource.to_json();
            assert_eq!(Resource::from_json(resource.key().kind, json.as_bytes()).unwrap(), resource);
            assert_eq!(Resource::from_json(resource.key().kind, json.as_bytes()).unwrap().to_json(), json);
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "(?s).{0,200}") {
            read(&text).len();
        }

        #[test]
        fn no_broken_document_makes_the_reader_panic(at in 0..SERVICE.len(), with in "[\\x00-\\x7f]{0,4}") {
            let mut text = SERVICE.to_owned();
            text.insert_str(at, &with);
            for document in read(&text).into_iter().flatten() {
                document.position(&FieldPath::root().field("spec").field("ports").index(0));
            }
        }
    }
}

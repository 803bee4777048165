//! The resource definitions that a cluster takes, written from the documents' own structs. `cargo xtask gen` writes them anew;
//! as a test it proves that what is committed is what the structs say.
//!
//! Sources: Kubernetes, "Extend the Kubernetes API with CustomResourceDefinitions" (structural schemas, validation rules in
//! CEL, additional printer columns). What `outrigger check` refuses and a schema can say is refused by the API server itself;
//! the rest is the validating webhook's.

use std::fmt::Write as _;

use expect_test::expect_file;
use serde_json::{Map, Value, json};

use super::Kind;
use super::reference::{choices, optional, root, schemas};

#[test]
fn the_resource_definitions_say_what_the_structs_say() {
    let mut text = String::from("# Generated from the code by `cargo xtask gen`; edits are lost.\n");
    for (kind, schema) in schemas().into_iter().filter(|(kind, _)| kind.api_version().starts_with("outrigger.dev/")) {
        let definition = definition(kind, schema);
        writeln!(text, "---\n{}", serde_saphyr::to_string(&definition).unwrap().trim_end()).unwrap();
    }
    expect_file![root().join("deploy/crds/outrigger.yaml")].assert_eq(&text);
}

/// Takes away what the schema does not know, as the API server does before it asks anybody ("Field pruning").
fn prune(schema: &Value, value: &mut Value) {
    let keeps = schema.get("x-kubernetes-preserve-unknown-fields").is_some_and(|keeps| keeps == true);
    match value {
        Value::Object(fields) => {
            let known = |name: &str| schema.get("properties")?.get(name).or_else(|| schema.get("additionalProperties"));
            // Metadata has a schema of its own, which no definition writes.
            fields.retain(|name, _| keeps || known(name).is_some());
            for (name, field) in fields.iter_mut().filter(|(name, _)| *name != "metadata") {
                known(name).into_iter().for_each(|schema| prune(schema, field));
            }
        }
        Value::Array(elements) => {
            let schema = schema.get("items").unwrap_or(&Value::Null);
            elements.iter_mut().for_each(|element| prune(schema, element));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn the_api_server_takes_no_field_away_that_the_model_refuses() {
    let schemas: Vec<_> = schemas().into_iter().map(|(kind, schema)| (kind, definition(kind, schema))).collect();
    let stored = |kind: &str, spec: &str| {
        let (_, definition) = schemas.iter().find(|(of, _)| of.as_str() == kind).unwrap();
        let text = format!("apiVersion: outrigger.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: a, namespace: shop}}\n{spec}\n");
        let mut document: Value = serde_saphyr::from_str(&text).unwrap();
        prune(definition.pointer("/spec/versions/0/schema/openAPIV3Schema").unwrap(), &mut document);
        document.to_string()
    };
    let refused = |text: &str| crate::model::yaml::read(text).remove(0).err().map(|fault| fault.text);
    let target = "targetRefs: [{kind: Service, name: web}]";
    for (kind, spec, unknown) in [
        ("AuthorizationPolicy", "spec: {action: ALLOW, rules: [{}]}\nrulez: []", "rulez"),
        ("AuthorizationPolicy", "spec: {action: DENY, rules: [{}], rulez: []}", "rulez"),
        ("AuthorizationPolicy", "spec: {action: ALLOW, rules: [{to: [{paths: [/x], methodz: [PUT]}]}]}", "methodz"),
        ("AuthorizationPolicy", "spec: {action: ALLOW, rules: [{from: [{namespaces: [two], principalz: [a]}]}]}", "principalz"),
        ("AuthorizationPolicy", "spec: {action: ALLOW, rules: [{wen: [{claim: sub, values: [a]}]}]}", "wen"),
        ("AuthorizationPolicy", "spec: {action: ALLOW, rules: [{when: [{claim: sub, values: [a], valuez: [b]}]}]}", "valuez"),
        ("AuthorizationPolicy", "spec: {targetRefs: [{kind: Service, name: web, port: 80}], action: ALLOW}", "port"),
        ("RequestAuthentication", "spec: {providers: [{issuer: a, audiences: [b], jwks: {keys: []}, audience: b}]}", "audience"),
        ("PeerAuthentication", "spec: {mode: Permissive, portLevel: [{port: 80, mode: Strict, modes: Strict}]}", "modes"),
        ("TrafficPolicy", &format!("spec: {{{target}, rateLimit: {{requests: 1, per: 1s, pir: 1m}}}}"), "pir"),
        ("TrafficPolicy", &format!("spec: {{{target}, fault: {{abort: {{percent: 1, status: 503, code: 1}}}}}}"), "code"),
        ("Mesh", "spec: {limits: {headerByte: 9000}}", "headerByte"),
        ("Workload", "spec: {addresses: [192.0.2.9], ports: [{port: 80, protocl: http}]}", "protocl"),
    ] {
        let stored = stored(kind, spec);
        let told = refused(&stored);
        assert!(told.as_ref().is_some_and(|told| told.contains(unknown)), "{kind} {spec}: {told:?}");
    }
    // What is known comes through as it is written.
    let good = "spec: {targetRefs: [{kind: Service, name: web}], action: ALLOW, rules: [{to: [{paths: [/x], methods: [PUT]}]}]}";
    assert_eq!(refused(&stored("AuthorizationPolicy", good)), None);
    // What the control plane says is its own: nobody puts there what no schema knows.
    assert!(!stored("AuthorizationPolicy", &format!("{good}\nstatus: {{kept: [], more: 1}}")).contains("more"));
}

fn definition(kind: Kind, schema: Value) -> Value {
    let singular = kind.as_str().to_lowercase();
    let mut spec = structural(schema);
    for (path, rules) in rules(kind) {
        add(&mut spec, path, rules);
    }
    let mut names = json!({
        "kind": kind.as_str(),
        "plural": kind.plural(),
        "singular": singular,
        "categories": ["outrigger"],
    });
    if kind.short() != singular {
        names["shortNames"] = json!([kind.short()]);
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{}.outrigger.dev", kind.plural()) },
        "spec": {
            "group": "outrigger.dev",
            // There is one for all namespaces: who may write in one of them does not rule the others.
            "scope": if kind == Kind::Mesh { "Cluster" } else { "Namespaced" },
            "names": names,
            "versions": [{
                "name": "v1alpha1",
                "served": true,
                "storage": true,
                "subresources": { "status": {} },
                "additionalPrinterColumns": columns(kind),
                "schema": { "openAPIV3Schema": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": true,
                    "required": ["spec"],
                    "properties": {
                        "apiVersion": { "type": "string" },
                        "kind": { "type": "string" },
                        "metadata": { "type": "object" },
                        "spec": spec,
                        "status": status(),
                    },
                } },
            }],
        },
    })
}

/// What `kubectl get` shows beside the name.
fn columns(kind: Kind) -> Vec<Value> {
    let column = |name: &str, path: &str| json!({ "name": name, "type": "string", "jsonPath": path });
    let mut columns = match kind {
        Kind::Mesh => vec![column("Egress", ".spec.egress"), column("Authorization", ".spec.defaultAuthorization")],
        Kind::Workload => vec![
            column("Address", ".spec.addresses[0]"),
            column("Account", ".spec.serviceAccount"),
            column("Transport", ".spec.transport"),
        ],
        Kind::AuthorizationPolicy => vec![column("Action", ".spec.action")],
        Kind::RequestAuthentication => vec![column("Tokens", ".spec.tokens"), column("Issuer", ".spec.providers[0].issuer")],
        Kind::PeerAuthentication => vec![column("Mode", ".spec.mode")],
        _ => Vec::new(),
    };
    if kind == Kind::TrafficPolicy {
        columns.push(column("Target", ".spec.targetRefs[0].name"));
    }
    columns.push(column("Accepted", ".status.conditions[?(@.type==\"Accepted\")].status"));
    let mut message = column("Message", ".status.conditions[?(@.type==\"Accepted\")].message");
    message["priority"] = 1.into();
    columns.push(message);
    columns.push(json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" }));
    columns
}

/// Conditions, as Kubernetes has them anywhere.
fn status() -> Value {
    let text = |most: u32| json!({ "type": "string", "maxLength": most });
    json!({
        "type": "object",
        "properties": { "kept": {
            "description": "Of a security policy: what it covers beyond where its Services lead now.",
            "type": "array",
            "maxItems": 256,
            "items": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
        }, "conditions": {
            "type": "array",
            "maxItems": 8,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
            "items": {
                "type": "object",
                "required": ["type", "status", "reason", "message", "lastTransitionTime"],
                "properties": {
                    "type": text(316),
                    "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                    "reason": text(1024),
                    "message": text(32768),
                    "lastTransitionTime": { "type": "string", "format": "date-time" },
                    "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0 },
                },
            },
        } },
    })
}

/// What is refused beyond the types, by the place in `spec`; `[]` is every element of a list.
fn rules(kind: Kind) -> Vec<(&'static str, Value)> {
    let count = |least: u32, most: u32| json!({ "minimum": least, "maximum": most });
    let rule = |rule: &str, message: &str| json!({ "x-kubernetes-validations": [{ "rule": rule, "message": message }] });
    let list = |least: u32, most: u32| json!({ "minItems": least, "maxItems": most });
    let by = |key: &str| json!({ "maxItems": 256, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key] });
    let name = || json!({ "minLength": 1, "maxLength": 253 });
    // A word of one part must stand there, or none at all.
    let targets = |least: u32| {
        vec![
            ("targetRefs", list(least, 64)),
            ("targetRefs[].name", name()),
            (
                "targetRefs[]",
                rule(
                    "!has(self.group) || self.group == '' || (self.kind == 'Service' ? self.group == 'core' : self.group == 'outrigger.dev')",
                    "there is no such kind in this group; leave group out",
                ),
            ),
        ]
    };
    match kind {
        Kind::Mesh => vec![
            ("ranges", list(1, 256)),
            ("ranges[]", json!({ "maxLength": 49 })),
            ("ranges[]", rule("isCIDR(self)", "it is not a network; write one as 10.64.0.0/16 or fd64::/64")),
            ("limits.headerBytes", count(8_192, 1 << 20)),
            ("limits.largeHeadBytes", count(1 << 20, 1 << 30)),
            ("limits.headerCount", count(32, 4_096)),
            ("limits.uriBytes", count(256, 65_534)),
            ("limits.concurrentStreams", count(1, 10_000)),
            ("limits.resets", count(10, 100_000)),
            ("limits.pendingResets", count(1, 10_000)),
            ("limits.errorResets", count(1, 100_000)),
            ("limits.controlFrames", count(100, 1_000_000)),
            ("limits.uploadBytes", count(0, 1 << 30)),
            ("limits.answerBytes", count(0, 1 << 30)),
            ("limits.upstreamConnections", count(1, 65_536)),
        ],
        Kind::Workload => vec![
            ("", rule("has(self.node) || self.addresses.size() > 0", "the workload has no address; write at least one")),
            ("addresses", list(0, 16)),
            ("addresses[]", json!({ "maxLength": 45 })),
            ("addresses[]", rule("isIP(self)", "it is not an IP address; write one as 10.64.0.5 or fd64::5")),
            ("serviceAccount", name()),
            ("ports", by("port")),
        ],
        Kind::AuthorizationPolicy => {
            let mut rules = targets(0);
            rules.extend([
                (
                    "rules[].from[]",
                    rule(
                        "has(self.principals) || has(self.namespaces)",
                        "the caller is not described; write principals or namespaces, or leave from out",
                    ),
                ),
                (
                    "rules[].to[]",
                    rule(
                        "has(self.methods) || has(self.paths) || has(self.ports)",
                        "the request is not described; write methods, paths or ports, or leave to out",
                    ),
                ),
                ("rules[].from[].principals", list(1, 1_024)),
                ("rules[].from[].namespaces", list(1, 1_024)),
                ("rules[].to[].methods", list(1, 64)),
                ("rules[].to[].methods[]", json!({ "pattern": "^([A-Z]+|\\*)$" })),
                ("rules[].to[].paths", list(1, 1_024)),
                ("rules[].to[].paths[]", json!({ "minLength": 1, "pattern": "^[/*][^?#]*$" })),
                ("rules[].to[].ports", list(1, 256)),
                ("rules[].when[].claim", json!({ "minLength": 1 })),
                ("rules[].when[].values", list(1, 1_024)),
            ]);
            rules
        }
        Kind::RequestAuthentication => {
            let mut rules = targets(0);
            rules.extend([
                (
                    "from",
                    rule(
                        "has(self.header) != has(self.queryParam)",
                        "the place of the token is not one place; write header or queryParam, one of them",
                    ),
                ),
                ("providers", list(1, PROVIDERS_MAX)),
                (
                    "providers[]",
                    rule("!has(self.jwksFile)", "a document of a cluster has no files beside it; write the keys into jwks"),
                ),
                ("providers[]", rule("has(self.jwks)", "the issuer has no keys; write its public keys into jwks")),
                ("providers[].issuer", json!({ "minLength": 1 })),
                ("providers[].audiences", list(1, 64)),
                ("providers[].jwks.keys", list(1, 16)),
                ("providers[].leeway", rule("duration(self) <= duration('5m')", "write at most 5m")),
            ]);
            rules
        }
        Kind::PeerAuthentication => {
            let mut rules = targets(0);
            rules.push(("portLevel", by("port")));
            rules
        }
        Kind::TrafficPolicy => {
            let mut rules = targets(1);
            rules.extend([
                (
                    "targetRefs[]",
                    rule("self.kind == 'Service'", "it is for Services; write the Service that leads to the Workload"),
                ),
                ("circuitBreaking.ejection.consecutiveFailures", json!({ "minimum": 1 })),
                ("circuitBreaking.limits.maxConnections", json!({ "minimum": 1 })),
                ("circuitBreaking.limits.maxPendingRequests", json!({ "minimum": 1 })),
                ("circuitBreaking.limits.maxRequests", json!({ "minimum": 1 })),
                (
                    "fault",
                    rule(
                        "has(self.delay) || has(self.abort)",
                        "the fault does nothing; write delay, abort or both, or leave the fault out",
                    ),
                ),
                ("fault.abort.status", count(400, 599)),
                (
                    "fault.delay.duration",
                    rule("duration(self) >= duration('1ms') && duration(self) <= duration('5m')", "write 1ms to 5m"),
                ),
                ("rateLimit.requests", json!({ "minimum": 1 })),
                ("rateLimit.burst", json!({ "minimum": 1 })),
                (
                    "rateLimit.per",
                    rule("duration(self) >= duration('1ms') && duration(self) <= duration('24h')", "write 1ms to 24h"),
                ),
                (
                    "retryBudget.interval",
                    rule("duration(self) >= duration('1s') && duration(self) <= duration('1h')", "write 1s to 1h"),
                ),
            ]);
            rules
        }
        _ => Vec::new(),
    }
}

/// Providers of one RequestAuthentication.
const PROVIDERS_MAX: u32 = 16;

/// Adds to the schema of a place; rules beside those that are there.
fn add(schema: &mut Value, path: &str, more: Value) {
    let mut at = schema;
    for part in path.split('.').filter(|part| !part.is_empty()) {
        let (name, lists) = (part.trim_end_matches("[]"), part.matches("[]").count());
        at = at.get_mut("properties").and_then(|fields| fields.get_mut(name)).unwrap_or_else(|| panic!("{path}: no {name}"));
        for _ in 0..lists {
            at = at.get_mut("items").unwrap_or_else(|| panic!("{path}: {name} is no list"));
        }
    }
    for (key, value) in more.as_object().unwrap() {
        match (at.get_mut(key), value) {
            (Some(Value::Array(known)), Value::Array(more)) => known.extend(more.iter().cloned()),
            _ => at[key] = value.clone(),
        }
    }
}

/// The same as Kubernetes wants it: one type, no alternatives with types of their own, no closed objects (unknown fields
/// are the webhook's to refuse), `nullable` nowhere (what may be absent is simply not required).
fn structural(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else {
        return json!({ "x-kubernetes-preserve-unknown-fields": true });
    };
    for key in ["$schema", "title", "default"] {
        schema.remove(key);
    }
    if let Some(Value::String(format)) = schema.get("format")
        && !matches!(format.as_str(), "int32" | "int64" | "double")
    {
        schema.remove("format");
    }
    // Spans. What is reckoned with must have a bound.
    if schema.contains_key("pattern") && !schema.contains_key("maxLength") {
        schema.insert("maxLength".to_owned(), 32.into());
    }
    // The only number of two bytes that a document has is a port.
    if schema.get("maximum").is_some_and(|most| *most == u16::MAX) {
        schema.insert("minimum".to_owned(), 1.into());
    }
    if let Some(Value::Array(types)) = schema.get("type") {
        let one = types.iter().find(|one| **one != "null").cloned();
        schema.insert("type".to_owned(), one.unwrap());
    }
    if let Some(Value::Array(values)) = schema.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    if let Some(values) = choices(&Value::Object(schema.clone())) {
        schema.remove("oneOf");
        schema.remove("anyOf");
        schema.insert("type".to_owned(), "string".into());
        schema.insert("enum".to_owned(), values.into_iter().map(Value::from).collect());
    } else if let Some(inner) = optional(&schema) {
        let mut inner = structural(inner);
        if let (Value::Object(inner), Some(description)) = (&mut inner, schema.get("description")) {
            inner.insert("description".to_owned(), description.clone());
        }
        return inner;
    }
    if schema.contains_key("x-kubernetes-int-or-string") {
        schema.remove("anyOf");
    }
    let has_fields = schema.contains_key("properties");
    match schema.remove("additionalProperties") {
        Some(Value::Bool(true)) if !has_fields => {
            schema.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
        }
        // The model refuses what it does not know; the API server must not take that away before anybody has seen it.
        Some(Value::Bool(false)) => {
            schema.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
        }
        Some(values @ Value::Object(_)) => {
            schema.insert("additionalProperties".to_owned(), structural(values));
        }
        _ => {}
    }
    if let Some(Value::Object(properties)) = schema.remove("properties") {
        let properties: Map<String, Value> = properties.into_iter().map(|(name, value)| (name, structural(value))).collect();
        schema.insert("properties".to_owned(), properties.into());
    }
    if let Some(items) = schema.remove("items") {
        schema.insert("items".to_owned(), structural(items));
    }
    schema.into()
}

//! The reference of every field, written from the documents' own structs. `cargo xtask gen` writes it anew; as a test it proves
//! that what is committed is what the structs say.

use std::fmt::Write as _;
use std::path::Path;

use expect_test::expect_file;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::Kind;
use super::authorization_policy::AuthorizationPolicySpec;
use super::grpc_route::GrpcRouteSpec;
use super::http_route::HttpRouteSpec;
use super::mesh::MeshSpec;
use super::object::Spec;
use super::peer_authentication::PeerAuthenticationSpec;
use super::reference_grant::ReferenceGrantSpec;
use super::request_authentication::RequestAuthenticationSpec;
use super::service::ServiceSpec;
use super::tcp_route::TcpRouteSpec;
use super::tls_route::TlsRouteSpec;
use super::traffic_policy::TrafficPolicySpec;
use super::workload::WorkloadSpec;

#[test]
fn the_reference_says_what_the_structs_say() {
    let mut text = String::from(
        "# Reference: every field of every document\n\nGenerated from the code by `cargo xtask gen`; edits are lost. What the \
         policies decide together is told in [policies.md](policies.md).\nA field marked * must be there. Durations are written \
         as `250ms`, `10s`, `1h30m`.\n",
    );
    for (kind, schema) in schemas() {
        write!(text, "\n## {kind}\n\n`apiVersion: {}`\n\n", kind.api_version()).unwrap();
        writeln!(text, "{}\n", described(&schema)).unwrap();
        writeln!(text, "| field of `spec` | type | meaning |\n| --- | --- | --- |").unwrap();
        fields(&schema, "", &mut text);
    }
    expect_file![root().join("docs/reference.md")].assert_eq(&text);
}

pub(super) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

pub(super) fn schemas() -> Vec<(Kind, Value)> {
    fn of<S: Spec + JsonSchema>() -> (Kind, Value) {
        let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
        (S::KIND, settings.into_generator().into_root_schema_for::<S>().to_value())
    }
    vec![
        of::<MeshSpec>(),
        of::<ServiceSpec>(),
        of::<WorkloadSpec>(),
        of::<HttpRouteSpec>(),
        of::<GrpcRouteSpec>(),
        of::<TlsRouteSpec>(),
        of::<TcpRouteSpec>(),
        of::<ReferenceGrantSpec>(),
        of::<AuthorizationPolicySpec>(),
        of::<RequestAuthenticationSpec>(),
        of::<PeerAuthenticationSpec>(),
        of::<TrafficPolicySpec>(),
    ]
}

/// The schema of what may also be null.
pub(super) fn optional(schema: &Map<String, Value>) -> Option<Value> {
    let either = schema.get("anyOf")?.as_array()?;
    let (null, rest): (Vec<_>, Vec<_>) = either.iter().partition(|one| one.get("type").is_some_and(|of| of == "null"));
    (null.len() == 1 && rest.len() == 1).then(|| rest[0].clone())
}

/// The words of which one must stand there.
pub(super) fn choices(schema: &Value) -> Option<Vec<String>> {
    let word = |one: &Value| one.get("const").and_then(Value::as_str).map(str::to_owned);
    let mut words = Vec::new();
    for one in schema.get("oneOf").or_else(|| schema.get("enum"))?.as_array()? {
        match (one.as_str(), word(one), one.get("enum").and_then(Value::as_array)) {
            (Some(text), _, _) => words.push(text.to_owned()),
            (_, Some(text), _) => words.push(text),
            (_, _, Some(several)) => words.extend(several.iter().filter_map(Value::as_str).map(str::to_owned)),
            _ if one.is_null() => {}
            _ => return None,
        }
    }
    (!words.is_empty()).then_some(words)
}

fn described(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
    let mut text = text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    for one in schema.get("oneOf").and_then(Value::as_array).into_iter().flatten() {
        if let (Some(word), Some(meaning)) =
            (one.get("const").and_then(Value::as_str), one.get("description").and_then(Value::as_str))
        {
            write!(text, " `{word}`: {}", meaning.split_whitespace().collect::<Vec<_>>().join(" ")).unwrap();
        }
    }
    text.trim().to_owned()
}

/// One row for each field, and for each field inside it.
fn fields(schema: &Value, path: &str, text: &mut String) {
    let required: Vec<&str> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let inner = field.as_object().and_then(optional).unwrap_or_else(|| field.clone());
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let star = if required.contains(&name.as_str()) { "*" } else { "" };
        let mut meaning = described(field);
        if meaning.is_empty() {
            meaning = described(&inner);
        }
        writeln!(text, "| `{path}`{star} | {} | {meaning} |", type_of(&inner)).unwrap();
        match inner.get("items") {
            Some(items) => fields(items, &format!("{path}[]"), text),
            None => fields(&inner, &path, text),
        }
    }
}

fn type_of(schema: &Value) -> String {
    if let Some(words) = choices(schema) {
        return words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(" or ");
    }
    if schema.get("x-kubernetes-int-or-string").is_some() {
        return "number or text".to_owned();
    }
    let one = match schema.get("type") {
        Some(Value::Array(types)) => types.iter().find_map(|one| one.as_str().filter(|one| *one != "null")),
        other => other.and_then(Value::as_str),
    };
    match one {
        Some("array") => format!("list of {}", schema.get("items").map_or_else(|| "anything".to_owned(), type_of)),
        Some("object") if schema.get("properties").is_none() => "map".to_owned(),
        Some("object") => "object".to_owned(),
        Some("integer" | "number") => "number".to_owned(),
        Some("boolean") => "true or false".to_owned(),
        Some("string") if schema.get("pattern").is_some() => "duration".to_owned(),
        Some("string") => "text".to_owned(),
        _ => "anything".to_owned(),
    }
}

//! What is wrong with a document, and what to do about it, in our words.

use serde_saphyr::{DefaultMessageFormatter, Error, MessageFormatter as _};

use super::Fault;
use super::source::Source;
use crate::base::names::nearest;
use crate::base::problems::Severity;

/// An error of the parser in our words.
pub(super) fn told(source: &Source, error: &Error) -> Fault {
    let mut error = error.without_snippet();
    while let Error::AliasError { error: inner, .. } = error {
        error = inner.without_snippet();
    }
    let among = |wrong: &str, expected: &[&str]| match nearest(wrong, expected.iter().copied()) {
        Some(meant) => format!("did you mean {meant:?}?"),
        None if expected.is_empty() => "leave it out".to_owned(),
        None => format!("known here: {}", expected.join(", ")),
    };
    let (text, remedy) = match error {
        Error::SerdeUnknownField { field: word, .. } | Error::SerdeUnknownVariant { variant: word, .. }
            if NOT_CARRIED_OUT.contains(&word.as_str()) =>
        {
            (format!("Gateway API's {word} is not carried out here"), "leave it out".to_owned())
        }
        Error::SerdeUnknownField { field, expected, .. } => {
            // What is read only to be passed over is not offered; what Kubernetes reads is recognised, and not listed.
            let offered: Vec<_> = expected.iter().copied().filter(|name| !PASSED_OVER.contains(name)).collect();
            let read: Vec<_> = offered.iter().copied().filter(|name| !KUBERNETES_READS.contains(name)).collect();
            let meant = nearest(field, read.iter().copied()).or_else(|| nearest(field, offered.iter().copied()));
            let remedy = meant.map_or_else(|| among(field, &read), |meant| format!("did you mean {meant:?}?"));
            (format!("unknown field {field:?}"), remedy)
        }
        Error::SerdeUnknownVariant { variant, expected, .. } => {
            let meant = nearest(variant, expected.iter().copied()).map(|meant| format!("did you mean {meant:?}? "));
            let remedy = format!("{}known here: {}", meant.unwrap_or_default(), expected.join(", "));
            (format!("{variant:?} is not a value of this field"), remedy)
        }
        Error::SerdeMissingField { field, .. } => (format!("the field {field:?} is missing"), format!("write {field}")),
        Error::SerdeInvalidType { unexpected, expected, .. } | Error::SerdeInvalidValue { unexpected, expected, .. } => {
            (format!("{unexpected} stands where {expected} is expected"), format!("write {expected}"))
        }
        Error::InvalidScalar { ty, location } => {
            (format!("{} is not {}", source.written(Some(*location)), plain(ty)), "write one".to_owned())
        }
        Error::InvalidBooleanStrict { location } => {
            (format!("{} is not true or false", source.written(Some(*location))), "write true or false".to_owned())
        }
        Error::Unexpected { expected, location, .. } => {
            let expected = plain(expected);
            (format!("{} stands where {expected} is expected", source.written(Some(*location))), format!("write {expected}"))
        }
        Error::NullIntoString { .. } => ("the value is empty".to_owned(), "write a text, or leave the field out".to_owned()),
        Error::DuplicateMappingKey { key, .. } => {
            let key = key.as_deref().unwrap_or("a key");
            (format!("{key:?} is there twice"), "keep one of the two".to_owned())
        }
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => {
            let text = "the document is too deep or refers to itself too often".to_owned();
            (text, "write it out, or split it into several documents".to_owned())
        }
        Error::Message { msg, location } if msg == BAD_ADDRESS => {
            let text = format!("{} is not an IP address", source.written(Some(*location)));
            (text, "write one as 10.64.0.5 or fd64::5".to_owned())
        }
        // Our own types say what to write behind what is wrong.
        Error::Message { msg, .. } => match msg.split_once("; ") {
            Some((text, remedy)) => (text.to_owned(), remedy.to_owned()),
            None => (msg.clone(), "correct the value".to_owned()),
        },
        other => {
            let message = DefaultMessageFormatter.format_message(other);
            (format!("not YAML: {}", message.trim_end_matches('.')), "correct the line".to_owned())
        }
    };
    Fault { at: source.at(error.location()), text, remedy, severity: Severity::Refuses, key: None, body: None }
}

/// The parser's word for a kind of value, in ours.
fn plain(word: &str) -> &str {
    match word {
        "mapping start" | "mapping" => "a mapping",
        "sequence start" | "sequence" => "a list",
        "string scalar" | "string" => "a text",
        "bool" => "true or false",
        "i8" | "i16" | "i32" | "i64" => "a whole number",
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 1 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number from 0 on",
        "f32" | "f64" | "floating point" => "a number",
        other => other,
    }
}

/// What the standard library says of a text that is no address.
const BAD_ADDRESS: &str = "invalid IP address syntax";

/// Words of Gateway API that are spelt well, and mean something that is not done here.
const NOT_CARRIED_OUT: [&str; 4] = ["ExternalAuth", "externalAuth", "sessionPersistence", "useDefaultGateways"];

/// Fields of a Service that mean nothing here and something in a cluster.
const KUBERNETES_READS: [&str; 19] = [
    "allocateLoadBalancerNodePorts",
    "externalIPs",
    "externalName",
    "externalTrafficPolicy",
    "healthCheckNodePort",
    "internalTrafficPolicy",
    "ipFamilies",
    "ipFamily",
    "ipFamilyPolicy",
    "loadBalancerClass",
    "loadBalancerIP",
    "loadBalancerSourceRanges",
    "nodePort",
    "publishNotReadyAddresses",
    "sessionAffinity",
    "sessionAffinityConfig",
    "topologyKeys",
    "trafficDistribution",
    "type",
];

/// Fields of `metadata` that are read and passed over.
const PASSED_OVER: [&str; 11] = [
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "status",
    "uid",
];

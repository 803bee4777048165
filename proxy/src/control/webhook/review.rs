//! The question of the API server and the answer to it: AdmissionReview of admission.k8s.io/v1.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What is asked.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Request {
    pub(super) uid: String,
    pub(super) kind: GroupVersionKind,
    #[serde(default)]
    pub(super) sub_resource: Option<String>,
    /// Empty where the API server is to find one.
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) namespace: Option<String>,
    pub(super) operation: String,
    #[serde(default)]
    pub(super) object: Value,
}

#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(default)]
pub(super) struct GroupVersionKind {
    pub(super) group: String,
    pub(super) version: String,
    pub(super) kind: String,
}

impl fmt::Display for GroupVersionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, version, kind } = self;
        let slash = if group.is_empty() { "" } else { "/" };
        write!(f, "{group}{slash}{version} {kind}")
    }
}

/// Why a question cannot be read. Whoever asks is at fault.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("this is no admission review: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{found:?} is not read here; ask in {VERSION} AdmissionReview (admissionReviewVersions: [v1])")]
    Version { found: String },
    #[error("the admission review holds no request")]
    Empty,
    #[error(
        "an admission review that takes more than {WEIGHT_MAX} bytes to take in is not read; write a smaller object, or several"
    )]
    Heavy,
}

impl Fault {
    /// Its name in logs and metrics.
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Self::Json(_) => "not_a_review",
            Self::Version { .. } => "version",
            Self::Empty => "no_request",
            Self::Heavy => "too_large",
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Allowed { word: &'static str, patch: Option<json_patch::Patch>, warnings: Vec<String> },
    Refused { word: &'static str, text: String },
}

/// The half of a review that says yes.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    uid: &'a str,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<String>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
}

/// Bytes that the values of a JSON text take in memory, roughly: an object of one member is eight bytes of text, and a node of a tree
/// with room for eleven.
pub(super) fn weight(text: &[u8]) -> usize {
    let (mut weight, mut in_text, mut is_escaped) = (text.len(), false, false);
    for byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_text => is_escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'{' => weight += TREE_NODE,
            b',' | b'[' => weight += VALUE,
            b':' => weight += MEMBER,
            _ => {}
        }
    }
    weight
}

/// Of a map of texts to values, in the standard library: eleven of both, and what holds them together.
const TREE_NODE: usize = 640;
const MEMBER: usize = TREE_NODE / 11;
const VALUE: usize = size_of::<Value>();

/// The heaviest question that is read. It is held several times over while it is answered.
pub(super) const WEIGHT_MAX: usize = 32 << 20;

/// Reads a question.
///
/// # Errors
/// It is none of this version.
pub(super) fn read(body: &[u8]) -> Result<Request, Fault> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Review {
        #[serde(default)]
        api_version: String,
        #[serde(default)]
        kind: String,
        request: Option<Value>,
    }
    let Review { api_version, kind, request } = serde_json::from_slice(body)?;
    if api_version != VERSION || kind != KIND {
        return Err(Fault::Version { found: format!("{api_version} {kind}") });
    }
    Ok(serde_json::from_value(request.ok_or(Fault::Empty)?)?)
}

/// The uid of a question of which only the beginning is there. The API server writes it before all that comes from people.
pub(super) fn uid(beginning: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(beginning);
    let (_, request) = text.split_once("\"request\"")?;
    let (_, after) = request.split_once("\"uid\"")?;
    let (_, quoted) = after.split_once('"')?;
    let (uid, _) = quoted.split_once('"')?;
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (uid.len() <= UID_MAX && uid.bytes().all(fits)).then(|| uid.to_owned())
}

impl Answer {
    pub(super) fn allowed(word: &'static str) -> Self {
        Self::Allowed { word, patch: None, warnings: Vec::new() }
    }

    pub(super) fn refused(word: &'static str, text: String) -> Self {
        Self::Refused { word, text }
    }

    /// Its name in logs and metrics.
    pub(super) const fn word(&self) -> &'static str {
        match self {
            Self::Allowed { word, .. } | Self::Refused { word, .. } => word,
        }
    }

    /// Why it is refused, if it is.
    pub(super) fn refusal(&self) -> Option<&str> {
        match self {
            Self::Allowed { .. } => None,
            Self::Refused { text, .. } => Some(text),
        }
    }

    /// In the form that the API server reads.
    pub(super) fn review(&self, uid: &str) -> Value {
        let response = match self {
            Self::Allowed { patch, warnings, .. } => {
                // Maps with text keys and lists: all of it has a JSON form.
                let text = patch.as_ref().filter(|patch| !patch.0.is_empty()).and_then(|patch| serde_json::to_string(patch).ok());
                let response = Response {
                    uid,
                    allowed: true,
                    patch_type: text.as_ref().map(|_| "JSONPatch"),
                    patch: text.map(|text| STANDARD.encode(text)),
                    warnings,
                };
                serde_json::to_value(response).unwrap_or_default()
            }
            Self::Refused { text, .. } => {
                json!({ "uid": uid, "allowed": false, "status": { "code": 422, "reason": "Invalid", "message": text } })
            }
        };
        json!({ "apiVersion": VERSION, "kind": KIND, "response": response })
    }
}

const VERSION: &str = "admission.k8s.io/v1";
const KIND: &str = "AdmissionReview";
/// A UUID has 36 letters.
const UID_MAX: usize = 64;

//! Timeouts and deadlines.
//!
//! Sources: Gateway API GEP-1742 (HTTPRouteTimeouts; `0s` switches a timeout off); gRPC over HTTP/2, `grpc-timeout`.
//! A caller can shorten a rule's limit, never lengthen it.

use std::time::Duration;

use http::HeaderMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::base::problems::{FieldPath, Problems};
use crate::base::units::Span;

/// What a user writes (Gateway API HTTPRouteTimeouts).
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TimeoutsConfig {
    /// From the request to its answer, all attempts together; `0s` or absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request: Option<Span>,
    /// One attempt at one endpoint, at most `request`; `0s` or absent: no limit of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) backend_request: Option<Span>,
}

/// Compiled timeouts of a rule.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Timeouts {
    /// From the whole request header to the whole response header, all attempts together.
    pub(crate) request: Option<Duration>,
    /// One attempt.
    pub(crate) attempt: Option<Duration>,
}

impl TimeoutsConfig {
    /// Reports every fault under `at` and returns timeouts only if there is none.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Option<Timeouts> {
        let limit = |span: Option<Span>| span.map(|span| span.0).filter(|limit| !limit.is_zero());
        let (request, attempt) = (limit(self.request), limit(self.backend_request));
        if let (Some(request), Some(attempt)) = (request, attempt)
            && attempt > request
        {
            problems.refuse(
                &at.field("backendRequest"),
                format!("one attempt may take {}, which is longer than all of them together", Span(attempt)),
                format!("write at most {}", Span(request)),
            );
            return None;
        }
        Some(Timeouts { request, attempt })
    }
}

impl Timeouts {
    /// The moment at which the request must be answered: the rule's limit, cut by what the caller says it will wait
    /// (`grpc-timeout`).
    pub(crate) fn deadline(&self, headers: &HeaderMap, now: Instant) -> Option<Instant> {
        todo!()
    }
}

/// Reads a `grpc-timeout`: 1 to 8 digits and a unit (`H M S m u n`). `None` for anything else.
pub(crate) fn grpc_timeout(text: &[u8]) -> Option<Duration> {
    todo!()
}

//! What one client may ask of a sidecar before there is a request to decide about: sizes of heads, counts on a connection
//! of HTTP/2, and how long anything of a client is waited for.
//!
//! Sources: RFC 9110 15.5.9 (408), 15.5.15 (414), RFC 6585 5 (431), RFC 9113 10.5; CVE-2023-44487 (rapid reset), CVE-2019-9512
//! and -9515 (floods of PING and SETTINGS), CVE-2024-27316 (floods of CONTINUATION). Every limit has a range: none can be
//! switched off, and none can be set so low that ordinary clients meet it.

use std::ops::RangeInclusive;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::problems::{FieldPath, Problems};
use crate::base::units::Span;

/// What a user writes; what is left out has its default.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct LimitsConfig {
    /// Bytes of a request's head, request line and headers together, 8192 to 1048576; beyond it the answer is 431. Above 72 KiB
    /// it holds for the heads of answers too. Default: 65536.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) header_bytes: Option<u32>,
    /// Bytes that the heads over 4 KiB of all requests under way hold together, as HTTP/2 counts them, 1048576 to 1073741824; a request
    /// with such a head that would go beyond it is answered with 503, and small heads pass. It holds at once. Default: 67108864.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) large_head_bytes: Option<u32>,
    /// Headers of a request, 32 to 4096; beyond it the answer is 431. Above 256 it holds for answers too, which may have 100
    /// otherwise. Default: 256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) header_count: Option<u32>,
    /// Bytes of a request's target, 256 to 65534; beyond it the answer is 414. Default: 65534.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uri_bytes: Option<u32>,
    /// Requests at once on one connection of HTTP/2, 1 to 10000; more are refused one by one (REFUSED_STREAM), and clients
    /// wait or open another connection. Default: 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) concurrent_streams: Option<u32>,
    /// Streams that a client of HTTP/2 may take back within ten seconds before they were answered and within a second of
    /// their beginning, 10 to 100000; beyond it the connection is closed (ENHANCE_YOUR_CALM). Resets of streams that are over
    /// count too, but for one reset of each request. Default: 500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) resets: Option<u32>,
    /// Streams that a client of HTTP/2 may take back before the sidecar looked at them even once, 1 to 10000; beyond it the
    /// connection is closed. Default: 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pending_resets: Option<u32>,
    /// Streams of one connection that the sidecar resets because they break the protocol, 1 to 100000; beyond it the
    /// connection is closed. Default: 1024.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error_resets: Option<u32>,
    /// Frames of HTTP/2 within ten seconds that carry nothing of a request (PING, SETTINGS, PRIORITY, empty DATA, unknown
    /// ones, and WINDOW_UPDATE far beyond what was sent to the client), 100 to 1000000; beyond it the connection is closed.
    /// Default: 50000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) control_frames: Option<u32>,
    /// Bytes of requests' bodies that the sidecar holds for all its clients of HTTP/2 together because nobody takes them, beyond
    /// the MiB that each connection may always send, 0 to 1073741824; beyond it whoever has sent much waits. It holds at once, for
    /// connections that stand too. Default: 67108864.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) upload_bytes: Option<u32>,
    /// Bytes of answers that the sidecar holds for all its readers together because they do not read, and that it granted, on the
    /// connections in HTTP/2 that it opened, beyond the MiB that each of them is always granted, 0 to 1073741824; beyond it the
    /// answers of one connection share what it has. It holds at once, for connections that stand too. Default: 134217728.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) answer_bytes: Option<u32>,
    /// Connections in HTTP/1 that the sidecar opens to one address, for one client where that is the own application, 1 to 65536;
    /// beyond it requests wait for one of them, as many as 1024, and what is beyond that is answered with 503. Default: 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) upstream_connections: Option<u32>,
    /// From the first byte of a head to its last, 1s to 5m; beyond it the answer is 408. Default: 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) header_timeout: Option<Span>,
    /// How long a connection may carry nothing between requests, 1s to 24h; it is closed without an answer. Default: 15m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) idle_timeout: Option<Span>,
    /// How long a connection of HTTP/2 takes new requests, 1s to 24h, and up to a fifth less by chance; then its client is told
    /// to open another one (GOAWAY), and what is under way ends in peace. Default: 1h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) connection_age: Option<Span>,
    /// How long a request under way may stand still because its client reads nothing of what there is of the answer, or sends
    /// nothing of the body before the answer began (408), 1s to 24h. Streams on which both sides are silent, and calls of gRPC,
    /// wait for as long as they like. Default: 5m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stream_timeout: Option<Span>,
    /// From the first byte to the end of a TLS handshake between sidecars, 1s to 1m. Default: 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) handshake_timeout: Option<Span>,
}

/// What holds for a connection from its beginning to its end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Limits {
    pub(crate) header_bytes: u32,
    pub(crate) large_head_bytes: u32,
    pub(crate) header_count: u32,
    pub(crate) uri_bytes: u32,
    pub(crate) concurrent_streams: u32,
    pub(crate) resets: u32,
    pub(crate) pending_resets: u32,
    pub(crate) error_resets: u32,
    pub(crate) control_frames: u32,
    pub(crate) upload_bytes: u32,
    pub(crate) answer_bytes: u32,
    pub(crate) upstream_connections: u32,
    pub(crate) header_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) connection_age: Duration,
    pub(crate) stream_timeout: Duration,
    pub(crate) handshake_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_bytes: 64 * 1024,
            large_head_bytes: 64 << 20,
            header_count: 256,
            // The most that the codec of HTTP/1 reads.
            uri_bytes: 65_534,
            concurrent_streams: 1_000,
            resets: 500,
            pending_resets: 20,
            error_resets: 1_024,
            control_frames: 50_000,
            upload_bytes: 64 << 20,
            // Three hundred readers that stand still.
            answer_bytes: 128 << 20,
            // As many requests as another sidecar sends to one service, or to one pod by its address, where nothing else is written.
            upstream_connections: 4_096,
            header_timeout: Duration::from_secs(10),
            // Longer than a client keeps an idle connection, so that it is the client that closes it.
            idle_timeout: Duration::from_secs(15 * 60),
            // Longer than a sidecar keeps a link, so that it is the one that opened it who ends it.
            connection_age: Duration::from_secs(3_600),
            stream_timeout: Duration::from_secs(5 * 60),
            handshake_timeout: Duration::from_secs(10),
        }
    }
}

impl LimitsConfig {
    /// Reports every fault under `at`; a limit with a fault keeps its default.
    pub(crate) fn compile(&self, at: &FieldPath, problems: &mut Problems) -> Limits {
        let usual = Limits::default();
        let mut count = |field: &str, written: Option<u32>, range: RangeInclusive<u32>, usual: u32| match written {
            Some(written) if !range.contains(&written) => {
                let (least, most) = (range.start(), range.end());
                let text = format!("{written} is out of range");
                problems.refuse(&at.field(field), text, format!("write a number from {least} to {most}"));
                usual
            }
            written => written.unwrap_or(usual),
        };
        let header_bytes = count("headerBytes", self.header_bytes, 8_192..=HEADER_BYTES_MAX, usual.header_bytes);
        let large_head_bytes = count("largeHeadBytes", self.large_head_bytes, HEADER_BYTES_MAX..=1 << 30, usual.large_head_bytes);
        let header_count = count("headerCount", self.header_count, 32..=4_096, usual.header_count);
        let uri_bytes = count("uriBytes", self.uri_bytes, 256..=65_534, usual.uri_bytes);
        let concurrent_streams = count("concurrentStreams", self.concurrent_streams, 1..=10_000, usual.concurrent_streams);
        let resets = count("resets", self.resets, 10..=100_000, usual.resets);
        let pending_resets = count("pendingResets", self.pending_resets, 1..=10_000, usual.pending_resets);
        let error_resets = count("errorResets", self.error_resets, 1..=100_000, usual.error_resets);
        let control_frames = count("controlFrames", self.control_frames, 100..=1_000_000, usual.control_frames);
        let upload_bytes = count("uploadBytes", self.upload_bytes, 0..=1 << 30, usual.upload_bytes);
        let answer_bytes = count("answerBytes", self.answer_bytes, 0..=1 << 30, usual.answer_bytes);
        let upstream_connections =
            count("upstreamConnections", self.upstream_connections, 1..=65_536, usual.upstream_connections);
        let mut time = |field: &str, written: Option<Span>, most: Span, usual: Duration| match written {
            Some(written) if written.0 < LEAST_TIME.0 || written.0 > most.0 => {
                let text = format!("{written} is out of range");
                problems.refuse(&at.field(field), text, format!("write a duration from {LEAST_TIME} to {most}"));
                usual
            }
            written => written.map_or(usual, |written| written.0),
        };
        let day = Span(Duration::from_secs(24 * 3_600));
        Limits {
            header_bytes,
            large_head_bytes,
            header_count,
            uri_bytes,
            concurrent_streams,
            resets,
            pending_resets,
            error_resets,
            control_frames,
            upload_bytes,
            answer_bytes,
            upstream_connections,
            header_timeout: time("headerTimeout", self.header_timeout, Span(Duration::from_secs(300)), usual.header_timeout),
            idle_timeout: time("idleTimeout", self.idle_timeout, day, usual.idle_timeout),
            connection_age: time("connectionAge", self.connection_age, day, usual.connection_age),
            stream_timeout: time("streamTimeout", self.stream_timeout, day, usual.stream_timeout),
            handshake_timeout: time(
                "handshakeTimeout",
                self.handshake_timeout,
                Span(Duration::from_secs(60)),
                usual.handshake_timeout,
            ),
        }
    }
}

impl Limits {
    /// Those of a link. Many clients share it, and each was counted and waited for already by the sidecar that it came to: that
    /// one is to decide first, and to tell.
    pub(crate) fn on_link(self) -> Self {
        Self {
            resets: self.resets.saturating_mul(LINK_TAKES_BACK),
            pending_resets: self.pending_resets.saturating_mul(LINK_TAKES_BACK),
            error_resets: self.error_resets.saturating_mul(LINK_SHARED_BY),
            control_frames: self.control_frames.saturating_mul(LINK_SHARED_BY),
            stream_timeout: self.stream_timeout.saturating_add(LINK_LATER),
            ..self
        }
    }
}

/// The largest head of a request that a mesh may allow.
pub(crate) const HEADER_BYTES_MAX: u32 = 1 << 20;
/// How many clients a link between sidecars counts as.
const LINK_SHARED_BY: u32 = 10;
/// As how many clients it takes requests back. One that closes its connection takes all back that were under way on it, and may
/// do so again and again within its own limits: the requests of others go over the same link.
const LINK_TAKES_BACK: u32 = 100;
const LINK_LATER: Duration = Duration::from_secs(10);
const LEAST_TIME: Span = Span(Duration::from_secs(1));

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> (Limits, Vec<String>) {
        let config: LimitsConfig = serde_json::from_str(json).unwrap();
        let mut problems = Problems::of("Mesh/default/mesh");
        let limits = config.compile(&FieldPath::root().field("limits"), &mut problems);
        (
            limits,
            problems.into_vec().iter().map(|problem| format!("{}: {}; {}", problem.at, problem.text, problem.remedy)).collect(),
        )
    }

    #[test]
    fn what_is_not_written_has_its_default() {
        assert_eq!(check("{}"), (Limits::default(), Vec::new()));
        let (limits, problems) = check(r#"{ "headerCount": 100, "idleTimeout": "1m" }"#);
        assert!(problems.is_empty());
        let expected = Limits { header_count: 100, idle_timeout: Duration::from_secs(60), ..Limits::default() };
        assert_eq!(limits, expected);
    }

    #[test]
    fn a_limit_out_of_its_range_names_the_range() {
        let (limits, problems) = check(r#"{ "headerBytes": 100, "resets": 0, "headerTimeout": "10m", "streamTimeout": "10ms" }"#);
        assert_eq!(limits, Limits::default());
        assert_eq!(
            problems,
            [
                "limits.headerBytes: 100 is out of range; write a number from 8192 to 1048576",
                "limits.resets: 0 is out of range; write a number from 10 to 100000",
                "limits.headerTimeout: 10m is out of range; write a duration from 1s to 5m",
                "limits.streamTimeout: 10ms is out of range; write a duration from 1s to 24h",
            ]
        );
    }
}

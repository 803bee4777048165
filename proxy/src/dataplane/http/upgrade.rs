//! Upgrades, and CONNECT: a request that asks for another protocol, or for a way through a forward proxy, becomes a tunnel of
//! bytes when both sides agree.
//!
//! Sources: RFC 9110 7.8 (Upgrade) and 9.3.6 (CONNECT), RFC 8441 (extended CONNECT). Between two sidecars the tunnel is one stream of
//! their shared connection: `101` on one side is `200` with the token of the upgrade on the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Response, StatusCode};

use super::attempt::UPGRADE_TOKEN;
use super::body::Body;
use super::pipeline::Connection;
use super::record::Record;
use super::reject::Reject;
use super::revoked;
use super::tunnel::Upgrading;
use crate::dataplane::pool::Lease;
use crate::dataplane::tcp;
use crate::policy::breaker::Slot;
use crate::telemetry::reason::Reason;

/// How a caller hears that it has what it asked for.
#[derive(Debug)]
pub(crate) enum Taken {
    /// In HTTP/1.1: the other protocol.
    Switch(HeaderValue),
    /// Over a link: the same.
    Link(HeaderValue),
    /// In HTTP/2: the stream, by a success.
    Stream,
    /// In whatever its caller speaks: a tunnel to somewhere else, by the application's own success.
    Tunnel,
}

/// Answers that the upgrade is accepted and joins both sides when the answer is through. `held` is what the request holds
/// upstream: a tunnel takes its place there until it ends.
pub(crate) fn establish(
    connection: &Arc<Connection>,
    mut record: Record,
    mut answer: http::response::Parts,
    taken: Taken,
    ours: Option<Upgrading>,
    theirs: Option<Upgrading>,
    held: (Lease, Option<Slot>),
) -> Response<Body> {
    let (Some(ours), Some(theirs)) = (ours, theirs) else {
        let reject = Reject::UpstreamProtocol;
        record.refused(&reject, &reject.told());
        return reject.render(false);
    };
    let beside = Arc::clone(connection);
    let judge = if matches!(taken, Taken::Tunnel) { revoked::may_tunnel } else { revoked::may_ask };
    connection.proxy.tasks.spawn(async move {
        let _held = held;
        let counts = record.counts();
        let (ours, theirs) = match tokio::try_join!(ours, theirs) {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(%error, "an upgrade was not completed");
                return;
            }
        };
        let ended = tokio::select! {
            ended = tcp::copy(ours, theirs, &counts, tcp::IDLE_MAX) => ended,
            reject = revoked::tunnel(&beside, judge) => return record.cut(&reject),
        };
        match ended {
            tcp::Ended::Both | tcp::Ended::Idle => record.body_ended(),
            tcp::Ended::Downstream(_) => {}
            tcp::Ended::Upstream(_) => record.body_broke(Reason::UpstreamReset),
        }
        tracing::trace!(sent = counts.sent.load(Ordering::Relaxed), "a tunnel ended");
    });
    match taken {
        Taken::Switch(token) => {
            answer.status = StatusCode::SWITCHING_PROTOCOLS;
            answer.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            answer.headers.insert(UPGRADE, token);
        }
        Taken::Link(token) => {
            answer.status = StatusCode::OK;
            answer.headers.insert(UPGRADE_TOKEN, token);
        }
        Taken::Stream => answer.status = StatusCode::OK,
        Taken::Tunnel => {}
    }
    // An answer that switches protocols has no content, so nothing may say how long it is.
    answer.headers.remove(http::header::CONTENT_LENGTH);
    Response::from_parts(answer, Body::Empty)
}

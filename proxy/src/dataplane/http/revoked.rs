//! Callers that are shut out while something of theirs is under way: a stream of events, an upload, a tunnel. What may live
//! for days would otherwise outlive the policy that shuts its caller out.
//!
//! Invariants: only a caller of whom no request would be let through is cut off, for what it asked for is not judged again, but for a
//! CONNECT, of which all that was judged is known; and only what was let through before, so that a refusal reaches its caller.

use super::connect;
use super::pipeline::Connection;
use super::reject::Reject;
use crate::dataplane::connection::inbound_port;
use crate::dataplane::opaque;
use crate::policy::authorization::Verdict;
use crate::snapshot::{InboundPort, Snapshot};
use crate::telemetry::Direction;

/// Whether what is under way on a port may go on.
pub(super) type Judge = fn(&InboundPort, &Connection) -> Result<(), Reject>;

/// Returns when a policy shuts the caller of a tunnel out, as one of those below judges; never at the caller's own side.
pub(super) async fn tunnel(connection: &Connection, judge: Judge) -> Reject {
    match connection.direction {
        Direction::Inbound => {
            let permit = |_: &Snapshot, port: &InboundPort| judge(port, connection);
            opaque::revoked(&connection.proxy, connection.original, permit).await
        }
        Direction::Outbound => std::future::pending().await,
    }
}

/// Returns when a policy shuts the caller out while requests of it are under way, which is then written down on the connection
/// for their records; never at the caller's own side. Looks from the moment of the call on: to be called before the first
/// request is taken.
pub(super) fn requests(connection: &Connection, under_way: impl Fn() -> bool) -> impl Future<Output = ()> {
    let inbound = connection.direction == Direction::Inbound;
    let watched = inbound.then(|| (connection.proxy.generations.subscribe(), judge(connection).is_ok()));
    async move {
        let Some((mut generations, mut permitted)) = watched else {
            return std::future::pending().await;
        };
        loop {
            if generations.changed().await.is_err() {
                // Nothing is published any more.
                return std::future::pending().await;
            }
            match judge(connection) {
                Err(reject) if permitted && under_way() => {
                    // Nobody else writes it.
                    drop(connection.revoked.set(Box::new(reject)));
                    return;
                }
                judged => permitted = judged.is_ok(),
            }
        }
    }
}

/// May the caller of a connection to the own application ask for anything at all?
fn judge(connection: &Connection) -> Result<(), Reject> {
    may_ask(inbound_port(&connection.proxy.published.current(), connection.original), connection)
}

/// May it have a tunnel by CONNECT?
pub(super) fn may_tunnel(port: &InboundPort, Connection { peer, .. }: &Connection) -> Result<(), Reject> {
    opaque::admit(port, peer)?;
    connect::permit(&port.policies, peer).map(|_rule| ())
}

/// May it ask for anything at all?
pub(super) fn may_ask(port: &InboundPort, Connection { peer, .. }: &Connection) -> Result<(), Reject> {
    opaque::admit(port, peer)?;
    match port.policies.authorization.as_ref().map(|authorization| authorization.decide_any(peer)) {
        Some(Verdict::Deny(rule)) => Err(Reject::Denied(rule)),
        Some(Verdict::Allow(_)) | None => Ok(()),
    }
}

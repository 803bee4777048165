//! A request's body that goes on after its answer began.
//!
//! An answer may begin before its request ended (RFC 9113 8.1); from there on the body goes its way by itself. It is worth
//! something only to whoever wants the answer: if that is dropped before its end, the stream is taken back. A server that
//! answered in full may still want the rest, and is given up when it takes nothing for too long.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::link::Place;
use crate::dataplane::http::inflow::Stream;
use crate::dataplane::http::outflow::Outflow;
use crate::dataplane::tasks::Tasks;

/// What an answer holds until it was read.
#[derive(Debug)]
pub(super) enum Held {
    /// The request was sent whole.
    Alone { place: Place },
    /// The rest of it is on its way, and takes the place as well.
    Uploads { place: Arc<Place>, whole: oneshot::Sender<()> },
    /// It asked for a tunnel. Where there is none, its stream may still be open on this side, and goes with the answer.
    Tunnel { place: Place },
}

impl Held {
    /// The place of an answer that began, with what is left of its request.
    pub(super) fn new(place: Place, rest: Option<Outflow>, tasks: &Tasks) -> Self {
        let Some(rest) = rest else { return Self::Alone { place } };
        let place = Arc::new(place);
        let (whole, answered) = oneshot::channel();
        tasks.spawn(go_on(Arc::clone(&place), rest, answered));
        Self::Uploads { place, whole }
    }

    /// The place of a tunnel, or of the answer that there is none.
    pub(super) fn tunnel(place: Place) -> Self {
        Self::Tunnel { place }
    }

    /// There may be much of the answer.
    pub(super) fn may_be_large(&self) {
        match self {
            Self::Alone { place } | Self::Tunnel { place } => place.may_be_large(),
            Self::Uploads { place, .. } => place.may_be_large(),
        }
    }

    /// The answer was read whole, from this stream.
    pub(super) fn give_back(self, spent: Option<Stream>) {
        match self {
            Self::Alone { place } => place.spent(spent),
            // Nobody hears it if the request ended too.
            Self::Uploads { whole, .. } => whole.send(()).unwrap_or_default(),
            Self::Tunnel { .. } => {}
        }
    }
}

/// The place goes last, when the stream is through or taken back.
async fn go_on(_place: Arc<Place>, mut rest: Outflow, answered: oneshot::Receiver<()>) {
    // Both arms are cancel-safe.
    tokio::select! {
        biased;
        () = &mut rest => return,
        whole = answered => if whole.is_err() {
            return;
        },
    }
    rest.alone();
    rest.await;
}

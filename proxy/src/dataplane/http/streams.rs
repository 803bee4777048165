//! Serves HTTP/2: each stream is a request in a task of its own, and a task ends with its stream.
//!
//! Sources: RFC 9113 8.1, 8.5 and 8.7, RFC 8441.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::server::{Builder, Connection as Codec, Handshake, SendResponse};
use h2::{Ping, PingPong, Reason, RecvStream};
use http::header::CONTENT_LENGTH;
use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use tokio::sync::oneshot;

use super::body::Body;
use super::credit::Share;
use super::frames::{Framed, Traffic, Unanswered};
use super::inflow::Inflow;
use super::interims::Interims;
use super::outflow::Outflow;
use super::pipeline::{self, Beside, Connection};
use super::tunnel::{Tunnel, Upgrading};
use crate::base::net::BoxedIo;
use crate::base::placed;

/// One connection. It is over when its client left or was told to, and no stream is left.
pub(super) struct Streams {
    state: State,
    traffic: Arc<Traffic>,
    connection: Arc<Connection>,
    share: Share,
    /// It is to end, as soon as it has begun.
    closing: bool,
    /// To ask whether the client is still there, once that was asked.
    pings: Option<PingPong>,
}

enum State {
    Begins(Handshake<Framed, Bytes>),
    Serves(Codec<Framed, Bytes>),
}

impl Streams {
    pub(super) fn new(codec: &Builder, io: Framed, traffic: Arc<Traffic>, connection: Arc<Connection>) -> Self {
        let share = Share::new(Arc::clone(&connection.proxy.uploads), Arc::clone(&traffic.account));
        Self { state: State::Begins(codec.handshake(io)), traffic, connection, share, closing: false, pings: None }
    }

    /// No new stream is taken; what is under way ends.
    pub(super) fn graceful_shutdown(&mut self) {
        match &mut self.state {
            State::Begins(_) => self.closing = true,
            State::Serves(codec) => codec.graceful_shutdown(),
        }
    }
}

impl Streams {
    /// Asks whether the client is still there (RFC 9113 6.7). `false`: it did not answer the last time.
    pub(super) fn ask_whether_there(&mut self) -> bool {
        let State::Serves(codec) = &mut self.state else { return false };
        if self.pings.is_none() {
            self.pings = codec.ping_pong();
        }
        let Some(pings) = &mut self.pings else { return false };
        // Only one that was answered, and whose answer was heard, is followed by another one.
        let _answered = pings.poll_pong(&mut Context::from_waker(Waker::noop()));
        pings.send_ping(Ping::opaque()).is_ok()
    }
}

impl Future for Streams {
    type Output = Result<(), h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        loop {
            match &mut this.state {
                State::Begins(handshake) => {
                    let mut codec = ready!(Pin::new(handshake).poll(cx))?;
                    if this.closing {
                        codec.graceful_shutdown();
                    }
                    this.state = State::Serves(codec);
                }
                State::Serves(codec) => {
                    if let Some(target) = this.share.lowered() {
                        codec.set_target_window_size(target);
                    }
                    match codec.poll_accept(cx) {
                        Poll::Ready(Some(accepted)) => {
                            let (request, respond) = accepted?;
                            let (connection, unanswered) = (Arc::clone(&this.connection), this.traffic.asked());
                            // Boxed where it is made, it is not moved again.
                            let stream = placed::pinned(|| serve(connection, unanswered, request, respond));
                            this.connection.proxy.tasks.spawn(stream);
                            // The codec ran until nothing more came. Without another head it need not be asked for another request.
                            if this.traffic.unseen.left() || this.traffic.is_paused() {
                                continue;
                            }
                        }
                        Poll::Ready(None) => return Poll::Ready(Ok(())),
                        Poll::Pending if this.traffic.is_paused() => {
                            this.traffic.resume();
                            // Others first, and those requests among them.
                            cx.waker().wake_by_ref();
                        }
                        Poll::Pending => {}
                    }
                    // The codec asks to be polled again where that grants anything.
                    if let Some(target) = this.share.poll_raised(cx) {
                        codec.set_target_window_size(target);
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

/// Answers one request. Dropping it takes the stream back.
async fn serve(connection: Arc<Connection>, unanswered: Unanswered, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
    let (mut unanswered, mut respond) = (unanswered, respond);
    let patience = connection.limits.stream_timeout;
    let (mut parts, from) = request.into_parts();
    let asks_for_head = parts.method == Method::HEAD;
    let (incoming, tunnel, upgrading) = if parts.method == Method::CONNECT {
        // A tunnel has no length, whatever its head says.
        parts.headers.remove(CONTENT_LENGTH);
        let (promise, kept) = oneshot::channel::<BoxedIo>();
        let upgrading = Upgrading::new(async { kept.await.map_err(std::io::Error::other) });
        (Inflow::Empty, Some((from, promise)), Some(upgrading))
    } else {
        (Inflow::upload(from, unanswered.traffic(), connection.link), None, None)
    };
    let interims = Interims::default();
    let broke = AtomicBool::new(false);
    let answer = {
        let beside = Beside { spelling: None, interims: &interims, broke: Some(&broke) };
        let mut handling = pin!(pipeline::handle(connection, Request::from_parts(parts, incoming), beside, upgrading));
        poll_fn(|cx| {
            let handled = handling.as_mut().poll(cx);
            if interims.are_waiting() {
                say(&interims, &mut respond);
            }
            if let Poll::Ready(answer) = handled {
                return Poll::Ready(Some(answer));
            }
            // Nobody waits for the answer any more.
            let reset = ready!(respond.poll_reset(cx));
            if reset.is_ok_and(|reason| unanswered.broke(respond.stream_id().as_u32(), reason)) {
                broke.store(true, Ordering::Relaxed);
                // Nobody hears it; it is told.
                let refused = handling.as_mut().poll(cx);
                debug_assert!(refused.is_ready(), "the line ends here");
            }
            Poll::Ready(None)
        })
        .await
    };
    let Some(answer) = answer else { return };
    unanswered.answered();
    let (mut head, body) = answer.into_parts();
    let tunnel = tunnel.filter(|_| head.status.is_success());
    let without_content = matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    // A text of ours is not sent where there is no place for one; what others answer has no body there.
    let silent = (asks_for_head || without_content) && matches!(body, Body::Full(_));
    let end = tunnel.is_none() && (silent || body.is_end_stream());
    if tunnel.is_none()
        && !body.is_end_stream()
        && !without_content
        && let Some(length) = body.size_hint().exact()
        && !head.headers.contains_key(CONTENT_LENGTH)
    {
        head.headers.insert(CONTENT_LENGTH, length.into());
    }
    let to = match respond.send_response(Response::from_parts(head, ()), end) {
        Ok(to) => to,
        Err(error) => {
            tracing::debug!(%error, "an answer was not sent");
            return respond.send_reset(Reason::INTERNAL_ERROR);
        }
    };
    if let Some((from, promise)) = tunnel {
        let account = Arc::clone(&unanswered.traffic().account);
        // Whoever wanted the tunnel may be gone; then the stream is taken back.
        drop(promise.send(Box::new(Tunnel::new(from, account, to))));
    } else if !end {
        let mut outflow = Outflow::patient(body, to, patience);
        (&mut outflow).await;
        if outflow.is_cut()
            && let Poll::Ready(Ok(reason)) = respond.poll_reset(&mut Context::from_waker(Waker::noop()))
            && unanswered.broke(respond.stream_id().as_u32(), reason)
        {
            outflow.reader_broke();
        }
    }
}

/// Says what comes before the answer.
fn say(interims: &Interims, respond: &mut SendResponse<Bytes>) {
    while let Some(interim) = interims.next() {
        if let Err(error) = respond.send_informational(interim) {
            tracing::debug!(%error, "an interim answer was not sent");
        }
    }
    interims.written();
}

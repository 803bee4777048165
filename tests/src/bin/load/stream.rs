//! Long streams: WebSockets, or calls of gRPC that go on both ways. Each says something now and then, wants it back, and is
//! opened anew when the other end has closed it in order. Any other end is a failure.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::plan::{Plan, Protocol};
use crate::seen::Seen;
use crate::{http2, websocket};

/// From when on an answer counts as missing.
const LATE: Duration = Duration::from_secs(10);

/// What an exchange on a stream came to.
pub(crate) enum Turn {
    /// What was said came back.
    Answered,
    /// The other end has closed the stream, in order.
    Closed,
}

enum Stream {
    WebSocket(websocket::Client),
    Call(http2::Call),
}

/// What all of them did.
#[derive(Default)]
struct Tally {
    opened: Cell<u64>,
    closed: Cell<u64>,
}

/// Keeps as many as planned, and tells what was seen.
pub(crate) async fn run(plan: Plan) -> Result<Value> {
    let (plan, tally) = (Rc::new(plan), Rc::new(Tally::default()));
    let stop: Rc<Cell<bool>> = Rc::default();
    let (mut asked, told) = (signal(SignalKind::terminate())?, Rc::clone(&stop));
    tokio::task::spawn_local(async move {
        asked.recv().await;
        told.set(true);
    });
    let start = Instant::now();
    let tasks: Vec<_> = (0..plan.connections)
        .map(|_| tokio::task::spawn_local(keep(Rc::clone(&plan), Rc::clone(&tally), Rc::clone(&stop), start)))
        .collect();
    let mut all = Seen::default();
    for task in tasks {
        all.add(task.await?);
    }
    let mut report = all.report(start.elapsed());
    if let Some(fields) = report.as_object_mut() {
        fields.insert("streams".to_owned(), json!({ "opened": tally.opened.get(), "closed": tally.closed.get() }));
    }
    Ok(report)
}

/// Keeps one of them open.
async fn keep(plan: Rc<Plan>, tally: Rc<Tally>, stop: Rc<Cell<bool>>, start: Instant) -> Seen {
    let (mut seen, mut open) = (Seen::default(), None);
    while start.elapsed() < plan.time && !stop.get() {
        let begun = Instant::now();
        let turn = async {
            if open.is_none() {
                open = Some(Stream::open(&plan).await?);
                tally.opened.set(tally.opened.get() + 1);
            }
            open.as_mut().context("no stream")?.turn().await
        };
        match tokio::time::timeout(LATE, turn).await.unwrap_or_else(|_late| Err(anyhow::anyhow!("no answer within {LATE:?}"))) {
            Ok(Turn::Answered) => seen.answer(200, begun.elapsed()),
            Ok(Turn::Closed) => {
                tally.closed.set(tally.closed.get() + 1);
                open = None;
            }
            Err(error) => {
                seen.failure(format!("{error:#}"));
                open = None;
            }
        }
        tokio::time::sleep(plan.pause).await;
    }
    seen
}

impl Stream {
    async fn open(plan: &Plan) -> Result<Self> {
        Ok(match plan.protocol {
            Protocol::Grpc => Self::Call(http2::Connection::open(plan).await?.call().await?),
            Protocol::Http1 => Self::WebSocket(websocket::Client::open(&plan.target).await?),
            Protocol::Http2 => anyhow::bail!("streams are WebSockets or calls"),
        })
    }

    async fn turn(&mut self) -> Result<Turn> {
        match self {
            Self::WebSocket(socket) => socket.turn().await,
            Self::Call(call) => call.turn().await,
        }
    }
}

/// Streams that a server has open, and the moment from which it closes them.
#[derive(Clone, Default)]
pub(crate) struct Leaving(Rc<Left>);

#[derive(Default)]
struct Left {
    asked: Cell<bool>,
    open: Cell<usize>,
    changed: tokio::sync::Notify,
}

/// A stream that is open as long as this is there.
pub(crate) struct Held(Leaving);

impl Leaving {
    /// Waits until the server is asked to end (SIGTERM), and then until all streams are closed.
    pub(crate) async fn end(&self, at_most: Duration) -> Result<()> {
        signal(SignalKind::terminate())?.recv().await;
        self.0.asked.set(true);
        self.0.changed.notify_waiters();
        let closed = async {
            loop {
                let changed = self.0.changed.notified();
                if self.0.open.get() == 0 {
                    return;
                }
                changed.await;
            }
        };
        ensure!(tokio::time::timeout(at_most, closed).await.is_ok(), "{} streams did not end", self.0.open.get());
        Ok(())
    }

    pub(crate) fn hold(&self) -> Held {
        self.0.open.set(self.0.open.get() + 1);
        Held(self.clone())
    }
}

impl Held {
    /// Waits until the server is asked to end.
    pub(crate) async fn asked(&self) {
        loop {
            let changed = self.0.0.changed.notified();
            if self.0.0.asked.get() {
                return;
            }
            changed.await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.open.set(self.0.0.open.get().saturating_sub(1));
        self.0.0.changed.notify_waiters();
    }
}

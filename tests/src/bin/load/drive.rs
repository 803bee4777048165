//! Driving: closed loops, one for each stream, or one open loop that all streams serve, until the time is up or somebody
//! asks for an end (SIGTERM).

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::plan::{Plan, Protocol};
use crate::seen::Seen;
use crate::ticks::Ticks;
use crate::{http1, http2};

/// From when on an answer counts as missing.
const LATE: Duration = Duration::from_secs(10);

/// Drives as planned, and tells what was seen.
pub(crate) async fn run(plan: Plan) -> Result<String> {
    let plan = Rc::new(plan);
    let stop: Rc<Cell<bool>> = Rc::default();
    let (mut asked, told) = (signal(SignalKind::terminate())?, Rc::clone(&stop));
    tokio::task::spawn_local(async move {
        asked.recv().await;
        told.set(true);
    });
    let mut lanes = Vec::new();
    let mut all = Seen::default();
    for _ in 0..plan.connections {
        // The streams of a connection share it from the start.
        let shared = match plan.protocol {
            Protocol::Http1 => None,
            Protocol::Http2 | Protocol::Grpc => match http2::Connection::open(&plan).await {
                Ok(connection) => Some(connection),
                Err(error) => {
                    all.failure(format!("{error:#}"));
                    None
                }
            },
        };
        lanes.extend((0..plan.streams).map(|_| Lane {
            plan: Rc::clone(&plan),
            open: shared.clone().map(Open::Two),
            stop: Rc::clone(&stop),
        }));
    }
    let start = Instant::now();
    let ticks = plan.rate.map(|rate| Ticks::begin(rate, plan.warm + plan.time, Rc::clone(&stop))).transpose()?.map(Rc::new);
    let tasks: Vec<_> = lanes
        .into_iter()
        .map(|lane| match &ticks {
            Some(ticks) => tokio::task::spawn_local(lane.serve(Rc::clone(ticks), start)),
            None => tokio::task::spawn_local(lane.circle(start)),
        })
        .collect();
    for task in tasks {
        all.add(task.await?);
    }
    Ok(all.report(start.elapsed().saturating_sub(plan.warm)).to_string())
}

/// One request at a time.
struct Lane {
    plan: Rc<Plan>,
    open: Option<Open>,
    /// Somebody asked for an end.
    stop: Rc<Cell<bool>>,
}

enum Open {
    One(http1::Connection),
    Two(http2::Connection),
}

impl Lane {
    /// A closed loop: the next request when the last is answered.
    async fn circle(mut self, start: Instant) -> Seen {
        let mut seen = Seen::default();
        while start.elapsed() < self.plan.time + self.plan.warm && !self.stop.get() {
            let begun = Instant::now();
            self.request(begun, begun.duration_since(start) >= self.plan.warm, &mut seen).await;
            if !self.plan.pause.is_zero() {
                tokio::time::sleep(self.plan.pause).await;
            }
        }
        seen
    }

    /// A share of an open loop: whatever is due next. Latency counts from when it was due, so a slow answer that holds up
    /// others is seen in theirs.
    async fn serve(mut self, ticks: Rc<Ticks>, start: Instant) -> Seen {
        let mut seen = Seen::default();
        while let Some(due) = ticks.next().await {
            self.request(due, due.saturating_duration_since(start) >= self.plan.warm, &mut seen).await;
        }
        seen
    }

    async fn request(&mut self, due: Instant, counts: bool, seen: &mut Seen) {
        let fresh = self.open.is_none();
        match tokio::time::timeout(LATE, self.exchange()).await {
            Ok(Ok(status)) => {
                if counts {
                    seen.answer(status, due.elapsed());
                }
            }
            Ok(Err(error)) => {
                // A server may close a connection between two requests: no request was lost.
                if fresh || !format!("{error:#}").contains("closed before") {
                    seen.failure(format!("{error:#}"));
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                self.open = None;
            }
            Err(_late) => {
                seen.failure(format!("no answer within {LATE:?}"));
                self.open = None;
            }
        }
        if self.plan.reconnect {
            self.open = None;
        }
    }

    /// A broken connection is a failure, and the next request opens another.
    async fn exchange(&mut self) -> Result<u16> {
        if self.open.is_none() {
            self.open = Some(match self.plan.protocol {
                Protocol::Http1 => Open::One(http1::Connection::open(&self.plan).await?),
                Protocol::Http2 | Protocol::Grpc => Open::Two(http2::Connection::open(&self.plan).await?),
            });
        }
        match self.open.as_mut().context("no connection")? {
            Open::One(connection) => connection.exchange(&self.plan).await,
            Open::Two(connection) => connection.exchange(&self.plan).await,
        }
    }
}

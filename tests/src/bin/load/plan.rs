//! What to drive, and how.

use std::cell::Cell;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::USAGE;

pub(crate) struct Plan {
    pub(crate) target: String,
    pub(crate) path: String,
    pub(crate) protocol: Protocol,
    pub(crate) connections: usize,
    /// Requests at a time on each connection.
    pub(crate) streams: usize,
    pub(crate) time: Duration,
    /// Requests that begin within this time are made but not counted.
    pub(crate) warm: Duration,
    pub(crate) pause: Duration,
    /// Every request opens a connection.
    pub(crate) reconnect: bool,
    /// Requests a second, whatever comes back; none is a closed loop.
    pub(crate) rate: Option<f64>,
    /// What each request's order begins with; none is a request without one.
    pub(crate) orders: Option<String>,
    /// The number of the next order.
    pub(crate) next_order: Cell<u64>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
    /// Unary calls with a message of 1 KiB.
    Grpc,
}

impl Plan {
    pub(crate) fn parse(target: &str, words: &[&str]) -> Result<Self> {
        let mut plan = Self {
            target: target.to_owned(),
            path: "/".to_owned(),
            protocol: Protocol::Http1,
            connections: 1,
            streams: 1,
            time: Duration::from_secs(5),
            warm: Duration::ZERO,
            pause: Duration::ZERO,
            reconnect: false,
            rate: None,
            orders: None,
            next_order: Cell::new(0),
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--reconnect" => plan.reconnect = true,
                "--h2" => plan.protocol = Protocol::Http2,
                "--grpc" => plan.protocol = Protocol::Grpc,
                _ => {
                    let value = words.next().with_context(|| format!("{word} wants a value\n{USAGE}"))?;
                    match *word {
                        "--connections" => plan.connections = value.parse()?,
                        "--streams" => plan.streams = value.parse()?,
                        "--seconds" => plan.time = Duration::from_secs_f64(value.parse()?),
                        "--warm" => plan.warm = Duration::from_secs_f64(value.parse()?),
                        "--pause" => plan.pause = Duration::from_millis(value.parse()?),
                        "--rate" => plan.rate = Some(value.parse()?),
                        "--orders" => plan.orders = Some((*value).to_owned()),
                        "--path" => plan.path = (*value).to_owned(),
                        _ => bail!("{USAGE}"),
                    }
                }
            }
        }
        let multiplexed = plan.protocol != Protocol::Http1;
        ensure!(multiplexed || plan.streams == 1, "HTTP/1.1 has no streams\n{USAGE}");
        ensure!(!(multiplexed && plan.reconnect), "--reconnect is for HTTP/1.1\n{USAGE}");
        ensure!(plan.rate.is_none_or(|rate| (1.0..=100_000.0).contains(&rate)), "a rate from 1 to 100,000\n{USAGE}");
        Ok(plan)
    }
    /// The name of the next order.
    pub(crate) fn order(&self) -> Option<String> {
        let name = self.orders.as_ref()?;
        let number = self.next_order.get();
        self.next_order.set(number + 1);
        Some(format!("{name}-{number}"))
    }
}

//! A load generator and the servers behind it, all as plain as can be, so that what is measured is what stands between.
//!
//! `load serve PORT BYTES` answers every HTTP/1.1 request at PORT with so many bytes, or with as many as its path says
//! (`/65536`), and every HTTP/2 request (prior knowledge) at the port after it; a gRPC message is sent back there.
//! It is a WebSocket for who asks for one, and a call that goes on for who calls `Stream`; both echo, and are closed in order when
//! it is asked to end. With `--book` it writes down each request's order.
//! `load book PORT` keeps such a book, and `GET` tells what is in it.
//! `load drive HOST:PORT` keeps a fixed number of connections busy, each stream of them with one request at a time (a closed
//! loop), or sends at a fixed rate whatever comes back (an open loop), and prints what it saw as one line of JSON.
//! With `--orders NAME` each request is a POST and an order of its own.
//! `load stream HOST:PORT` keeps long streams (WebSockets, or with `--grpc` calls) open, and prints what became of them.
//! `load hold HOST:PORT COUNT` opens connections, sends one request on each and keeps them.
#![expect(clippy::print_stdout, reason = "its answer is its output")]
#![expect(clippy::disallowed_types, reason = "it measures real time")]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::net::TcpListener;

mod book;
mod drive;
mod hold;
mod http1;
mod http2;
mod plan;
mod seen;
mod stream;
mod ticks;
mod websocket;

use plan::Plan;

const USAGE: &str = "usage: load serve PORT BYTES [--book HOST:PORT]
       load book PORT
       load drive HOST:PORT [--connections N] [--seconds S] [--path PATH] [--pause MS] [--warm S]
                  [--reconnect | --h2 | --grpc] [--streams N] [--rate PER_SECOND] [--orders NAME]
       load stream HOST:PORT [--connections N] [--seconds S] [--pause MS] [--grpc]
       load hold HOST:PORT COUNT";

/// The largest answer.
const ANSWER_MAX: usize = 1 << 24;

fn main() -> ExitCode {
    e2e::role::main("load", run)
}

/// How long streams may take to be closed by both ends.
const CLOSED_WITHIN: Duration = Duration::from_secs(5);

/// How a server serves, and what it is in the middle of.
#[derive(Clone)]
pub(crate) struct Service {
    /// Of a usual answer.
    pub(crate) bytes: usize,
    pub(crate) pen: Option<book::Pen>,
    pub(crate) leaving: stream::Leaving,
}

async fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port, bytes, rest @ ..] => {
            let pen = match rest {
                [] => None,
                ["--book", address] => Some(book::Pen::new(address)),
                _ => bail!("{USAGE}"),
            };
            let leaving = stream::Leaving::default();
            serve(port.parse().context("PORT")?, Service { bytes: bytes.parse().context("BYTES")?, pen, leaving }).await
        }
        ["book", port] => book::keep(port.parse().context("PORT")?).await,
        ["drive", target, rest @ ..] => {
            let plan = Plan::parse(target, rest)?;
            println!("{}", drive::run(plan).await?);
            Ok(())
        }
        ["stream", target, rest @ ..] => {
            println!("{}", stream::run(Plan::parse(target, rest)?).await?);
            Ok(())
        }
        ["hold", target, count] => hold::run(Plan::parse(target, &[])?, count.parse().context("COUNT")?).await,
        _ => bail!("{USAGE}"),
    }
}

async fn serve(port: u16, service: Service) -> Result<()> {
    let listen =
        |port: u16| async move { TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}")) };
    let second = port.checked_add(1).context("no port comes after PORT")?;
    let (one, two) = (listen(port).await?, listen(second).await?);
    println!("serving on ports {port} and {second}");
    let leaving = service.leaving.clone();
    tokio::select! {
        ended = http1::serve(one, service.clone()) => ended,
        ended = http2::serve(two, service) => ended,
        ended = leaving.end(CLOSED_WITHIN) => ended,
    }
}

/// How many bytes a path like `/65536` asks for.
fn asked(path: &str) -> Option<usize> {
    path.strip_prefix('/')?.parse().ok().filter(|bytes| *bytes <= ANSWER_MAX)
}

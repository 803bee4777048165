//! A load generator and the servers behind it, all as plain as can be, so that what is measured is what stands between.
//!
//! `load serve PORT BYTES` answers every HTTP/1.1 request at PORT with so many bytes, or with as many as its path says
//! (`/65536`), and every HTTP/2 request (prior knowledge) at the port after it; a gRPC message is sent back there.
//! `load drive HOST:PORT` keeps a fixed number of connections busy, each stream of them with one request at a time (a closed
//! loop), or sends at a fixed rate whatever comes back (an open loop), and prints what it saw as one line of JSON.
//! `load hold HOST:PORT COUNT` opens connections, sends one request on each and keeps them.
#![expect(clippy::print_stdout, reason = "its answer is its output")]
#![expect(clippy::disallowed_types, reason = "it measures real time")]

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use tokio::net::TcpListener;

mod drive;
mod hold;
mod http1;
mod http2;
mod plan;
mod seen;
mod ticks;

use plan::Plan;

const USAGE: &str = "usage: load serve PORT BYTES
       load drive HOST:PORT [--connections N] [--seconds S] [--path PATH] [--pause MS] [--warm S]
                  [--reconnect | --h2 | --grpc] [--streams N] [--rate PER_SECOND]
       load hold HOST:PORT COUNT";

/// The largest answer.
const ANSWER_MAX: usize = 1 << 24;

fn main() -> ExitCode {
    e2e::role::main("load", run)
}

async fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port, bytes] => serve(port.parse().context("PORT")?, bytes.parse().context("BYTES")?).await,
        ["drive", target, rest @ ..] => {
            let plan = Plan::parse(target, rest)?;
            println!("{}", drive::run(plan).await?);
            Ok(())
        }
        ["hold", target, count] => hold::run(Plan::parse(target, &[])?, count.parse().context("COUNT")?).await,
        _ => bail!("{USAGE}"),
    }
}

async fn serve(port: u16, bytes: usize) -> Result<()> {
    let listen =
        |port: u16| async move { TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}")) };
    let second = port.checked_add(1).context("no port comes after PORT")?;
    let (one, two) = (listen(port).await?, listen(second).await?);
    println!("serving on ports {port} and {second}");
    tokio::select! {
        ended = http1::serve(one, bytes) => ended,
        ended = http2::serve(two, bytes) => ended,
    }
}

/// How many bytes a path like `/65536` asks for.
fn asked(path: &str) -> Option<usize> {
    path.strip_prefix('/')?.parse().ok().filter(|bytes| *bytes <= ANSWER_MAX)
}

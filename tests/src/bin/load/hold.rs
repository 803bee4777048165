//! Idle connections: opened a few at a time, used once each, then kept.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::http1::Connection;
use crate::plan::Plan;

/// Connections that are opened at a time.
const AT_ONCE: usize = 32;
/// An end for whoever is forgotten.
const LONGEST: Duration = Duration::from_secs(600);

/// Opens `count` connections with a request on each, says so, and keeps them until it is killed.
pub(crate) async fn run(plan: Plan, count: usize) -> Result<()> {
    let wanted = u64::try_from(count)? + 64;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        let maximum = limit.maximum.map(|maximum| maximum.max(wanted));
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }).context("cannot open so many files")?;
    }
    let (plan, left) = (Rc::new(plan), Rc::new(Cell::new(count)));
    let mut tasks = Vec::new();
    for _ in 0..AT_ONCE {
        let (plan, left) = (Rc::clone(&plan), Rc::clone(&left));
        tasks.push(tokio::task::spawn_local(async move {
            let mut open = Vec::new();
            while left.get() > 0 {
                left.set(left.get() - 1);
                let mut connection = Connection::open(&plan).await?;
                let status = connection.exchange(&plan).await?;
                ensure!(status == 200, "a connection was answered with {status}");
                open.push(connection);
            }
            Ok(open)
        }));
    }
    let mut held = Vec::new();
    for task in tasks {
        held.extend(task.await??);
    }
    println!("holding {} connections", held.len());
    tokio::time::sleep(LONGEST).await;
    Ok(())
}

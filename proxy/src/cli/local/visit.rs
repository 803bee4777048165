//! `outrigger exec` and `outrigger stop`: from outside into a pod that runs.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::super::{Failure, print, warn};
use super::places::{self, PodPlaces};
use super::pod::cannot;
use super::run::{cgroup_root, exit_code};
use super::user::User;
use super::{ExecArgs, StopArgs, cgroup, pod};
use crate::base::units::Span;
use crate::model::pod_record::PodRecord;

/// Becomes the command: its input, outputs, signals and exit code are this process's own. A command of another user has a
/// session of its own, which a process group's leader cannot begin: it is a child, and ends with this process.
pub(crate) fn exec(args: ExecArgs) -> Result<ExitCode, Failure> {
    let user = args.user.as_deref().map(User::find).transpose()?;
    let (places, record) = find(&args.namespace, &args.name)?;
    if !places.started().exists() {
        return Err(Failure::environment(format!("the pod {} is still being started", places.pod), "try again in a moment"));
    }
    let when_orphaned = user.is_some().then_some(Signal::TERM);
    let mut command = pod::app_command(&places, &record, &args.command, user.as_ref(), when_orphaned)?;
    let error = if user.is_some() {
        match command.status() {
            Ok(status) => return Ok(ExitCode::from(exit_code(status))),
            Err(error) => error,
        }
    } else {
        command.exec()
    };
    let program = args.command.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
    let code = match error.kind() {
        io::ErrorKind::NotFound => 127,
        io::ErrorKind::PermissionDenied if rustix::process::geteuid().is_root() => 126,
        _other => return Err(cannot(&format!("run {program} in the pod {}", places.pod), &error)),
    };
    warn(&format!("outrigger: cannot start {program}: {error}"));
    Ok(ExitCode::from(code))
}

/// Asks the program to end, then makes it. Returns when the pod is gone.
pub(crate) fn stop(args: StopArgs) -> Result<ExitCode, Failure> {
    let Span(grace) = args.grace.parse::<Span>().map_err(|error| Failure::invalid([error]))?;
    let (places, record) = find(&args.namespace, &args.name)?;
    let app = record.cgroup.join("app");
    let alive = || places.is_alive().map_err(|error| cannot("look at the pod's lock", &error));
    if alive()? {
        // The supervisor marks the pod as terminating and passes the signal on.
        signal(record.supervisor.cast_signed(), Signal::TERM);
    } else {
        for process in cgroup::processes(&app) {
            signal(process, Signal::TERM);
        }
    }
    let ended = |at_most: Duration| wait_until(at_most, || Ok(!alive()? && cgroup::processes(&app).is_empty()));
    if !ended(grace)? {
        cgroup::kill(&app).map_err(|error| cannot("end the program", &error))?;
        // The supervisor still lets the sidecar drain.
        if !ended(DRAIN_AT_MOST)? {
            signal(record.supervisor.cast_signed(), Signal::KILL);
            ended(KILL_AT_MOST)?;
        }
    }
    // Nothing, where the supervisor did it.
    pod::remove(&places, places.state(), &cgroup_root()?)?;
    print(&format!("{} is stopped\n", places.pod))?;
    Ok(ExitCode::SUCCESS)
}

/// Was the supervisor of a pod of this machine killed, so that only what it would have removed is left?
pub(crate) fn has_lost_supervisor(namespace: &str, name: &str) -> bool {
    let places = PodPlaces::new(&places::known_state(), namespace, name);
    places.is_ok_and(|places| {
        // Whoever may not look does not know it.
        matches!(places.read_record(), Ok(Some(_))) && matches!(places.is_alive(), Ok(false))
    })
}

/// Is a pod of this machine gone, or about to go, which its control plane may learn only in a moment?
pub(crate) fn is_ending(namespace: &str, name: &str) -> bool {
    let places = PodPlaces::new(&places::known_state(), namespace, name);
    // Whoever may not look does not know it.
    places.is_ok_and(|places| places.read_record().is_ok_and(|record| record.is_none_or(|record| record.terminating)))
}

/// Asks again and again, for at most that long, whether something has happened.
pub(crate) fn wait_until(at_most: Duration, mut happened: impl FnMut() -> Result<bool, Failure>) -> Result<bool, Failure> {
    let begun = Instant::now();
    loop {
        if happened()? {
            return Ok(true);
        }
        if begun.elapsed() > at_most {
            return Ok(false);
        }
        std::thread::sleep(POLL);
    }
}

/// Sends a signal to a process that may be gone already.
pub(crate) fn signal(process: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(process)
        && kill_process(pid, signal).is_err()
    {
        // Gone, which is what a signal would bring about.
    }
}

fn find(namespace: &str, name: &str) -> Result<(PodPlaces, PodRecord), Failure> {
    let places = PodPlaces::new(&places::known_state(), namespace, name)?;
    match places.read_record() {
        Ok(Some(record)) => Ok((places, record)),
        Ok(None) => Err(Failure::environment(
            format!("no pod {} runs on this machine", places.pod),
            "`outrigger run` makes one; a pod of another namespace is named with -n",
        )),
        Err(error) => Err(cannot("read the pod's record", &error)),
    }
}

const POLL: Duration = Duration::from_millis(10);
const DRAIN_AT_MOST: Duration = Duration::from_secs(12);
const KILL_AT_MOST: Duration = Duration::from_secs(2);

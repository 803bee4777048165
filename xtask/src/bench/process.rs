//! Processes inside pods, and what they cost.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{PATIENCE, Pod, kill, wait_for};
use rustix::process::Signal;

/// A command inside a pod; it and what it started end with this.
pub(crate) struct Running {
    child: Child,
    /// Those that count.
    pub(crate) processes: Vec<u32>,
    all: Vec<u32>,
}

impl Running {
    /// Starts it on processor 1, with as many files as this machine allows.
    pub(crate) fn proxy(pod: &Pod, name: &str, line: &[String], counted: Option<&str>) -> Result<Self> {
        let mut whole: Vec<String> =
            ["sh", "-c", "ulimit -n $(ulimit -H -n); exec taskset -c 1 \"$@\"", "sh"].into_iter().map(str::to_owned).collect();
        whole.extend_from_slice(line);
        Self::start(pod, name, &whole, counted)
    }

    /// Starts it, and waits until its processes are there.
    pub(crate) fn start(pod: &Pod, name: &str, line: &[String], counted: Option<&str>) -> Result<Self> {
        let before = pod.processes("app")?;
        let child = pod.name.exec(line).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut running = Self { child, processes: Vec::new(), all: Vec::new() };
        let counts = |process: u32| {
            let named = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            // What has not become the program yet does not count.
            match counted {
                Some(counted) => named.trim() == counted,
                None => !["sh", "taskset", "env", "outrigger"].contains(&named.trim()),
            }
        };
        wait_for(name, PATIENCE, || {
            if let Some(status) = running.child.try_wait()? {
                return Ok(Err(anyhow::anyhow!("{name} ended at once ({status})")));
            }
            running.all = pod.processes("app")?.into_iter().filter(|process| !before.contains(process)).collect();
            running.processes = running.all.iter().copied().filter(|process| counts(*process)).collect();
            ensure!(!running.processes.is_empty(), "no process of {name} is in the pod");
            Ok(Ok(()))
        })??;
        Ok(running)
    }

    /// The first line that it prints.
    pub(crate) fn first_line(&mut self) -> Result<String> {
        let output = self.child.stdout.take().context("its output was read already")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(!line.is_empty(), "it ended without a word");
        Ok(line)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for process in self.all.iter().chain(&self.processes) {
            kill(*process, Signal::KILL);
        }
        if self.processes.is_empty() {
            self.child.kill().ok();
        }
        self.child.wait().ok();
    }
}

/// User and system time of processes, as the kernel counts it in hundredths of a second.
pub(crate) fn processor_time(processes: &[u32]) -> Result<Duration> {
    let mut ticks = 0;
    for process in processes {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).context("a proxy is gone")?;
        for field in [11, 12] {
            ticks += field_of(&stat, field)?;
        }
    }
    Ok(Duration::from_millis(ticks * 10))
}

/// How long a process has been there, as the kernel counts it in hundredths of a second.
pub(crate) fn age(process: u32) -> Result<Duration> {
    let up = std::fs::read_to_string("/proc/uptime")?;
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).context("a proxy is gone")?;
    let up = up.split(' ').next().and_then(|seconds| seconds.parse().ok()).context("no uptime")?;
    Ok(Duration::from_secs_f64(up).saturating_sub(Duration::from_millis(field_of(&stat, 19)? * 10)))
}

/// A number of `/proc/PID/stat`, counted from the state on.
fn field_of(stat: &str, field: usize) -> Result<u64> {
    // The name may hold spaces; what follows its closing parenthesis does not.
    let numbers = stat.rsplit(") ").next().unwrap_or_default();
    numbers.split(' ').nth(field).and_then(|number| number.parse().ok()).context("a short stat line")
}

/// Resident memory of processes, in MiB.
pub(crate) fn resident(processes: &[u32]) -> Result<f64> {
    let mut kib = 0.0;
    for process in processes {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).context("a proxy is gone")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        kib += line.split_whitespace().next().and_then(|number| number.parse::<f64>().ok()).context("no number")?;
    }
    Ok(kib / 1024.0)
}

//! `cargo xtask bench --instructions`: how many instructions of its own a sidecar runs for a request.
//!
//! Time on a shared machine is noise; instructions are not. The sidecars of the benchmark's pods are put away and the same
//! binary, with the same arguments and in the same place, runs under callgrind: captured, enrolled and configured as
//! shipped. Counted is what happens between two dumps, while the load generator drives; the kernel's share is not in it.
//!
//! The profiles stay in `target/instructions`, for `callgrind_annotate`.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{PATIENCE, Pod, cgroup_root, finish, kill, target, wait_for};
use rustix::process::Signal;
use serde_json::json;

use crate::bench::Wish;
use crate::bench::bed::{Bed, good, target as service_of};
use crate::bench::works::Work;
use crate::setup::step;
use crate::{Stop, shell};

/// Measures and prints.
pub(crate) fn run(bed: &Bed, works: &[&Work], wish: &Wish) -> Result<()> {
    for (program, package) in [("valgrind", "valgrind"), ("nsenter", "util-linux")] {
        if !shell::has(program) {
            return Err(Stop::Missing(format!("{program} is missing (Debian: apt-get install {package})")).into());
        }
    }
    let profiles = target().join("instructions");
    std::fs::create_dir_all(&profiles)?;
    // The sidecars write into it, as the user that they run as.
    std::fs::set_permissions(&profiles, std::fs::Permissions::from_mode(0o777))?;
    // Names are told by the runner, which will stand still.
    let plain = resolved(bed, "plain")?;
    let meshed = resolved(bed, "meshed")?;
    let counted = step("starting the sidecars under callgrind", || {
        let client = Counted::take_over(&bed.client, &bed.binary, &profiles)?;
        let server = Counted::take_over(&bed.server, &bed.binary, &profiles)?;
        Ok([client, server])
    })?;
    let [client, server] = &counted;
    let mut results = Vec::new();
    println!("\n{:<15} {:>12} {:>12} {:>12}", "work", "outbound", "inbound", "sum");
    for work in works {
        if let Some(traffic) = work.traffic() {
            let (sidecars, address): (Vec<&Counted>, &str) = match bed.sidecars(traffic.way).len() {
                1 => (vec![client], plain.as_str()),
                _ => (vec![client, server], meshed.as_str()),
            };
            let port = service_of(traffic.way).rsplit(':').next().unwrap_or_default();
            let service = format!("{address}:{port}");
            wait_for("answers", PATIENCE, || {
                let seen = bed.drive(&bed.client, &service, traffic, 1.0)?;
                ensure!(good(&seen) > 0.0, "{service} does not answer: {seen}");
                Ok(())
            })?;
            for sidecar in &sidecars {
                sidecar.zero()?;
            }
            let seen = bed.drive(&bed.client, &service, traffic, wish.seconds)?;
            let requests = good(&seen);
            ensure!(requests > 0.0, "no request was answered: {seen}");
            let mut counts = Vec::new();
            for sidecar in &sidecars {
                counts.push(sidecar.dump(work.name)? / requests);
            }
            let count = |at: usize| counts.get(at).map_or("-".to_owned(), |count| format!("{count:.0}"));
            let sum: f64 = counts.iter().sum();
            println!("{:<15} {:>12} {:>12} {:>12.0}", work.name, count(0), count(1), sum);
            results.push(json!({ "work": work.name, "candidate": "outrigger", "metric": "instructions_per_request",
                "outbound": counts.first(), "inbound": counts.get(1), "sum": sum, "requests": requests }));
        }
    }
    drop(counted);
    wish.write(&results)
}

/// The address at which the client reaches a service.
fn resolved(bed: &Bed, service: &str) -> Result<String> {
    let said = bed.client.exec(["getent", "ahostsv4", service])?.ok()?;
    let address = said.split_whitespace().next().with_context(|| format!("{service} has no address"))?;
    Ok(address.to_owned())
}

/// A sidecar under callgrind in the place of a pod's own one, which comes back when this is dropped.
struct Counted {
    pod: String,
    child: Child,
    /// The `outrigger run` that would start the pod's own sidecar again; it stands still meanwhile.
    runner: u32,
    /// The pod's network namespace.
    network: String,
    profiles: PathBuf,
}

impl Counted {
    fn take_over(pod: &Pod, binary: &Path, profiles: &Path) -> Result<Self> {
        let own = pod.sidecar()?;
        let arguments = std::fs::read(format!("/proc/{own}/cmdline"))?;
        let arguments: Vec<String> = arguments
            .split(|byte| *byte == 0)
            .skip(1)
            .filter(|argument| !argument.is_empty())
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        let status = std::fs::read_to_string(format!("/proc/{own}/status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
            line.split_whitespace().next().map(str::to_owned).with_context(|| format!("{name} is empty"))
        };
        let (runner, user) = (field("PPid:")?.parse()?, field("Uid:")?);
        // The namespaces outlive their process as long as somebody holds them open.
        let [mount, net] = ["mnt", "net"].map(|kind| File::open(format!("/proc/{own}/ns/{kind}")));
        let (mount, net) = (mount?, net?);
        for file in [&mount, &net] {
            rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty())?;
        }
        let place = cgroup_root()?.join(format!("outrigger/pods/{}.{}/sidecar", pod.name.namespace, pod.name.name));
        let out = profiles.join(format!("{}.out", pod.name.name));
        // The sidecar of an earlier run left it to a user of its own.
        if out.exists() {
            std::fs::remove_file(&out).with_context(|| format!("cannot remove {}", out.display()))?;
        }
        // A shell waits in the new place until the own sidecar has left its ports.
        let script = "read go; exec setpriv --reuid \"$0\" --regid \"$0\" --clear-groups --no-new-privs --inh-caps=-all \"$@\"";
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount=/proc/self/fd/{}", mount.as_raw_fd()))
            .arg(format!("--net=/proc/self/fd/{}", net.as_raw_fd()))
            .args(["--", "sh", "-c", script, &user, "valgrind", "--tool=callgrind", "--quiet", "--fair-sched=yes"])
            .arg(format!("--dump-before={MARK_FUNCTION}"))
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(binary)
            .args(&arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(profiles.join(format!("{}.log", pod.name.name)))?);
        let child = command.spawn().context("cannot run nsenter")?;
        let (pod_name, network) = (pod.name.name.clone(), pod.name.network());
        let mut counted = Self { pod: pod_name, child, runner, network, profiles: profiles.to_owned() };
        let id = counted.child.id();
        std::fs::write(place.join("cgroup.procs"), id.to_string()).context("cannot enter the sidecar's cgroup")?;
        kill(runner, Signal::STOP);
        kill(own, Signal::KILL);
        std::thread::sleep(Duration::from_millis(100));
        let mut stdin = counted.child.stdin.take().context("no standard input")?;
        stdin.write_all(b"\n")?;
        drop(stdin);
        let ready = format!("http://{}:14021/ready", pod.address()?);
        wait_for("the sidecar under callgrind", PATIENCE * 2, || {
            finish(Command::new("curl").args(["-sS", "--fail", "--max-time", "5", &ready]), PATIENCE)?.ok().map(drop)
        })?;
        Ok(counted)
    }

    /// Counts from here.
    fn zero(&self) -> Result<()> {
        self.mark()?;
        self.dumps().map(drop)
    }

    /// Asks the sidecar for something that nobody else asks it for. Callgrind dumps what it counted and begins anew when the
    /// function runs that answers.
    fn mark(&self) -> Result<()> {
        let mut ask = Command::new("ip");
        ask.args(["netns", "exec", &self.network, "curl", "-sS", "--fail", "-o", "/dev/null", "--max-time", "20"]);
        ask.arg(format!("http://127.0.0.1:14020/{MARK_PATH}"));
        finish(&mut ask, PATIENCE)?.ok().map(drop)
    }

    /// The profiles that were dumped, each once.
    fn dumps(&self) -> Result<Vec<String>> {
        let begin = format!("{}.out.", self.pod);
        let files = std::fs::read_dir(&self.profiles)?.filter_map(|entry| Some(entry.ok()?.path()));
        let ours = files.filter(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&begin)));
        ours.map(|file| {
            let text = std::fs::read_to_string(&file)?;
            std::fs::remove_file(&file)?;
            Ok(text)
        })
        .collect()
    }

    /// What was counted since; the profile is kept under the name of the work.
    fn dump(&self, work: &str) -> Result<f64> {
        self.mark()?;
        let mut sum = 0.0;
        for text in self.dumps()? {
            let total =
                text.lines().rev().find_map(|line| line.strip_prefix("totals:").or_else(|| line.strip_prefix("summary:")));
            sum += total.and_then(|total| total.trim().parse::<f64>().ok()).context("a profile without a total")?;
            std::fs::write(self.profiles.join(format!("{work}.{}.profile", self.pod)), text)?;
        }
        ensure!(sum > 0.0, "callgrind wrote no profile into {}", self.profiles.display());
        Ok(sum)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        kill(self.runner, Signal::CONT);
    }
}

/// What the sidecar is asked for as a mark, and the function that answers it.
const MARK_PATH: &str = "snapshot";
const MARK_FUNCTION: &str = "*Window*Inspect*snapshot*";

//! More connections to a pod than its sidecar takes: what comes waits, or gets no answer, and nothing passes the sidecar by.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, wait_for};
use e2e::rung::Rung;
use e2e::runner::{Case, Runner, Wish};

use crate::world::{echo, metric, own};

struct World {
    web: Pod,
    callers: Vec<Pod>,
    mesh: Mesh,
}

/// Each calls from an address of its own: one has some 28,000 ports for one destination.
const CALLERS: usize = 4;
/// Connections of a listener and worker that a sidecar has at once.
const CONNECTIONS_MAX: usize = 32_768;

/// Files that a sidecar keeps for itself; of the others a quarter is for where connections lead to.
const OWN_FILES: usize = 128;

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "crowd/web", "web")?;
        mesh.apply(&own("PeerAuthentication", "crowd", "open", "{ mode: Permissive }"))?;
        let callers = (0..CALLERS).map(|number| mesh.pod(&format!("crowd/caller-{number}")).outside().idle());
        Ok(World { callers: callers.collect::<Result<_>>()?, web, mesh })
    };
    runner.group(
        "crowd",
        make,
        &[
            Case { name: "what_a_sidecar_has_no_file_for_waits_and_is_counted", run: |world, _| files(world) },
            Case { name: "connections_beyond_what_a_sidecar_takes_wait_and_none_passes_it_by", run: many },
        ],
    );
}

/// Opens connections, a request on each, and says how many came to be, were answered, how many of them with 200, and how many ended
/// without an answer: once when nothing changed for five seconds, and again, when it is told to go on, once none waits any more.
const CALL: &str = r#"
import selectors, socket, sys, time
address, count = sys.argv[1], int(sys.argv[2])
poll, opened, connected, answered, served, failed = selectors.DefaultSelector(), 0, 0, 0, 0, 0
changed = time.monotonic()
def step(patience):
    global connected, answered, served, failed, changed
    for key, events in poll.select(patience):
        one, changed = key.fileobj, time.monotonic()
        try:
            if events & selectors.EVENT_WRITE:
                error = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, "connect")
                connected += 1
                one.send(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
                poll.modify(one, selectors.EVENT_READ, key.data)
            elif key.data.append(one.recv(65536)) or not key.data[-1]:
                raise OSError(0, "closed")
            elif len(key.data) == 1:
                answered += 1
                served += key.data[0].startswith(b"HTTP/1.1 200")
        except OSError:
            failed += not any(key.data)
            poll.unregister(one)
            one.close()
def until(done, limit):
    end = time.monotonic() + limit
    while not done() and time.monotonic() < end:
        step(0.05)
    print(opened, connected, answered, served, failed, flush=True)
while opened < count:
    # As fast as it is answered, and slowly where it is not.
    for _ in range(100 if opened - answered < 1000 else 20):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex((address, 8080))
        poll.register(one, selectors.EVENT_WRITE, [])
        opened += 1
        if opened == count:
            break
    step(0.02)
until(lambda: answered + failed == count or time.monotonic() - changed > 5, 100)
for line in sys.stdin:
    until(lambda: answered + failed == count, 100)
"#;

/// What callers say of their connections.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    opened: usize,
    connected: usize,
    answered: usize,
    served: usize,
    failed: usize,
}

/// Somebody with many connections, which end with it.
struct Caller {
    process: Child,
    says: BufReader<ChildStdout>,
    hears: ChildStdin,
}

impl Caller {
    fn new(from: &Pod, to: &Pod, count: usize) -> Result<Self> {
        let mut line = from.name.exec(["python3", "-c", CALL, &to.address()?, &count.to_string()]);
        let mut process = line.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (says, hears) = (process.stdout.take().context("no stdout")?, process.stdin.take().context("no stdin")?);
        Ok(Self { process, says: BufReader::new(says), hears })
    }

    fn said(&mut self) -> Result<Said> {
        let mut line = String::new();
        self.says.read_line(&mut line)?;
        let numbers: Vec<usize> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [opened, connected, answered, served, failed] = *numbers.as_slice() else {
            anyhow::bail!("the caller said {line:?}")
        };
        Ok(Said { opened, connected, answered, served, failed })
    }

    fn go_on(&mut self) -> Result<()> {
        Ok(writeln!(self.hears)?)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// How many files the web's sidecar may open, changed until this is dropped: within what its own user may change.
struct Files<'a>(&'a World, String);

impl<'a> Files<'a> {
    fn limited(world: &'a World, files: usize) -> Result<Self> {
        let before = open_files_max(world)?;
        let limited = Self(world, before.to_string());
        limited.set(&files.to_string())?;
        Ok(limited)
    }

    fn set(&self, files: &str) -> Result<()> {
        let sidecar = self.0.web.sidecar()?;
        let owner = std::fs::metadata(format!("/proc/{sidecar}"))?;
        let mut line = Command::new("setpriv");
        line.args([format!("--reuid={}", owner.uid()), format!("--regid={}", owner.gid()), "--clear-groups".to_owned()]);
        line.args(["prlimit".to_owned(), format!("--pid={sidecar}"), format!("--nofile={files}:")]);
        finish(&mut line, PATIENCE)?.ok().map(drop)
    }
}

impl Drop for Files<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.set(&self.1) {
            println!("crowd: the sidecar's limit of files stays: {error:#}");
        }
    }
}

/// How many files the web's sidecar may open.
fn open_files_max(world: &World) -> Result<usize> {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", world.web.sidecar()?))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("no limit of files")?;
    line.split_whitespace().next().and_then(|number| number.parse().ok()).with_context(|| format!("no number in {line}"))
}

fn delayed(world: &World, reason: &str) -> Result<f64> {
    metric(&world.web, "outrigger_accepts_delayed_total", &["inbound", reason])
}

fn files(world: &World) -> Result<()> {
    const COUNT: usize = 60;
    let caller = world.callers.first().context("no caller")?;
    let before = delayed(world, "system")?;
    let folder = format!("/proc/{}/fd", world.web.sidecar()?);
    let free = (0..).find(|number| !std::path::Path::new(&format!("{folder}/{number}")).exists()).unwrap_or_default();
    let few = Files::limited(world, free + 20)?;
    let mut caller = Caller::new(caller, &world.web, COUNT)?;
    let said = caller.said()?;
    ensure!(said.connected == COUNT && said.answered < COUNT && said.failed == 0, "with few files: {said:?}");
    drop(few);
    caller.go_on()?;
    let said = caller.said()?;
    // Who was taken with the last file finds none to reach the program with, and is told so.
    ensure!(said.answered == COUNT && said.served > 0 && said.failed == 0, "with files again: {said:?}");
    let after = delayed(world, "system")?;
    let refused = metric(&world.web, "outrigger_requests_total", &["overloaded"])?;
    println!("crowd: {} of {COUNT} were served, {refused} found no file for the way on", said.served);
    ensure!(after > before, "{before} accepts were delayed before, {after} after");
    let log = std::fs::read_to_string(world.mesh.folder().join("state/log/crowd.web.sidecar.log"))?;
    ensure!(log.contains("what comes waits in the backlog"), "the sidecar logged {log}");
    passed_by(world)
}

/// Nothing of what came to the pod got past its sidecar.
fn passed_by(world: &World) -> Result<()> {
    let (total, what) = agent(world, "outrigger_capture_bypass_total", "reason")?;
    ensure!(total == 0.0, "connections passed the sidecar by: {what}");
    Ok(())
}

/// The sum of a metric of the agent's for the pod, over those of its samples that hold `part`.
fn agent(world: &World, name: &str, part: &str) -> Result<(f64, String)> {
    let page = finish(Command::new("curl").args(["-sS", "--fail", "http://127.0.0.1:14030/metrics"]), PATIENCE)?.ok()?;
    let pod = format!("pod=\"{}\"", world.web.name.name);
    let lines: Vec<&str> = page
        .lines()
        .filter(|line| {
            line.starts_with(name) && line.contains(&pod) && line.contains("namespace=\"crowd\"") && line.contains(part)
        })
        .collect();
    let value = |line: &&str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
    Ok((lines.iter().filter_map(value).sum(), lines.join("\n")))
}

fn many(world: &World, wish: &Wish) -> Result<()> {
    // One caller has no more files than a process of this machine may open.
    let each = if wish.long { 15_000 } else { 250 };
    let all = each * CALLERS;
    let most = (open_files_max(world)?.saturating_sub(OWN_FILES) / 4 * 3).min(CONNECTIONS_MAX);
    let reason = if most < CONNECTIONS_MAX { "descriptors" } else { "connections" };
    let begun = Instant::now();
    let before = delayed(world, reason)?;
    let mut callers = world.callers.iter().map(|from| Caller::new(from, &world.web, each)).collect::<Result<Vec<_>>>()?;
    let said = callers.iter_mut().map(Caller::said).collect::<Result<Vec<_>>>()?;
    let sum = |count: fn(&Said) -> usize| said.iter().map(count).sum::<usize>();
    let (opened, connected) = (sum(|said| said.opened), sum(|said| said.connected));
    let (answered, failed) = (sum(|said| said.answered), sum(|said| said.failed));
    println!(
        "crowd: of {opened} connections {connected} came to be, {answered} were answered, {failed} not and ended after {:?}; \
         at most {most} by {reason}",
        begun.elapsed()
    );
    ensure!(opened == all, "{said:?}");
    if all > most {
        // What the backlog has no place for is reset by the kernel in the end.
        ensure!((most - 200..=most + 3).contains(&answered), "{answered} were answered of {most}");
        ensure!(connected < all && failed <= connected - answered, "{said:?}");
    } else {
        ensure!(answered == all, "{said:?}");
    }
    passed_by(world)?;
    // Who waits is served when others end.
    let mut last = callers.pop().context("no caller")?;
    let before_that = said.last().copied().unwrap_or_default();
    drop(callers);
    last.go_on()?;
    let said = last.said()?;
    println!("crowd: with the others gone the last caller had {said:?} after {:?}", begun.elapsed());
    ensure!(said.answered + said.failed == each && said.failed < each, "{said:?}");
    ensure!((said.answered > before_that.answered) == (all > most), "{before_that:?}, then {said:?}");
    drop(last);
    let delayed = delayed(world, reason)? - before;
    ensure!((delayed > 0.0) == (all > most), "{delayed} accepts were delayed");
    if Rung::asked() == Rung::Ebpf { recorded(world, answered) } else { Ok(()) }
}

/// Every connection ended in a flow record, or was counted as one for which there was no room.
fn recorded(world: &World, at_least: usize) -> Result<()> {
    wait_for("the connections are recorded", PATIENCE, || {
        let (recorded, _) = agent(world, "outrigger_capture_flows_total", "inbound")?;
        let (lost, _) = agent(world, "outrigger_capture_connections", "\"flow_lost\"")?;
        let (steered, _) = agent(world, "outrigger_capture_connections", "\"steered\"")?;
        println!("crowd: {recorded} records, {lost} lost, of {steered} connections");
        ensure!(recorded + lost >= at_least as f64, "{recorded} records and {lost} lost, of {at_least} connections");
        Ok(())
    })
}

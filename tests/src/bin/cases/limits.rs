//! What does not fit and what is no enrolment: a named error each, and a pod that is closed rather than open.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, PodName, cgroup_root, finish, kill, outrigger, wait_for};
use e2e::runner::{Case, Runner, Wish};
use rustix::process::Signal;

use crate::world::{echo, expect, pins, service, until};

struct World {
    web: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        Ok(World { web: echo(&mesh, "limits/web", "web")?, mesh })
    };
    runner.group(
        "limits",
        make,
        &[
            Case { name: "a_pod_that_is_not_enrolled_is_closed_and_its_program_never_starts", run: |world, _| unenrolled(world) },
            Case {
                name: "a_pod_that_finds_no_room_is_refused_by_name_and_its_program_never_starts",
                run: |world, _| full(world),
            },
            Case { name: "what_is_no_question_is_answered_with_what_is_wrong_about_it", run: |world, _| no_questions(world) },
            Case { name: "a_thousand_questions_at_once_are_each_answered", run: |world, _| thousand(world) },
            Case {
                name: "a_thousand_enrolments_at_once_are_each_taken_and_the_pod_is_served_as_before",
                run: |world, _| enrolments(world),
            },
            Case { name: "pods_that_come_and_go_leave_nothing_with_the_agent", run: come_and_go },
        ],
    );
}

/// A process that stands still, until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(process: u32) -> Self {
        kill(process, Signal::STOP);
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill(self.0, Signal::CONT);
    }
}

/// A child that is killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// `outrigger run` of a program that leaves a mark when it starts.
fn marking(name: &str, mark: &Path) -> Command {
    let mut run = outrigger(["run", name, "-n", "limits", "--", "touch"]);
    run.arg(mark);
    run
}

/// Between the making of its namespace and its enrolment nothing captures a pod's connections. The agent stands still, so
/// that it stays there; a program that somebody else put into the namespace shows what could get out and in.
fn unenrolled(world: &World) -> Result<()> {
    let mark = world.mesh.folder().join("late");
    let network = PodName::parse("limits/late").network();
    let stopped = Stopped::new(world.mesh.process("node")?);
    let mut run = marking("late", &mark);
    let mut run = Running(run.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
    let record = world.mesh.folder().join("state/pods/limits.late.json");
    let address = wait_for("the pod's record", PATIENCE, || {
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&record)?)?;
        record["addresses"][0].as_str().map(str::to_owned).context("no address")
    })?;
    let mut server = Command::new("ip");
    server.args(["netns", "exec", &network, "python3", "-m", "http.server", "8080"]);
    server.stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Running(server.spawn()?);
    let inside = |url: &str| {
        let curl = ["netns", "exec", &network, "curl", "-sS", "--noproxy", "*", "--max-time", "2", "-o", "/dev/null", url];
        finish(Command::new("ip").args(curl), PATIENCE)
    };
    wait_for("the program in the pod", PATIENCE, || inside("http://127.0.0.1:8080/")?.ok())?;
    // Into the pod, from the machine; out of it, to another pod and to the machine.
    let into: SocketAddr = format!("{address}:8080").parse()?;
    ensure!(TcpStream::connect_timeout(&into, Duration::from_secs(2)).is_err(), "{into} can be reached");
    let outside = world.web.address()?;
    for url in [format!("http://{outside}:14021/ready"), "http://10.64.0.1:14030/metrics".to_owned()] {
        let said = inside(&url)?;
        ensure!(said.code != 0, "the pod reached {url}");
    }
    let status = wait_for("`outrigger run` gives up", PATIENCE, || run.0.try_wait()?.context("it waits"))?;
    let mut said = String::new();
    std::io::Read::read_to_string(run.0.stderr.as_mut().context("no stderr")?, &mut said)?;
    ensure!(status.code() == Some(3) && said.contains("did not enrol the pod"), "{status}: {said}");
    ensure!(!mark.exists(), "the program was started");
    ensure!(!Path::new("/run/netns").join(&network).exists(), "the pod's network namespace is left");
    drop(stopped);
    // With an agent the same pod runs.
    finish(&mut marking("late", &mark), PATIENCE)?.ok()?;
    ensure!(mark.exists(), "the program did not start");
    Ok(())
}

/// Puts entries of pods that there are not into a map until it is full, or takes them away: bpf(2) by hand.
const FILL: &str = r#"
import ctypes, platform, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
number = 280 if platform.machine() == "aarch64" else 321
def bpf(command, attributes):
    return libc.syscall(number, command, attributes, len(attributes))
path = ctypes.create_string_buffer(sys.argv[1].encode())
opened = bpf(7, struct.pack("QII", ctypes.addressof(path), 0, 0).ljust(128, b"\0"))
assert opened >= 0, ctypes.get_errno()
key, value = ctypes.create_string_buffer(8), ctypes.create_string_buffer(256)
count = 0
for pod in range(1 << 20):
    struct.pack_into("Q", key, 0, (1 << 63) + pod)
    fill = sys.argv[2] == "fill"
    entry = struct.pack("IIQQQ", opened, 0, ctypes.addressof(key), ctypes.addressof(value) if fill else 0, 0)
    if bpf(2 if fill else 3, entry.ljust(128, b"\0")) < 0:
        break
    count += 1
print(count)
"#;

fn full(world: &World) -> Result<()> {
    let change = |way: &str| -> Result<usize> {
        let map = "/run/outrigger/bpf/PODS";
        Ok(finish(Command::new("python3").args(["-c", FILL, map, way]), PATIENCE)?.ok()?.trim().parse()?)
    };
    let mark = world.mesh.folder().join("full");
    let filled = change("fill")?;
    let begun = Instant::now();
    let said = finish(&mut marking("full", &mark), PATIENCE);
    let emptied = change("empty")?;
    ensure!(filled > 1_000 && emptied == filled, "{filled} entries were made and {emptied} taken away");
    let said = said?;
    ensure!(said.code == 3 && said.stderr.contains("the map PODS is full: a node has room for"), "{}", said.all());
    ensure!(said.stderr.contains("remedy: stop pods that are not needed"), "{}", said.stderr);
    ensure!(begun.elapsed() < Duration::from_secs(8), "it was told after {:?}", begun.elapsed());
    ensure!(!mark.exists(), "the program was started");
    let refused = agent_metrics()?;
    ensure!(refused.contains("outrigger_node_pods_refused_total{reason=\"full\"} 1"), "{refused}");
    expect(&world.web, &["http://127.0.0.1:14021/ready"], 200)?;
    // What was said of that pod says nothing of the next one of its name.
    finish(&mut marking("full", &mark), PATIENCE)?.ok().map(drop)
}

fn agent_metrics() -> Result<String> {
    finish(Command::new("curl").args(["-sS", "--fail", "http://127.0.0.1:14030/metrics"]), PATIENCE)?.ok()
}

/// A script of Python in the pod's sidecar cgroup and network namespace.
fn inside(pod: &Pod, script: &str) -> Result<String> {
    let cgroup = cgroup_root()?.join(format!("outrigger/pods/{}.{}/sidecar/cgroup.procs", pod.name.namespace, pod.name.name));
    let enter = format!("echo $$ > {} && exec ip netns exec {} \"$@\"", cgroup.display(), pod.name.network());
    finish(Command::new("sh").args(["-c", &enter, "sh", "python3", "-c", script]), PATIENCE)?.ok()
}

/// Each case: the bytes, what comes with them, and whether the sending half is closed behind them.
const NO_QUESTIONS: &str = r#"
import array, json, os, socket
question = json.dumps({"outrigger": 1, "namespace": "limits", "name": "web"}).encode()
tcp = socket.create_server(("127.0.0.1", 0))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for line, descriptors, end in [
    (question[:20], [tcp], True),
    (b"\xff\xfe\n", [], False),
    (b"x" * 5000 + b"\n", [], False),
    (question.replace(b'"outrigger": 1', b'"outrigger": 2') + b"\n", [tcp], False),
    (question + b"\n", [], False),
    (question + b"\n", [os.pipe()[0]], False),
    (question + b"\n", [datagrams], False),
    (question + b"\n", [tcp] * 9, False),
    (question + b"\n", [tcp], False),
]:
    asker = socket.socket(socket.AF_UNIX)
    asker.connect("/run/outrigger/node.sock")
    numbers = [one if isinstance(one, int) else one.fileno() for one in descriptors]
    asker.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))] if numbers else [])
    if end:
        asker.shutdown(socket.SHUT_WR)
    print(json.loads(asker.makefile().readline())["error"]["text"])
"#;

fn no_questions(world: &World) -> Result<()> {
    let said = inside(&world.web, NO_QUESTIONS)?;
    let expected = [
        "the question cannot be read: unexpected end of file",
        "the question cannot be read: expected value",
        "the question cannot be read: the message is too long",
        "the question is of version 2",
        "0 descriptors came with the question",
        "the descriptor is no TCP socket",
        "the descriptor is no TCP socket",
        "the question cannot be read: more descriptors came with the message than it may have",
        "the listener is at port",
    ];
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines.len() == expected.len(), "{said}");
    for (line, expected) in lines.iter().zip(expected) {
        ensure!(line.starts_with(expected), "{line:?} instead of {expected:?}");
    }
    expect(&world.web, &["http://127.0.0.1:14021/ready"], 200).map(drop)
}

/// A thousand that ask at once with the wrong listener, then more connections than one namespace may have.
const THOUSAND: &str = r#"
import array, json, resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
question = json.dumps({"outrigger": 1, "namespace": "limits", "name": "web"}).encode() + b"\n"
listener = socket.create_server(("127.0.0.1", 0))
def dial():
    asker = socket.socket(socket.AF_UNIX)
    asker.connect("/run/outrigger/node.sock")
    return asker
askers = [dial() for _ in range(1000)]
for asker in askers:
    asker.sendmsg([question], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener.fileno()]))])
answers = [json.loads(asker.makefile().readline())["error"]["text"] for asker in askers]
print(sum("the listener is at port" in answer for answer in answers))
del askers, asker
silent = [dial() for _ in range(1100)]
many, late = 0, 0
for asker in silent:
    text = json.loads(asker.makefile().readline())["error"]["text"]
    many += "1024 from one network namespace" in text
    late += "no whole line came within 5s" in text
print(many > 0 and many + late == 1100)
"#;

fn thousand(world: &World) -> Result<()> {
    let agent = world.mesh.process("node")?;
    let before = open_files(agent)?;
    let said = inside(&world.web, THOUSAND)?;
    ensure!(said.split_whitespace().eq(["1000", "True"]), "{said}");
    settles(agent, before)?;
    ensure!(
        agent_metrics()?.contains("outrigger_node_enrolments_total{outcome=\"too_many\"}"),
        "those turned away are not counted"
    );
    expect(&world.web, &["http://127.0.0.1:14021/ready"], 200).map(drop)
}

/// A sidecar's own question, asked a thousand times at once with its own listeners, which the agent gives back to who is the
/// sidecar.
const ENROLMENTS: &str = r#"
import array, json, resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
question = {"outrigger": 1, "namespace": "limits", "name": "again"}
def dial():
    asker = socket.socket(socket.AF_UNIX)
    asker.connect("/run/outrigger/node.sock")
    return asker
keeper = dial()
keeper.sendall(json.dumps({**question, "purpose": "resume"}).encode() + b"\n")
line, given, _, _ = keeper.recvmsg(4096, socket.CMSG_SPACE(32))
listeners = array.array("i", b"".join(data for _, _, data in given))
enrol = json.dumps(question).encode() + b"\n"
askers = [dial() for _ in range(1000)]
begun = time.monotonic()
for asker in askers:
    asker.sendmsg([enrol], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, listeners)])
answers = [json.loads(asker.makefile().readline()) for asker in askers]
took = time.monotonic() - begun
print(len(listeners), sum("ok" in answer for answer in answers), round(took, 2))
"#;

fn enrolments(world: &World) -> Result<()> {
    let pod = echo(&world.mesh, "limits/again", "again")?;
    let agent = world.mesh.process("node")?;
    let before = open_files(agent)?;
    let said = inside(&pod, ENROLMENTS)?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let [_listeners, "1000", took] = words.as_slice() else { anyhow::bail!("not each was taken: {said}") };
    println!("limits: a thousand enrolments at once took {took} s");
    settles(agent, before)?;
    // The sidecar itself is served as before, though the last who asked in its place is gone.
    expect(&pod, &["http://127.0.0.1:14021/ready"], 200)?;
    world.mesh.apply(&service("limits", "again", 80, 8080))?;
    until(&world.web, "http://again/", 200).map(drop)
}

fn open_files(process: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{process}/fd"))?.count())
}

/// No more files are open than before.
fn settles(process: u32, before: usize) -> Result<()> {
    wait_for("the agent closes what it opened", PATIENCE, || {
        let now = open_files(process)?;
        ensure!(now <= before, "{now} files are open, {before} were before");
        Ok(())
    })
}

/// Pods at once in the case below.
const AT_ONCE: usize = 4;

fn come_and_go(world: &World, wish: &Wish) -> Result<()> {
    let pods: usize = if wish.long { 1_000 } else { 24 };
    let agent = world.mesh.process("node")?;
    let run = |number: usize| {
        finish(&mut outrigger(["run", &format!("short-{number}"), "-n", "limits", "--", "true"]), PATIENCE)?.ok().map(drop)
    };
    // How long each of those took that ran at once.
    let all = |numbers: &[usize]| {
        let mut took = Vec::new();
        for some in numbers.chunks(AT_ONCE) {
            let begun = Instant::now();
            std::thread::scope(|scope| {
                let runs: Vec<_> = some.iter().map(|number| scope.spawn(|| run(*number))).collect();
                runs.into_iter().try_for_each(|run| run.join().map_err(|_panic| anyhow::anyhow!("a run panicked"))?)
            })?;
            took.push(begun.elapsed());
        }
        Ok::<_, anyhow::Error>(took)
    };
    // The first ones make what stays: buffers, threads, connections to the control plane.
    let numbers: Vec<usize> = (0..pods + 8).collect();
    let (first, rest) = numbers.split_at(8);
    all(first)?;
    let (files, memory) = (open_files(agent)?, resident(agent)?);
    let pins_before = pins();
    let begun = Instant::now();
    let took = all(rest)?;
    let each = begun.elapsed() / u32::try_from(pods)?;
    // The least of many: what else the machine does adds to some, and a cost that grows to all.
    let (early, late) = took.split_at(took.len() / 2);
    let (early, late) = (early.iter().min().context("no pods")?, late.iter().min().context("no pods")?);
    settles(agent, files)?;
    let grown = resident(agent)?.saturating_sub(memory);
    println!(
        "limits: {pods} pods came and went, {each:?} each, {AT_ONCE} at once in {early:?} at first and {late:?} in the end, \
         the agent's memory grew by {grown} KiB"
    );
    ensure!(*late < *early * 3, "{AT_ONCE} pods took {early:?} at first and {late:?} in the end");
    ensure!(grown < 8 * 1024, "the agent's memory grew by {grown} KiB");
    wait_for("the pods' pins go", PATIENCE, || {
        // Fewer where a pod of an earlier case left late.
        ensure!(pins() <= pins_before, "{} pins, {pins_before} before", pins());
        Ok(())
    })
}

/// In KiB.
fn resident(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a process without memory")?;
    line.split_whitespace().next().and_then(|number| number.parse().ok()).with_context(|| format!("no number in {line}"))
}

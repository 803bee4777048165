//! The ladder of capture: which rung a mesh stands on, that it is told, and what the lower rungs do in their own ways.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Said, binary, finish, outrigger, wait_for};
use e2e::runner::{Case, Runner};
use serde_json::Value;

use crate::world::{Pair, expect, said, until};

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || Pair::make(Mesh::up_with(&["--capture", "nftables"])?, "ladder");
    runner.group(
        "ladder",
        make,
        &[
            Case { name: "the_rung_that_was_asked_for_is_told_with_what_it_costs", run: |world, _| told(world) },
            Case {
                name: "a_ruleset_that_is_changed_is_missed_and_put_back_within_one_interval",
                run: |world, _| put_back(world),
            },
            Case { name: "a_pod_that_enforces_is_refused_where_nothing_can_be_dropped", run: |world, _| enforces(world) },
            Case { name: "a_crafted_packet_reaches_nobody_past_the_sidecar", run: |world, _| crafted(world) },
            Case { name: "pods_that_run_keep_their_rung", run: |world, _| kept(world) },
        ],
    );
    runner.group(
        "falls",
        || Ok(()),
        &[Case { name: "a_mesh_that_may_not_load_programs_falls_to_nftables_and_says_why", run: |(), _| falls() }],
    );
}

fn status() -> Result<Said> {
    finish(&mut outrigger(["status"]), PATIENCE)
}

/// The line of `status` about capture, unfolded.
fn capture_line(status: &str) -> String {
    let lines = status.lines().skip_while(|line| !line.starts_with("capture "));
    let folded = lines.enumerate().take_while(|(place, line)| *place == 0 || line.starts_with(' '));
    folded.map(|(_place, line)| line.trim()).collect::<Vec<_>>().join(" ")
}

fn agent(path: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:14030/{path}");
    finish(Command::new("curl").args(["-sS", "--noproxy", "*", "--max-time", "5", &url]), PATIENCE)?.ok()
}

fn standing() -> Result<Value> {
    Ok(serde_json::from_str::<Value>(&agent("capture")?)?["standing"].clone())
}

fn told(world: &Pair) -> Result<()> {
    let said = status()?;
    let line = capture_line(&said.stdout);
    ensure!(said.code == 0, "{}", said.all());
    ensure!(line.contains("nftables on Linux") && line.contains("as asked for"), "{line}");
    for cost in ["nf_conntrack_max", "CAP_NET_ADMIN", "see their sidecar as the client", "no pod can enforce"] {
        ensure!(line.contains(cost), "{cost} is not told: {line}");
    }
    ensure!(standing()?["rung"] == "nftables", "{}", standing()?);
    let metrics = agent("metrics")?;
    for (rung, value) in [("ebpf", 0), ("nftables", 1), ("explicit", 0)] {
        let sample = format!("outrigger_capture_rung{{rung=\"{rung}\"}} {value}");
        ensure!(metrics.contains(&sample), "no {sample}");
    }
    let doctor = finish(&mut outrigger(["doctor"]), PATIENCE)?.ok()?;
    ensure!(doctor.lines().any(|line| line.starts_with("warn  rung") && line.contains("nftables on Linux")), "{doctor}");
    // It is another client than on the first rung that an app sees, and that is said too.
    let answer = said_by_web(world)?;
    ensure!(answer["peer"] == world.web.address()?, "the app saw {answer}");
    Ok(())
}

fn said_by_web(world: &Pair) -> Result<Value> {
    said(&expect(&world.caller, &["http://web.ladder/"], 200)?)
}

fn put_back(world: &Pair) -> Result<()> {
    let network = world.web.name.network();
    let nft = |line: &str| finish(Command::new("ip").args(["netns", "exec", &network, "nft"]).args(line.split(' ')), PATIENCE);
    let before = nft("list table inet outrigger")?.ok()?;
    ensure!(before.contains("tproxy") && before.contains("redirect"), "{before}");
    nft("flush ruleset")?.ok()?;
    let begun = std::time::Instant::now();
    let ready = || agent("ready");
    wait_for("the agent misses it", PATIENCE, || {
        let said = ready()?;
        ensure!(said.contains("ladder/web") && said.contains("put back"), "it says {said}");
        Ok(())
    })?;
    ensure!(begun.elapsed() < Duration::from_secs(12), "after {:?} only", begun.elapsed());
    ensure!(nft("list table inet outrigger")?.ok()?.contains("tproxy"), "it is not back");
    wait_for("all is well again", PATIENCE, || {
        ensure!(ready()? == "ready\n", "{}", ready()?);
        Ok(())
    })?;
    until(&world.caller, "http://web.ladder/", 200).map(drop)
}

fn enforces(world: &Pair) -> Result<()> {
    let run = ["run", "enforcing", "-n", "ladder", "--annotation", "outrigger.dev/capture=enforce", "--", "true"];
    let said = finish(&mut outrigger(run), PATIENCE)?;
    ensure!(said.code == 3 && said.stderr.contains("nftables does not see what packet sockets send"), "{}", said.all());
    ensure!(said.stderr.contains("remedy: run the pod without the annotation"), "{}", said.stderr);
    expect(&world.caller, &["http://web.ladder/"], 200).map(drop)
}

fn crafted(world: &Pair) -> Result<()> {
    let steered = || crate::capture::agent_counts("web", "outrigger_capture_connections", "steered");
    let before = steered()?;
    crate::capture::craft(&world.caller, &world.web)?;
    std::thread::sleep(Duration::from_secs(1));
    let more = steered()? - before;
    ensure!(more == 0.0, "{more} arrived");
    Ok(())
}

fn kept(world: &Pair) -> Result<()> {
    let agent_of = || world.mesh.process("node");
    let before = agent_of()?;
    // As an agent that is started again by somebody else, with another wish.
    let arguments = ["node", "--name", "another", "--capture", "ebpf", "--metrics", "127.0.0.1:14999", "--state"];
    let folder = world.mesh.folder();
    let mut another = outrigger(arguments);
    another.arg(folder.join("state")).arg("--node-socket").arg(folder.join("node.sock"));
    another.arg("--workload-api").arg(folder.join("workload.sock"));
    let said = finish(&mut another, PATIENCE)?;
    ensure!(
        said.code == 3 && said.stderr.contains("captured by nftables, and cannot be captured by eBPF as well"),
        "{}",
        said.all()
    );
    ensure!(said.stderr.contains("--capture nftables"), "{}", said.stderr);
    ensure!(agent_of()? == before, "the agent was started again");
    expect(&world.caller, &["http://web.ladder/"], 200).map(drop)
}

/// Makes bpf(2) fail with EPERM, as the profiles of containers do, and becomes the command.
const FORBID_BPF: &str = r#"
import ctypes, os, platform, struct, sys
number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, ctypes.byref(header)) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"#;

fn falls() -> Result<()> {
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    let folder = tempfile::Builder::new().prefix("outrigger-e2e-").tempdir()?;
    let state = folder.path().join("state").to_string_lossy().into_owned();
    let up = |wish: &str| {
        let mut command = Command::new("python3");
        command.args(["-c", FORBID_BPF]).arg(binary()).args(["up", "--detach", "--state", &state, "--capture", wish]);
        finish(&mut command, PATIENCE)
    };
    let checked = || {
        // Asked for by name, nothing takes its place.
        let said = up("ebpf")?;
        ensure!(said.code == 3 && said.stderr.contains("Operation not permitted"), "{}", said.all());
        finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
        up("auto")?.ok()?;
        let line = capture_line(&status()?.stdout);
        ensure!(line.contains("nftables on Linux") && line.contains("no eBPF: "), "{line}");
        ensure!(line.contains("Operation not permitted (os error 1)") && line.contains("it costs: "), "{line}");
        let fallen = standing()?["fallen"][0].clone();
        ensure!(fallen["rung"] == "ebpf" && fallen["errno"] == 1, "{fallen}");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("no release")?;
        ensure!(fallen["kernel"] == release.trim(), "{fallen}");
        // It captures.
        let run = ["run", "fallen", "-n", "ladder", "--", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}"];
        let mut run = outrigger(run);
        let said = finish(run.args(["--noproxy", "*", "--max-time", "5", "http://10.64.255.250/"]), PATIENCE)?;
        ensure!(said.stdout == "503", "the sidecar did not answer: {}", said.all());
        Ok(())
    };
    let outcome = checked();
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    outcome
}

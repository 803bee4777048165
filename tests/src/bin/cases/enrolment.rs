//! Who may enrol a pod, and who is told an identity: decided by the kernel's word, whatever the caller says.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, Said, binary, cgroup_root, finish, kill, outrigger, target, wait_for};
use e2e::runner::{Case, Runner};
use rustix::process::Signal;

use crate::capture::agent_metrics;
use crate::world::{client, echo, expect, metric, service, until};

struct World {
    web: Pod,
    api: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        Ok(World { web: echo(&mesh, "enrol/web", "web")?, api: client(&mesh, "enrol/api")?, mesh })
    };
    runner.group(
        "enrolment",
        make,
        &[
            Case { name: "a_sidecar_that_asks_for_another_pods_identity_is_refused", run: |world, _| another_pod(world) },
            Case { name: "a_listener_from_another_namespace_is_refused", run: |world, _| foreign_listener(world) },
            Case { name: "a_caller_in_no_pod_is_refused", run: |world, _| no_pod(world) },
            Case { name: "the_app_cannot_take_its_sidecars_place", run: |world, _| the_app(world) },
            Case { name: "another_listener_than_the_inbound_one_is_refused", run: |world, _| another_port(world) },
            Case { name: "the_user_of_one_sidecar_can_do_nothing_to_another_one", run: |world, _| other_users(world) },
            Case { name: "a_program_with_a_user_of_its_own_has_no_privilege", run: |world, _| without_privilege(world) },
            Case { name: "the_workload_api_tells_nothing_outside_a_pod", run: |world, _| workload_api(world) },
            Case { name: "the_workload_api_gives_a_pods_key_to_its_sidecar_and_not_to_its_app", run: |world, _| no_key(world) },
            Case { name: "a_killed_agent_finds_its_pods_again", run: |world, _| agent_again(world) },
            Case { name: "a_pod_that_starts_while_the_agent_is_away_waits_for_it", run: |world, _| away(world, "node") },
            Case {
                name: "a_pod_that_starts_while_the_control_plane_is_away_waits_for_it",
                run: |world, _| away(world, "control"),
            },
            Case { name: "a_sidecar_stopped_before_it_has_an_identity_ends_what_it_began", run: |world, _| early_stop(world) },
        ],
    );
    runner.group(
        "rotation",
        || Ok(()),
        &[Case { name: "certificates_rotate_under_load_without_a_lost_request", run: |(), _| rotation() }],
    );
}

/// Asks the agent to enrol `namespace/name` with a listener that is made by `listen`, an expression of the script below.
const ASK: &str = r#"
import array, json, os, socket, sys
name, port, netns = sys.argv[1], int(sys.argv[2]), sys.argv[3]
asker = socket.socket(socket.AF_UNIX)
asker.connect("/run/outrigger/node.sock")
if netns != "-":
    # The listener's namespace alone is another one: the asking socket was made before.
    import ctypes
    assert ctypes.CDLL(None, use_errno=True).setns(os.open(netns, os.O_RDONLY), 0x40000000) == 0
listener = socket.create_server(("0.0.0.0", port), reuse_port=True)
line = json.dumps({"outrigger": 1, "namespace": "enrol", "name": name}).encode() + b"\n"
asker.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener.fileno()]))])
print(asker.makefile().readline())
"#;

/// Asks from inside `pod`'s network namespace, as a process of its cgroup `part`; without a pod, from the machine itself.
fn ask(from: Option<(&Pod, &str)>, name: &str, port: u16, listener: Option<&Pod>) -> Result<Said> {
    let netns = listener.map_or_else(|| "-".to_owned(), |pod| format!("/run/netns/{}", pod.name.network()));
    let port = port.to_string();
    let python = ["python3", "-c", ASK, name, &port, &netns];
    let Some((pod, part)) = from else {
        return finish(Command::new("python3").args(python.iter().skip(1)), PATIENCE);
    };
    let cgroup = cgroup_root()?.join(format!("outrigger/pods/{}.{}/{part}/cgroup.procs", pod.name.namespace, pod.name.name));
    let script = format!("echo $$ > {} && exec ip netns exec {} \"$@\"", cgroup.display(), pod.name.network());
    finish(Command::new("sh").args(["-c", &script, "sh"]).args(python), PATIENCE)
}

/// One error with a remedy, and nothing changed: the pod is still served by its own sidecar.
fn refused(world: &World, said: &Said, text: &str) -> Result<()> {
    let answer: serde_json::Value = serde_json::from_str(&said.stdout).with_context(|| said.all())?;
    let error = answer["error"]["text"].as_str().with_context(|| format!("not refused: {answer}"))?;
    ensure!(error.contains(text), "refused, but not for the reason: {answer}");
    ensure!(answer["error"]["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "no remedy: {answer}");
    expect(&world.web, &["http://127.0.0.1:14021/ready"], 200).map(drop)
}

fn another_pod(world: &World) -> Result<()> {
    refused(world, &ask(Some((&world.web, "sidecar")), "api", 24_006, None)?, "is in the pod enrol/web, but asked for enrol/api")
}

fn foreign_listener(world: &World) -> Result<()> {
    let said = ask(Some((&world.web, "sidecar")), "web", 24_006, Some(&world.api))?;
    refused(world, &said, "the listener is from another network namespace than the pod enrol/web")
}

fn no_pod(world: &World) -> Result<()> {
    refused(world, &ask(None, "web", 24_006, None)?, "is in no pod of this node")
}

fn the_app(world: &World) -> Result<()> {
    refused(world, &ask(Some((&world.web, "app")), "web", 24_006, None)?, "not in the sidecar's")
}

fn another_port(world: &World) -> Result<()> {
    refused(world, &ask(Some((&world.web, "sidecar")), "web", 24_006, None)?, "the listener is at port 24006, not at 14006")
}

/// A client of a sidecar that is told to stop is in the middle of a request: the sidecar waits for the rest, and answers.
const HALF_A_HEAD: &str = r#"
import signal, socket, subprocess, sys, time
sidecar = subprocess.Popen(sys.argv[1:])
for _attempt in range(100):
    try:
        client = socket.create_connection(("127.0.0.1", 14001))
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
client.sendall(b"GET / HTTP/1.1\r\nhost: a")
time.sleep(1)
sidecar.send_signal(signal.SIGTERM)
time.sleep(1)
assert sidecar.poll() is None, "it did not wait"
client.sendall(b"\r\n\r\n")
print(client.recv(4096).decode())
print("ended with", sidecar.wait(10))
"#;

/// With a configuration of an earlier life it takes the application's connections; nobody gives it an identity.
fn early_stop(world: &World) -> Result<()> {
    let kept = world.mesh.folder().join("state/sidecars/enrol.web");
    let state = world.mesh.folder().join("early-stop");
    finish(Command::new("cp").arg("-r").args([&kept, &state]), PATIENCE)?.ok()?;
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh", "python3", "-c", HALF_A_HEAD]);
    command.arg(binary()).args(["sidecar", "--namespace", "enrol", "--name", "web", "--control", "127.0.0.1:1"]);
    command.args(["--workload-api", "/nowhere/workload.sock", "--node", "/nowhere/node.sock", "--log", "json", "--state"]);
    let said = finish(command.arg(&state), PATIENCE)?;
    let all = said.all();
    for part in ["HTTP/1.1 421", "outrigger-reason: own_port", "ended with 0", "no identity yet", "draining", "stopped"] {
        ensure!(all.contains(part), "no {part} in {all}");
    }
    Ok(())
}

/// The user that a process became.
fn user_of(process: u32) -> Result<u32> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("a process without a user")?;
    line.split_whitespace().next().and_then(|id| id.parse().ok()).with_context(|| format!("no user in {line}"))
}

/// As another sidecar's user, and as the very same user: neither of them gets into the process. Root does, which shows that
/// it is the right that is lacking, not the way.
fn other_users(world: &World) -> Result<()> {
    let (web, api) = (world.web.sidecar()?, world.api.sidecar()?);
    let (user, same) = (user_of(web)?, user_of(api)?);
    ensure!(user != same && user > 1_900_000_000 && same > 1_900_000_000, "the sidecars are the users {user} and {same}");
    let trace = if cfg!(target_arch = "x86_64") { 101 } else { 117 };
    let root = format!("/proc/{api}/root");
    let ways = [
        format!("ls {root}/"),
        format!("ls -l /proc/{api}/fd/"),
        format!("head -c 0 /proc/{api}/mem"),
        format!(
            "curl -sS --max-time 5 --fail -X POST --unix-socket {root}/run/outrigger/sidecar/operator.sock 'http://sidecar/log?level=info'"
        ),
        // PTRACE_SEIZE, which does not stop the process.
        format!("perl -e 'exit(syscall({trace}, 0x4206, {api}, 0, 0) < 0)'"),
    ];
    for (user, comes_in) in [(0, true), (user, false), (same, false)] {
        for way in &ways {
            let mut command = Command::new("setpriv");
            command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups"]);
            let said = finish(command.args(["sh", "-c", way]), PATIENCE)?;
            ensure!((said.code == 0) == comes_in, "user {user}: {way} ended with {}: {}", said.code, said.all());
        }
    }
    // What it may not show to others it still tells of itself, and its state is its own.
    for (name, least) in [("process_open_fds", 5.0), ("process_resident_memory_bytes", 1e6), ("process_cpu_seconds_total", 0.001)]
    {
        let value = metric(&world.api, name, &[])?;
        ensure!(value >= least, "{name} is {value}");
    }
    let state = world.mesh.folder().join("state/sidecars/enrol.api");
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&state)?);
    ensure!(owner == same, "{} belongs to {owner}, not to {same}", state.display());
    kill(api, Signal::KILL);
    let again = wait_for("the sidecar is started again", PATIENCE, || {
        let process = world.api.sidecar()?;
        ensure!(process != api, "it is not");
        expect(&world.api, &["http://127.0.0.1:14021/ready"], 200)?;
        Ok(process)
    })?;
    let now = user_of(again)?;
    ensure!(now == same, "the sidecar was {same}, and is {now} after a restart");
    ensure!(state.join("operator.sock").exists(), "it does not stand in its state");
    Ok(())
}

/// What root's programs may, and `--user` takes away: another pod's network and the mesh's token. Root does both, which shows
/// that the ways are right.
fn without_privilege(world: &World) -> Result<()> {
    let token = world.mesh.token_file();
    let other = format!("/run/netns/{}", world.web.name.network());
    let ways = format!(
        "id -u; id -G; echo home $HOME; grep -E '^(CapPrm|CapEff|CapBnd|NoNewPrivs):' /proc/self/status; \
         cat {} >/dev/null 2>&1; echo token $?; nsenter --net={other} true 2>/dev/null; echo netns $?; sleep 100000",
        token.display()
    );
    let lines = |pod: &Pod| {
        wait_for("the program's words", PATIENCE, || {
            let said = pod.log();
            ensure!(said.contains("netns "), "so far: {said}");
            Ok(said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>())
        })
    };
    let of_root = world.mesh.pod("enrol/root").run(["sh", "-c", &ways])?;
    let said = lines(&of_root)?;
    ensure!(said.iter().any(|line| line == "token 0") && said.iter().any(|line| line == "netns 0"), "root: {said:?}");
    let of_nobody = world.mesh.pod("enrol/nobody").user("nobody").run(["sh", "-c", &ways])?;
    let said = lines(&of_nobody)?;
    let zero = "0000000000000000";
    for wanted in ["65534", &format!("CapPrm: {zero}"), &format!("CapEff: {zero}"), &format!("CapBnd: {zero}"), "NoNewPrivs: 1"] {
        ensure!(said.iter().any(|line| line == wanted), "no line {wanted}: {said:?}");
    }
    ensure!(!said.iter().any(|line| line == "token 0" || line == "netns 0" || line == "home /root"), "nobody: {said:?}");
    // It is a pod like any other, and so is a command inside it.
    world.mesh.apply(&service("enrol", "web", 80, 8080))?;
    until(&of_nobody, "http://web/", 200)?;
    let mut inside = outrigger(["exec", "nobody", "-n", "enrol", "--user", "12345:54321", "--", "sh", "-c", "id -u; id -G"]);
    let said = finish(&mut inside, PATIENCE)?.ok()?;
    ensure!(said == "12345\n54321\n", "{said}");
    // At a terminal of root's, it has none: on one it could type into root's shell.
    let mut line = outrigger(["exec", "nobody", "-n", "enrol", "--user", "nobody", "--"]);
    line.args(["sh", "-c", "'(true </dev/tty) 2>/dev/null && echo terminal $? || echo none; exit 7'"]);
    let words = std::iter::once(line.get_program()).chain(line.get_args()).map(|word| word.to_string_lossy());
    let words = words.collect::<Vec<_>>().join(" ");
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &words, "/dev/null"]);
    terminal.envs(line.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let said = finish(&mut terminal, PATIENCE)?;
    ensure!(said.code == 7 && said.stdout.trim() == "none", "{}", said.all());
    let root = finish(&mut outrigger(["run", "x", "--user", "root", "--", "true"]), PATIENCE)?;
    ensure!(root.code == 2 && root.stderr.contains("--user"), "{}", root.all());
    Ok(())
}

/// The standard's own security header is sent by hand: what is proven is who is told nothing even so.
fn workload_api(_world: &World) -> Result<()> {
    let call = |header: &str| {
        let mut command = Command::new("curl");
        command.args([
            "-sS",
            "-i",
            "--max-time",
            "5",
            "--http2-prior-knowledge",
            "--unix-socket",
            "/run/outrigger/workload.sock",
        ]);
        command.args(["-H", "content-type: application/grpc", "-H", "te: trailers", "-H", header, "--data-binary", "@-"]);
        command.arg("http://localhost/SpiffeWorkloadAPI/FetchX509SVID").stdin(empty_message()?);
        finish(&mut command, PATIENCE)
    };
    // INVALID_ARGUMENT is 3, PERMISSION_DENIED is 7.
    let without = call("x-nothing: true")?;
    ensure!(without.stdout.contains("grpc-status: 3"), "without the security header: {}", without.all());
    let with = call("workload.spiffe.io: true")?;
    ensure!(with.stdout.contains("grpc-status: 7"), "from outside every pod: {}", with.all());
    Ok(())
}

/// The app shares the sidecar's network namespace and reaches the same socket.
fn no_key(world: &World) -> Result<()> {
    let call = "printf '\\0\\0\\0\\0\\0' | curl -sS -i --max-time 5 --http2-prior-knowledge --unix-socket /run/outrigger/workload.sock \
        -H 'content-type: application/grpc' -H 'te: trailers' -H 'workload.spiffe.io: true' --data-binary @- \
        http://localhost/SpiffeWorkloadAPI/FetchX509SVID";
    let said = world.web.exec(["sh", "-c", call])?;
    ensure!(said.stdout.contains("grpc-status: 7") && !said.stdout.contains("spiffe://"), "the app is told {}", said.all());
    let counted = agent_metrics()?;
    for (outcome, least) in [("answered", 2), ("refused", 1)] {
        let line = format!("outrigger_node_workload_api_calls_total{{outcome=\"{outcome}\"}} ");
        let count = counted.lines().find_map(|counted| counted.strip_prefix(&line)?.trim().parse::<u64>().ok());
        ensure!(count.is_some_and(|count| count >= least), "{outcome}: {count:?} in {counted}");
    }
    let log = world.mesh.log();
    ensure!(log.contains("an identity was refused"), "the agent's log does not tell of it: {log}");
    Ok(())
}

/// A gRPC frame without compression that holds a message of no bytes.
fn empty_message() -> Result<std::process::Stdio> {
    use std::io::{Seek as _, Write as _};
    let mut file = tempfile::tempfile()?;
    file.write_all(&[0; 5])?;
    file.rewind()?;
    Ok(file.into())
}

fn agent_again(world: &World) -> Result<()> {
    world.mesh.apply(&service("enrol", "web", 80, 8080))?;
    until(&world.api, "http://web/", 200)?;
    let agent = world.mesh.process("node")?;
    kill(agent, Signal::KILL);
    // What is captured stays captured, and goes on.
    expect(&world.api, &["http://web/"], 200)?;
    wait_for("the agent runs again", PATIENCE, || {
        ensure!(world.mesh.process("node")? != agent, "it does not");
        Ok(())
    })?;
    wait_for("both sidecars handed their listeners over again", PATIENCE, || {
        let said = finish(Command::new("curl").args(["-sS", "--fail", "http://127.0.0.1:14030/metrics"]), PATIENCE)?.ok()?;
        ensure!(said.contains("outrigger_node_enrolments_total{outcome=\"enrolled\"} 2"), "{said}");
        Ok(())
    })?;
    expect(&world.api, &["http://web/"], 200).map(drop)
}

/// The supervisor is stopped meanwhile, so that the pod is there before the part is.
fn away(world: &World, part: &str) -> Result<()> {
    let (supervisor, process) = (world.mesh.process("supervisor")?, world.mesh.process(part)?);
    let log = world.mesh.folder().join("away.log");
    kill(supervisor, Signal::STOP);
    kill(process, Signal::KILL);
    let mut run = outrigger(["run", "early", "-n", "enrol", "--", "true"]);
    let pod = run.stderr(std::fs::File::create(&log)?).spawn();
    let said = || std::fs::read_to_string(&log);
    let (waits, within) = match part {
        "node" => ("the node agent is being started again; waiting for it", 4),
        _control => ("the sidecar is not ready yet; waiting for it", 10),
    };
    let told = wait_for("the pod waits", Duration::from_secs(within), || {
        let told = said()?;
        ensure!(told.contains(waits), "it says {told:?}");
        Ok(())
    });
    kill(supervisor, Signal::CONT);
    let ended = pod?.wait()?;
    told?;
    ensure!(ended.success(), "{ended}: {}", said()?);
    wait_for("the part runs again", PATIENCE, || {
        ensure!(world.mesh.process(part)? != process, "it does not");
        Ok(())
    })
}

/// Certificates that live for ten seconds, and load for twice as long.
fn rotation() -> Result<()> {
    let mesh = Mesh::up_in(&[], &[("OUTRIGGER_SVID_TTL", "10s")])?;
    let _web = echo(&mesh, "rotation/web", "web")?;
    let caller = client(&mesh, "rotation/caller")?;
    mesh.apply(&service("rotation", "web", 80, 8080))?;
    until(&caller, "http://web/", 200)?;
    let expires = || {
        let said = finish(Command::new("curl").args(["-sS", "--fail", "http://127.0.0.1:14030/metrics"]), PATIENCE)?.ok()?;
        let ours = r#"outrigger_node_certificate_expiry_timestamp_seconds{namespace="rotation",pod="web"} "#;
        let value = said.lines().find_map(|line| line.strip_prefix(ours)).context("the agent tells of no certificate")?;
        value.parse::<u64>().context("no number")
    };
    let first = expires()?;
    let load = target().join("debug/load");
    let mut drive = caller.name.exec([load.as_os_str()]);
    drive.args(["drive", "web:80", "--connections", "2", "--pause", "5", "--seconds", "20"]);
    let seen: serde_json::Value = serde_json::from_str(&finish(&mut drive, PATIENCE)?.ok()?)?;
    let last = expires()?;
    ensure!(last >= first + 10, "certificates were not replaced: {first} and {last}");
    let good = seen["statuses"]["200"].as_u64();
    ensure!(good > Some(100) && seen["requests"].as_u64() == good, "requests were lost: {seen}");
    mesh.down()
}

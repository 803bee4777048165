//! The local mesh's own life: what `up` refuses, and that `down` leaves nothing, whatever happened before.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Said, binary, cgroup_root, finish, kill, outrigger, wait_for};
use e2e::quota::Quota;
use e2e::runner::{Case, Runner, Wish};
use rustix::process::Signal;

use crate::world::{Nobody, client, echo, expect, pins, route, service, until};

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    runner.group(
        "life",
        || Ok(()),
        &[
            Case { name: "up_without_root_says_what_it_needs", run: |(), _| without_root() },
            Case { name: "up_without_cgroup_v2_says_so", run: |(), _| without_cgroups() },
            Case { name: "up_without_the_right_to_load_programs_says_so", run: |(), _| without_programs() },
            Case { name: "a_watched_folder_may_disappear_and_come_back", run: |(), _| folder() },
            Case { name: "up_with_a_taken_port_says_who_has_it", run: |(), _| taken_port() },
            Case { name: "up_twice_says_that_it_is_up_and_down_takes_the_mesh_that_is_meant", run: |(), _| twice() },
            Case { name: "down_after_a_kill_of_everything_leaves_nothing", run: |(), _| nothing_left() },
            Case { name: "down_after_a_kill_of_the_supervisor_leaves_nothing", run: |(), _| supervisor_killed() },
            Case { name: "down_after_agents_that_were_killed_while_they_enrolled_leaves_nothing", run: half_enrolled },
            Case { name: "a_pod_that_no_mesh_knows_any_more_stays_closed", run: |(), _| left_behind() },
            Case { name: "up_after_a_kill_watches_the_folders_of_before", run: |(), _| watches_again() },
            Case { name: "no_process_of_the_mesh_keeps_what_its_caller_had_open", run: |(), _| lets_go() },
            Case { name: "rare_events_of_the_kernel_programs_reach_the_log_where_asked_for", run: |(), _| kernel_log() },
            Case { name: "a_service_without_an_address_is_its_pods", run: |(), _| headless() },
            Case { name: "a_pod_that_no_workload_may_be_is_refused_before_it_is_made", run: |(), _| refused_pods() },
            Case { name: "a_pod_passes_its_programs_exit_code_and_output_through", run: |(), _| passes_through() },
            Case { name: "a_sidecar_has_as_many_workers_as_its_quota_has_room_for", run: |(), _| workers() },
        ],
    );
}

/// A refusal by the environment: exit code 3, one message, a remedy.
fn refused(said: &Said, word: &str) -> Result<()> {
    ensure!(said.code == 3, "exit code {} instead of 3: {}", said.code, said.all());
    ensure!(said.stderr.to_lowercase().contains(word), "the message does not name {word}: {}", said.stderr);
    ensure!(said.stderr.lines().count() <= 6, "not one clear message: {}", said.stderr);
    Ok(())
}

fn without_root() -> Result<()> {
    refused(&Nobody::new()?.finish(&["up"])?, "root")
}

fn without_cgroups() -> Result<()> {
    let script = format!("umount -R {} && exec {} up", cgroup_root()?.display(), binary().display());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    refused(&finish(&mut command, PATIENCE)?, "cgroup")
}

fn without_programs() -> Result<()> {
    // As a kernel that refuses: root without the capabilities for bpf(2).
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-bpf,-sys_admin,-perfmon", "--inh-caps=-all"]).arg(binary()).arg("up");
    let said = finish(&mut command, PATIENCE)?;
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    refused(&said, "cap")
}

fn taken_port() -> Result<()> {
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    for (address, port) in [("127.0.0.1:14080", "14080"), ("0.0.0.0:14030", "14030")] {
        let listener = std::net::TcpListener::bind(address)?;
        let said = finish(&mut outrigger(["up"]), PATIENCE)?;
        drop(listener);
        finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
        refused(&said, port)?;
        ensure!(said.stderr.contains(&format!("process {} (", std::process::id())), "who has it is not told: {}", said.stderr);
        let remedy = said.stderr.lines().find(|line| line.contains("remedy: ")).unwrap_or_default();
        let kill = format!("`kill {}`", std::process::id());
        ensure!(remedy.contains(&kill) && !remedy.contains("--"), "an option that `up` does not have: {}", said.stderr);
    }
    Ok(())
}

fn folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let resources = folder.path().join("mesh");
    std::fs::create_dir(&resources)?;
    std::fs::write(resources.join("web.yaml"), service("life", "web", 80, 8080))?;
    let mesh = Mesh::up_with(&["--resources", &resources.to_string_lossy()])?;
    let web = echo(&mesh, "life/web", "web")?;
    let caller = client(&mesh, "life/client")?;
    until(&caller, "http://web/", 200)?;
    std::fs::remove_dir_all(&resources)?;
    std::thread::sleep(Duration::from_secs(1));
    // The last good state stays in force.
    expect(&caller, &["http://web/"], 200)?;
    std::fs::create_dir(&resources)?;
    std::fs::write(resources.join("web.yaml"), service("life", "web", 80, 8080) + &service("life", "again", 80, 8080))?;
    wait_for("the folder is read again", PATIENCE, || {
        let said = finish(&mut outrigger(["get", "Service", "again", "-n", "life"]), PATIENCE)?;
        ensure!(said.code == 0, "{}", said.all());
        Ok(())
    })?;
    drop((web, caller));
    mesh.down()
}

fn headless() -> Result<()> {
    let mesh = Mesh::up()?;
    let [first, second] = [echo(&mesh, "life/db-0", "db")?, echo(&mesh, "life/db-1", "db")?];
    let caller = client(&mesh, "life/client")?;
    let closed = "[{ matches: [{ path: { type: PathPrefix, value: /closed } }] }, { backendRefs: [{ name: db, port: 8080 }] }]";
    let service = service("life", "db", 8080, 8080).replace("spec:", "spec:\n  clusterIP: None");
    mesh.apply(&(service + &route("life", "db", "db", closed)))?;
    until(&caller, "http://db:8080/", 200)?;
    let addresses = [first.address()?, second.address()?];
    let named = caller.exec(["getent", "ahosts", "db"])?.ok()?;
    for address in &addresses {
        ensure!(named.contains(address.as_str()), "{address} is not behind db: {named}");
        // By the name of the Service its routes hold; by the pod's address it is the pod.
        let resolved = format!("db:8080:{address}");
        expect(&caller, &["--resolve", &resolved, "http://db:8080/closed"], 500)?;
        expect(&caller, &[&format!("http://{address}:8080/closed")], 200)?;
    }
    for (pod, own) in [("db-0", "life/db-0"), ("db-1", "life/db-1")] {
        for _ in 0..4 {
            let answer = expect(&caller, &[&format!("http://{pod}.db.life:8080/")], 200)?;
            ensure!(answer.body.contains(own), "{pod} was not asked: {}", answer.body);
        }
    }
    let told = finish(&mut outrigger(["explain", "--from", "life/client", "--to", "db"]), PATIENCE)?.ok()?;
    ensure!(addresses.iter().all(|address| told.contains(address)) && !told.contains("240.0"), "{told}");
    drop((first, second, caller));
    mesh.down()
}

fn refused_pods() -> Result<()> {
    let mesh = Mesh::up()?;
    let long = "a".repeat(80);
    for arguments in [
        &["--label", "app=a,b"][..],
        &["--label", "app=a", "--label", "app=b"],
        &["--port", "http:80", "--port", "http:81"],
        &["--port", "a:80", "--port", "b:80"],
        &[long.as_str()],
    ] {
        let name: &[&str] = if arguments == [long.as_str()] { &[] } else { &["odd"] };
        let words = [&["run"], name, arguments, &["-n", "life", "--", "true"]].concat();
        let said = finish(&mut outrigger(words), PATIENCE)?;
        ensure!(said.code == 2 && said.stderr.lines().count() <= 6, "{arguments:?}: {}: {}", said.code, said.all());
    }
    let said = finish(&mut outrigger(["delete", "-f", "/dev/null"]), PATIENCE)?;
    ensure!(said.code == 2 && said.stderr.contains("no document"), "{}: {}", said.code, said.all());
    mesh.down()
}

fn twice() -> Result<()> {
    let mesh = Mesh::up()?;
    let said = finish(&mut outrigger(["up"]), PATIENCE)?;
    ensure!(said.code != 0, "a second mesh came up: {}", said.all());
    ensure!(said.stderr.contains("already") && said.stderr.contains("down"), "the message names no remedy: {}", said.stderr);
    let other = finish(outrigger(["down", "--state"]).arg(mesh.folder().join("other")), PATIENCE)?;
    ensure!(other.code == 2 && other.stderr.contains("has its state in"), "another state's mesh: {}", other.all());
    mesh.api("/api/status").context("`down` of another state took the mesh down")?;
    mesh.down()
}

fn left_behind() -> Result<()> {
    let mesh = Mesh::up()?;
    let web = echo(&mesh, "life/web", "web")?;
    let caller = client(&mesh, "life/client")?;
    let outsider = mesh.pod("life/outsider").outside().idle()?;
    let url = format!("http://{}:8080/", web.address()?);
    // From the outsider's network, past `exec`, which needs a mesh that is up.
    let network = outsider.name.network();
    let closed = || {
        for _ in 0..4 {
            let ask = ["netns", "exec", &network, "curl", "-s", "--noproxy", "*", "--max-time", "1", "-w", "%{http_code}", &url];
            let heard = finish(Command::new("ip").args(ask), PATIENCE)?;
            ensure!(!heard.stdout.ends_with("200"), "a stranger was let in: {}", heard.stdout);
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    };
    closed()?;
    std::fs::remove_file(mesh.folder().join("state/pods/life.web.json"))?;
    closed().context("its record is gone")?;
    wait_for("status tells of it", PATIENCE, || {
        let said = finish(&mut outrigger(["status"]), PATIENCE)?;
        ensure!(said.code == 1 && said.all().contains("life/web: it runs and no record describes it"), "{}", said.all());
        Ok(())
    })?;
    kill(mesh.process("supervisor")?, Signal::KILL);
    let state = mesh.folder().join("state").display().to_string();
    let refused = wait_for("another mesh is refused", PATIENCE, || {
        let other = finish(outrigger(["up", "--detach", "--state"]).arg(mesh.folder().join("other")), PATIENCE)?;
        ensure!(other.code == 3 && other.stderr.contains("knows nothing of"), "{}: {}", other.code, other.all());
        Ok(other.stderr)
    })?;
    ensure!(refused.contains("life/client") && refused.contains(&format!("outrigger up --state {state}")), "{refused}");
    closed().context("its mesh is gone")?;
    // The note of who was up may be lost with the mesh; the pods know whose they are.
    std::fs::remove_file("/run/outrigger/up.json")?;
    let other = finish(outrigger(["down", "--state"]).arg(mesh.folder().join("other")), PATIENCE)?;
    ensure!(other.code == 2 && other.stderr.contains(&format!("has its state in {state}")), "{}: {}", other.code, other.all());
    closed().context("another mesh was taken down")?;
    drop((web, caller));
    mesh.down()
}

/// Pods outlive the supervisor, and what is allowed to them stands in a folder that the next `up` need not name.
fn watches_again() -> Result<()> {
    let watched = tempfile::tempdir()?;
    std::fs::write(watched.path().join("web.yaml"), service("life", "web", 80, 8080))?;
    let place = watched.path().display().to_string();
    let mesh = Mesh::up_with(&["--resources", &place])?;
    let known = || finish(&mut outrigger(["get", "service", "web", "-n", "life"]), PATIENCE);
    ensure!(known()?.code == 0, "{}", known()?.all());
    let state = mesh.folder().join("state").display().to_string();
    kill(mesh.process("supervisor")?, Signal::KILL);
    let again = |arguments: &[&str]| {
        wait_for("the mesh is up again", PATIENCE, || {
            let said = finish(outrigger(["up", "--detach", "--state", &state]).args(arguments), PATIENCE)?;
            ensure!(said.code == 0, "{}: {}", said.code, said.all());
            Ok(said.all())
        })
    };
    let said = again(&[])?;
    ensure!(said.contains(&format!("{place} (as before)")), "{said}");
    ensure!(known()?.code == 0, "what the folder holds is not in force: {}", known()?.all());
    // Only an end that was asked for forgets them.
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    let said = again(&[])?;
    ensure!(!said.contains("watching"), "{said}");
    mesh.down()
}

/// What a mesh makes outside its own folders.
fn traces() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut add = |kind: &str, text: &str| {
        for line in text.lines().filter(|line| line.contains("outrigger")) {
            found.insert(format!("{kind}: {line}"));
        }
    };
    add("network namespace", &finish(Command::new("ip").args(["netns", "list"]), PATIENCE)?.ok()?);
    add("link", &finish(Command::new("ip").args(["-o", "link"]), PATIENCE)?.ok()?);
    add("mount", &std::fs::read_to_string("/proc/self/mounts")?);
    let processes = std::fs::read_dir("/proc")?.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
    let ours = binary().into_os_string().into_encoded_bytes();
    for line in processes.filter(|line| line.split(|byte| *byte == 0).next() == Some(&ours)) {
        add("process", &String::from_utf8_lossy(&line).replace('\0', " "));
    }
    if cgroup_root()?.join("outrigger").exists() {
        found.insert("the cgroup outrigger".to_owned());
    }
    if std::path::Path::new("/run/outrigger/bpf").exists() {
        found.insert("/run/outrigger/bpf".to_owned());
    }
    Ok(found)
}

fn nothing_left() -> Result<()> {
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    let before = traces()?;
    let mesh = Mesh::up()?;
    let web = echo(&mesh, "life/web", "web")?;
    let caller = client(&mesh, "life/client")?;
    mesh.apply(&service("life", "web", 80, 8080))?;
    until(&caller, "http://web/", 200)?;
    ensure!(traces()?.len() > before.len(), "a running mesh leaves no trace, so this case sees nothing");
    let mut processes = vec![mesh.process("supervisor")?, mesh.process("control")?, mesh.process("node")?];
    for pod in [&web, &caller] {
        processes.extend(pod.processes("sidecar")?);
        processes.extend(pod.processes("app")?);
    }
    processes.iter().for_each(|process| kill(*process, Signal::KILL));
    // `outrigger run` of both pods as well: they end when their program is gone, or `down` ends them.
    finish(&mut outrigger(["down"]), PATIENCE)?.ok().context("down after a kill")?;
    drop((web, caller, mesh));
    let after = traces()?;
    let left: Vec<&String> = after.difference(&before).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    // And a mesh comes up again.
    Mesh::up()?.down()
}

/// The supervisor alone: its roles, the pods and their sidecars were not asked.
fn supervisor_killed() -> Result<()> {
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    let before = traces()?;
    let folder = tempfile::tempdir()?;
    let held = Held::new(folder.path())?;
    let mesh = Mesh::up()?;
    let pod = mesh.pod("life/left").detach(["sleep", "100000"])?;
    let mut processes: Vec<u32> =
        ["supervisor", "control", "node"].map(|role| mesh.process(role)).into_iter().collect::<Result<_>>()?;
    processes.extend(pod.processes("sidecar")?.into_iter().chain(pod.processes("app")?));
    kill(mesh.process("supervisor")?, Signal::KILL);
    finish(&mut outrigger(["down"]), PATIENCE)?.ok().context("down after a kill")?;
    let left: Vec<u32> = processes.into_iter().filter(|process| is_running(*process)).collect();
    ensure!(left.is_empty(), "processes are left: {left:?}");
    ensure!(held.holders()?.is_empty(), "the caller's file is held by {:?}", held.holders()?);
    drop((pod, mesh));
    let after = traces()?;
    let left: Vec<&String> = after.difference(&before).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Mesh::up()?.down()
}

/// The agent is killed at any moment of an enrolment, again and again. Its pods still come up, and no pin stays of those that
/// end; then everything is killed at once.
fn half_enrolled((): &(), wish: &Wish) -> Result<()> {
    // Whoever is killed again and again is started anew after 5 s in the end.
    let rounds: u64 = if wish.long { 40 } else { 8 };
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    let before = traces()?;
    let mesh = Mesh::up()?;
    let at_first = pins();
    let is_back = || {
        let mut ready = Command::new("curl");
        ready.args(["-sS", "--fail", "--max-time", "2", "http://127.0.0.1:14030/ready"]);
        wait_for("the agent is back", PATIENCE, || finish(&mut ready, PATIENCE)?.ok().map(drop))
    };
    for round in 0..rounds {
        is_back()?;
        let name = format!("half-{round}");
        let mut run = outrigger(["run", &name, "-n", "life", "--", "true"]);
        let mut run = run.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn()?;
        let record = mesh.folder().join(format!("state/pods/life.{name}.json"));
        let begun = std::time::Instant::now();
        while !record.exists() && begun.elapsed() < PATIENCE {
            std::hint::spin_loop();
        }
        // An enrolment takes some milliseconds.
        std::thread::sleep(Duration::from_micros(round % 8 * 700));
        kill(mesh.process("node")?, Signal::KILL);
        let status = wait_for("the pod's end", PATIENCE, || run.try_wait()?.context("it still runs"))?;
        // Who asks an agent that is killed at that moment is told so; the pod is gone all the same.
        ensure!(matches!(status.code(), Some(0 | 3)), "round {round}: {status}");
    }
    is_back()?;
    wait_for("the pins of pods that are gone", PATIENCE, || {
        ensure!(pins() == at_first, "{} pins, {at_first} at first", pins());
        Ok(())
    })?;
    let pod = mesh.pod("life/last").detach(["sleep", "100000"])?;
    let mut processes = vec![mesh.process("supervisor")?, mesh.process("control")?, mesh.process("node")?];
    processes.extend(pod.processes("sidecar")?.into_iter().chain(pod.processes("app")?));
    processes.iter().for_each(|process| kill(*process, Signal::KILL));
    finish(&mut outrigger(["down"]), PATIENCE)?.ok().context("down after a kill")?;
    drop((pod, mesh));
    let after = traces()?;
    let left: Vec<&String> = after.difference(&before).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn is_running(process: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// A file that this process has open and hands to everything that it starts, as a shell does after `exec 9>FILE`.
struct Held {
    file: std::fs::File,
    path: std::path::PathBuf,
}

impl Held {
    fn new(folder: &std::path::Path) -> Result<Self> {
        let path = folder.canonicalize()?.join("held");
        let file = std::fs::File::create(&path)?;
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
        Ok(Self { file, path })
    }

    /// Who else has it open: process and name.
    fn holders(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let open = std::fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
            if process != std::process::id()
                && open.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file == self.path)
            {
                let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                found.push(format!("{process} {}", name.trim()));
            }
        }
        Ok(found)
    }
}

fn lets_go() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let held = Held::new(folder.path())?;
    // A child that knows nothing of all this has it: the test would see it.
    let mut witness = Command::new("sleep").arg("100").spawn()?;
    let seen = held.holders();
    witness.kill()?;
    witness.wait()?;
    ensure!(seen?.len() == 1, "the file was not handed on, so this case sees nothing");
    rustix::fs::flock(&held.file, rustix::fs::FlockOperation::LockExclusive)?;
    let mesh = Mesh::up()?;
    let web = echo(&mesh, "life/held", "held")?;
    let apart = mesh.pod("life/apart").detach(["sleep", "100000"])?;
    let mut inside = web.spawn(["sleep", "100000"])?;
    let said = web.exec(["ls", "/proc/self/fd"])?.ok()?;
    // The fourth is the folder that ls reads.
    ensure!(said.split_whitespace().eq(["0", "1", "2", "3"]), "a program in a pod has open: {said}");
    let holders = held.holders()?;
    kill(inside.id(), Signal::KILL);
    inside.wait()?;
    ensure!(holders.is_empty(), "the caller's file is held by {holders:?}");
    // And in the background.
    drop((web, apart));
    mesh.down()?;
    let state = folder.path().join("state");
    let mut command = outrigger(["up", "--detach", "--state"]);
    // It returns when both of its outputs are closed: nothing that goes on has them.
    let up = finish(command.arg(&state), PATIENCE).and_then(Said::ok);
    let run =
        finish(&mut outrigger(["run", "apart", "-n", "life", "--detach", "--", "sleep", "100000"]), PATIENCE).and_then(Said::ok);
    let holders = held.holders();
    // The lock goes with its one owner.
    let Held { file, path } = held;
    drop(file);
    let free = rustix::fs::flock(std::fs::File::open(path)?, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    finish(&mut outrigger(["down"]), PATIENCE)?.ok()?;
    up.and(run)?;
    ensure!(holders?.is_empty(), "the caller's file is held in the background");
    free.context("the caller's lock is still held")
}

fn kernel_log() -> Result<()> {
    let line = "refused: connect to a link-local address, namespace ";
    for (asked, expected) in [("true", true), ("false", false)] {
        let mesh = Mesh::up_in(&[], &[("OUTRIGGER_KERNEL_LOG", asked)])?;
        let pod = client(&mesh, "life/rare")?;
        pod.curl(["--max-time", "2", "http://[fe80::1%25eth0]/"])?;
        let path = mesh.folder().join("state/log/node.log");
        let seen = wait_for("the line", Duration::from_secs(2), || {
            let log = std::fs::read_to_string(&path)?;
            ensure!(log.contains(line), "the node agent logged:\n{log}");
            Ok(())
        });
        drop(pod);
        mesh.down()?;
        ensure!(seen.is_ok() == expected, "asked for: {asked}, but {seen:?}");
    }
    Ok(())
}

fn passes_through() -> Result<()> {
    let mesh = Mesh::up()?;
    let said = finish(&mut outrigger(["run", "short", "-n", "life", "--", "sh", "-c", "echo said; exit 7"]), PATIENCE)?;
    ensure!(said.code == 7 && said.stdout.trim() == "said", "{said:?}");
    let pod = client(&mesh, "life/place")?;
    let said = pod.exec(["sh", "-c", "echo out; exit 5"])?;
    ensure!(said.code == 5 && said.stdout.trim() == "out", "{said:?}");
    drop(pod);
    mesh.down()
}

fn workers() -> Result<()> {
    let mesh = Mesh::up()?;
    let processors = std::thread::available_parallelism()?.get();
    for (name, percent, expected) in [("half", 50, 1), ("one", 150, 1), ("more", 250, processors.min(2)), ("free", 0, processors)]
    {
        let quota = if percent > 0 { Some(Quota::of(percent)?) } else { None };
        let pod = mesh.pod(&format!("life/{name}")).sidecar_env("OUTRIGGER_WORKERS", "auto").idle()?;
        drop(quota);
        let threads = std::fs::read_dir(format!("/proc/{}/task", pod.sidecar()?))?;
        let names = threads.map(|thread| Ok(std::fs::read_to_string(thread?.path().join("comm"))?));
        let names = names.collect::<Result<Vec<String>>>()?;
        // The first one is the process' own thread.
        let count = 1 + names.iter().filter(|name| name.trim() == "worker").count();
        ensure!(count == expected.clamp(1, 64), "{percent} %: {count} workers instead of {expected}: {names:?}");
    }
    mesh.down()
}

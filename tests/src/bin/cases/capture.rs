//! Capture as a pod's programs meet it: nothing gets past the sidecar, and nobody has to know that it is there.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, wait_for};
use e2e::rung::Rung;
use e2e::runner::{Case, Runner};

use crate::world::{Pair, until};

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || Pair::make(Mesh::up()?, "capture");
    runner.group(
        "capture",
        make,
        &[
            Case { name: "a_caller_sees_the_peer_that_it_asked_for", run: |world, _| true_peer(world) },
            Case { name: "a_pods_ipv6_address_is_reached_as_its_ipv4_address_is", run: |world, _| both_families(world) },
            Case { name: "a_pod_that_calls_itself_is_answered", run: |world, _| itself(world) },
            Case { name: "what_listens_on_loopback_is_reached_inside_the_pod_only", run: |world, _| loopback(world) },
            Case { name: "a_sidecars_own_ports_are_closed_to_everybody_outside", run: |world, _| own_ports(world) },
            Case { name: "an_app_that_asks_for_any_port_gets_none_of_the_sidecars", run: |world, _| any_port(world) },
            Case {
                name: "what_a_pods_annotations_exclude_passes_its_sidecar_by_and_is_counted",
                run: |world, _| excluded(world),
            },
            Case { name: "pods_that_come_and_go_do_not_change_their_gateways_address", run: |_, _| gateway() },
            Case {
                name: "a_crafted_packet_is_counted_within_a_second_and_told_by_status",
                run: |world, _| crafted(world, false),
            },
            Case { name: "a_crafted_packet_does_not_leave_a_pod_that_enforces", run: |world, _| crafted(world, true) },
            Case { name: "whoever_closes_an_enrolment_socket_opens_nothing", run: |world, _| enrolment_closed(world) },
            Case { name: "a_program_that_is_taken_off_is_missed_within_one_interval", run: |_, _| taken_off() },
            Case { name: "the_agent_tells_what_the_kernel_did", run: |world, _| counted(world) },
        ],
    );
}

/// Connects to `host`:`port` inside `pod` and prints the peer that the socket names, or the error's number.
fn peer(pod: &Pod, host: &str, port: u16) -> Result<String> {
    let script = "import socket, sys\ntry:\n  s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)\n  \
                  print(*s.getpeername()[:2])\nexcept OSError as error:\n  print('errno', error.errno)";
    let said = pod.exec(["python3", "-c", script, host, &port.to_string()])?.ok()?;
    Ok(said.trim().to_owned())
}

/// Takes every port that the kernel gives out, of a range that holds the sidecar's: by `listen` without `bind`, which passes no
/// hook, and by `bind` to port 0, which does not say which one it will be.
const ANY_PORT: &str = r#"
import socket
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("14000 14030")
taken, kept = set(), []
for bound in [False, True]:
    for _ in range(40):
        one = socket.socket()
        try:
            if bound:
                one.bind(("127.0.0.1", 0))
            one.listen()
        except OSError:
            break
        kept.append(one)
        taken.add(one.getsockname()[1])
    if not bound:
        assert len(kept) > 20, len(kept)
        print(sorted(taken & {14001, 14006, 14020, 14021}))
        kept.clear()
print(sorted(taken & {14001, 14006, 14020, 14021}))
"#;

/// In a pod without a sidecar, where nothing but the reservation keeps the ports.
fn any_port(world: &Pair) -> Result<()> {
    let pod = world.mesh.pod("capture/any-port").outside().idle()?;
    let said = pod.exec(["python3", "-c", ANY_PORT])?.ok()?;
    ensure!(said.split_whitespace().eq(["[]", "[]"]), "the kernel gave away {said}");
    Ok(())
}

/// The pod's IPv6 address.
fn v6(pod: &Pod) -> Result<String> {
    let network = pod.name.network();
    let list = ["-n", &network, "-6", "-o", "addr", "show", "dev", "eth0", "scope", "global"];
    let said = finish(Command::new("ip").args(list), PATIENCE)?.ok()?;
    let address = said.split_whitespace().skip_while(|word| *word != "inet6").nth(1);
    let address = address.and_then(|address| address.split('/').next()).with_context(|| format!("no address in {said}"))?;
    Ok(address.to_owned())
}

fn true_peer(world: &Pair) -> Result<()> {
    for address in [world.web.address()?, v6(&world.web)?] {
        let seen = peer(&world.caller, &address, 8080)?;
        ensure!(seen == format!("{address} 8080"), "asked for {address}, sees {seen}");
    }
    Ok(())
}

fn both_families(world: &Pair) -> Result<()> {
    until(&world.caller, &format!("http://{}:8080/", world.web.address()?), 200)?;
    until(&world.caller, &format!("http://[{}]:8080/", v6(&world.web)?), 200)?;
    Ok(())
}

fn itself(world: &Pair) -> Result<()> {
    until(&world.web, "http://web.capture/", 200)?;
    until(&world.web, &format!("http://{}:8080/", world.web.address()?), 200)?;
    Ok(())
}

fn loopback(world: &Pair) -> Result<()> {
    let mut server = world.web.spawn(["timeout", "20", "python3", "-m", "http.server", "--bind", "127.0.0.1", "7785"])?;
    let reached = || {
        world.web.wait_listening(7785)?;
        until(&world.web, "http://127.0.0.1:7785/", 200)?;
        let outside = world.caller.curl([&format!("http://{}:7785/", world.web.address()?)])?;
        ensure!(outside.status != 200, "the other pod was answered: {}", outside.body);
        Ok(())
    };
    let result = reached();
    server.kill().ok();
    server.wait()?;
    result
}

fn own_ports(world: &Pair) -> Result<()> {
    for address in [world.web.address()?, v6(&world.web)?] {
        for port in [14001, 14006, 14020] {
            // From the machine, whose processes no program redirects.
            let url =
                if address.contains(':') { format!("http://[{address}]:{port}/") } else { format!("http://{address}:{port}/") };
            let said = finish(Command::new("curl").args(["-sS", "--noproxy", "*", "--max-time", "5", &url]), PATIENCE)?;
            // 7: the connection was refused.
            ensure!(said.code == 7, "{url}: exit code {}: {}", said.code, said.all());
        }
    }
    Ok(())
}

/// What the agent counts: of `pod`, in the metric `name`, by the value of its third label.
pub(crate) fn agent_counts(pod: &str, name: &str, value: &str) -> Result<f64> {
    let text = agent_metrics()?;
    let parts = [format!("pod=\"{pod}\""), format!("=\"{value}\"")];
    let line = text.lines().find(|line| line.starts_with(&format!("{name}{{")) && parts.iter().all(|part| line.contains(part)));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok())
        .with_context(|| format!("no {name} of {pod} and {value} in {text}"))
}

pub(crate) fn agent_metrics() -> Result<String> {
    let url = "http://127.0.0.1:14030/metrics";
    finish(Command::new("curl").args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5", url]), PATIENCE)?.ok()
}

fn excluded(world: &Pair) -> Result<()> {
    const BYPASS: &str = "outrigger_capture_bypass_total";
    let serve = [e2e::programs::shop().into_os_string(), "echo".into()];
    let gate = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: { name: open, namespace: capture }\nspec: { targetRefs: [{ kind: Workload, name: open }], action: DENY, rules: [{ from: [{ namespaces: [nobody] }] }] }\n";
    world.mesh.apply(gate)?;
    let open = world.mesh.pod("capture/open").annotation("outrigger.dev/exclude-inbound-ports", "8080").run(serve)?;
    open.wait_listening(8080)?;
    // Who opens the port is told what it opens, and whoever looks.
    let told = "AuthorizationPolicy/capture/open: spec.targetRefs: it does nothing at port 8080 of Workload/capture/open";
    ensure!(open.log().contains(&format!("warning: {told}")), "{}", open.log());
    let status = finish(&mut e2e::mesh::outrigger(["status", "-o", "json"]), PATIENCE)?.ok()?;
    ensure!(status.contains("it does nothing at port 8080 of Workload/capture/open"), "{status}");
    let policy = finish(&mut e2e::mesh::outrigger(["get", "authz", "open", "-n", "capture"]), PATIENCE)?.ok()?;
    ensure!(policy.contains("accepted, 1 warning"), "{policy}");
    world.mesh.delete(gate)?;
    let url = |pod: &Pod| Ok::<_, anyhow::Error>(format!("http://{}:8080/", pod.address()?));
    // From the machine, in clear: what is excluded is reached, what is not is for the mesh alone.
    let from_outside = |pod: &Pod| {
        let mut command = Command::new("curl");
        command.args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "--noproxy", "*", "--max-time", "5", &url(pod)?]);
        finish(&mut command, PATIENCE)
    };
    ensure!(from_outside(&open)?.stdout == "200", "{}", from_outside(&open)?.all());
    ensure!(from_outside(&world.web)?.stdout != "200", "what is not excluded was reached from outside");
    // From a pod, without its sidecar; its connections to everybody else are captured as ever.
    let network = format!("{}/32", open.address()?);
    let past =
        world.mesh.pod("capture/past").account("past").annotation("outrigger.dev/exclude-outbound-cidrs", &network).idle()?;
    until(&past, &url(&open)?, 200)?;
    until(&past, "http://web.capture/", 200)?;
    for (pod, reason, some) in [
        ("open", "excluded_inbound_port", true),
        ("past", "excluded_outbound_cidr", true),
        ("past", "excluded_outbound_port", false),
        ("web", "excluded_inbound_port", false),
    ] {
        let count = agent_counts(pod, BYPASS, reason)?;
        ensure!((count >= 1.0) == some, "{BYPASS} of {pod} by {reason} is {count}");
    }
    ensure!(agent_counts("past", "outrigger_capture_connections", "redirected")? >= 1.0, "nothing else was captured");
    // A slip is no wish.
    let mut slip = e2e::mesh::outrigger(["run", "slip", "--annotation", "outrigger.dev/exclude-ports=80", "--", "true"]);
    let said = finish(&mut slip, PATIENCE)?;
    ensure!(said.code == 2 && said.stderr.contains("exclude-outbound-ports"), "{}", said.all());
    Ok(())
}

/// A bridge without an address of its own takes its ports' lowest; its neighbours would talk to nobody until they notice.
fn gateway() -> Result<()> {
    let address = || std::fs::read_to_string("/sys/class/net/outrigger0/address");
    let ip = |line: &str| finish(Command::new("ip").args(line.split(' ')), PATIENCE)?.ok();
    let before = address()?;
    ip("link add orlowest address 02:00:00:00:00:01 type veth peer name orlowest-peer")?;
    let joined = ip("link set orlowest master outrigger0 up");
    let after = address();
    ip("link delete orlowest")?;
    joined?;
    ensure!(after? == before, "the bridge took the address of a port");
    Ok(())
}

/// Sends the first segment of a connection to `host`:8080 by a raw socket, as a program with CAP_NET_RAW can.
const CRAFT: &str = r#"
import socket, struct, sys
source, target = socket.inet_aton(sys.argv[1]), socket.inet_aton(sys.argv[2])
segment = struct.pack("!HHIIBBHHH", 5555, 8080, 1, 0, 5 << 4, 2, 1024, 0, 0)
pseudo = source + target + struct.pack("!BBH", 0, 6, len(segment)) + segment
total = sum(struct.unpack("!%dH" % (len(pseudo) // 2), pseudo))
total = (total & 0xffff) + (total >> 16)
segment = segment[:16] + struct.pack("!H", ~(total + (total >> 16)) & 0xffff) + segment[18:]
socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP).sendto(segment, (sys.argv[2], 0))
"#;

/// Sends it from `pod` to `target`.
pub(crate) fn craft(pod: &Pod, target: &Pod) -> Result<()> {
    pod.exec(["python3", "-c", CRAFT, &pod.address()?, &target.address()?])?.ok().map(drop)
}

fn crafted(world: &Pair, enforce: bool) -> Result<()> {
    let (name, mode) = if enforce { ("enforcing", "enforce") } else { ("observed", "observe") };
    let pod = world.mesh.pod(&format!("capture/{name}")).annotation("outrigger.dev/capture", mode).idle()?;
    until(&pod, "http://web.capture/", 200)?;
    let count = |event: &str| agent_counts(name, "outrigger_capture_connections", event);
    let arrived = || agent_counts("web", "outrigger_capture_connections", "steered");
    ensure!(count("raw_socket")? == 0.0, "what the sidecar dials is counted");
    let before = arrived()?;
    craft(&pod, &world.web)?;
    std::thread::sleep(Duration::from_secs(1));
    let bypass = agent_counts(name, "outrigger_capture_bypass_total", "raw_socket")?;
    ensure!(bypass == 1.0, "{bypass} were counted");
    let (dropped, more) = (count("bypass_dropped")?, arrived()? - before);
    ensure!((dropped == 1.0) == enforce && (more == 0.0) == enforce, "{dropped} were dropped, {more} arrived");
    let said = finish(&mut e2e::mesh::outrigger(["status"]), PATIENCE)?;
    let told = format!("warning: connections of capture/{name} got past its sidecar: raw_socket 1");
    ensure!(said.code == 0 && said.stdout.contains(&told), "{}", said.all());
    ensure!(said.stdout.lines().any(|line| line.starts_with("capture ") && line.contains("links watched")), "{}", said.all());
    until(&pod, "http://web.capture/", 200).map(drop)
}

/// The connection is kept open for the agent's sake alone: closing it, or asking for what one may not have, changes nothing.
fn enrolment_closed(world: &Pair) -> Result<()> {
    let script = "import socket\nfor text in (b'', b'{', b'{\"outrigger\":1,\"namespace\":\"capture\",\"name\":\"caller\"}\\n'):\n  \
                  for _ in range(50):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect('/run/outrigger/node.sock')\n    \
                  s.send(text) if text else None\n    s.close()";
    world.caller.exec(["python3", "-c", script])?.ok()?;
    until(&world.caller, "http://web.capture/", 200)?;
    // The sidecar's own ends with it: then nothing leaves and nothing comes in, until there is a sidecar again.
    let address = world.web.address()?;
    e2e::mesh::kill(world.web.sidecar()?, rustix::process::Signal::KILL);
    let url = format!("http://{address}:8080/");
    let direct = finish(Command::new("curl").args(["-sS", "--fail", "--noproxy", "*", "--max-time", "2", &url]), PATIENCE)?;
    ensure!(direct.code != 0, "the app was reached: {}", direct.all());
    until(&world.caller, "http://web.capture/", 200).map(drop)
}

/// A pin is all that holds a program where it is attached.
fn taken_off() -> Result<()> {
    let ready = || {
        let url = "http://127.0.0.1:14030/ready";
        finish(Command::new("curl").args(["-sS", "--noproxy", "*", "--max-time", "5", "-w", "%{http_code}", url]), PATIENCE)?.ok()
    };
    ensure!(ready()? == "ready\n200", "not ready before");
    std::fs::remove_file("/run/outrigger/bpf/link_or_getpeername6")?;
    let begun = std::time::Instant::now();
    wait_for("the agent misses it", PATIENCE, || {
        let said = ready()?;
        ensure!(said.contains("or_getpeername6") && said.ends_with("503"), "it says {said}");
        Ok(())
    })?;
    ensure!(begun.elapsed() < Duration::from_secs(12), "after {:?} only", begun.elapsed());
    let said = finish(&mut e2e::mesh::outrigger(["status"]), PATIENCE)?;
    ensure!(said.code == 1 && said.stdout.contains("capture is not complete: the program or_getpeername6"), "{}", said.all());
    wait_for("it is put back", PATIENCE, || {
        let said = ready()?;
        ensure!(said == "ready\n200", "it says {said}");
        Ok(())
    })
}

fn counted(world: &Pair) -> Result<()> {
    until(&world.caller, "http://web.capture/", 200)?;
    let text = agent_metrics()?;
    // Of these nftables knows nothing.
    let by_programs = Rung::asked() == Rung::Ebpf;
    for (pod, event, some) in [
        ("caller", "redirected", true),
        ("caller", "original_found", by_programs),
        ("caller", "original_missing", false),
        ("web", "steered", true),
        ("web", "client_shown", by_programs),
        ("web", "own_port_refused", true),
        ("web", "foreign_own_dial", false),
    ] {
        let name = format!(r#"outrigger_capture_connections{{event="{event}",namespace="capture",pod="{pod}"}} "#);
        let line = text.lines().find(|line| line.starts_with(&name)).with_context(|| format!("no {name}in {text}"))?;
        ensure!(line.ends_with(" 0") != some, "{line}");
    }
    Ok(())
}

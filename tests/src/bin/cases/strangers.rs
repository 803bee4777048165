//! Whoever stands at the door and should not be let in: silent, slow, malformed, or with papers that are no good.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, wait_for};
use e2e::runner::{Case, Runner};

use crate::world::{client, echo, expect, metric, own, until};

struct World {
    client: Pod,
    outsider: Pod,
    web: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "door/web", "web")?;
        let caller = client(&mesh, "door/client")?;
        let outsider = mesh.pod("door/outsider").outside().idle()?;
        mesh.apply(
            "---\napiVersion: v1\nkind: Service\nmetadata: { name: web, namespace: door }\nspec:\n  selector: { app: web }\n  ports: [{ port: 80, targetPort: 8080, appProtocol: http }]\n",
        )?;
        mesh.apply(&own("PeerAuthentication", "door", "open", "{ mode: Permissive }"))?;
        until(&caller, "http://web/", 200)?;
        Ok(World { client: caller, outsider, web, mesh })
    };
    runner.group(
        "strangers",
        make,
        &[
            Case { name: "a_silent_or_slow_client_of_a_declared_port_is_let_go_of_in_time", run: |world, _| slow(world) },
            Case { name: "a_malformed_request_is_told_which_limit_it_broke", run: |world, _| malformed(world) },
            Case { name: "floods_of_http_2_are_ended_in_bounded_memory_while_others_are_served", run: |world, _| floods(world) },
            Case { name: "an_expired_or_foreign_certificate_opens_no_link", run: |world, _| papers(world) },
        ],
    );
}

/// Three clients at once: one says nothing, one never ends its head, one is fast.
fn slow(world: &World) -> Result<()> {
    let code = "import socket, sys, threading, time; said = []\n\
        def silent():\n\
        \x20   s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.settimeout(25); t = time.time()\n\
        \x20   d = s.recv(1000); said.append(f'silent {len(d)} {round(time.time() - t)}')\n\
        def trickle():\n\
        \x20   s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.settimeout(25); t = time.time()\n\
        \x20   s.sendall(b'GET /trickled HTTP/1.1\\r\\nhost: web\\r\\nx: ')\n\
        \x20   s.settimeout(0.5); d = b''\n\
        \x20   while time.time() - t < 25:\n\
        \x20       try:\n\
        \x20           d = s.recv(1000); break\n\
        \x20       except TimeoutError: s.sendall(b'a')\n\
        \x20   ours = b'outrigger-reason: request_timeout' in d; said.append(f'trickle {d[:12].decode()} {ours} {round(time.time() - t)}')\n\
        ts = [threading.Thread(target=f) for f in (silent, trickle)]\n\
        [t.start() for t in ts]; [t.join() for t in ts]; print(*said, sep='; ')\n";
    let address = world.web.address()?;
    for (pod, sidecar, direction, host, port) in [
        (&world.outsider, &world.web, "inbound", address.as_str(), "8080"),
        (&world.client, &world.client, "outbound", "web", "80"),
    ] {
        let wanted = ["request_timeout", "door/web", direction];
        let before = metric(sidecar, "outrigger_refusals_total", &wanted)?;
        let said = pod.exec(["python3", "-c", code, host, port])?.ok()?;
        let line = |word: &str| {
            said.trim().split("; ").find(|line| line.starts_with(word)).with_context(|| format!("no {word} in {said}"))
        };
        let seconds = |line: &str| line.rsplit(' ').next().and_then(|word| word.parse::<u32>().ok()).unwrap_or_default();
        let (silent, trickle) = (line("silent")?, line("trickle")?);
        ensure!(silent.starts_with("silent 0 ") && (9..=13).contains(&seconds(silent)), "{direction}: {said}");
        ensure!(trickle.contains("HTTP/1.1 408") && trickle.contains("True"), "{direction}: {said}");
        ensure!((9..=13).contains(&seconds(trickle)), "{direction}: {said}");
        let after = metric(sidecar, "outrigger_refusals_total", &wanted)?;
        ensure!(after >= before + 2.0, "{direction}: {before} refusals became {after}");
    }
    expect(&world.client, &["http://web/"], 200).map(drop)
}

fn malformed(world: &World) -> Result<()> {
    let address = world.web.address()?;
    let large = format!("x-large: {}", "y".repeat(100_000));
    let long = "z".repeat(100_000);
    for (pod, base) in [(&world.client, "http://web".to_owned()), (&world.outsider, format!("http://{address}:8080"))] {
        let cases: [(&[&str], &str, u16, &str, &str); 5] = [
            (&["-H", "Host:"], "/hostless", 400, "bad_request", "no Host"),
            (&["-H", "outrigger-upgrade: x"], "/reserved", 400, "reserved_header", "outrigger-upgrade"),
            (&["-H", &large], "/", 431, "headers_too_large", "larger than 65536 bytes"),
            (&[], &format!("/{long}"), 414, "uri_too_long", "longer than 65534 bytes"),
            (&["-H", "content-length: 1", "-H", "Content-Length: 2"], "/", 400, "bad_request", "Content-Length"),
        ];
        for (arguments, path, status, reason, words) in cases {
            let mut line = vec!["-i"];
            line.extend_from_slice(arguments);
            let url = format!("{base}{path}");
            line.push(&url);
            let answer = pod.curl(&line)?;
            ensure!(answer.status == status, "{reason} was answered with {}: {}", answer.status, answer.body);
            let header = format!("outrigger-reason: {reason}");
            ensure!(answer.body.contains(&header) && answer.body.contains(words), "{reason}: {}", answer.body);
        }
    }
    let log = world.mesh.folder().join("state/log/door.web.access.log");
    wait_for("the access log", PATIENCE, || {
        let text = std::fs::read_to_string(&log).with_context(|| format!("no {}", log.display()))?;
        let peer = format!("\"peer\":\"{}:", world.outsider.address()?);
        for reason in ["headers_too_large", "uri_too_long", "bad_request", "reserved_header"] {
            let reason = format!("\"reason\":\"{reason}\"");
            let told = |line: &str| line.contains(&reason) && line.contains(&peer) && line.contains("\"door/web\"");
            ensure!(text.lines().any(told), "no line with {reason} and {peer}: {text}");
        }
        // What was refused before it was understood is told as it came.
        for path in ["/hostless", "/reserved"] {
            ensure!(text.contains(&format!("\"path\":\"{path}\"")), "no line with {path}: {text}");
        }
        Ok(())
    })
}

/// All attacks at once at the door of one sidecar, from outside of the mesh, while another pod calls.
fn floods(world: &World) -> Result<()> {
    let address = world.web.address()?;
    let sidecar = world.web.sidecar()?;
    let memory = |field: &str| -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{sidecar}/status"))?;
        let line = status.lines().find(|line| line.starts_with(field)).with_context(|| format!("no {field}"))?;
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).with_context(|| format!("no number: {line}"))
    };
    // From here on VmHWM is the most that there was since now.
    std::fs::write(format!("/proc/{sidecar}/clear_refs"), "5")?;
    let before = memory("VmRSS")?;
    let program = e2e::mesh::root().join("tests/floods.py").to_string_lossy().into_owned();
    let (seconds, connections) = (FLOOD.as_secs().to_string(), FLOOD_CONNECTIONS.to_string());
    let (said, served, slowest) = std::thread::scope(|scope| -> Result<_> {
        let mut command = world.outsider.name.exec(["python3", &program, &address, "8080", &seconds, &connections]);
        let flood = scope.spawn(move || finish(&mut command, FLOOD + PATIENCE));
        let (mut served, mut slowest) = (0_u32, Duration::ZERO);
        while !flood.is_finished() {
            let begin = Instant::now();
            expect(&world.client, &["http://web/"], 200)?;
            slowest = slowest.max(begin.elapsed());
            served += 1;
        }
        Ok((flood.join().map_err(|_panic| anyhow!("the flood broke off"))??.ok()?, served, slowest))
    })?;
    ensure!(world.web.sidecar()? == sidecar, "the sidecar is another one");
    let most = memory("VmHWM")?;
    println!(
        "    {served} others served, the slowest in {slowest:?}; {before} KiB before, {most} KiB at most; ended: {}",
        said.trim()
    );
    let ended: BTreeMap<String, u32> = serde_json::from_str(&said)?;
    for (attack, times) in &ended {
        ensure!(attack == "shut" || *times >= FLOOD_CONNECTIONS, "{attack} was ended {times} times only: {said}");
    }
    ensure!(served >= 5 && slowest < FLOOD, "only {served} requests of others were served, the slowest in {slowest:?}");
    ensure!(most <= before + FLOOD_KIB_MAX, "{before} KiB became {most} KiB");
    for reason in ["too_many_resets", "too_many_frames", "headers_too_large"] {
        let told = metric(&world.web, "outrigger_refusals_total", &[reason, "door/web", "inbound"])?;
        ensure!(told >= f64::from(FLOOD_CONNECTIONS), "{reason}: {told} refusals were told");
    }
    // And afterwards it is as before.
    expect(&world.client, &["http://web/"], 200).map(drop)
}

/// Leaves signed by the mesh's own root: one that is good, to know that the door opens at all; one that is over; one of
/// another trust domain. And one of another root.
fn papers(world: &World) -> Result<()> {
    let folder = world.mesh.folder().join("papers");
    std::fs::create_dir_all(&folder)?;
    let authority = world.mesh.folder().join("state/ca");
    let sign = "set -e; cd \"$1\"; n=$2; shift 2\n\
        openssl ecparam -name prime256v1 -genkey -noout -out $n.key\n\
        openssl req -new -key $n.key -subj /CN=stranger -out $n.csr\n\
        printf 'basicConstraints=critical,CA:FALSE\\nkeyUsage=critical,digitalSignature\\nextendedKeyUsage=serverAuth,clientAuth\\nsubjectAltName=URI:%s\\n' \"$1\" > $n.ext\n\
        openssl x509 -req -in $n.csr -CA \"$3\" -CAkey \"$4\" -set_serial 0x40$RANDOM -days \"$2\" -extfile $n.ext -out $n.crt\n\
        chmod 644 $n.key $n.crt\n";
    finish(
        Command::new("openssl").current_dir(&folder).args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            "other.key",
            "-subj",
            "/CN=other",
            "-days",
            "2",
            "-out",
            "other.pem",
        ]),
        PATIENCE,
    )?
    .ok()?;
    let ours = "spiffe://cluster.local/ns/door/sa/client";
    let root = |name: &str| authority.join(name).to_string_lossy().into_owned();
    let (mesh_root, mesh_key) = (root("root.pem"), root("root.key"));
    for (name, id, days, root, key) in [
        ("good", ours, "1", mesh_root.as_str(), mesh_key.as_str()),
        // It is over one second after it began.
        ("expired", ours, "0", &mesh_root, &mesh_key),
        ("foreign", "spiffe://elsewhere.example/ns/door/sa/client", "1", &mesh_root, &mesh_key),
        ("other-root", ours, "1", "other.pem", "other.key"),
    ] {
        let mut command = Command::new("bash");
        command.args(["-c", sign, "sign"]).arg(&folder).args([name, id, days, root, key]);
        finish(&mut command, PATIENCE)?.ok().with_context(|| format!("cannot sign {name}"))?;
    }
    std::thread::sleep(Duration::from_secs(2));
    let code = "import socket, ssl, sys\n\
        c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE; c.set_alpn_protocols([sys.argv[2]])\n\
        c.load_cert_chain(sys.argv[3] + '.crt', sys.argv[3] + '.key')\n\
        try:\n\
        \x20   s = c.wrap_socket(socket.create_connection((sys.argv[1], 8080)), server_hostname='web'); s.settimeout(5)\n\
        \x20   s.sendall(b'GET /stranger HTTP/1.1\\r\\nhost: web\\r\\nconnection: close\\r\\n\\r\\n' if sys.argv[2] == 'outrigger-tcp' else b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0')\n\
        \x20   d = s.recv(4000); print('answered' if d else 'closed', d[:60])\n\
        except (OSError, ssl.SSLError) as e: print('refused', e)\n";
    let address = world.web.address()?;
    let tried = |name: &str, alpn: &str| {
        let papers = folder.join(name).to_string_lossy().into_owned();
        world.outsider.exec(["python3", "-c", code, &address, alpn, &papers])?.ok()
    };
    let wanted = ["inbound", "handshake_failed", "door/web"];
    let reached = |parts: &[&str]| metric(&world.web, "outrigger_opaque_connections_total", parts);
    let before = metric(&world.web, "outrigger_refusals_total", &wanted)?;
    for alpn in ["outrigger-h2", "outrigger-tcp"] {
        let said = tried("good", alpn)?;
        ensure!(said.contains("answered"), "{alpn} with a good certificate: {said}");
    }
    wait_for("the good connection's end", PATIENCE, || {
        ensure!(reached(&["inbound", ours])? >= 1.0, "not told");
        Ok(())
    })?;
    let carried = reached(&["inbound", ours])?;
    for name in ["expired", "foreign", "other-root"] {
        for alpn in ["outrigger-h2", "outrigger-tcp"] {
            let said = tried(name, alpn)?;
            ensure!(!said.contains("answered"), "{alpn} with the {name} certificate: {said}");
        }
    }
    wait_for("the refusals", PATIENCE, || {
        let after = metric(&world.web, "outrigger_refusals_total", &wanted)?;
        ensure!(after >= before + 6.0, "{before} handshakes became {after}");
        Ok(())
    })?;
    ensure!(reached(&["inbound", ours])? <= carried, "a connection was carried to the application");
    ensure!(reached(&["elsewhere.example"])? <= 0.0, "a foreign identity was believed");
    let log = std::fs::read_to_string(world.mesh.folder().join("state/log/door.web.access.log"))?;
    let peer = format!("\"peer\":\"{}:", world.outsider.address()?);
    let lines = log.lines().filter(|line| line.contains("\"reason\":\"handshake_failed\"") && line.contains(&peer));
    ensure!(lines.clone().count() >= 6, "the access log: {log}");
    for detail in ["certificate_expired", "trust_domain", "unknown_authority"] {
        let wanted = format!("\"detail\":\"{detail}\"");
        ensure!(lines.clone().filter(|line| line.contains(&wanted)).count() >= 2, "{detail} in the access log: {log}");
    }
    expect(&world.client, &["http://web/"], 200).map(drop)
}

/// How long the floods last, how many connections each of them has, and what they may cost a sidecar.
const FLOOD: Duration = Duration::from_secs(10);
const FLOOD_CONNECTIONS: u32 = 4;
const FLOOD_KIB_MAX: u64 = 16 << 10;

//! What an application sees behind a pair of sidecars, next to what it sees behind nginx: the same odd requests, byte for
//! byte, through both, to the same program. A difference is named here and justified, or it is a failure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner, Wish};

use crate::corpus::{CORPUS, Odd};
use crate::world::{client, until};

struct World {
    client: Pod,
    plain: Pod,
    app: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    runner.group(
        "fidelity",
        make,
        &[
            Case {
                name: "odd_requests_reach_the_application_as_behind_nginx_or_for_a_reason",
                run: |world, _| differential(world),
            },
            Case { name: "a_large_body_passes_in_constant_memory_both_ways", run: large },
        ],
    );
}

fn make() -> Result<World> {
    let mesh = Mesh::up()?;
    let folder = mesh.folder().join("fidelity");
    std::fs::create_dir_all(folder.join("logs"))?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = folder.join(name);
        std::fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let recorder = file("recorder.py", RECORDER)?;
    file("ask.py", ASK)?;
    file("large.py", LARGE)?;
    let path = folder.display();
    let nginx = file(
        "nginx.conf",
        &format!(
            "daemon off; master_process off; pid {path}/pid; error_log {path}/error;\n\
             events {{ worker_connections 512; }}\n\
             http {{\n\
               access_log off; underscores_in_headers on; large_client_header_buffers 4 64k; proxy_buffer_size 64k; proxy_buffers 8 64k; proxy_busy_buffers_size 128k;\n\
               client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c; uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;\n\
               server {{ listen 8081; location / {{\n\
                 proxy_pass http://127.0.0.1:8080; proxy_http_version 1.1; proxy_request_buffering off;\n\
                 proxy_set_header Host $http_host; proxy_set_header Connection '';\n\
               }} }}\n\
             }}\n"
        ),
    )?;
    let app = mesh.pod("odd/app").label("app", "app").account("app").run(["python3", "-u", &recorder])?;
    app.wait_listening(8080)?;
    let program = programs::third("usr/sbin/nginx")?;
    let both = format!("python3 -u {recorder} & LD_LIBRARY_PATH={} exec {} -c {nginx}", programs::libraries(), program.display());
    let plain = mesh.pod("odd/plain").outside().run(["sh", "-c", &both])?;
    plain.wait_listening(8080)?;
    plain.wait_listening(8081)?;
    mesh.apply(
        "---\napiVersion: v1\nkind: Service\nmetadata: { name: app, namespace: odd }\nspec:\n  selector: { app: app }\n  ports: [{ port: 80, targetPort: 8080, appProtocol: http }]\n",
    )?;
    let caller = client(&mesh, "odd/client")?;
    until(&caller, "http://app/", 200)?;
    Ok(World { client: caller, plain, app, mesh })
}

fn differential(world: &World) -> Result<()> {
    ensure!(CORPUS.len() >= 40, "the corpus shrank to {}", CORPUS.len());
    let folder = world.mesh.folder().join("fidelity");
    let texts: Vec<String> = CORPUS.iter().map(|odd| hex(odd.bytes)).collect();
    std::fs::write(folder.join("corpus.json"), serde_json::to_string(&texts)?)?;
    let nginx = ask(&world.plain, &folder, "127.0.0.1", "8081")?;
    let pair = ask(&world.client, &folder, "app", "80")?;
    let mut wrong = String::new();
    for (index, odd) in CORPUS.iter().enumerate() {
        let lines = |all: &[Vec<String>]| all.get(index).cloned().unwrap_or_default();
        let (nginx, pair) = (lines(&nginx), lines(&pair));
        let found = difference(&nginx, &pair);
        let Odd { name, differs, .. } = odd;
        let named = differs.map_or(String::new(), |(difference, _why)| difference.trim().to_owned());
        let reason = differs.is_none_or(|(_, why)| why.contains("RFC "));
        if found.trim() != named || !reason {
            write!(wrong, "\n{name}: found\n{found}\nnamed\n{named}\n(nginx {nginx:?}\n pair {pair:?})\n")?;
        }
    }
    ensure!(wrong.is_empty(), "unnamed differences, or named ones that are none:{wrong}");
    Ok(())
}

/// What the application saw of each request, or how it was refused, line by line.
fn ask(pod: &Pod, folder: &Path, host: &str, port: &str) -> Result<Vec<Vec<String>>> {
    let script = folder.join("ask.py").to_string_lossy().into_owned();
    let corpus = folder.join("corpus.json").to_string_lossy().into_owned();
    let said = pod.exec(["python3", &script, host, port, &corpus])?.ok()?;
    serde_json::from_str(&said).with_context(|| format!("no list: {said}"))
}

/// The lines that only one of both has; or that they have the same in another order.
fn difference(nginx: &[String], pair: &[String]) -> String {
    let mut counts = BTreeMap::<&str, i32>::new();
    nginx.iter().for_each(|line| *counts.entry(line).or_default() -= 1);
    pair.iter().for_each(|line| *counts.entry(line).or_default() += 1);
    let only = |list: &[String], sign: char, many: i32| -> String {
        let here = |line: &&String| counts.get(line.as_str()).is_some_and(|count| count.signum() == many);
        list.iter().filter(here).fold(String::new(), |text, line| text + &format!("{sign} {line}\n"))
    };
    let text = only(nginx, '-', -1) + &only(pair, '+', 1);
    if text.is_empty() && nginx != pair { "another order".to_owned() } else { text }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Answers each request with what it saw of it, in hexadecimal digits, and knows uploads and downloads of any size.
const RECORDER: &str = r#"
import re, socket, threading

def serve(peer):
    data = bytearray()
    def more():
        piece = peer.recv(1 << 18)
        if not piece: raise EOFError
        data.extend(piece)
    def line(at):
        while True:
            end = data.find(b"\r\n", at)
            if end >= 0: return end + 2
            more()
    try:
        while True:
            while b"\r\n\r\n" not in data: more()
            end = data.index(b"\r\n\r\n") + 4
            head = bytes(data[:end]).lower()
            if b"\r\nexpect: 100-continue" in head: peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: *(\d+)", head)
            if head.startswith(b"post /count"):
                left = int(length[1]) - (len(data) - end)
                total = len(data) - end
                while left > 0:
                    got = peer.recv_into(view, min(left, len(view)))
                    if not got: raise EOFError
                    left -= got; total += got
                data.clear()
                peer.sendall(b"HTTP/1.1 200 OK\r\nX-Total: %d\r\nContent-Length: 0\r\n\r\n" % total)
                continue
            if head.startswith(b"get /give/"):
                size = int(head.split(b"/")[2].split()[0])
                del data[:end]
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                while size > 0: size -= peer.send(view[:min(size, len(view))])
                continue
            if b"\r\ntransfer-encoding: chunked" in head:
                while True:
                    after = line(end)
                    size = int(bytes(data[end:after]).split(b";")[0].strip(), 16)
                    end = after
                    if size == 0: break
                    while len(data) < end + size + 2: more()
                    end += size + 2
                while True:
                    after = line(end)
                    empty = after == end + 2
                    end = after
                    if empty: break
            elif length:
                end += int(length[1])
                while len(data) < end: more()
            seen = bytes(data[:end]).hex().encode()
            del data[:end]
            peer.sendall(b"HTTP/1.1 200 OK\r\nX-Seen: " + seen + b"\r\nContent-Length: 0\r\n\r\n")
    except (EOFError, OSError, ValueError): pass
    finally: peer.close()

view = memoryview(bytearray(1 << 18))
server = socket.create_server(("0.0.0.0", 8080), backlog=512)
while True: threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"#;

/// Sends each request on a connection of its own and prints what was seen of it in lines that can be compared: where
/// nginx always writes Host first, and a trace header is added by every sidecar, that is no line.
const ASK: &str = r#"
import json, re, socket, sys, threading

def chunks(rest):
    body, trailers = b"", []
    while True:
        size, _, rest = rest.partition(b"\r\n")
        size = int(size.split(b";")[0], 16)
        if size == 0: break
        body, rest = body + rest[:size], rest[size + 2:]
    return body, [f"trailer {line.decode('latin1')}" for line in rest.split(b"\r\n") if line]

def lines(raw):
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *headers = head.split(b"\r\n")
    host, framing, others, trailers = "no host", "no body", [], []
    for header in headers:
        name, _, value = header.partition(b":")
        value = value.strip().decode("latin1")
        if name.lower() == b"traceparent": continue
        if name.lower() == b"host": host = f"host {value}"
        elif name.lower() == b"content-length": framing = f"length {value}"
        elif name.lower() == b"transfer-encoding":
            framing = f"coded {value}"
            rest, trailers = chunks(rest)
        else: others.append(header.decode("latin1"))
    body = [f"body {rest.decode('latin1')}"] if rest else []
    return [first.decode("latin1"), host, framing, *others, *body, *trailers]

def one(index, request):
    answer = b""
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as peer:
            peer.sendall(request)
            while True:
                piece = peer.recv(1 << 16)
                if not piece: break
                answer += piece
                peer.settimeout(0.7)
    except OSError: pass
    seen = []
    for status, seal in re.findall(rb"(?:^|\r\n|\n)HTTP/1\.[01] ([2-5]\d\d)[^\r]*\r\n(?:[^\r]+\r\n)*?(?:x-seen: ([0-9a-f]+)\r\n|\r\n)", answer, re.I):
        seen += lines(bytes.fromhex(seal.decode())) if seal else [f"refused {status.decode()}"]
    results[index] = seen or [f"no answer"]

requests = [bytes.fromhex(text) for text in json.load(open(sys.argv[3]))]
results = [None] * len(requests)
threads = [threading.Thread(target=one, args=pair) for pair in enumerate(requests)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(results))
"#;

/// A body each way, and the peak of both sidecars' memory.
fn large(world: &World, wish: &Wish) -> Result<()> {
    let bytes: u64 = if wish.long { 1 << 30 } else { 256 << 20 };
    let sidecars = [sidecar(&world.client)?, sidecar(&world.app)?];
    let before = sidecars.iter().map(|id| resident(*id)).collect::<Result<Vec<_>>>()?;
    let script = world.mesh.folder().join("fidelity/large.py").to_string_lossy().into_owned();
    let mut command = world.client.name.exec(["python3", &script, "app", "80", &bytes.to_string()]);
    let start = std::time::Instant::now();
    let said = finish(&mut command, 4 * PATIENCE)?.ok()?;
    let took = start.elapsed();
    ensure!(said.trim() == format!("{bytes} {bytes}"), "of {bytes} bytes came {said}");
    for (id, before) in sidecars.into_iter().zip(before) {
        let peak = resident(id)?;
        ensure!(peak < before + MEMORY_MAX, "a sidecar grew from {before} to {peak} KiB for {bytes} bytes in {took:?}");
    }
    Ok(())
}

/// The sidecar's process of a pod.
fn sidecar(pod: &Pod) -> Result<u32> {
    let file =
        e2e::mesh::cgroup_root()?.join(format!("outrigger/pods/{}.{}/sidecar/cgroup.procs", pod.name.namespace, pod.name.name));
    wait_for("the sidecar's process", PATIENCE, || {
        let text = std::fs::read_to_string(&file).with_context(|| format!("no {}", file.display()))?;
        text.lines().next().and_then(|line| line.parse().ok()).with_context(|| format!("nothing in {}", file.display()))
    })
}

/// The most memory that a process had so far, in KiB.
fn resident(process: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    line.split_whitespace().next().and_then(|word| word.parse().ok()).with_context(|| format!("VmHWM is {line}"))
}

/// What a body on its way may cost a sidecar, in KiB: windows and buffers, far less than the body.
const MEMORY_MAX: u64 = 32 << 10;

const LARGE: &str = r#"
import http.client, sys

host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
peer = http.client.HTTPConnection(host, port, timeout=100)
piece = memoryview(bytearray(1 << 18))
peer.putrequest("POST", "/count")
peer.putheader("Content-Length", str(size))
peer.endheaders()
left = size
while left > 0:
    here = min(left, len(piece))
    peer.sock.sendall(piece[:here])
    left -= here
answer = peer.getresponse()
up = answer.getheader("X-Total")
answer.read()
peer.request("GET", f"/give/{size}")
answer = peer.getresponse()
down = 0
while got := answer.readinto(piece): down += got
print(up, down)
"#;

//! Programs of others, unchanged, talking across two pods.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner};

use crate::world::{client, expect, seen_client, service, until};

struct World {
    client: Pod,
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    let make = || {
        let mesh = Mesh::up()?;
        Ok(World { client: client(&mesh, "shop/client")?, mesh })
    };
    runner.group(
        "third_party",
        make,
        &[
            Case { name: "curl_gets_a_page_from_nginx_which_sees_the_clients_address", run: |world, _| nginx(world) },
            Case { name: "redis_and_its_client_talk", run: |world, _| redis(world) },
            Case { name: "postgresql_and_psql_talk", run: |world, _| postgres(world) },
            Case { name: "a_websocket_echoes", run: |world, _| websocket(world) },
            Case { name: "grpc_in_python_talks_unary_and_streaming", run: |world, _| grpc(world) },
            Case { name: "pythons_http_server_serves_a_file", run: |world, _| http_server(world) },
        ],
    );
}

/// `env LD_LIBRARY_PATH=... PROGRAM`, the beginning of a command line.
fn third(path: &str) -> Result<Vec<OsString>> {
    let program = programs::third(path)?;
    Ok(vec!["env".into(), format!("LD_LIBRARY_PATH={}", programs::libraries()).into(), program.into_os_string()])
}

fn line(mut command: Vec<OsString>, rest: &[&str]) -> Vec<OsString> {
    command.extend(rest.iter().map(OsString::from));
    command
}

fn nginx(world: &World) -> Result<()> {
    let folder = world.mesh.folder().join("nginx");
    std::fs::create_dir_all(folder.join("logs"))?;
    std::fs::write(folder.join("page.html"), "a page of nginx\n")?;
    let path = folder.display();
    let config = format!(
        "daemon off; master_process off; pid {path}/pid; error_log stderr;\n\
         events {{ worker_connections 64; }}\n\
         http {{\n\
           log_format who '$remote_addr $request';\n\
           access_log {path}/access who;\n\
           client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c; uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;\n\
           server {{ listen 8080; location / {{ root {path}; }} location /who {{ return 200 $remote_addr; }} }}\n\
         }}\n"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, config)?;
    let file = file.to_string_lossy().into_owned();
    let server = world.mesh.pod("shop/nginx").label("app", "nginx").run(line(third("usr/sbin/nginx")?, &["-c", &file]))?;
    server.wait_listening(8080)?;
    world.mesh.apply(&service("shop", "nginx", 80, 8080))?;
    let page = until(&world.client, "http://nginx/page.html", 200)?;
    ensure!(page.body == "a page of nginx\n", "the page came as {:?}", page.body);
    let address = seen_client(&world.client, &server)?;
    let who = expect(&world.client, &["http://nginx.shop.svc.cluster.local/who"], 200)?;
    ensure!(who.body == address, "nginx saw {} as its client, which is {address}", who.body);
    let log = std::fs::read_to_string(folder.join("access"))?;
    ensure!(log.lines().all(|line| line.starts_with(&format!("{address} "))), "nginx logged {log}");
    Ok(())
}

fn redis(world: &World) -> Result<()> {
    let command =
        line(third("usr/bin/redis-server")?, &["--port", "6379", "--save", "", "--protected-mode", "no", "--bind", "*"]);
    let server = world.mesh.pod("shop/redis").label("app", "redis").run(command)?;
    server.wait_listening(6379)?;
    world.mesh.apply(&service("shop", "redis", 6379, 6379))?;
    let ask = |words: &[&str]| -> Result<String> {
        let mut rest = vec!["-h", "redis"];
        rest.extend(words);
        world.client.exec(line(third("usr/bin/redis-cli")?, &rest))?.ok()
    };
    wait_for("redis", PATIENCE, || {
        let said = ask(&["PING"])?;
        ensure!(said.trim() == "PONG", "redis said {said}");
        Ok(())
    })?;
    let large = "x".repeat(100_000);
    ensure!(ask(&["SET", "large", &large])?.trim() == "OK", "SET was not taken");
    ensure!(ask(&["GET", "large"])?.trim() == large, "GET gave something else back");
    Ok(())
}

fn postgres(world: &World) -> Result<()> {
    let folder = world.mesh.folder().join("postgres");
    std::fs::create_dir_all(&folder)?;
    // PostgreSQL does not run as root, and its folder must be its own.
    std::os::unix::fs::chown(&folder, Some(65534), Some(65534))?;
    let data = folder.join("data").to_string_lossy().into_owned();
    // The programs may stand below a home that only root enters: who is not root finds them mounted elsewhere.
    let as_nobody = |program: &str, rest: &[&str]| -> Vec<OsString> {
        let script = "mount --bind \"$0\" /mnt && exec setpriv --reuid=65534 --regid=65534 --clear-groups env \"$@\"";
        let words = ["unshare", "--mount", "sh", "-c", script].map(OsString::from);
        let libraries = format!("LD_LIBRARY_PATH={}", programs::libraries_below("/mnt".as_ref()));
        let program = format!("/mnt/usr/lib/postgresql/15/bin/{program}");
        let command = [programs::third_party().into(), libraries.into(), program.into()];
        words.into_iter().chain(command).chain(rest.iter().map(OsString::from)).collect()
    };
    let make = as_nobody("initdb", &["-D", &data, "-U", "shop", "-A", "trust", "--locale=C", "-E", "UTF8"]);
    let (program, arguments) = make.split_first().context("an empty command")?;
    e2e::mesh::finish(std::process::Command::new(program).args(arguments).current_dir(&folder), 4 * PATIENCE)?.ok()?;
    std::fs::write(Path::new(&data).join("pg_hba.conf"), "host all all all trust\n")?;
    let run = as_nobody(
        "postgres",
        &["-D", &data, "-c", "listen_addresses=*", "-c", "unix_socket_directories=", "-c", "ssl=off", "-c", "jit=off"],
    );
    let server = world.mesh.pod("shop/postgres").label("app", "postgres").run(run)?;
    server.wait_listening(5432)?;
    world.mesh.apply(&service("shop", "postgres", 5432, 5432))?;
    let ask = |query: &str| -> Result<String> {
        let program = third("usr/lib/postgresql/15/bin/psql")?;
        world.client.exec(line(program, &["-h", "postgres", "-U", "shop", "-d", "postgres", "-At", "-c", query]))?.ok()
    };
    wait_for("postgres", PATIENCE, || ask("select 1").map(drop))?;
    ask(
        "create table goods (id int primary key, text text); insert into goods select i, repeat('y', 1000) from generate_series(1, 500) i",
    )?;
    let said = ask("select count(*), sum(length(text)) from goods")?;
    ensure!(said.trim() == "500|500000", "psql said {said}");
    // The notice of another address in the server's own words: it sees the client, not its sidecar.
    let seen = ask("select host(inet_client_addr())")?;
    ensure!(seen.trim() == seen_client(&world.client, &server)?, "PostgreSQL saw the client as {seen}");
    Ok(())
}

fn python(world: &World, name: &str, code: &str) -> Result<Vec<OsString>> {
    let file = world.mesh.folder().join(name);
    std::fs::write(&file, code)?;
    Ok(vec![programs::python()?.into_os_string(), "-u".into(), file.into_os_string()])
}

fn websocket(world: &World) -> Result<()> {
    let server = python(world, "ws_server.py", WS_SERVER)?;
    let server = world.mesh.pod("shop/chat").label("app", "chat").run(server)?;
    server.wait_listening(8080)?;
    world.mesh.apply(&service("shop", "chat", 80, 8080))?;
    let client = python(world, "ws_client.py", WS_CLIENT)?;
    let said = wait_for("the chat", PATIENCE, || world.client.exec(&client)?.ok())?;
    ensure!(said.trim() == "20 echoes", "the client said {said}");
    Ok(())
}

const WS_SERVER: &str = r#"
import asyncio, websockets

async def echo(socket):
    async for message in socket:
        await socket.send(message)

async def main():
    async with websockets.serve(echo, "0.0.0.0", 8080):
        await asyncio.Future()

asyncio.run(main())
"#;

const WS_CLIENT: &str = r#"
import asyncio, websockets

async def main():
    async with websockets.connect("ws://chat/", proxy=None) as socket:
        for number in range(20):
            message = f"message {number} " + "z" * (number * 500)
            await socket.send(message)
            assert await socket.recv() == message
            if number == 10:
                await asyncio.sleep(1)
    print("20 echoes")

asyncio.run(main())
"#;

fn grpc(world: &World) -> Result<()> {
    let server = python(world, "grpc_server.py", GRPC_SERVER)?;
    let server = world.mesh.pod("shop/calls").label("app", "calls").run(server)?;
    server.wait_listening(50051)?;
    world.mesh.apply(&service("shop", "calls", 50051, 50051))?;
    let client = python(world, "grpc_client.py", GRPC_CLIENT)?;
    let said = wait_for("the calls", PATIENCE, || world.client.exec(&client)?.ok())?;
    ensure!(said.trim() == "HELLO 5 NOT_FOUND", "the client said {said}");
    Ok(())
}

const GRPC_SERVER: &str = r#"
import grpc, time
from concurrent import futures

def unary(request, context):
    if request == b"missing":
        context.abort(grpc.StatusCode.NOT_FOUND, "nothing of that name")
    return request.upper()

def stream(requests, context):
    for request in requests:
        yield request + b"!"

handlers = grpc.method_handlers_generic_handler("test.Calls", {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Stream": grpc.stream_stream_rpc_method_handler(stream),
})
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers((handlers,))
server.add_insecure_port("0.0.0.0:50051")
server.start()
server.wait_for_termination()
"#;

const GRPC_CLIENT: &str = r#"
import grpc

channel = grpc.insecure_channel("calls:50051", options=[("grpc.enable_http_proxy", 0)])
unary = channel.unary_unary("/test.Calls/Unary")
upper = unary(b"hello", timeout=10).decode()
stream = channel.stream_stream("/test.Calls/Stream")
count = sum(1 for answer in stream(iter([b"a", b"b", b"c", b"d", b"e"]), timeout=10) if answer.endswith(b"!"))
try:
    unary(b"missing", timeout=10)
    code = "OK"
except grpc.RpcError as error:
    code = error.code().name
print(upper, count, code)
"#;

fn http_server(world: &World) -> Result<()> {
    let folder = world.mesh.folder().join("files");
    std::fs::create_dir_all(&folder)?;
    // Larger than any window or buffer on the way.
    let content = "0123456789abcdef".repeat(200_000);
    std::fs::write(folder.join("large.txt"), &content)?;
    let python = programs::python()?;
    let server = world.mesh.pod("shop/files").label("app", "files").run([
        python.into_os_string(),
        "-m".into(),
        "http.server".into(),
        "-d".into(),
        folder.into_os_string(),
        "8000".into(),
    ])?;
    server.wait_listening(8000)?;
    world.mesh.apply(&service("shop", "files", 80, 8000))?;
    let answer = until(&world.client, "http://files/large.txt", 200)?;
    ensure!(answer.body == content, "{} of {} bytes came through", answer.body.len(), content.len());
    expect(&world.client, &["http://files/missing"], 404)?;
    Ok(())
}

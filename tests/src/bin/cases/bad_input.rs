//! Bad documents: one clear message with a position and a remedy each, and the last good state kept.

use anyhow::{Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, Said, finish, outrigger};
use e2e::runner::{Case, Runner};

use crate::world::{client, echo, expect, own, route, service, until};

struct World {
    client: Pod,
    _web: Pod,
    mesh: Mesh,
}

/// Runs the groups: one without a mesh, one with.
pub(crate) fn run(runner: &mut Runner) {
    runner.group(
        "check",
        || Ok(()),
        &[
            Case { name: "invalid_yaml_is_named_with_its_place", run: |(), _| refused("kind: [\n", &["1:"], &[]) },
            Case {
                name: "an_unknown_field_is_refused",
                run: |(), _| refused(&own("AuthorizationPolicy", "a", "b", "{ action: ALLOW, ruels: [] }"), &["ruels"], &[]),
            },
            Case {
                name: "an_unknown_kind_is_refused",
                run: |(), _| refused(&own("Nonsense", "a", "b", "{}"), &["Nonsense"], &[]),
            },
            Case {
                name: "a_route_to_nothing_is_told",
                run: |(), _| {
                    told(
                        &(service("a", "web", 80, 8080)
                            + &route("a", "r", "web", "[{ backendRefs: [{ name: gone, port: 80 }] }]")),
                        &["gone"],
                    )
                },
            },
            Case { name: "a_document_of_a_megabyte_is_refused_soon", run: |(), _| megabyte() },
            Case { name: "good_documents_pass", run: |(), _| passes() },
        ],
    );
    let make = || {
        let mesh = Mesh::up()?;
        let web = echo(&mesh, "bad/web", "web")?;
        let caller = client(&mesh, "bad/client")?;
        mesh.apply(&service("bad", "web", 80, 8080))?;
        until(&caller, "http://web/", 200)?;
        Ok(World { client: caller, _web: web, mesh })
    };
    runner.group(
        "bad_input",
        make,
        &[
            Case { name: "apply_refuses_and_keeps_the_last_good_form", run: |world, _| keeps(world) },
            Case { name: "an_allow_policy_without_rules_allows_nothing", run: |world, _| no_rules(world) },
            Case { name: "a_garbage_first_packet_does_no_harm", run: |world, _| garbage(world) },
            Case { name: "a_header_block_over_the_limit_is_refused", run: |world, _| headers(world) },
        ],
    );
}

fn check(yaml: &str) -> Result<Said> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("document.yaml"), yaml)?;
    let mut command = outrigger(["check", "-f"]);
    command.arg(folder.path());
    finish(&mut command, PATIENCE)
}

/// The document is refused, with its file and line; the message holds `words`.
fn refused(yaml: &str, words: &[&str], _unused: &[&str]) -> Result<()> {
    let said = check(yaml)?;
    ensure!(said.code == 1 || said.code == 2, "exit code {}: {}", said.code, said.all());
    ensure!(said.all().contains("document.yaml:"), "no position: {}", said.all());
    for word in words {
        ensure!(said.all().contains(word), "the message does not say {word}: {}", said.all());
    }
    Ok(())
}

/// The document is taken or not, but the message names what is wrong with it.
fn told(yaml: &str, words: &[&str]) -> Result<()> {
    let said = check(yaml)?;
    for word in words {
        ensure!(said.all().contains(word), "the message does not say {word}: {}", said.all());
    }
    Ok(())
}

fn megabyte() -> Result<()> {
    let mut yaml = service("a", "web", 80, 8080);
    yaml.push_str("# ");
    yaml.push_str(&"x".repeat(1 << 20));
    yaml.push('\n');
    let said = check(&yaml)?;
    ensure!(said.code == 1 || said.code == 2, "exit code {}: {}", said.code, said.all());
    ensure!(said.all().len() < 2000, "the message has {} bytes", said.all().len());
    Ok(())
}

fn passes() -> Result<()> {
    let said = check(&(service("a", "web", 80, 8080) + &own("PeerAuthentication", "a", "b", "{ mode: Strict }")))?;
    ensure!(said.code == 0, "exit code {}: {}", said.code, said.all());
    Ok(())
}

fn keeps(world: &World) -> Result<()> {
    let good = own(
        "AuthorizationPolicy",
        "bad",
        "gate",
        "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/closed*'] }] }] }",
    );
    world.mesh.apply(&good)?;
    until(&world.client, "http://web/closed", 403)?;
    let bad = own(
        "AuthorizationPolicy",
        "bad",
        "gate",
        "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ pahts: ['/other*'] }] }] }",
    );
    let said = world.mesh.try_apply(&bad)?;
    ensure!(said.code != 0 && said.all().contains("pahts"), "{said:?}");
    expect(&world.client, &["http://web/closed"], 403)?;
    expect(&world.client, &["http://web/other"], 200)?;
    world.mesh.delete(&good)?;
    until(&world.client, "http://web/closed", 200).map(drop)
}

fn no_rules(world: &World) -> Result<()> {
    let none =
        own("AuthorizationPolicy", "bad", "none", "{ targetRefs: [{ kind: Service, name: web }], action: ALLOW, rules: [] }");
    world.mesh.apply(&none)?;
    until(&world.client, "http://web/", 403)?;
    world.mesh.delete(&none)?;
    until(&world.client, "http://web/", 200).map(drop)
}

fn garbage(world: &World) -> Result<()> {
    let code = "import socket\n\
        for data in [b'\\x00' * 100, b'\\x16\\x03\\x01\\xff\\xff' + b'a' * 400, b'GET', b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' + b'z' * 300, b'']:\n\
        \x20   s = socket.create_connection(('web', 80)); s.settimeout(2)\n\
        \x20   try:\n\
        \x20       s.sendall(data); s.recv(1000)\n\
        \x20   except OSError: pass\n\
        \x20   s.close()\n\
        print('sent')\n";
    world.client.exec(["python3", "-c", code])?.ok()?;
    expect(&world.client, &["http://web/"], 200).map(drop)
}

fn headers(world: &World) -> Result<()> {
    let large = format!("x-large: {}", "y".repeat(100_000));
    let answer = world.client.curl(["-H", &large, "http://web/"])?;
    ensure!(answer.status == 431 || answer.status == 400, "100 kB of headers were answered with {}", answer.status);
    expect(&world.client, &["http://web/"], 200).map(drop)
}

//! Bad documents: one clear message with a position and a remedy each, and the last good state kept.

use anyhow::{Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, Said, finish, outrigger};
use e2e::runner::{Case, Runner};

use crate::world::{client, echo, expect, own, route, service, until};

struct World {
    client: Pod,
    web: Pod,
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
            Case { name: "two_routes_that_contradict_are_told", run: |(), _| told(&contradiction(), &["second"]) },
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
        Ok(World { client: caller, web, mesh })
    };
    runner.group(
        "bad_input",
        make,
        &[
            Case { name: "apply_refuses_and_keeps_the_last_good_form", run: |world, _| keeps(world) },
            Case { name: "an_allow_policy_without_rules_allows_nothing", run: |world, _| no_rules(world) },
            Case { name: "a_garbage_first_packet_does_no_harm", run: |world, _| garbage(world) },
            Case { name: "a_peer_of_another_trust_domain_or_without_certificate_is_refused", run: |world, _| strangers(world) },
            Case { name: "a_pod_cannot_enrol_as_another_or_with_a_foreign_listener", run: |world, _| impostor(world) },
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

/// Two routes that match the same requests of one service and lead elsewhere.
fn contradiction() -> String {
    let rules = |to: &str| {
        format!("[{{ matches: [{{ path: {{ type: Exact, value: /a }} }}], backendRefs: [{{ name: {to}, port: 80 }}] }}]")
    };
    service("a", "web", 80, 8080)
        + &service("a", "one", 80, 8080)
        + &service("a", "two", 80, 8080)
        + &route("a", "first", "web", &rules("one"))
        + &route("a", "second", "web", &rules("two"))
}

/// TLS as sidecars speak it, from outside: with a certificate of another trust domain, and with none.
fn strangers(world: &World) -> Result<()> {
    let folder = world.mesh.folder().join("strangers");
    std::fs::create_dir_all(&folder)?;
    let mut tool = std::process::Command::new(e2e::programs::shop());
    finish(tool.arg("certificates").arg(&folder), PATIENCE)?.ok()?;
    let outsider = world.mesh.pod("bad/stranger").outside().idle()?;
    let code = "import socket, ssl, sys\n\
        c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE; c.set_alpn_protocols([sys.argv[2]])\n\
        if sys.argv[3] == 'with': c.load_cert_chain(sys.argv[4] + '/client.crt', sys.argv[4] + '/client.key')\n\
        try:\n\
        \x20   s = c.wrap_socket(socket.create_connection((sys.argv[1], 8080)), server_hostname='web'); s.settimeout(3)\n\
        \x20   s.sendall(b'GET / HTTP/1.1\\r\\nhost: web\\r\\n\\r\\n' if sys.argv[2] == 'outrigger-tcp' else b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0')\n\
        \x20   d = s.recv(4000); print('answered' if d else 'closed', d[:60])\n\
        except (OSError, ssl.SSLError) as e: print('refused', e)\n";
    let address = world.web.address()?;
    let folder = folder.to_string_lossy().into_owned();
    for alpn in ["outrigger-h2", "outrigger-tcp"] {
        for certificate in ["with", "without"] {
            let said = outsider.exec(["python3", "-c", code, &address, alpn, certificate, &folder])?.ok()?;
            ensure!(!said.contains("answered"), "{alpn} {certificate} a certificate: {said}");
        }
    }
    expect(&world.client, &["http://web/"], 200).map(drop)
}

/// A process inside a pod that speaks the enrolment's words, for another pod and with a listener of its own namespace.
fn impostor(world: &World) -> Result<()> {
    let code = "import array, json, socket\n\
        l = socket.socket(); l.bind(('0.0.0.0', 0)); l.listen()\n\
        s = socket.socket(socket.AF_UNIX); s.settimeout(5)\n\
        try:\n\
        \x20   s.connect('/run/outrigger/node.sock')\n\
        \x20   line = json.dumps({'outrigger': 1, 'namespace': 'bad', 'name': 'web'}).encode() + b'\\n'\n\
        \x20   s.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [l.fileno()]))])\n\
        \x20   print(s.recv(4000).decode())\n\
        except OSError as e: print('error', e)\n";
    let said = world.client.exec(["python3", "-c", code])?.ok()?;
    ensure!(said.contains("error") && !said.contains("\"ok\""), "the node agent said {said}");
    // And from the host, whose namespace is no pod's.
    let said = finish(std::process::Command::new("python3").args(["-c", code]), PATIENCE)?.ok()?;
    ensure!(said.contains("error") && !said.contains("\"ok\""), "the node agent said {said}");
    expect(&world.client, &["http://web/"], 200).map(drop)
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

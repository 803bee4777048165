//! Every policy once, on one mesh: each case has a namespace of its own.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, Said, finish, kill, outrigger, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner};
use e2e::wire::Capture;

use crate::world::{client, echo, expect, metric, own, route, said, seen_client, service, service_of, until};

struct World {
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    runner.group(
        "policies",
        || Ok(World { mesh: Mesh::up()? }),
        &[
            Case { name: "identities_of_both_ends_are_counted", run: |world, _| identities(world) },
            Case { name: "the_wire_holds_none_of_the_requests_bytes", run: |world, _| wire(world) },
            Case { name: "strict_mode_refuses_plaintext_and_a_peer_authentication_permits_it", run: |world, _| strict(world) },
            Case { name: "authorization_allows_and_denies_by_rule", run: |world, _| authorization(world) },
            Case { name: "who_changes_a_service_does_not_take_its_policy_off_the_pods", run: |world, _| kept(world) },
            Case { name: "a_request_after_300_ms_of_silence_is_still_refused", run: |world, _| silence(world) },
            Case { name: "tokens_are_checked_and_their_claims_used", run: |world, _| tokens(world) },
            Case { name: "a_canary_gets_its_share", run: |world, _| canary(world) },
            Case { name: "routes_match_path_header_method_and_query", run: |world, _| matching(world) },
            Case { name: "headers_and_paths_are_rewritten", run: |world, _| rewriting(world) },
            Case { name: "retries_hide_a_failing_endpoint_and_the_breaker_ejects_it", run: |world, _| retries(world) },
            Case { name: "a_deadline_ends_a_slow_request", run: |world, _| deadline(world) },
            Case { name: "a_shadow_gets_copies_and_the_caller_is_untouched", run: |world, _| shadow(world) },
            Case { name: "a_shadow_that_is_slow_or_silent_costs_the_caller_no_time", run: |world, _| slow_shadow(world) },
            Case { name: "a_rate_limit_refuses_what_is_too_much", run: |world, _| rate_limit(world) },
            Case { name: "a_fault_meets_callers", run: |world, _| fault(world) },
            Case { name: "a_port_of_the_sidecars_own_is_no_applications", run: |world, _| own_ports(world) },
            Case { name: "what_listens_on_loopback_only_stays_unreachable", run: |world, _| loopback(world) },
        ],
    );
}

/// A namespace with `client` and `web`, which answers.
fn pair(world: &World, namespace: &str) -> Result<(Pod, Pod)> {
    let web = echo(&world.mesh, &format!("{namespace}/web"), "web")?;
    let caller = client(&world.mesh, &format!("{namespace}/client"))?;
    world.mesh.apply(&service(namespace, "web", 80, 8080))?;
    until(&caller, "http://web/", 200)?;
    Ok((caller, web))
}

fn identities(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "ids")?;
    let before = metric(&web, "outrigger_requests_total", &["inbound"])?;
    for _ in 0..5 {
        expect(&caller, &["http://web/counted"], 200)?;
    }
    let source = "spiffe://cluster.local/ns/ids/sa/client";
    wait_for("the metrics", PATIENCE, || {
        let counted = metric(&web, "outrigger_requests_total", &["inbound", source])?;
        ensure!(counted >= 5.0, "the sidecar counted {counted} requests of {source}, {before} before:\n{}", web.metrics()?);
        Ok(())
    })
}

fn wire(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "wire")?;
    let marker = "a-word-that-no-other-frame-holds";
    let capture = Capture::start()?;
    expect(&caller, &[&format!("http://web/{marker}"), "-d", &format!("body={marker}")], 200)?;
    let frames = capture.finish()?;
    ensure!(frames.count() > 0, "the capture is empty");
    ensure!(frames.holding(marker.as_bytes()) == 0, "{} frames hold the request", frames.holding(marker.as_bytes()));
    // The same call between pods without sidecars shows that the capture would have seen it.
    let plain = world.mesh.pod("wire/plain").outside().run([programs::shop().into_os_string(), "echo".into()])?;
    plain.wait_listening(8080)?;
    let outsider = world.mesh.pod("wire/outsider").outside().idle()?;
    let capture = Capture::start()?;
    expect(&outsider, &[&format!("http://{}:8080/{marker}", plain.address()?)], 200)?;
    ensure!(capture.finish()?.holding(marker.as_bytes()) > 0, "the capture did not see a plaintext request");
    drop(web);
    Ok(())
}

fn strict(world: &World) -> Result<()> {
    let (_caller, web) = pair(world, "strict")?;
    let outsider = world.mesh.pod("strict/outsider").outside().idle()?;
    let url = format!("http://{}:8080/", web.address()?);
    let refused = outsider.curl([&url])?;
    ensure!(refused.status != 200, "plaintext from outside the mesh was answered: {}", refused.body);
    let permissive = own("PeerAuthentication", "strict", "open", "{ mode: Permissive }");
    world.mesh.apply(&permissive)?;
    let answer = until(&outsider, &url, 200)?;
    ensure!(said(&answer)?["peer"] == seen_client(&outsider, &web)?, "the application saw {}", answer.body);
    world.mesh.delete(&permissive)?;
    wait_for("plaintext is refused again", PATIENCE, || {
        let answer = outsider.curl([&url])?;
        ensure!(answer.status != 200, "it is answered");
        Ok(())
    })
}

fn authorization(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "authz")?;
    let other = client(&world.mesh, "authz/other")?;
    world.mesh.apply(&own(
        "AuthorizationPolicy",
        "authz",
        "readers",
        "{ targetRefs: [{ kind: Service, name: web }], action: ALLOW, rules: [{ from: [{ principals: ['spiffe://cluster.local/ns/authz/sa/client'] }], to: [{ methods: [GET], paths: ['/open*'] }] }] }",
    ))?;
    until(&caller, "http://web/", 403)?;
    expect(&caller, &["http://web/open/a"], 200)?;
    expect(&caller, &["-X", "POST", "http://web/open/a"], 403)?;
    let refused = expect(&other, &["http://web/open/a"], 403)?;
    ensure!(
        refused.said.all().contains("readers") || refused.body.is_empty() || refused.body.contains("authorization"),
        "{}",
        refused.body
    );
    world.mesh.apply(&own(
        "AuthorizationPolicy",
        "authz",
        "no-secrets",
        "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/open/secret*'] }] }] }",
    ))?;
    until(&caller, "http://web/open/secret", 403)?;
    expect(&caller, &["http://web/open/a"], 200)?;
    // Other spellings of the same path meet the same rule.
    expect(&caller, &["--path-as-is", "http://web/open/a/../secret"], 403)?;
    expect(&caller, &["--path-as-is", "http://web/open/%73ecret"], 403)?;
    drop(web);
    Ok(())
}

fn kept(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "kept")?;
    let gate = |note: &str| {
        own("AuthorizationPolicy", "kept", "gate", "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{}] }")
            .replace("name: gate,", &format!("name: gate, annotations: {{ note: {note} }},"))
    };
    let stored = service("kept", "web", 80, 8080);
    let direct = format!("http://{}:8080/", web.address()?);
    world.mesh.apply(&gate("first"))?;
    until(&caller, &direct, 403)?;
    for changed in [service("kept", "web", 80, 9090), service_of("kept", "web", "nobody", 80, 8080)] {
        let said = world.mesh.try_apply(&(changed + &gate("first")))?;
        ensure!(
            said.code == 0 && said.stderr.contains("goes on covering port") && said.stderr.contains("8080"),
            "{}",
            said.all()
        );
        expect(&caller, &[&direct], 403)?;
    }
    world.mesh.delete(&stored)?;
    kill(world.mesh.process("control")?, rustix::process::Signal::KILL);
    let status = finish(&mut outrigger(["status"]), PATIENCE)?;
    ensure!(status.code == 1 && status.stdout.contains("Service/kept/web does not exist"), "{}", status.all());
    expect(&caller, &[&direct], 403)?;
    // Another pod of the old labels, which comes afterwards.
    let late = echo(&world.mesh, "kept/late", "web")?;
    expect(&caller, &[&format!("http://{}:8080/", late.address()?)], 403)?;
    let said = world.mesh.try_apply(&gate("second"))?;
    ensure!(said.code == 0 && said.stderr.contains("lets go of ports 8080, 9090 of kept/late, kept/web"), "{}", said.all());
    until(&caller, &direct, 200)?;
    world.mesh.delete(&gate("second"))
}

fn silence(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "silence")?;
    world.mesh.apply(&own(
        "AuthorizationPolicy",
        "silence",
        "nobody",
        "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }",
    ))?;
    until(&caller, "http://web/secret", 403)?;
    let code = "import socket, sys, time\n\
        s = socket.create_connection(('web', 80)); time.sleep(float(sys.argv[1]))\n\
        s.settimeout(5)\n\
        try:\n    s.sendall(b'GET /secret HTTP/1.1\\r\\nhost: web\\r\\nconnection: close\\r\\n\\r\\n'); print(s.recv(4000).decode(errors='replace'))\n\
        except OSError as e: print('closed', e)\n";
    for wait in ["0.3", "0.6", "1.5"] {
        let answer = caller.exec(["python3", "-c", code, wait])?.ok()?;
        ensure!(!answer.contains(" 200 "), "after {wait} s of silence a denied request was answered: {answer}");
    }
    drop(web);
    Ok(())
}

fn tokens(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "tokens")?;
    let folder = world.mesh.folder().join("keys");
    std::fs::create_dir_all(&folder)?;
    let folder = folder.to_string_lossy().into_owned();
    let tool =
        |words: &[&str]| finish(Command::new(programs::shop()).args(words), PATIENCE)?.ok().map(|said| said.trim().to_owned());
    tool(&["keys", &folder])?;
    let keys = std::fs::read_to_string(format!("{folder}/jwks.json"))?;
    world.mesh.apply(&own(
        "RequestAuthentication",
        "tokens",
        "people",
        &format!("{{ targetRefs: [{{ kind: Service, name: web }}], providers: [{{ issuer: 'https://id.shop', audiences: [web], jwks: {keys} }}] }}"),
    ))?;
    until(&caller, "http://web/", 401)?;
    let bearer = |issuer: &str, audience: &str, seconds: &str, claims: &[&str]| -> Result<String> {
        let mut words = vec!["token", folder.as_str(), issuer, audience, "ada", seconds];
        words.extend(claims);
        tool(&words).map(|token| format!("authorization: Bearer {token}"))
    };
    let good = bearer("https://id.shop", "web", "60", &["role=admin"])?;
    expect(&caller, &["-H", &good, "http://web/"], 200)?;
    expect(&caller, &["-H", &bearer("https://id.shop", "web", "-600", &[])?, "http://web/"], 401)?;
    expect(&caller, &["-H", &bearer("https://id.shop", "other", "60", &[])?, "http://web/"], 401)?;
    expect(&caller, &["-H", &bearer("https://id.else", "web", "60", &[])?, "http://web/"], 401)?;
    let mut forged = good.clone();
    forged.replace_range(forged.len() - 12..forged.len() - 8, "AAAA");
    expect(&caller, &["-H", &forged, "http://web/"], 401)?;
    world.mesh.apply(&own(
        "AuthorizationPolicy",
        "tokens",
        "admins",
        "{ targetRefs: [{ kind: Service, name: web }], action: ALLOW, rules: [{ when: [{ claim: role, values: [admin] }] }] }",
    ))?;
    let clerk = bearer("https://id.shop", "web", "60", &["role=clerk"])?;
    wait_for("the clerk is refused", PATIENCE, || expect(&caller, &["-H", &clerk, "http://web/"], 403).map(drop))?;
    expect(&caller, &["-H", &good, "http://web/"], 200)?;
    drop(web);
    Ok(())
}

/// How many of `count` requests each version answered.
fn split(caller: &Pod, url: &str, count: usize) -> Result<std::collections::BTreeMap<String, usize>> {
    let mut seen = std::collections::BTreeMap::new();
    let range = format!("{url}?[1-{count}]");
    // One curl for all of them: it prints each body, then its status.
    let said = caller.exec(["curl", "-sS", "--noproxy", "*", "-w", "\n", &range])?.ok()?;
    for line in said.lines().filter(|line| line.starts_with('{')) {
        let value: serde_json::Value = serde_json::from_str(line)?;
        *seen.entry(value["service"].as_str().unwrap_or("?").to_owned()).or_default() += 1;
    }
    Ok(seen)
}

fn canary(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "canary")?;
    let _next = echo(&world.mesh, "canary/next", "next")?;
    world.mesh.apply(
        &(service("canary", "next", 80, 8080)
            + &service_of("canary", "stable", "web", 80, 8080)
            + &route(
                "canary",
                "split",
                "web",
                "[{ backendRefs: [{ name: stable, port: 80, weight: 80 }, { name: next, port: 80, weight: 20 }] }]",
            )),
    )?;
    wait_for("the canary", PATIENCE, || {
        let seen = split(&caller, "http://web/", 200)?;
        let share = seen.get("canary/next").copied().unwrap_or(0);
        // Twenty of a hundred, drawn two hundred times: 40, and four standard deviations are 23.
        ensure!((17..=63).contains(&share), "of 200 requests the canary got {share}: {seen:?}");
        Ok(())
    })
}

fn matching(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "matching")?;
    let _special = echo(&world.mesh, "matching/special", "special")?;
    world.mesh.apply(&(service("matching", "special", 80, 8080)
        + &service_of("matching", "plain", "web", 80, 8080)
        + &route(
            "matching",
            "rules",
            "web",
            "[{ matches: [{ path: { type: PathPrefix, value: /special } }, { headers: [{ name: x-special, value: 'yes' }] }, { method: DELETE }, { queryParams: [{ name: special, value: '1' }] }], backendRefs: [{ name: special, port: 80 }] }, { backendRefs: [{ name: plain, port: 80 }] }]",
        )))?;
    let to = |arguments: &[&str]| -> Result<String> {
        Ok(said(&expect(&caller, arguments, 200)?)?["service"].as_str().unwrap_or("?").to_owned())
    };
    wait_for("the route", PATIENCE, || {
        ensure!(to(&["http://web/special/a"])? == "matching/special", "a path prefix did not match");
        Ok(())
    })?;
    ensure!(to(&["http://web/specially"])? == "matching/web", "a prefix matched part of an element");
    ensure!(to(&["-H", "x-special: yes", "http://web/"])? == "matching/special", "a header did not match");
    ensure!(to(&["-X", "DELETE", "http://web/"])? == "matching/special", "a method did not match");
    ensure!(to(&["http://web/?special=1"])? == "matching/special", "a query did not match");
    ensure!(to(&["http://web/?special=2"])? == "matching/web", "another query matched");
    Ok(())
}

fn rewriting(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "rewriting")?;
    world.mesh.apply(&(service_of("rewriting", "behind", "web", 80, 8080)
        + &route(
            "rewriting",
            "rules",
            "web",
            "[{ matches: [{ path: { type: PathPrefix, value: /old } }], filters: [{ type: URLRewrite, urlRewrite: { path: { type: ReplacePrefixMatch, replacePrefixMatch: /new } } }, { type: RequestHeaderModifier, requestHeaderModifier: { set: [{ name: x-set, value: 'by-the-mesh' }], remove: [x-gone] } }, { type: ResponseHeaderModifier, responseHeaderModifier: { add: [{ name: x-answer, value: '42' }] } }], backendRefs: [{ name: behind, port: 80 }] }]",
        )))?;
    wait_for("the route", PATIENCE, || {
        let answer = expect(&caller, &["-H", "x-gone: here", "-H", "x-set: mine", "http://web/old/a?b=c"], 200)?;
        let said = said(&answer)?;
        ensure!(said["path"] == "/new/a" && said["query"] == "b=c", "the path came as {said}");
        ensure!(said["headers"]["x-set"] == "by-the-mesh", "the header came as {said}");
        ensure!(said["headers"].get("x-gone").is_none(), "the header stayed: {said}");
        Ok(())
    })?;
    let heads = expect(&caller, &["-i", "http://web/old/a"], 200)?;
    ensure!(heads.body.to_lowercase().contains("x-answer: 42"), "the answer had no header of the route: {}", heads.body);
    Ok(())
}

fn retries(world: &World) -> Result<()> {
    let good = echo(&world.mesh, "retries/good", "pay")?;
    let shop = programs::shop();
    let bad = world.mesh.pod("retries/bad").label("app", "pay").account("pay").env("FAIL_EVERY", "1").env("NAME", "retries/bad");
    let bad = bad.run([shop.into_os_string(), "payments".into()])?;
    bad.wait_listening(8080)?;
    let caller = client(&world.mesh, "retries/client")?;
    world.mesh.apply(&(service("retries", "pay", 80, 8080)
        + &service_of("retries", "paying", "pay", 80, 8080)
        + &route("retries", "again", "pay", "[{ retry: { codes: [503], attempts: 3, backoff: 5ms }, backendRefs: [{ name: paying, port: 80 }] }]")
        + &own(
            "TrafficPolicy",
            "retries",
            "breaker",
            "{ targetRefs: [{ kind: Service, name: paying }, { kind: Service, name: pay }], retryBudget: { minRetriesPerSecond: 100 }, circuitBreaking: { ejection: { consecutiveFailures: 3, baseEjection: 60s } } }",
        )))?;
    until(&caller, "http://pay/", 200)?;
    for number in 0..40 {
        expect(&caller, &[&format!("http://pay/{number}")], 200)
            .with_context(|| format!("request {number}; the sidecar counts:\n{}", caller.metrics().unwrap_or_default()))?;
    }
    let served =
        |pod: &Pod| -> Result<u64> { Ok(pod.exec(["curl", "-s", "http://127.0.0.1:8080/served"])?.ok()?.trim().parse()?) };
    let failed = served(&bad)?;
    ensure!(failed >= 3, "the bad endpoint was asked {failed} times only, so nothing was hidden");
    ensure!(failed <= 6, "the bad endpoint was asked {failed} times: it was not ejected after three failures");
    ensure!(served(&good)? >= 40, "the good endpoint served {}", served(&good)?);
    Ok(())
}

fn deadline(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "deadline")?;
    world.mesh.apply(
        &(service_of("deadline", "behind", "web", 80, 8080)
            + &route("deadline", "soon", "web", "[{ timeouts: { request: 300ms }, backendRefs: [{ name: behind, port: 80 }] }]")),
    )?;
    wait_for("the deadline", PATIENCE, || {
        let start = Instant::now();
        expect(&caller, &["http://web/?delay=3000"], 504)?;
        ensure!(start.elapsed() < Duration::from_millis(1500), "it took {:?}", start.elapsed());
        Ok(())
    })?;
    expect(&caller, &["http://web/?delay=50"], 200).map(drop)
}

fn shadow(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "shadow")?;
    let next = echo(&world.mesh, "shadow/next", "next")?;
    world.mesh.apply(&(service("shadow", "next", 80, 8080)
        + &service_of("shadow", "behind", "web", 80, 8080)
        + &route(
            "shadow",
            "copy",
            "web",
            "[{ filters: [{ type: RequestMirror, requestMirror: { backendRef: { name: next, port: 80 } } }], backendRefs: [{ name: behind, port: 80 }] }]",
        )))?;
    wait_for("a copy", PATIENCE, || {
        let start = Instant::now();
        // The shadow is slow and fails; the caller is asked for neither.
        let answer = expect(&caller, &["-d", "what-was-sent", "http://web/copied"], 200)?;
        ensure!(said(&answer)?["service"] == "shadow/web", "the shadow answered the caller: {}", answer.body);
        ensure!(start.elapsed() < Duration::from_secs(2), "the caller waited {:?}", start.elapsed());
        std::thread::sleep(Duration::from_millis(200));
        ensure!(next.log().contains("POST /copied"), "the shadow saw nothing: {}", next.log());
        Ok(())
    })?;
    // A shadow that is gone is no trouble of the caller.
    next.stop()?;
    for _ in 0..5 {
        expect(&caller, &["http://web/copied"], 200)?;
    }
    Ok(())
}

/// How long the slow shadow takes.
const SHADOW_DELAY: Duration = Duration::from_secs(2);

fn slow_shadow(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "lagging")?;
    let server = |name: &str, answer: &str| -> Result<Pod> {
        let code = format!(
            "import http.server, time\nclass H(http.server.BaseHTTPRequestHandler):\n  def do_GET(self):\n    {answer}\n    self.send_response(200)\n    self.send_header('content-length', '0')\n    self.end_headers()\nhttp.server.ThreadingHTTPServer(('', 8080), H).serve_forever()"
        );
        let pod = world.mesh.pod(&format!("lagging/{name}")).label("app", name).run(["python3", "-c", &code])?;
        pod.wait_listening(8080)?;
        Ok(pod)
    };
    let _slow = server("slow", &format!("time.sleep({})", SHADOW_DELAY.as_secs()))?;
    let silent = server("silent", "time.sleep(1000)")?;
    let median = || -> Result<f64> {
        let urls = "http://web/[1-21]";
        let said = caller
            .exec(["curl", "-sS", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code} %{time_total}\n", urls])?
            .ok()?;
        let mut times = Vec::new();
        for line in said.lines() {
            let (status, time) = line.split_once(' ').context("no time")?;
            ensure!(status == "200", "the caller was answered with {status}");
            times.push(time.parse::<f64>()?);
        }
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().context("no request")
    };
    let before = median()?;
    let to = |name: &str| format!("{{ type: RequestMirror, requestMirror: {{ backendRef: {{ name: {name}, port: 80 }} }} }}");
    world.mesh.apply(
        &(service("lagging", "slow", 80, 8080)
            + &service("lagging", "silent", 80, 8080)
            + &service_of("lagging", "behind", "web", 80, 8080)
            + &route(
                "lagging",
                "copy",
                "web",
                &format!("[{{ filters: [{}, {}], backendRefs: [{{ name: behind, port: 80 }}] }}]", to("slow"), to("silent")),
            )),
    )?;
    let copied = |name: &str, outcome: &str| {
        let parts = [format!("\"lagging/{name}\""), format!("outcome=\"{outcome}\"")];
        metric(&caller, "outrigger_shadow_requests_total", &[&parts[0], &parts[1]])
    };
    let after = median()?;
    ensure!(
        after < (before * 10.0).max(SHADOW_DELAY.as_secs_f64() / 10.0),
        "a request took {after} s with the shadows and {before} s without"
    );
    wait_for("the slow shadow's answers", PATIENCE, || {
        let answered = copied("slow", "answered")?;
        ensure!(answered >= 21.0, "{answered} of 21 copies were answered");
        Ok(())
    })?;
    let so_far = copied("silent", "answered")? + copied("silent", "failed")?;
    ensure!(so_far == 0.0, "{so_far} copies have an outcome, though their receiver never answers");
    silent.stop()?;
    wait_for("the end of the silent shadow's copies", PATIENCE, || {
        let failed = copied("silent", "failed")?;
        ensure!(failed >= 21.0, "{failed} of 21 copies failed");
        Ok(())
    })
}

fn rate_limit(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "rate")?;
    world.mesh.apply(&own(
        "TrafficPolicy",
        "rate",
        "few",
        "{ targetRefs: [{ kind: Service, name: web }], rateLimit: { requests: 5, per: 1h } }",
    ))?;
    wait_for("the limit", PATIENCE, || {
        let said = caller
            .exec(["curl", "-sS", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}\n", "http://web/[1-12]"])?
            .ok()?;
        let refused = said.lines().filter(|status| *status == "429").count();
        ensure!(refused >= 7, "of 12 requests {refused} were refused: {said}");
        Ok(())
    })
}

fn fault(world: &World) -> Result<()> {
    let (caller, _web) = pair(world, "fault")?;
    let abort = own(
        "TrafficPolicy",
        "fault",
        "trouble",
        "{ targetRefs: [{ kind: Service, name: web }], fault: { abort: { status: 418, percent: 100 } } }",
    );
    world.mesh.apply(&abort)?;
    until(&caller, "http://web/", 418)?;
    world.mesh.apply(&own(
        "TrafficPolicy",
        "fault",
        "trouble",
        "{ targetRefs: [{ kind: Service, name: web }], fault: { delay: { duration: 700ms, percent: 100 } } }",
    ))?;
    wait_for("the delay", PATIENCE, || {
        let start = Instant::now();
        expect(&caller, &["http://web/"], 200)?;
        ensure!(start.elapsed() >= Duration::from_millis(700), "it took {:?} only", start.elapsed());
        Ok(())
    })
}

fn own_ports(world: &World) -> Result<()> {
    let refused = |said: &Said, told: &str| {
        ensure!(said.code == 2 && said.stderr.contains(told), "{told} is not in {}", said.all());
        Ok(())
    };
    for port in [14001, 14006, 14020, 14021] {
        let told = format!("Service/own/web: spec.ports[0].targetPort: {port} is a port of the sidecar's own");
        refused(&world.mesh.try_apply(&service_of("own", "web", "web", 80, port))?, &told)?;
        let flag = format!("http:{port}");
        let said = finish(&mut outrigger(["run", "web", "-n", "own", "--port", &flag, "--", "true"]), PATIENCE)?;
        refused(&said, &format!("--port {flag}: {port} is a port of the sidecar's own"))?;
    }
    // Who has no sidecar has no such ports, and a Service leads to one by its name.
    let plain = world.mesh.pod("own/plain").label("app", "plain").port("http:14006").env("PORT", "14006").outside();
    let plain = plain.run([programs::shop().into_os_string(), "echo".into()])?;
    plain.wait_listening(14006)?;
    let services = service_of("own", "plain", "plain", 80, 8080).replace("targetPort: 8080", "targetPort: http");
    world.mesh.apply(&services)?;
    let caller = world.mesh.pod("own/client").idle()?;
    until(&caller, "http://plain/", 200)?;
    world.mesh.delete(&services)
}

fn loopback(world: &World) -> Result<()> {
    let (caller, web) = pair(world, "loop")?;
    let code =
        "import http.server; http.server.HTTPServer(('127.0.0.1', 9000), http.server.SimpleHTTPRequestHandler).serve_forever()";
    let mut hidden = web.spawn(["python3", "-c", code])?;
    web.wait_listening(9000)?;
    let answer = caller.curl([format!("http://{}:9000/", web.address()?)]);
    hidden.kill().ok();
    hidden.wait().ok();
    let answer = answer?;
    ensure!(answer.status != 200, "what listens on loopback only was reached");
    // The sidecar's own ports neither.
    for port in [14001, 14006, 14020] {
        let answer = caller.curl([format!("http://{}:{port}/", web.address()?)])?;
        let told = answer.status == 421 && answer.body.contains("own ports");
        ensure!(told, "port {port} of another pod's sidecar: {} {}", answer.status, answer.body);
    }
    Ok(())
}

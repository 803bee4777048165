//! What one sees of a mesh, each by a reader that shares nothing with the writer: Debian's Prometheus, a collector on
//! OpenTelemetry's own messages, and curl.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, kill, root, wait_for};
use e2e::programs;
use e2e::runner::{Case, Runner};
use serde_json::Value;

use crate::world::{expect, metric, own, route, said, service, service_of, until};

struct World {
    mesh: Mesh,
    web: Pod,
    caller: Pod,
    /// Behind `pay`, of which one endpoint always fails; behind `next`, which gets copies; behind `raw`, which speaks no HTTP.
    others: Vec<Pod>,
    spans: PathBuf,
    collector: Reader,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    runner.group(
        "observability",
        make,
        &[
            Case { name: "a_trace_leads_from_the_client_through_both_sidecars", run: |world, _| trace(world) },
            Case { name: "a_log_line_names_the_rule_and_the_trace", run: |world, _| access_log(world) },
            Case { name: "the_page_tells_who_calls_whom_and_what_was_refused", run: |world, _| graph(world) },
            Case { name: "every_query_of_the_dashboard_is_answered_by_a_real_prometheus", run: |world, _| prometheus(world) },
            Case { name: "the_network_may_read_metrics_and_readiness_alone", run: |world, _| doors(world) },
            Case { name: "a_collector_that_is_gone_delays_no_request", run: |world, _| gone(world) },
        ],
    );
}

/// A program that reads; ended when dropped.
struct Reader(Child);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

const COLLECTOR: &str = "10.64.0.1:4317";

/// Documents under which every kind of event happens.
fn documents() -> String {
    let retrying = "[{ retry: { codes: [503], attempts: 3, backoff: 5ms }, backendRefs: [{ name: paying, port: 80 }] }]";
    let copying = "[{ filters: [{ type: RequestMirror, requestMirror: { backendRef: { name: next, port: 80 } } }], backendRefs: [{ name: web, port: 80 }] }]";
    service("obs", "web", 80, 8080)
        + &service("obs", "next", 80, 8080)
        + &service("obs", "raw", 9000, 9000)
        + &service("obs", "pay", 80, 8080)
        + &service_of("obs", "paying", "pay", 80, 8080)
        + &route("obs", "again", "pay", retrying)
        + &route("obs", "copy", "web", copying)
        + &own(
            "TrafficPolicy",
            "obs",
            "breaker",
            "{ targetRefs: [{ kind: Service, name: paying }, { kind: Service, name: pay }], retryBudget: { minRetriesPerSecond: 100 }, circuitBreaking: { ejection: { consecutiveFailures: 3, baseEjection: 600s } } }",
        )
        + &own(
            "AuthorizationPolicy",
            "obs",
            "no-secrets",
            "{ targetRefs: [{ kind: Service, name: web }], action: DENY, rules: [{ to: [{ paths: ['/secret*'] }] }] }",
        )
        + "---\napiVersion: outrigger.dev/v1alpha1\nkind: Mesh\nmetadata: { name: mesh }\nspec: { tracing: { sample: 100 } }\n"
}

fn make() -> Result<World> {
    let mesh = Mesh::up()?;
    let spans = mesh.folder().join("spans.jsonl");
    let script = root().join("tests/collector.py");
    let mut command = Command::new(programs::python()?);
    command.arg("-u").arg(script).arg(COLLECTOR).arg(&spans);
    let said = mesh.folder().join("collector.log");
    command.stdin(Stdio::null()).stdout(std::fs::File::create(&said)?).stderr(std::fs::File::create(&said)?);
    let collector = Reader(command.spawn().context("cannot run the collector")?);
    wait_for("the collector", PATIENCE, || {
        let said = std::fs::read_to_string(&said)?;
        ensure!(said.contains("collector is up"), "it said {said}");
        Ok(())
    })?;

    let traced = |name: &str, app: &str| {
        mesh.pod(&format!("obs/{name}"))
            .label("app", app)
            .account(app)
            .env("NAME", name)
            .sidecar_env("OUTRIGGER_OTLP", &format!("http://{COLLECTOR}"))
    };
    let echo = || [programs::shop().into_os_string(), "echo".into()];
    let web = traced("web", "web").run(echo())?;
    let caller = traced("caller", "caller").idle()?;
    let bad = traced("bad", "pay").env("FAIL_EVERY", "1").run([programs::shop().into_os_string(), "payments".into()])?;
    let raw = traced("raw", "raw").run(["python3", "-u", "-c", RAW_SERVER])?;
    let others = vec![traced("good", "pay").run(echo())?, traced("next", "next").run(echo())?, bad, raw];
    for pod in others.iter().take(3).chain([&web]) {
        pod.wait_listening(8080)?;
    }
    if let Some(raw) = others.last() {
        raw.wait_listening(9000)?;
    }
    mesh.apply(&documents())?;
    until(&caller, "http://web/", 200)?;
    until(&caller, "http://pay/", 200)?;
    Ok(World { mesh, web, caller, others, spans, collector })
}

/// Answers what nobody would take for HTTP.
const RAW_SERVER: &str = "
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data[::-1])
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(('', 9000), Echo).serve_forever()
";

const RAW_CLIENT: &str = "
import socket
with socket.create_connection(('raw', 9000), 5) as link:
    link.sendall(b'\\x00\\x01\\x02')
    assert link.recv(3) == b'\\x02\\x01\\x00'
";

/// Every kind of event, over and over, for some seconds.
fn busy(world: &World, rounds: u32) -> Result<()> {
    std::fs::write(world.mesh.folder().join("raw.py"), RAW_CLIENT)?;
    let raw = world.mesh.folder().join("raw.py");
    // The address is set aside for documentation (RFC 5737): nobody answers there.
    let script = format!(
        "get() {{ curl -sS --noproxy '*' -o /dev/null --max-time 5 \"$@\"; }}
         for i in $(seq {rounds}); do
           get http://web/$i; get http://web/secret; get http://pay/$i; python3 {}; get --max-time 0.2 http://192.0.2.1/; sleep 0.1
         done; true",
        raw.display()
    );
    world.caller.exec(["sh", "-c", &script])?.ok().map(drop)
}

/// Does `work` while somebody calls: rates are of the last seconds.
fn while_busy<T>(world: &World, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let calls = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                busy(world, 3)?;
            }
            Ok(())
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        calls.join().map_err(|_panicked| anyhow!("who calls panicked"))??;
        worked
    })
}

fn spans(world: &World, trace: &str) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(&world.spans)?;
    let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(all.filter(|span| span["trace_id"] == trace).collect())
}

fn trace(world: &World) -> Result<()> {
    let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let header = format!("traceparent: 00-{trace}-{span}-01");
    let answer = expect(&world.caller, &["-H", &header, "-H", "tracestate: congo=t61rcWkgMzE", "http://web/traced?q=1"], 200)?;
    let (client, server) = wait_for("both spans", PATIENCE, || {
        let spans = spans(world, trace)?;
        let of = |kind: &str, service: &str| {
            spans
                .iter()
                .find(|span| span["kind"] == kind && span["resource"]["service.name"] == service)
                .cloned()
                .with_context(|| format!("no {kind} of {service} in {spans:?}"))
        };
        Ok((of("SPAN_KIND_CLIENT", "caller")?, of("SPAN_KIND_SERVER", "web")?))
    })?;
    ensure!(client["parent_span_id"] == span, "the client's span does not continue the caller's: {client}");
    ensure!(server["parent_span_id"] == client["span_id"], "the server's span is not under the client's: {server}");
    let heard = &said(&answer)?["headers"];
    let expected = format!("00-{trace}-{}-01", server["span_id"].as_str().unwrap_or_default());
    ensure!(heard["traceparent"] == expected, "the application was told {heard}, not {expected}");
    ensure!(heard["tracestate"] == "congo=t61rcWkgMzE", "the state was lost: {heard}");
    let said = &server["attributes"];
    ensure!(said["http.request.method"] == "GET" && said["http.response.status_code"] == 200, "the span says {said}");
    ensure!(said["url.path"] == "/traced", "the span says {said}");
    ensure!(said["outrigger.mtls"] == true, "the span says {said}");
    ensure!(said["outrigger.source.identity"] == "spiffe://cluster.local/ns/obs/sa/caller", "the span says {said}");
    // Without a caller's trace the mesh begins one, and it reaches the other end.
    let answer = expect(&world.caller, &["http://web/begun"], 200)?;
    let heard = crate::world::said(&answer)?["headers"]["traceparent"].as_str().unwrap_or_default().to_owned();
    let begun = heard.split('-').nth(1).context("the application was told no trace")?.to_owned();
    wait_for("the spans of a trace that the mesh began", PATIENCE, || {
        let count = spans(world, &begun)?.len();
        ensure!(count >= 2, "{count} of them");
        Ok(())
    })
}

fn access_log(world: &World) -> Result<()> {
    let trace = "11112222333344445555666677778888";
    let header = format!("traceparent: 00-{trace}-00f067aa0ba902b7-01");
    expect(&world.caller, &["-H", &header, "http://web/secret/plan?token=hidden"], 403)?;
    let line = |pod: &str| {
        let path = world.mesh.folder().join(format!("state/log/obs.{pod}.access.log"));
        wait_for(&format!("a line in {}", path.display()), PATIENCE, || {
            let text = std::fs::read_to_string(&path)?;
            ensure!(!text.contains("hidden"), "a query was written");
            let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.find(|line| line["trace_id"] == trace).context("none of this trace")
        })
    };
    let decided = line("web")?;
    ensure!(decided["direction"] == "inbound" && decided["status"] == 403 && decided["reason"] == "denied", "{decided}");
    ensure!(decided["rule"].as_str().is_some_and(|rule| rule.starts_with("AuthorizationPolicy/obs/no-secrets")), "{decided}");
    ensure!(decided["source_identity"] == "spiffe://cluster.local/ns/obs/sa/caller", "{decided}");
    ensure!(decided["path"] == "/secret/plan" && decided["mtls"] == true, "{decided}");
    let passed = line("caller")?;
    ensure!(passed["direction"] == "outbound" && passed["status"] == 403 && passed["reason"] == "denied", "{passed}");
    ensure!(passed["destination_service"] == "obs/web" && passed["attempts"] == 1, "{passed}");
    Ok(())
}

/// The graph, once it tells all that goes on.
fn busy_graph(world: &World) -> Result<Value> {
    let graph = world.mesh.api("/api/graph")?;
    let edge = |to: &str| {
        let edges = graph["edges"].as_array().into_iter().flatten();
        let mut edges = edges.filter(|edge| edge["source"] == "workload:obs/caller");
        edges.find(|edge| edge["destination"] == to).cloned().with_context(|| format!("no calls of {to} in {graph}"))
    };
    let web = edge("service:obs/web")?;
    ensure!(web["rate"].as_f64() > Some(0.0) && web["p99_ms"].as_f64() > Some(0.0), "nothing happens: {web}");
    ensure!(web["mtls"] == 1.0 && web["success"] == 1.0, "{web}");
    ensure!(web["refused_rate"].as_f64() > Some(0.0), "the refusals are not on their edge: {web}");
    ensure!(edge("service:obs/raw")?["total"].as_f64() > Some(0.0), "no opaque connection was counted");
    ensure!(graph["ejected"][0]["workload"] == "obs/bad", "the failing endpoint is not told: {}", graph["ejected"]);
    Ok(graph)
}

fn graph(world: &World) -> Result<()> {
    let page = finish(Command::new("curl").args(["-sS", "-i", "--max-time", "5", "http://127.0.0.1:14080/"]), PATIENCE)?.ok()?;
    ensure!(page.contains("content-security-policy: default-src 'none'"), "the page may load what it did not bring");
    ensure!(page.contains("Who calls whom"), "this is not the page");
    // Looking at it makes the control plane read every second.
    let graph = while_busy(world, || wait_for("the graph", PATIENCE, || busy_graph(world)))?;
    let refusals = graph["refusals"].as_array().context("no refusals")?;
    let rule =
        |refusal: &&Value| refusal["rule"].as_str().is_some_and(|rule| rule.starts_with("AuthorizationPolicy/obs/no-secrets"));
    let refusal = refusals.iter().find(rule).with_context(|| format!("the rule is not told: {refusals:?}"))?;
    ensure!(refusal["reason"] == "denied" && refusal["decided"] == "inbound", "{refusal}");
    ensure!(refusal["source"] == "workload:obs/caller" && refusal["destination"] == "service:obs/web", "{refusal}");
    for sidecar in graph["sidecars"].as_array().context("no sidecars")? {
        ensure!(sidecar["reached"] == true && sidecar["control_connected"] == true, "{sidecar}");
        ensure!(sidecar["certificate_expiry"].as_f64() > Some(1.7e9), "{sidecar}");
    }
    Ok(())
}

fn prometheus(world: &World) -> Result<()> {
    let folder = world.mesh.folder();
    let pods = world.others.iter().chain([&world.web, &world.caller]);
    let targets = pods.map(|pod| Ok(format!("\"{}:14021\"", pod.address()?))).collect::<Result<Vec<_>>>()?.join(", ");
    let config = format!(
        "global: {{ scrape_interval: 1s }}\nscrape_configs:\n  - job_name: sidecars\n    static_configs: [{{ targets: [{targets}] }}]\n"
    );
    std::fs::write(folder.join("prometheus.yml"), config)?;
    // The port is free now; Prometheus takes it at once.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let log = std::fs::File::create(folder.join("prometheus.log"))?;
    let mut command = Command::new(programs::third("usr/bin/prometheus")?);
    command.env("LD_LIBRARY_PATH", programs::libraries()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.arg(format!("--config.file={}", folder.join("prometheus.yml").display()));
    command.arg(format!("--storage.tsdb.path={}", folder.join("tsdb").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
    let _reader = Reader(command.spawn().context("cannot run prometheus")?);
    let query = |text: &str| -> Result<Vec<Value>> {
        let url = format!("http://127.0.0.1:{port}/api/v1/query");
        let mut command = Command::new("curl");
        command.args(["-sS", "--max-time", "10", "-G", "--data-urlencode", &format!("query={text}"), &url]);
        let answer: Value = serde_json::from_str(&finish(&mut command, PATIENCE)?.ok()?)?;
        ensure!(answer["status"] == "success", "{text} was answered with {answer}");
        Ok(answer["data"]["result"].as_array().cloned().unwrap_or_default())
    };
    wait_for("prometheus", PATIENCE, || {
        let up = query("up == 1")?;
        ensure!(up.len() == world.others.len() + 2, "it reads {} sidecars", up.len());
        Ok(())
    })?;
    while_busy(world, || told_by_prometheus(&query))
}

/// Every query of the dashboard that comes with the product finds a number.
fn told_by_prometheus(query: &dyn Fn(&str) -> Result<Vec<Value>>) -> Result<()> {
    let file = root().join("deploy/dashboards/outrigger.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let number = |value: &Value| value["value"][1].as_str().is_some_and(|text| text != "NaN");
    let mut asked = 0;
    for panel in dashboard["panels"].as_array().context("a dashboard without panels")? {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let written = target["expr"].as_str().context("a target without query")?;
            // What Grafana puts in for its variables.
            let text = written
                .replace("$__rate_interval", "30s")
                .replace("$__range", "60s")
                .replace("$service", ".*")
                .replace('\n', " ");
            ensure!(!text.contains('$'), "{text} has a variable that Grafana does not know");
            wait_for(&format!("data for {:?}", panel["title"]), PATIENCE, || {
                let found = query(&text)?;
                ensure!(!found.is_empty(), "{text} finds nothing");
                ensure!(found.iter().any(number), "{text} finds no number: {found:?}");
                Ok(())
            })?;
            asked += 1;
        }
    }
    ensure!(asked > 20, "only {asked} queries in the dashboard");
    let first = |text: &str| -> Result<f64> {
        let found = query(text)?;
        let value =
            found.first().and_then(|sample| sample["value"][1].as_str()).with_context(|| format!("{text} finds nothing"))?;
        Ok(value.parse()?)
    };
    ensure!(first("sum(rate(outrigger_requests_total{direction=\"outbound\"}[30s]))")? > 0.0, "no requests are told");
    ensure!(first("sum(increase(outrigger_refusals_total{reason=\"denied\"}[30s]))")? > 0.0, "no refusals are told");
    ensure!(first("count(outrigger_endpoint_ejected)")? >= 1.0, "no ejected endpoint is told");
    Ok(())
}

fn doors(world: &World) -> Result<()> {
    let address = world.web.address()?;
    let outsider = world.mesh.pod("obs/outsider").outside().idle()?;
    // A scraper stands in the mesh or outside of it.
    for pod in [&outsider, &world.caller] {
        expect(pod, &[&format!("http://{address}:14021/ready")], 200)?;
        expect(pod, &[&format!("http://{address}:14021/metrics")], 200)?;
    }
    for path in ["/snapshot", "/connections", "/drain", "/log"] {
        expect(&outsider, &[&format!("http://{address}:14021{path}")], 404)?;
    }
    for pod in [&outsider, &world.caller] {
        let closed = pod.curl([format!("http://{address}:14020/ready")])?;
        ensure!(closed.status != 200 && !closed.body.contains("ready"), "the operator's door is open: {}", closed.body);
    }
    // The pod's application shares the loopback interface: it may look, and change nothing.
    expect(&world.web, &["http://127.0.0.1:14020/snapshot"], 200)?;
    let before = expect(&world.web, &["http://127.0.0.1:14020/log"], 200)?.body;
    for change in ["drain", "log?level=trace"] {
        expect(&world.web, &["-X", "POST", &format!("http://127.0.0.1:14020/{change}")], 403)?;
    }
    let socket = world.mesh.folder().join("state/sidecars/obs.web/operator.sock");
    let ask = |user: &str, url: &str| {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), "--clear-groups", "curl", "-sS", "--fail", "--max-time", "5", "-X", "POST"]);
        finish(command.arg("--unix-socket").arg(&socket).arg(format!("http://sidecar/{url}")), PATIENCE)
    };
    let refused = ask("65534", "drain")?;
    ensure!(refused.code != 0, "another user drained the sidecar: {}", refused.all());
    let set = ask("0", "log?level=info,outrigger::dataplane=debug")?.ok()?;
    ensure!(set.contains("outrigger::dataplane=debug"), "the filter is {set}, and was {before}");
    ask("0", &format!("log?level={}", before.trim()))?.ok().map(drop)
}

fn gone(world: &World) -> Result<()> {
    kill(world.collector.0.id(), rustix::process::Signal::KILL);
    let before = metric(&world.caller, "outrigger_spans_dropped_total", &[])?;
    let said = world
        .caller
        .exec(["curl", "-sS", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code} %{time_total}\n", "http://web/[1-100]"])?
        .ok()?;
    let slow = said.lines().filter(|line| {
        let (status, seconds) = line.split_once(' ').unwrap_or_default();
        status != "200" || seconds.trim().parse::<f64>().is_ok_and(|seconds| seconds > 1.0)
    });
    ensure!(said.lines().count() == 100 && slow.count() == 0, "some failed or were slow: {said}");
    wait_for("spans are counted as dropped", PATIENCE, || {
        let now = metric(&world.caller, "outrigger_spans_dropped_total", &[])?;
        ensure!(now > before, "{now} dropped, {before} before");
        Ok(())
    })
}

//! `cargo xtask demo`: the whole mesh with a small shop in it, and on the terminal what it did.
//!
//! Everything shown is read from outside, as a user could: answers, the sidecars' metrics, a capture of the pods' links.
//! With `--check` each claim is asserted; without, the shop stays up, with some customers in it, until interrupted.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::{Mesh, PATIENCE, Pod, finish, wait_for};
use e2e::metrics::{Sample, parse};
use e2e::programs;
use e2e::wire::Capture;

use crate::setup::{self, step};
use crate::show::{Show, bold, dim};
use crate::{Stop, shell};

const ISSUER: &str = "https://id.shop.example";

/// Requests of one round of traffic.
const PAGES: usize = 200;
const ORDERS: usize = 30;

/// Shows the mesh; with `check` also fails where a claim does not hold.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    if !shell::is_root() {
        let text = "the mesh makes network namespaces and loads kernel programs: run as root (sudo -E cargo xtask demo)";
        return Err(Stop::Missing(text.to_owned()).into());
    }
    let interrupted = watch_interrupt()?;
    setup::run(root, setup::Need::Mesh)?;
    shell::say("building the mesh and the shop (a first build takes some minutes)");
    setup::build(root)?;
    let mut show = Show::default();
    let mesh = step("bringing up the mesh: control plane, node agent, kernel programs", Mesh::up)?;
    let shop = Shop::open(&mesh)?;
    let result = shop.trade(&mut show, &interrupted).and_then(|()| if check { Ok(()) } else { shop.stay(&interrupted) });
    step("taking everything down", || mesh.down())?;
    result?;
    if !check || show.failed.is_empty() {
        return Ok(());
    }
    Err(Stop::No(format!("{} of the demo's claims did not hold: {}", show.failed.len(), show.failed.join("; "))).into())
}

/// The shop's pods.
struct Shop<'a> {
    mesh: &'a Mesh,
    pods: BTreeMap<&'static str, Pod>,
    /// Where the key that signs the customers' tokens is kept.
    keys: tempfile::TempDir,
}

/// A pod: its name, its role in `shop`, its labels, its environment.
type Staff = (&'static str, &'static str, &'static [(&'static str, &'static str)], &'static [(&'static str, &'static str)]);

const STAFF: [Staff; 8] = [
    ("storefront", "storefront", &[("app", "storefront")], &[]),
    ("catalog", "catalog", &[("app", "catalog")], &[]),
    ("catalog-next", "catalog", &[("app", "catalog-next")], &[("NAME", "catalog-next")]),
    ("reviews-v1", "reviews", &[("app", "reviews"), ("version", "v1")], &[("VERSION", "v1")]),
    ("reviews-v2", "reviews", &[("app", "reviews"), ("version", "v2")], &[("VERSION", "v2")]),
    ("inventory", "inventory", &[("app", "inventory")], &[]),
    ("payments-1", "payments", &[("app", "payments")], &[("NAME", "payments-1")]),
    ("payments-2", "payments", &[("app", "payments")], &[("NAME", "payments-2"), ("FAIL_EVERY", "1")]),
];

impl<'a> Shop<'a> {
    /// Starts the pods and applies the documents.
    fn open(mesh: &'a Mesh) -> Result<Self> {
        let keys = tempfile::tempdir()?;
        finish(Command::new(programs::shop()).arg("keys").arg(keys.path()), PATIENCE)?.ok()?;
        let mut shop = Self { mesh, pods: BTreeMap::new(), keys };
        step("opening the shop: nine pods, each with its sidecar", || {
            for (name, role, labels, environment) in STAFF {
                let mut pod = mesh.pod(&format!("shop/{name}")).account(name.trim_end_matches("-1").trim_end_matches("-2"));
                for (key, value) in labels {
                    pod = pod.label(key, value);
                }
                for (key, value) in environment {
                    pod = pod.env(key, value);
                }
                let pod = pod.detach([programs::shop().into_os_string(), role.into()])?;
                pod.wait_listening(8080)?;
                shop.pods.insert(name, pod);
            }
            let customer = mesh.pod("shop/customer").account("customer").detach(["sleep", "1000000"])?;
            shop.pods.insert("customer", customer);
            Ok(())
        })?;
        step("applying services, routes and policies (tests/shop/*.yaml)", || {
            let keys = std::fs::read_to_string(shop.keys.path().join("jwks.json"))?;
            let folder = e2e::mesh::root().join("tests/shop");
            let mut documents = String::new();
            for file in ["services.yaml", "routes.yaml", "policies.yaml"] {
                documents.push_str(&std::fs::read_to_string(folder.join(file))?);
                documents.push_str("---\n");
            }
            mesh.apply(documents.replace("@KEYS@", keys.trim()).trim_end_matches("---\n"))
        })?;
        Ok(shop)
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.get(name).with_context(|| format!("the shop has no {name}"))
    }

    /// Drives a round of traffic and shows what happened.
    fn trade(&self, show: &mut Show, interrupted: &AtomicBool) -> Result<()> {
        let customer = self.pod("customer")?;
        step("waiting for the first customer to be served", || {
            wait_for("the shop's page", PATIENCE, || {
                ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
                let answer = customer.curl(["http://storefront/"])?;
                ensure!(answer.status == 200, "status {}: {}", answer.status, answer.said.all());
                Ok(())
            })
        })?;
        let token = self.token(60)?;
        let (pages, orders) = step(&format!("customers: {PAGES} pages, {ORDERS} orders"), || {
            let pages = statuses(customer, &[&format!("http://storefront/?[1-{PAGES}]")])?;
            let orders = statuses(customer, &["-X", "PUT", "-H", &token, &format!("http://storefront/order?[1-{ORDERS}]")])?;
            Ok((pages, orders))
        })?;
        self.show_calls(show, &pages)?;
        self.show_canary(show)?;
        self.show_refusals(show)?;
        self.show_failing(show, &orders)?;
        self.show_shadow(show)?;
        self.show_wire(show)?;
        self.show_places(show)
    }

    /// Who called whom, with which identity.
    fn show_calls(&self, show: &mut Show, pages: &BTreeMap<u16, usize>) -> Result<()> {
        show.title("Who called whom, by the identity that mutual TLS proved");
        let mut calls: BTreeMap<(String, String, String), f64> = BTreeMap::new();
        for (name, pod) in self.pods.iter().filter(|(name, _)| **name != "customer") {
            for sample in samples(pod, "outrigger_requests_total")? {
                if sample.label("direction") == "inbound" {
                    let key = (sample.label("source_identity").to_owned(), (*name).to_owned(), sample.label("mtls").to_owned());
                    *calls.entry(key).or_default() += sample.value;
                }
            }
        }
        show.line(&dim(&format!("{:<46} {:<16} {:>8} {:>5}", "caller", "pod", "requests", "mTLS")));
        for ((source, pod, mtls), count) in &calls {
            show.line(&format!("{:<46} {pod:<16} {count:>8} {mtls:>5}", source.trim_start_matches("spiffe://")));
        }
        let total = calls.values().sum::<f64>();
        let proven =
            calls.iter().filter(|((source, _, _), _)| source.starts_with("spiffe://")).map(|(_, count)| count).sum::<f64>();
        show.claim(pages.get(&200) == Some(&PAGES), &format!("all {PAGES} pages were served ({})", counts(pages)));
        show.claim(total > 0.0 && proven >= total, &format!("all {total} requests came from a proven identity"));
        let expected =
            [("customer", "storefront"), ("storefront", "catalog"), ("storefront", "inventory"), ("storefront", "payments-1")];
        let seen = |caller: &str, pod: &str| calls.keys().any(|key| key.0.ends_with(&format!("/sa/{caller}")) && key.1 == pod);
        let missing: Vec<String> = expected
            .iter()
            .filter(|(caller, pod)| !seen(caller, pod))
            .map(|(caller, pod)| format!("{caller} to {pod}"))
            .collect();
        show.claim(missing.is_empty(), &format!("HTTP and gRPC calls are all there{}", note(&missing)));
        Ok(())
    }

    /// The split between both versions of the reviews.
    fn show_canary(&self, show: &mut Show) -> Result<()> {
        show.title("A canary: one request in five goes to version 2 of the reviews");
        let first = self.served("reviews-v1")?;
        let second = self.served("reviews-v2")?;
        let total = (first + second).max(1);
        for (name, count) in [("reviews-v1", first), ("reviews-v2", second)] {
            let bar = "#".repeat(usize::try_from(count * 40 / total).unwrap_or(0));
            show.line(&format!("{name:<12} {count:>5}  {bar}"));
        }
        let share = second * 100 / total;
        show.claim((6..=40).contains(&share), &format!("version 2 answered {share} % of {total} requests"));
        Ok(())
    }

    /// A call that its rule refuses, one that its token refuses.
    fn show_refusals(&self, show: &mut Show) -> Result<()> {
        show.title("Refused, and by what");
        let customer = self.pod("customer")?;
        let order = "http://storefront/order";
        let direct = customer.curl(["http://catalog/products"])?;
        let expired = customer.curl(["-X", "PUT", "-H", &self.token(-600)?, order])?;
        let none = customer.curl(["-X", "PUT", order])?;
        show.line(&format!("customer asks the catalog itself   {}", direct.status));
        show.line(&format!("an order with an expired token     {}", expired.status));
        show.line(&format!("an order without a token           {}", none.status));
        let mut rules: BTreeMap<String, f64> = BTreeMap::new();
        for pod in ["catalog", "payments-1"] {
            for sample in samples(self.pod(pod)?, "outrigger_refusals_total")? {
                *rules.entry(format!("{:<14} {}", sample.label("reason"), sample.label("rule"))).or_default() += sample.value;
            }
        }
        for (rule, count) in &rules {
            show.line(&dim(&format!("{count} x {rule}").chars().take(78).collect::<String>()));
        }
        let named = ["catalog-readers", "payments-tokens"].iter().all(|name| rules.keys().any(|rule| rule.contains(name)));
        show.claim(direct.status == 403, "the rule on the catalog refused the customer with 403");
        show.claim(expired.status == 401 && none.status == 401, "the payments' tokens were refused with 401");
        show.claim(named, "both refusals name the rule that decided");
        Ok(())
    }

    /// The endpoint that fails: hidden by retries, left out by the breaker.
    fn show_failing(&self, show: &mut Show, orders: &BTreeMap<u16, usize>) -> Result<()> {
        show.title("payments-2 fails every time: retries hide it, the breaker ejects it");
        let storefront = self.pod("storefront")?;
        let retries: f64 = samples(storefront, "outrigger_retries_total")?
            .iter()
            .filter(|sample| sample.label("outcome") == "sent" && sample.label("destination_service").contains("payments"))
            .map(|sample| sample.value)
            .sum();
        let ejections: Vec<Sample> = samples(storefront, "outrigger_ejections_total")?;
        show.line(&format!("orders        {} answered: {}", ORDERS, counts(orders)));
        show.line(&format!("payments-2    asked {} times, failed each time", self.served("payments-2")?));
        show.line(&format!("retries       {retries}"));
        for sample in &ejections {
            show.line(&format!("ejected       {} ({} times)", sample.label("destination_workload"), sample.value));
        }
        show.claim(orders.get(&200) == Some(&ORDERS), "no customer saw a failure");
        show.claim(retries >= 1.0, "retries hid it");
        show.claim(
            ejections.iter().any(|sample| sample.value >= 1.0 && sample.label("destination_workload").contains("payments-2")),
            "the breaker ejected payments-2",
        );
        Ok(())
    }

    /// The version that only gets copies.
    fn show_shadow(&self, show: &mut Show) -> Result<()> {
        show.title("A shadow: catalog-next gets a copy of half of the catalog's requests");
        let (asked, copied) = (self.served("catalog")?, self.served("catalog-next")?);
        show.line(&format!("catalog {asked}, catalog-next {copied}; nobody waited for the copies' answers"));
        show.claim(copied * 4 >= asked && copied < asked, "about half of the requests were copied");
        Ok(())
    }

    /// What a packet capture on the pods' links holds.
    fn show_wire(&self, show: &mut Show) -> Result<()> {
        show.title("What the wire carried");
        let secret = "one-large-canoe-please";
        let capture = Capture::start()?;
        let customer = self.pod("customer")?;
        let answer = customer.curl([format!("http://storefront/account?{secret}")])?;
        std::thread::sleep(Duration::from_millis(200));
        let meshed = capture.finish()?;
        let outside = self.mesh.pod("shop/outsider").outside().detach([programs::shop().into_os_string(), "echo".into()])?;
        outside.wait_listening(8080)?;
        let second = self.mesh.pod("shop/passer-by").outside().detach(["sleep", "1000000"])?;
        let url = format!("http://{}:8080/account?{secret}", outside.address()?);
        let capture = Capture::start()?;
        second.curl([url])?;
        std::thread::sleep(Duration::from_millis(200));
        let plain = capture.finish()?;
        show.line(&dim(&format!("{:<34} {:>8} {:>10} {:>10}", "the same call", "frames", "encrypted", "readable")));
        for (name, frames) in [("between pods of the mesh", &meshed), ("between pods with --no-sidecar", &plain)] {
            let readable = frames.holding(secret.as_bytes());
            show.line(&format!("{name:<34} {:>8} {:>10} {readable:>10}", frames.count(), frames.encrypted()));
        }
        show.claim(answer.status == 200 && meshed.encrypted() > 0, "the call was made, over TLS");
        show.claim(meshed.holding(secret.as_bytes()) == 0, "no frame holds a byte of the request in clear");
        show.claim(plain.holding(secret.as_bytes()) > 0, "without sidecars the same capture reads it");
        Ok(())
    }

    /// Where to look on.
    fn show_places(&self, show: &mut Show) -> Result<()> {
        show.title("Where to look");
        let address = self.pod("storefront")?.address()?;
        show.line("dashboard      http://127.0.0.1:14080/");
        show.line(&format!("metrics        http://{address}:14021/metrics (a sidecar's)"));
        show.line("               http://127.0.0.1:14014/metrics (the control plane's)");
        show.line("a shell in     target/debug/outrigger exec customer -n shop -- bash");
        show.line("every sidecar  target/debug/outrigger proxies");
        let page = finish(Command::new("curl").args(["-sS", "--fail", "--max-time", "5", "http://127.0.0.1:14080/"]), PATIENCE)?;
        show.claim(page.code == 0 && page.stdout.contains("<html"), "the dashboard's page is served");
        let graph = self.mesh.api("/api/graph");
        show.claim(graph.is_ok(), "and its data");
        Ok(())
    }

    /// Keeps some customers coming until interrupted.
    fn stay(&self, interrupted: &AtomicBool) -> Result<()> {
        println!("\n{}", bold("The shop stays open, with some customers in it, until you press Ctrl-C."));
        let customer = self.pod("customer")?;
        while !interrupted.load(Ordering::Relaxed) {
            let token = self.token(60)?;
            // What customers meet is on the dashboard; a failed round is theirs, not the demo's.
            statuses(customer, &["http://storefront/?[1-5]"]).ok();
            statuses(customer, &["-X", "PUT", "-H", &token, "http://storefront/order"]).ok();
            customer.curl(["http://catalog/products"]).ok();
            std::thread::sleep(Duration::from_millis(500));
        }
        println!();
        Ok(())
    }

    /// A header with a token that expires in `seconds`.
    fn token(&self, seconds: i32) -> Result<String> {
        let mut command = Command::new(programs::shop());
        command.arg("token").arg(self.keys.path()).args([ISSUER, "payments", "customer"]).arg(seconds.to_string());
        Ok(format!("authorization: Bearer {}", finish(&mut command, PATIENCE)?.ok()?.trim()))
    }

    /// How many requests a pod's program answered, as it says itself.
    fn served(&self, pod: &str) -> Result<u64> {
        let said =
            self.pod(pod)?.exec(["curl", "-sS", "--noproxy", "*", "--max-time", "5", "http://127.0.0.1:8080/served"])?.ok()?;
        said.trim().parse().with_context(|| format!("{pod} said {said}"))
    }
}

/// How often each status came, for a `curl` of many requests.
fn statuses(pod: &Pod, arguments: &[&str]) -> Result<BTreeMap<u16, usize>> {
    let mut line = vec!["curl", "-sS", "--noproxy", "*", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code}\n"];
    line.extend(arguments);
    let said = pod.exec(line)?;
    let mut seen = BTreeMap::new();
    for status in said.stdout.lines().filter_map(|line| line.trim().parse().ok()) {
        *seen.entry(status).or_default() += 1;
    }
    Ok(seen)
}

fn samples(pod: &Pod, name: &str) -> Result<Vec<Sample>> {
    Ok(parse(&pod.metrics()?).into_iter().filter(|sample| sample.name == name).collect())
}

fn counts(statuses: &BTreeMap<u16, usize>) -> String {
    let list: Vec<String> = statuses.iter().map(|(status, count)| format!("{count} x {status}")).collect();
    list.join(", ")
}

fn note(missing: &[String]) -> String {
    if missing.is_empty() { String::new() } else { format!(" except {}", missing.join(", ")) }
}

/// A flag that is set at Ctrl-C or SIGTERM.
fn watch_interrupt() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
            loop {
                tokio::select! {
                    _ = tokio::signal::ctrl_c() => {}
                    Some(()) = async { terminated.as_mut()?.recv().await } => {}
                }
                set.store(true, Ordering::Relaxed);
            }
        });
    });
    Ok(flag)
}

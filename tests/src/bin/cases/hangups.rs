//! Servers that hang up: no order is carried out twice, and where it can be known that nobody read it, none is lost.
//! Servers that speak first: their clients hear them at once.

#![expect(clippy::print_stdout, reason = "the counts of a long run are worth reading where nothing failed")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use e2e::mesh::{Mesh, Pod, finish};
use e2e::programs;
use e2e::runner::{Case, Runner, Wish};
use serde_json::Value;

use crate::world::{client, service};

struct World {
    client: Pod,
    /// Has a sidecar: orders reach it through the pair.
    paired: Pod,
    /// Has none: orders reach it through one hop.
    alone: Pod,
    /// As both, and they close at any moment.
    rude: Pod,
    rude_alone: Pod,
    _speakers: [Pod; 2],
    mesh: Mesh,
}

/// Runs the group.
pub(crate) fn run(runner: &mut Runner) {
    runner.group(
        "hangups",
        make,
        &[
            Case { name: "no_order_is_lost_or_doubled_by_a_server_that_closes_when_idle", run: |world, wish| idle(world, wish) },
            Case { name: "no_order_is_doubled_by_a_server_that_closes_at_any_moment", run: |world, wish| anytime(world, wish) },
            Case { name: "a_server_that_speaks_first_is_heard_at_once", run: |world, _| first_words(world) },
        ],
    );
}

fn program(words: &[&str]) -> Vec<OsString> {
    std::iter::once(programs::ledger().into_os_string()).chain(words.iter().map(OsString::from)).collect()
}

fn make() -> Result<World> {
    let mesh = Mesh::up()?;
    let caller = client(&mesh, "hang/client")?;
    // A server of the long run keeps a connection for up to five seconds, as the usual ones do.
    let longest = if std::env::args().any(|word| word == "--long") { "5000" } else { "200" };
    let serve = |name: &str, outside: bool, words: &[&str], port: u16| -> Result<Pod> {
        let pod = mesh.pod(&format!("hang/{name}")).label("app", name);
        let pod = if outside { pod.outside() } else { pod.account(name) };
        let pod = pod.run(program(words))?;
        pod.wait_listening(port)?;
        Ok(pod)
    };
    let habits = ["serve", "8080", "1", longest];
    let rude = ["serve", "8080", "1", longest, "--anytime"];
    let world = World {
        paired: serve("paired", false, &habits, 8080)?,
        alone: serve("alone", true, &habits, 8080)?,
        rude: serve("rude", false, &rude, 8080)?,
        rude_alone: serve("rude-alone", true, &rude, 8080)?,
        _speakers: [serve("mail", false, &["banner", "2525"], 2525)?, serve("mail-alone", true, &["banner", "2525"], 2525)?],
        client: caller,
        mesh,
    };
    let mut documents = String::new();
    for name in ["paired", "alone", "rude", "rude-alone"] {
        documents += &service("hang", name, 80, 8080);
    }
    for name in ["mail", "mail-alone"] {
        documents += &service("hang", name, 2525, 2525);
    }
    world.mesh.apply(&documents)?;
    Ok(world)
}

/// What came of orders to one service.
struct Outcome {
    name: &'static str,
    count: u64,
    /// What their sender heard.
    heard: Value,
    /// What the server did.
    did: Value,
    /// Connections that were closed at the server with bytes that nobody had read.
    cut: u64,
    /// The first lines that the sender's sidecar wrote about orders that were not carried out.
    failed: Vec<Value>,
    /// How many there are, by the state of their last attempt.
    states: BTreeMap<String, u64>,
}

/// Sends orders to both services at once.
fn send(world: &World, wish: &Wish, to: [(&'static str, &Pod); 2]) -> Result<[Outcome; 2]> {
    let [one, two] = to.map(|(name, server)| move || orders(world, wish, name, server));
    let (one, two) = std::thread::scope(|scope| {
        let running = scope.spawn(two);
        (one(), running.join())
    });
    Ok([one?, two.map_err(|_panic| anyhow!("the thread that sends orders panicked"))??])
}

fn orders(world: &World, wish: &Wish, name: &'static str, server: &Pod) -> Result<Outcome> {
    // Some two hundred orders a second to each, so that connections are used again at any age; many more, and the ports of
    // connections that are closed at once would not last for the minute in which TCP keeps them.
    let (count, senders, pause) = if wish.long { (100_000_u64, "224", "2000") } else { (5_000, "32", "60") };
    let target = format!("{name}:80");
    let mut command = world.client.name.exec(program(&["post", &target, &count.to_string(), senders, pause]));
    let time = Duration::from_secs(if wish.long { 900 } else { 60 });
    let cut_before = closed_unread(server)?;
    let heard: Value = serde_json::from_str(&finish(&mut command, time)?.ok()?)?;
    let did = server.curl(["http://127.0.0.1:8081/"])?;
    let did: Value = serde_json::from_str(&did.body).with_context(|| format!("the server said {:?}", did.body))?;
    let path = world.mesh.folder().join("state/log/hang.client.access.log");
    let log = std::fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
    let service = format!("hang/{name}");
    let (mut failed, mut states) = (Vec::new(), BTreeMap::<String, u64>::new());
    for line in log.lines() {
        let line: Value = serde_json::from_str(line)?;
        if line["destination_service"] == service.as_str() && line["status"] != 200 {
            let state = line["wire"].as_str().context("a failed order without the state of its attempt")?;
            *states.entry(state.to_owned()).or_default() += 1;
            if failed.len() < 5 {
                failed.push(line);
            }
        }
    }
    let cut = closed_unread(server)?.saturating_sub(cut_before);
    println!("    {name}: {heard}, {did}, {cut} closed unread, by the state of their attempts: {states:?}");
    Ok(Outcome { name, count, heard, did, cut, failed, states })
}

/// How many sockets of the pod were closed while bytes waited in them, as its kernel counts them. A server on a busy machine
/// does that to an order which comes between its decision and its close; the reset that follows proves nothing to a caller.
fn closed_unread(server: &Pod) -> Result<u64> {
    let text = server.exec(["cat", "/proc/net/netstat"])?.ok()?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = lines.next().zip(lines.next()).context("no TcpExt in /proc/net/netstat")?;
    let mut counters = names.split(' ').zip(values.split(' '));
    let (_, value) =
        counters.find(|(name, _)| *name == "TCPAbortOnClose").context("the kernel does not count TCPAbortOnClose")?;
    Ok(value.parse()?)
}

fn idle(world: &World, wish: &Wish) -> Result<()> {
    for outcome in send(world, wish, [("alone", &world.alone), ("paired", &world.paired)])? {
        let Outcome { name, count, heard, did, cut, failed, states: _ } = outcome;
        let good = heard["answers"]["200"].as_u64().unwrap_or(0);
        ensure!(
            good + cut >= count && did["orders"] == good && cut < count / 100,
            "{name}: orders were lost: {heard}, {did}, {cut} closed unread, {failed:?}"
        );
        ensure!(did["twice"].as_array().is_some_and(Vec::is_empty), "{name}: orders were carried out twice: {did}");
        ensure!(did["connections"].as_u64() > Some(count / 100), "{name}: the server hardly ever hung up: {did}");
    }
    Ok(())
}

fn anytime(world: &World, wish: &Wish) -> Result<()> {
    for outcome in send(world, wish, [("rude-alone", &world.rude_alone), ("rude", &world.rude)])? {
        let Outcome { name, count, heard, did, cut: _, failed: _, states } = outcome;
        ensure!(did["twice"].as_array().is_some_and(Vec::is_empty), "{name}: orders were carried out twice: {did}");
        let good = heard["answers"]["200"].as_u64().unwrap_or(0);
        ensure!(good > count / 2 && good < count, "{name}: this server breaks off some orders, and not most: {heard}, {did}");
        ensure!(did["orders"].as_u64() >= Some(good), "{name}: an order was answered that nobody carried out: {heard}, {did}");
        // Whatever went wrong is told, and how far the order came.
        ensure!(states.keys().all(|state| ["not_sent", "refused", "sent", "answered"].contains(&state.as_str())), "{states:?}");
        ensure!(states.get("sent").or(states.get("answered")).is_some(), "{name}: no state was told: {states:?}, {heard}");
    }
    Ok(())
}

fn first_words(world: &World) -> Result<()> {
    for name in ["mail-alone:2525", "mail:2525"] {
        let said = world.client.exec(program(&["greet", name, "20"]))?.ok()?;
        let mut took: Vec<u64> = serde_json::from_str(&said)?;
        // The first connection asks the control plane about the service.
        took.remove(0);
        took.sort_unstable();
        let median = took.get(took.len() / 2).copied().context("nothing measured")?;
        // A handshake takes its time in an unoptimised build; the silence that detection waits for would take ten times that.
        ensure!(median < 25_000, "{name}: the server's first words took {median} microseconds");
    }
    Ok(())
}

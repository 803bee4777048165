//! Load from a pod of its own while something is replaced or killed: requests that are orders, each of which is carried out
//! once, and long streams, which none but their app ends.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::PATIENCE;
use e2e::mesh::wait_for;
use e2e::runner::Wish;
use serde_json::{Value, json};

use super::pods::{Namespace, container, pod, service};
use crate::faults::no_loss;

/// A quarter of the least rate makes a hundred requests in it.
const LOAD_AT_LEAST: Duration = Duration::from_secs(8);
/// Long streams of each kind.
const STREAMS: u64 = 8;
/// Where the book of what was carried out is kept. It is none of the mesh's, so that it tells what the mesh did.
const BOOK: u16 = 9090;

/// Requests a second. What a development build does not manage on two cores says nothing of what is replaced meanwhile.
pub(super) fn rate(wish: &Wish) -> u32 {
    match (wish.long, std::env::var_os("OUTRIGGER_BIN").is_some()) {
        (true, true) => 1_000,
        (true, false) => 200,
        (false, _) => 80,
    }
}

/// Load until it is told to end: what goes between this machine and the pod may break meanwhile.
pub(super) struct Load<'a> {
    namespace: &'a Namespace<'a>,
    lines: Vec<String>,
    begun: Instant,
}

/// What came of the long streams.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Streams {
    /// Their apps closed each of them at least once.
    WereClosed,
    /// They are what they were.
    Stayed,
    /// Some apps left and closed theirs.
    MayBeClosed,
}

impl<'a> Load<'a> {
    /// One driver for each of these lines: `drive web:80 --connections 4 --rate 20`.
    pub(super) fn start(namespace: &'a Namespace<'a>, lines: Vec<String>) -> Result<Self> {
        let driver = |(number, line): (usize, &String)| {
            // An end for whoever is forgotten.
            let words = ["/bin/load"].into_iter().chain(line.split(' ')).chain(["--seconds", "900"]);
            container(&format!("load-{number}"), json!({ "command": words.collect::<Vec<_>>() }))
        };
        let drivers: Vec<_> = lines.iter().enumerate().map(driver).collect();
        namespace.make(&[pod("load", &drivers, json!({ "restartPolicy": "Never", "terminationGracePeriodSeconds": 20 }))])?;
        namespace.wait("Ready", PATIENCE, &["pod/load"])?;
        Ok(Self { namespace, lines, begun: Instant::now() })
    }

    /// All kinds of load at pods that [`serving`] made.
    pub(super) fn of_all_kinds(namespace: &'a Namespace<'a>, rate: u32) -> Result<Self> {
        let (half, quarter) = (rate / 2, rate / 4);
        Self::start(
            namespace,
            vec![
                format!("drive web:80 --connections 16 --rate {half} --orders one"),
                format!("drive web:81 --h2 --connections 4 --streams 4 --rate {quarter} --orders two"),
                format!("drive web:81 --grpc --connections 4 --streams 4 --rate {quarter} --orders call"),
                format!("stream web:80 --connections {STREAMS} --pause 200"),
                format!("stream web:81 --grpc --connections {STREAMS} --pause 200"),
            ],
        )
    }

    /// Ends it; nothing may have been lost. Returns what each of its drivers saw.
    pub(super) fn end(self) -> Result<Vec<Value>> {
        let Self { namespace, lines, begun } = self;
        // What was done meanwhile may have taken hardly any time.
        std::thread::sleep(LOAD_AT_LEAST.saturating_sub(begun.elapsed()));
        for (number, line) in lines.iter().enumerate() {
            let name = format!("load-{number}");
            let killed = namespace.cluster.exec(namespace.name, "load", &name, &["/bin/busybox", "kill", "-TERM", "1"])?;
            killed.ok().with_context(|| format!("load {line} has ended before"))?;
        }
        wait_for("the end of the load", PATIENCE, || {
            let phase = namespace.get("pod/load")?["status"]["phase"].clone();
            ensure!(phase == "Succeeded", "the pod is {phase}");
            Ok(())
        })?;
        let mut all = Vec::new();
        for (number, line) in lines.iter().enumerate() {
            let said = namespace.run(&["logs", "load", &format!("--container=load-{number}")])?;
            let seen: Value = serde_json::from_str(said.trim()).with_context(|| format!("load {line} said {said:?}"))?;
            println!("    {line}: {seen}");
            all.push(seen);
        }
        for (line, seen) in lines.iter().zip(&all) {
            no_loss(seen).with_context(|| format!("load {line}"))?;
        }
        Ok(all)
    }

    /// The same for all kinds: each order was carried out, once, and the streams fared as expected.
    pub(super) fn end_of_all_kinds(self, streams: Streams) -> Result<()> {
        let namespace = self.namespace;
        let seen = self.end()?;
        let (drivers, streamers): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen["streams"].is_null());
        let answered: u64 = drivers.iter().filter_map(|seen| seen["requests"].as_u64()).sum();
        let (status, book) = namespace.curl("client", &[&format!("http://{}:{BOOK}/", namespace.address_of("book")?)])?;
        ensure!(status == 200, "the book says {status} {book}");
        let book: Value = serde_json::from_str(&book)?;
        ensure!(book["twice"].as_array().is_some_and(Vec::is_empty), "orders were carried out twice: {book}");
        ensure!(book["orders"] == answered, "{answered} orders were answered, and carried out were {}", book["orders"]);
        println!("    {answered} orders, each carried out once");
        for seen in streamers {
            let (opened, closed) = (seen["streams"]["opened"].as_u64(), seen["streams"]["closed"].as_u64());
            match streams {
                Streams::WereClosed => ensure!(closed >= Some(STREAMS), "streams that no app closed: {seen}"),
                Streams::MayBeClosed => {}
                Streams::Stayed => ensure!(opened == Some(STREAMS) && closed == Some(0), "streams ended: {seen}"),
            }
        }
        Ok(())
    }
}

/// Pods that answer at 80 in HTTP/1.1 and WebSockets, at 81 in HTTP/2 and gRPC, and write each order down; and a client.
pub(super) fn serving(namespace: &Namespace<'_>, replicas: usize) -> Result<()> {
    namespace.cluster.run(&["annotate", "namespace", namespace.name, &format!("outrigger.dev/exclude-outbound-ports={BOOK}")])?;
    let keep = container("app", json!({ "command": ["/bin/load", "book", BOOK.to_string()] }));
    let mut book = pod("book", &[keep], json!({}));
    book["metadata"]["labels"]["outrigger.dev/inject"] = json!("disabled");
    namespace.make(&[book])?;
    namespace.wait("Ready", PATIENCE, &["pod/book"])?;
    let book = namespace.address_of("book")?;
    let serves = format!(
        "command: [/bin/load, serve, '8080', '64', --book, '{book}:{BOOK}']
ports: [{{ name: http, containerPort: 8080 }}, {{ name: http2, containerPort: 8081 }}]
readinessProbe: {{ tcpSocket: {{ port: http }}, periodSeconds: 1 }}
lifecycle: {{ preStop: {{ sleep: {{ seconds: 3 }} }} }}"
    );
    namespace.deployment("web", replicas, &serves)?;
    let ports = json!([
        { "name": "http", "port": 80, "targetPort": "http" },
        { "name": "http2", "port": 81, "targetPort": "http2", "appProtocol": "kubernetes.io/h2c" },
    ]);
    namespace.make(&[service("web", "web", 80, &json!("http"), json!({ "ports": ports }))])?;
    namespace.client("client")?;
    namespace.ready("web")?;
    namespace.ready("client")?;
    namespace.until("client", &["http://web/"], 200).map(drop)
}

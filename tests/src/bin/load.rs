//! A load generator and the server behind it, both as plain as can be, so that what is measured is what stands between.
//!
//! `load serve PORT BYTES` answers every HTTP/1.1 request with so many bytes, or with as many as its path says (`/65536`). `load drive HOST:PORT` keeps a fixed number
//! of connections busy, each with one request at a time (a closed loop), and prints what it saw as one line of JSON.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its answer is its output")]
#![expect(clippy::disallowed_types, reason = "it measures real time")]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const USAGE: &str = "usage: load serve PORT BYTES
       load drive HOST:PORT [--connections N] [--seconds S] [--path PATH] [--pause MS] [--warm S] [--reconnect]";

/// The largest answer.
const ANSWER_MAX: usize = 1 << 24;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    match words.as_slice() {
        ["serve", port, bytes] => local.block_on(&runtime, serve(port.parse().context("PORT")?, bytes.parse().context("BYTES")?)),
        ["drive", target, rest @ ..] => {
            let plan = Plan::parse(target, rest)?;
            println!("{}", local.block_on(&runtime, drive(plan))?);
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}

/// Answers every request at once; the head is read to its end, a body by its length.
async fn serve(port: u16, bytes: usize) -> Result<()> {
    let listener = TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}"))?;
    println!("serving on port {port}");
    let answer = move |bytes: usize| -> Rc<[u8]> {
        let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {bytes}\r\n\r\n").into_bytes();
        answer.resize(answer.len() + bytes, b'x');
        answer.into()
    };
    let usual = answer(bytes);
    loop {
        let (mut socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let usual = Rc::clone(&usual);
        tokio::task::spawn_local(async move {
            let mut buffer = Buffer::default();
            let mut asked: (String, Rc<[u8]>) = (String::new(), Rc::clone(&usual));
            // A client that leaves ends its connection, nothing else.
            while let Ok(Some(line)) = buffer.message(&mut socket).await {
                if line != asked.0 {
                    let path = line.split(' ').nth(1).and_then(|path| path.strip_prefix('/'));
                    let bytes = path.and_then(|path| path.parse().ok()).filter(|bytes| *bytes <= ANSWER_MAX);
                    asked = (line, bytes.map_or_else(|| Rc::clone(&usual), answer));
                }
                if socket.write_all(&asked.1).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// What to drive, and how.
struct Plan {
    target: String,
    path: String,
    connections: usize,
    time: Duration,
    /// Requests that begin within this time are made but not counted.
    warm: Duration,
    pause: Duration,
    reconnect: bool,
}

impl Plan {
    fn parse(target: &str, words: &[&str]) -> Result<Self> {
        let mut plan = Self {
            target: target.to_owned(),
            path: "/".to_owned(),
            connections: 1,
            time: Duration::from_secs(5),
            warm: Duration::ZERO,
            pause: Duration::ZERO,
            reconnect: false,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if *word == "--reconnect" {
                plan.reconnect = true;
                continue;
            }
            let value = words.next().with_context(|| format!("{word} wants a value\n{USAGE}"))?;
            match *word {
                "--connections" => plan.connections = value.parse()?,
                "--seconds" => plan.time = Duration::from_secs_f64(value.parse()?),
                "--warm" => plan.warm = Duration::from_secs_f64(value.parse()?),
                "--pause" => plan.pause = Duration::from_millis(value.parse()?),
                "--path" => plan.path = (*value).to_owned(),
                _ => bail!("{USAGE}"),
            }
        }
        Ok(plan)
    }
}

/// What one connection, or all of them, saw.
#[derive(Default)]
struct Seen {
    statuses: BTreeMap<u16, u64>,
    /// By what went wrong.
    failures: BTreeMap<String, u64>,
    latencies: Histogram,
}

async fn drive(plan: Plan) -> Result<String> {
    let plan = Rc::new(plan);
    let start = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..plan.connections {
        tasks.push(tokio::task::spawn_local(connection(Rc::clone(&plan), start)));
    }
    let mut all = Seen::default();
    for task in tasks {
        let seen = task.await?;
        seen.statuses.iter().for_each(|(status, count)| *all.statuses.entry(*status).or_default() += count);
        seen.failures.into_iter().for_each(|(what, count)| *all.failures.entry(what).or_default() += count);
        all.latencies.add(&seen.latencies);
    }
    let requests: u64 = all.statuses.values().sum();
    let counted = start.elapsed().saturating_sub(plan.warm).as_secs_f64();
    Ok(json!({
        "requests": requests,
        "rps": requests as f64 / counted,
        "statuses": all.statuses,
        "failures": all.failures,
        "p50_us": all.latencies.quantile(0.50),
        "p99_us": all.latencies.quantile(0.99),
        "max_us": all.latencies.quantile(1.0),
    })
    .to_string())
}

/// One connection's closed loop. A broken connection is a failure, and the next request opens another.
async fn connection(plan: Rc<Plan>, start: Instant) -> Seen {
    let mut seen = Seen::default();
    let request = format!("GET {} HTTP/1.1\r\nhost: {}\r\naccept: */*\r\n\r\n", plan.path, plan.target);
    let mut open: Option<(TcpStream, Buffer)> = None;
    while start.elapsed() < plan.time + plan.warm {
        let begun = Instant::now();
        let counts = begun.duration_since(start) >= plan.warm;
        let fresh = open.is_none();
        match tokio::time::timeout(Duration::from_secs(10), exchange(&plan, &request, &mut open)).await {
            Ok(Ok(status)) => {
                if counts {
                    *seen.statuses.entry(status).or_default() += 1;
                    seen.latencies.record(begun.elapsed());
                }
            }
            Ok(Err(error)) => {
                // A server may close a connection between two requests: no request was lost.
                if fresh || !format!("{error:#}").contains("closed before") {
                    *seen.failures.entry(format!("{error:#}")).or_default() += 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                open = None;
            }
            Err(_late) => {
                *seen.failures.entry("no answer within 10 s".to_owned()).or_default() += 1;
                open = None;
            }
        }
        if plan.reconnect {
            open = None;
        }
        if !plan.pause.is_zero() {
            tokio::time::sleep(plan.pause).await;
        }
    }
    seen
}

async fn exchange(plan: &Plan, request: &str, open: &mut Option<(TcpStream, Buffer)>) -> Result<u16> {
    if open.is_none() {
        let socket = TcpStream::connect(&plan.target).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        *open = Some((socket, Buffer::default()));
    }
    let (socket, buffer) = open.as_mut().context("no connection")?;
    socket.write_all(request.as_bytes()).await.context("cannot send")?;
    let head = buffer.message(socket).await?.context("the connection was closed before the answer")?;
    head.split(' ').nth(1).and_then(|status| status.parse().ok()).with_context(|| format!("no status in {head:?}"))
}

/// Bytes that arrived and are not used yet.
#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    /// Reads one message with its body and returns its first line; none where the peer closed between two messages.
    async fn message(&mut self, socket: &mut TcpStream) -> Result<Option<String>> {
        let mut from = 0;
        loop {
            if let Some(end) = find(self.bytes.get(from..).unwrap_or_default(), b"\r\n\r\n").map(|at| from + at + 4) {
                let head = String::from_utf8_lossy(self.bytes.get(..end).unwrap_or_default()).into_owned();
                self.body(socket, &head, end).await?;
                return Ok(head.lines().next().map(str::to_owned));
            }
            from = self.bytes.len().saturating_sub(3);
            if !self.more(socket).await? {
                ensure!(self.bytes.is_empty(), "the connection was closed within a head");
                return Ok(None);
            }
        }
    }

    /// Drops the head and the body behind it.
    async fn body(&mut self, socket: &mut TcpStream, head: &str, end: usize) -> Result<()> {
        let field = |name: &str| {
            head.lines().find_map(|line| {
                line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
            })
        };
        if field("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            // No server of the measurements answers in chunks; refusals without a length end with the last, empty one.
            while find(&self.bytes, b"\r\n0\r\n\r\n").is_none() && !self.bytes.ends_with(b"\r\n\r\n0\r\n\r\n") {
                ensure!(self.more(socket).await?, "the connection was closed within a body");
            }
            self.bytes.clear();
            return Ok(());
        }
        let length: usize = field("content-length").map_or(Ok(0), |value| value.parse()).context("a bad content-length")?;
        while self.bytes.len() < end + length {
            ensure!(self.more(socket).await?, "the connection was closed within a body");
        }
        self.bytes.drain(..end + length);
        Ok(())
    }

    async fn more(&mut self, socket: &mut TcpStream) -> Result<bool> {
        self.bytes.reserve(16 << 10);
        Ok(socket.read_buf(&mut self.bytes).await.context("cannot read")? > 0)
    }
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

/// Counts of microseconds in buckets that are at most 1/64 wide, as HDR histograms have them.
#[derive(Default)]
struct Histogram {
    buckets: BTreeMap<u32, u64>,
}

impl Histogram {
    fn record(&mut self, latency: Duration) {
        let micros = u32::try_from(latency.as_micros()).unwrap_or(u32::MAX);
        // Seven significant bits are kept: below 128 every microsecond has its bucket.
        let dropped = (32 - micros.leading_zeros()).saturating_sub(7);
        *self.buckets.entry(micros >> dropped << dropped).or_default() += 1;
    }

    fn add(&mut self, other: &Self) {
        other.buckets.iter().for_each(|(bucket, count)| *self.buckets.entry(*bucket).or_default() += count);
    }

    fn quantile(&self, share: f64) -> u32 {
        let total: u64 = self.buckets.values().sum();
        let mut left = total as f64 * share;
        for (bucket, count) in &self.buckets {
            left -= *count as f64;
            if left <= 0.0 {
                return *bucket;
            }
        }
        self.buckets.keys().next_back().copied().unwrap_or(0)
    }
}

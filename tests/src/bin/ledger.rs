//! A server that hangs up, and a client that counts: which orders were carried out, how often, and what their senders heard.
//!
//! `ledger serve PORT MIN MAX` carries out every `POST /ID` and closes a connection after an idleness between so many
//! milliseconds, drawn anew each time and as often short as long; from then on it reads nothing of it. With `--anytime` it also closes before it reads,
//! after it carried an order out, and within its answer. `GET /` on the port after it tells what was carried out.
//! `ledger post HOST:PORT COUNT CONNECTIONS PAUSE` sends so many orders and prints what it heard, as one line of JSON.
//! `ledger first HOST:PORT` asks until it is answered, and prints when that was, in microseconds since the epoch.
//! `ledger banner PORT` is a server that speaks first; `ledger greet HOST:PORT TIMES` prints how long its words took, in
//! microseconds.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its answer is its output")]
#![expect(clippy::disallowed_types, reason = "it measures real time")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

const USAGE: &str = "usage: ledger serve PORT MIN MAX [--anytime]
       ledger post HOST:PORT COUNT CONNECTIONS PAUSE
       ledger first HOST:PORT
       ledger banner PORT
       ledger greet HOST:PORT TIMES";

fn main() -> ExitCode {
    e2e::role::main("ledger", run)
}

async fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port, min, max, rest @ ..] => {
            let habits = Habits { min: milliseconds(min)?, max: milliseconds(max)?, anytime: *rest == ["--anytime"] };
            serve(port.parse().context("PORT")?, habits).await
        }
        ["post", target, count, connections, pause] => {
            let plan = Plan { target: (*target).to_owned(), count: count.parse()?, pause: milliseconds(pause)? };
            println!("{}", post(plan, connections.parse()?).await?);
            Ok(())
        }
        ["first", target] => {
            println!("{}", first(target).await?);
            Ok(())
        }
        ["banner", port] => banner(port.parse().context("PORT")?).await,
        ["greet", target, times] => {
            println!("{}", greet(target, times.parse()?).await?);
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}

fn milliseconds(word: &str) -> Result<Duration> {
    Ok(Duration::from_secs_f64(word.parse::<f64>()? / 1000.0))
}

/// Marsaglia's xorshift: nothing here is a secret.
#[derive(Clone)]
struct Dice(Rc<Cell<u64>>);

impl Dice {
    fn new() -> Self {
        let seed = UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs() ^ u64::from(time.subsec_nanos()) << 20) | 1;
        eprintln!("ledger: seed {seed}");
        Self(Rc::new(Cell::new(seed)))
    }

    /// Between 0 and 1.
    fn draw(&self) -> f64 {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        (x >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn between(&self, min: Duration, max: Duration) -> Duration {
        min + max.saturating_sub(min).mul_f64(self.draw())
    }

    /// The same, with every magnitude as likely as any other: of 1 ms to 5 s, as often below 70 ms as above.
    fn magnitude(&self, min: Duration, max: Duration) -> Duration {
        let min = min.max(Duration::from_micros(1));
        min.mul_f64((max.as_secs_f64() / min.as_secs_f64()).max(1.0).powf(self.draw()))
    }
}

/// When a server closes.
#[derive(Clone, Copy)]
struct Habits {
    min: Duration,
    max: Duration,
    anytime: bool,
}

type Book = Rc<RefCell<BTreeMap<String, u64>>>;

async fn serve(port: u16, habits: Habits) -> Result<()> {
    let orders = TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}"))?;
    let questions = TcpListener::bind(("::", port + 1)).await.context("cannot listen on the port after it")?;
    println!("serving on port {port}");
    let (book, dice, opened) = (Book::default(), Dice::new(), Rc::new(Cell::new(0_u64)));
    let told = (Rc::clone(&book), Rc::clone(&opened));
    tokio::task::spawn_local(async move {
        while let Ok((mut socket, _)) = questions.accept().await {
            let (orders, twice) = {
                let book = told.0.borrow();
                (book.len(), book.iter().filter(|(_, times)| **times > 1).map(|(id, _)| id.clone()).collect::<Vec<_>>())
            };
            let text = json!({ "orders": orders, "twice": twice, "connections": told.1.get() }).to_string();
            let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{text}", text.len());
            drop(socket.read(&mut [0; 4096]).await);
            drop(socket.write_all(answer.as_bytes()).await);
        }
    });
    loop {
        let (socket, _) = orders.accept().await?;
        socket.set_nodelay(true)?;
        opened.set(opened.get() + 1);
        tokio::task::spawn_local(customer(socket, habits, dice.clone(), Rc::clone(&book)));
    }
}

/// Serves one connection until it is closed.
async fn customer(mut socket: TcpStream, habits: Habits, dice: Dice, book: Book) {
    let (mut bytes, mut fresh) = (Vec::new(), true);
    loop {
        // Dropped, a socket is closed: what comes then is read by nobody. Who has just connected is waited for: a server
        // that hangs up on its first caller within a millisecond is no server.
        let idle = if std::mem::take(&mut fresh) { habits.max } else { dice.magnitude(habits.min, habits.max) };
        if habits.anytime && dice.draw() < 0.05 {
            return sleep(dice.between(Duration::from_micros(1), habits.min)).await;
        }
        let Ok(Ok(Some(id))) = timeout(idle, order(&mut socket, &mut bytes)).await else { return };
        *book.borrow_mut().entry(id).or_default() += 1;
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\ndone\n".as_slice();
        // Some break off somewhere within the answer.
        let cut = if habits.anytime && dice.draw() < 0.1 { (0..answer.len()).find(|_| dice.draw() < 0.05) } else { None };
        let part = cut.and_then(|cut| answer.get(..cut)).unwrap_or(answer);
        if socket.write_all(part).await.is_err() || cut.is_some() {
            return;
        }
    }
}

/// Reads one order whole, and returns its name; none at the end.
async fn order(socket: &mut TcpStream, bytes: &mut Vec<u8>) -> Result<Option<String>> {
    loop {
        if let Some((head, end)) = head_of(bytes) {
            let length: usize = field(&head, "content-length").map_or(Ok(0), |value| value.parse())?;
            if bytes.len() >= end + length {
                bytes.drain(..end + length);
                return Ok(head.split(' ').nth(1).map(str::to_owned));
            }
        }
        if socket.read_buf(bytes).await? == 0 {
            return Ok(None);
        }
    }
}

fn head_of(bytes: &[u8]) -> Option<(String, usize)> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    Some((String::from_utf8_lossy(bytes.get(..end)?).into_owned(), end))
}

fn field(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    })
}

struct Plan {
    target: String,
    count: u64,
    /// The longest wait between two orders of one connection.
    pause: Duration,
}

#[derive(Default)]
struct Heard {
    /// By status and, of a refusal, its reason.
    answers: RefCell<BTreeMap<String, u64>>,
    /// The connection to the own sidecar broke.
    failures: RefCell<BTreeMap<String, u64>>,
    next: Cell<u64>,
}

async fn post(plan: Plan, connections: usize) -> Result<String> {
    let (plan, heard, dice) = (Rc::new(plan), Rc::new(Heard::default()), Dice::new());
    let start = Instant::now();
    let mut tasks = Vec::new();
    for _ in 0..connections {
        let (plan, heard, dice) = (Rc::clone(&plan), Rc::clone(&heard), dice.clone());
        tasks.push(tokio::task::spawn_local(async move {
            let mut open = None;
            while heard.next.get() < plan.count {
                let id = heard.next.get();
                heard.next.set(id + 1);
                let sent = timeout(Duration::from_secs(10), one(&plan, id, &mut open)).await;
                let (list, word) = match sent {
                    Ok(Ok(answer)) => (&heard.answers, answer),
                    Ok(Err(error)) => (&heard.failures, format!("{error:#}")),
                    Err(_late) => (&heard.failures, "no answer within 10 s".to_owned()),
                };
                if std::ptr::eq(list, &raw const heard.failures) {
                    open = None;
                }
                *list.borrow_mut().entry(word).or_default() += 1;
                sleep(dice.between(Duration::from_micros(100), plan.pause)).await;
            }
        }));
    }
    for task in tasks {
        task.await?;
    }
    let (answers, failures) = (heard.answers.borrow().clone(), heard.failures.borrow().clone());
    Ok(json!({ "answers": answers, "failures": failures, "seconds": start.elapsed().as_secs_f64() }).to_string())
}

async fn one(plan: &Plan, id: u64, open: &mut Option<(TcpStream, Vec<u8>)>) -> Result<String> {
    if open.is_none() {
        let socket = TcpStream::connect(&plan.target).await.context("cannot connect")?;
        socket.set_nodelay(true)?;
        *open = Some((socket, Vec::new()));
    }
    let (socket, bytes) = open.as_mut().context("no connection")?;
    let body = format!("order {id}\n");
    let request = format!("POST /{id} HTTP/1.1\r\nhost: ledger\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(request.as_bytes()).await.context("cannot send")?;
    loop {
        if let Some((head, end)) = head_of(bytes) {
            let length = field(&head, "content-length").context("an answer without a length")?.parse::<usize>()?;
            if bytes.len() >= end + length {
                bytes.drain(..end + length);
                let status = head.split(' ').nth(1).context("no status")?.to_owned();
                return Ok(match field(&head, "outrigger-reason") {
                    Some(reason) => format!("{status} {reason}"),
                    None => status,
                });
            }
        }
        ensure!(socket.read_buf(bytes).await.context("cannot read")? > 0, "the connection was closed without an answer");
    }
}

async fn first(target: &str) -> Result<u128> {
    let address = tokio::net::lookup_host(target).await?.next().context("no address")?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        let asked = async {
            let mut socket = TcpStream::connect(address).await?;
            socket.write_all(b"GET / HTTP/1.1\r\nhost: first\r\nconnection: close\r\n\r\n").await?;
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n") && socket.read_buf(&mut heard).await? > 0 {}
            anyhow::Ok(heard.starts_with(b"HTTP/1.1 200 "))
        };
        if matches!(timeout(Duration::from_secs(1), asked).await, Ok(Ok(true))) {
            return Ok(UNIX_EPOCH.elapsed()?.as_micros());
        }
        sleep(Duration::from_micros(200)).await;
    }
    bail!("no answer within 30 s")
}

async fn banner(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}"))?;
    println!("serving on port {port}");
    loop {
        let (mut socket, _) = listener.accept().await?;
        tokio::task::spawn_local(async move {
            if socket.write_all(WORDS).await.is_ok() {
                drop(socket.read(&mut [0; 64]).await);
            }
        });
    }
}

async fn greet(target: &str, times: usize) -> Result<String> {
    let mut took = Vec::new();
    for _ in 0..times {
        let start = Instant::now();
        let mut socket = TcpStream::connect(target).await.context("cannot connect")?;
        let mut heard = [0; WORDS.len()];
        timeout(Duration::from_secs(10), socket.read_exact(&mut heard)).await.context("no word within 10 s")??;
        ensure!(heard == *WORDS, "it said something else");
        took.push(start.elapsed().as_micros());
    }
    Ok(json!(took).to_string())
}

const WORDS: &[u8; 26] = b"220 mail.example.org ready";

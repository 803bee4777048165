//! Which orders were carried out, and how often: kept by somebody who stays when those who carry them out are replaced.
//!
//! A server sends a line for each order before it answers; a book that cannot be reached yet is asked for again. `GET` tells
//! what is in it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// The field of a request that names its order.
pub(crate) const FIELD: &str = "order";
/// Orders that wait for their book.
const WAITING: usize = 1 << 16;
const AGAIN: Duration = Duration::from_millis(100);

/// Keeps the book at a port.
pub(crate) async fn keep(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("::", port)).await.with_context(|| format!("cannot listen on port {port}"))?;
    println!("keeping the book on port {port}");
    let book = Rc::new(RefCell::new(BTreeMap::<String, u64>::new()));
    loop {
        let (socket, _) = listener.accept().await?;
        let book = Rc::clone(&book);
        tokio::task::spawn_local(async move {
            let mut lines = BufReader::new(socket).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if !line.starts_with("GET ") {
                    *book.borrow_mut().entry(line).or_default() += 1;
                    continue;
                }
                let text = told(&book.borrow());
                let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{text}", text.len());
                drop(lines.get_mut().write_all(answer.as_bytes()).await);
                return;
            }
        });
    }
}

fn told(book: &BTreeMap<String, u64>) -> String {
    let twice: Vec<&String> = book.iter().filter(|(_, times)| **times > 1).map(|(order, _)| order).collect();
    json!({ "orders": book.len(), "twice": twice }).to_string()
}

/// Where a server writes its orders down.
#[derive(Clone)]
pub(crate) struct Pen(Sender<String>);

impl Pen {
    /// For the book at `HOST:PORT`.
    pub(crate) fn new(address: &str) -> Self {
        let (sender, receiver) = channel(WAITING);
        tokio::task::spawn_local(carry(address.to_owned(), receiver));
        Self(sender)
    }

    /// Writes one down.
    pub(crate) async fn note(&self, order: &str) {
        // The other end lives as long as this process.
        self.0.send(format!("{order}\n")).await.ok();
    }
}

async fn carry(address: String, mut orders: Receiver<String>) {
    let mut held: Option<String> = None;
    loop {
        let Ok(mut socket) = TcpStream::connect(&address).await else {
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        loop {
            let order = match held.take() {
                Some(order) => order,
                None => match orders.recv().await {
                    Some(order) => order,
                    None => return,
                },
            };
            if socket.write_all(order.as_bytes()).await.is_err() {
                held = Some(order);
                break;
            }
        }
    }
}

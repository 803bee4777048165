//! What the pods' links carried: every frame of them, read from a packet socket in the host's network namespace.
//!
//! The host's ends of all pods' links, and the bridge between them, stand in that namespace; what an application says to
//! its own sidecar never leaves its pod. A packet socket that is bound to no link sees them all (packet(7)).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

/// How much of a capture is kept.
const BYTES_MAX: usize = 64 << 20;

/// A running capture.
pub struct Capture {
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<Vec<Vec<u8>>>>,
}

impl Capture {
    /// Begins to read.
    pub fn start() -> Result<Self> {
        // ETH_P_ALL, in network byte order.
        let every = std::num::NonZeroU32::new(u32::from(3_u16.to_be())).map(Protocol::from_raw);
        let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, every)
            .context("cannot open a packet socket: it needs root")?;
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 8 << 20)?;
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let reader = std::thread::spawn(move || {
            let mut frames = Vec::new();
            let mut kept = 0;
            let mut buffer = vec![0; 128 << 10];
            // What is still queued when the end is asked for belongs to the capture: it ends at the first empty wait.
            loop {
                match rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty()) {
                    Ok((length, _)) if kept < BYTES_MAX => {
                        kept += length;
                        frames.push(buffer.get(..length).unwrap_or_default().to_vec());
                    }
                    Ok(_) => {}
                    Err(_) if asked.load(Ordering::Relaxed) => return frames,
                    Err(_nothing_came) => {}
                }
                if asked.load(Ordering::Relaxed) && kept >= BYTES_MAX {
                    return frames;
                }
            }
        });
        Ok(Self { stop, reader: Some(reader) })
    }

    /// Ends the capture and hands out its frames.
    pub fn finish(mut self) -> Result<Frames> {
        self.stop.store(true, Ordering::Relaxed);
        let frames = self.reader.take().and_then(|reader| reader.join().ok()).context("the capture's reader panicked")?;
        Ok(Frames(frames))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Captured frames, link-layer header first.
pub struct Frames(Vec<Vec<u8>>);

impl Frames {
    /// Their number.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Their bytes.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// How many of them hold these bytes.
    pub fn holding(&self, needle: &[u8]) -> usize {
        self.0.iter().filter(|frame| frame.windows(needle.len()).any(|window| window == needle)).count()
    }

    /// How many begin a TLS record of application data right behind a TCP header (content type 23, version 3.3).
    pub fn encrypted(&self) -> usize {
        self.0.iter().filter(|frame| payload(frame).is_some_and(|payload| payload.starts_with(&[23, 3, 3]))).count()
    }
}

/// What TCP carries in an Ethernet frame.
fn payload(frame: &[u8]) -> Option<&[u8]> {
    let packet = frame.get(14..)?;
    let (header, protocol) = match packet.first()? >> 4 {
        4 => (usize::from(packet.first()? & 15) * 4, packet.get(9)?),
        6 => (40, packet.get(6)?),
        _ => return None,
    };
    if *protocol != 6 {
        return None;
    }
    let segment = packet.get(header..)?;
    segment.get(usize::from(segment.get(12)? >> 4) * 4..)
}

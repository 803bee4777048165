//! What the kernel sends: a flow record per connection at its end, and the programs' rare events.

use std::io;
use std::path::Path;

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use proxy_common::flows::{FLOWS, Flow};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::KernelError;
use crate::node::maps;

/// The flow records of the node. Only one reader at a time gets them.
pub(crate) struct Flows {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Flows {
    /// Opens them where they are pinned; inside a runtime.
    pub(super) fn open(pins: &Path) -> Result<Self, KernelError> {
        let ring = maps::flows(pins)?;
        // SAFETY: the ring buffer owns its descriptor and says the same one as long as it lives.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
            .map_err(|error| KernelError::call(format!("wait for {FLOWS}"), error.into()))?;
        Ok(Self { ring })
    }

    /// The next record; waits for one as long as it takes. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Flow, KernelError> {
        loop {
            if let Some(flow) = self.take() {
                return Ok(flow);
            }
            let mut ready = self.ring.readable().await.map_err(|error| KernelError::call(format!("wait for {FLOWS}"), error))?;
            ready.clear_ready();
            drop(ready);
        }
    }

    /// The next record if there is one.
    pub(crate) fn take(&mut self) -> Option<Flow> {
        while let Some(record) = self.ring.get_mut().next() {
            if record.len() == size_of::<Flow>() {
                // SAFETY: of the right size, and a record is integers of which every bit pattern is valid.
                return Some(unsafe { record.as_ptr().cast::<Flow>().read_unaligned() });
            }
        }
        None
    }
}

impl std::fmt::Debug for Flows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Flows")
    }
}

/// Writes the rare events of the program with the id `program` into the log until dropped.
pub(super) fn log(program: u32) -> Result<impl Future<Output = ()> + Send, KernelError> {
    let failed = |error: io::Error| KernelError::call("read the programs' log", error);
    let logger = EbpfLogger::init_from_id(program).map_err(|error| failed(io::Error::other(error)))?;
    // SAFETY: the logger owns its ring buffer's descriptor and says the same one as long as it lives.
    let mut events =
        unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }.map_err(|error| failed(error.into()))?;
    Ok(async move {
        loop {
            events.get_mut().flush();
            match events.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => {
                    tracing::warn!(%error, "the programs' log ended");
                    return;
                }
            }
        }
    })
}

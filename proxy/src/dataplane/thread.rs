//! Threads beside the first one, each with a single-threaded runtime of its own: the one for what nobody's request waits on
//! (the identity's source, the configuration stream and the compiling of what it brings, the hand-over to the node agent),
//! so that a large configuration delays no answer; and further workers.
//!
//! Invariant: a thread ends with the value that owns it.

use std::io;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A thread; dropping it ends it, and whatever still runs on it.
#[derive(Debug)]
pub(super) struct Thread {
    name: &'static str,
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Thread {
    /// Starts it.
    ///
    /// # Errors
    /// There is no thread or no descriptor to be had.
    pub(super) fn start(name: &'static str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Its end is all that the channel tells.
            drop(runtime.block_on(stopped));
        })?;
        Ok(Self { name, handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Where tasks are spawned.
    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!(thread = self.name, "a thread ended in a panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Last(std::sync::mpsc::Sender<String>);

    impl Drop for Last {
        fn drop(&mut self) {
            self.0.send("ended".to_owned()).unwrap();
        }
    }

    #[test]
    fn what_runs_on_a_thread_ends_with_it() {
        let thread = Thread::start("aside").unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let last = Last(tell.clone());
        drop(thread.handle().spawn(async move {
            tell.send(std::thread::current().name().unwrap_or_default().to_owned()).unwrap();
            let _last = last;
            std::future::pending::<()>().await;
        }));
        assert_eq!(told.recv().unwrap(), "aside");
        drop(thread);
        assert_eq!(told.recv().unwrap(), "ended");
    }
}

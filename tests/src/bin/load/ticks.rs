//! The clock of an open loop: when each request is due, whatever happens to those before it.
//!
//! The runtime's timer counts milliseconds, which is too coarse for thousands of requests a second; a timerfd (timerfd_create(2))
//! counts nanoseconds, and tells how many periods passed. A period that was noticed late by less than one period is due when it
//! was noticed: that lateness is this machine's timer, not what is measured. Of several that were noticed at once, each is due
//! at its own time, so nothing that waited is left out (coordinated omission).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fd::OwnedFd;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

pub(crate) struct Ticks {
    due: Rc<Due>,
}

#[derive(Default)]
struct Due {
    waiting: RefCell<VecDeque<Instant>>,
    ended: Cell<bool>,
    changed: Notify,
}

impl Ticks {
    /// So many a second, for this long, or until `stop`.
    pub(crate) fn begin(rate: f64, time: Duration, stop: Rc<Cell<bool>>) -> Result<Self> {
        let period = Duration::from_secs_f64(1.0 / rate);
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let spec = Timespec { tv_sec: period.as_secs().try_into()?, tv_nsec: period.subsec_nanos().into() };
        timerfd_settime(&clock, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: spec, it_value: spec })?;
        #[expect(deprecated, reason = "what replaces it is unsafe for types that lie about their descriptor; OwnedFd does not")]
        let clock = AsyncFd::new(clock).context("the runtime takes no clock")?;
        let due = Rc::new(Due::default());
        tokio::task::spawn_local(tell(clock, period, Instant::now() + time, stop, Rc::clone(&due)));
        Ok(Self { due })
    }

    /// Waits for the next request that is due; none at the end, when all that were due have been taken.
    pub(crate) async fn next(&self) -> Option<Instant> {
        loop {
            let changed = self.due.changed.notified();
            if let Some(next) = self.due.waiting.borrow_mut().pop_front() {
                return Some(next);
            }
            if self.due.ended.get() {
                return None;
            }
            changed.await;
        }
    }
}

async fn tell(clock: AsyncFd<OwnedFd>, period: Duration, end: Instant, stop: Rc<Cell<bool>>, due: Rc<Due>) {
    while Instant::now() < end && !stop.get() {
        let Ok(mut ready) = clock.readable().await else { break };
        let mut count = [0_u8; 8];
        let read = ready.try_io(|clock| Ok(rustix::io::read(clock.get_ref(), &mut count)?));
        let Ok(Ok(_)) = read else { continue };
        let now = Instant::now();
        for late in (0..u64::from_ne_bytes(count)).rev() {
            due.waiting.borrow_mut().push_back(now - period.saturating_mul(u32::try_from(late).unwrap_or(u32::MAX)));
            due.changed.notify_one();
        }
    }
    due.ended.set(true);
    due.changed.notify_waiters();
}

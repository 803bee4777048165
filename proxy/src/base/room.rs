//! Room for so many connections at a door. Where it is full, the one that has asked nothing for the longest makes room: who
//! holds connections and is silent keeps nobody out, and who asks at once is answered.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// The connections of one door, by number.
#[derive(Debug)]
pub(crate) struct Room {
    most: usize,
    held: BTreeMap<u64, (AbortHandle, Work)>,
    count: u64,
}

/// What a connection has to do.
#[derive(Clone, Debug)]
pub(crate) struct Work(Arc<Mutex<Doing>>);

#[derive(Debug)]
struct Doing {
    answers: usize,
    /// Since when there is none, if there is none.
    silent_since: Instant,
}

/// An answer that is being made; none any more when dropped.
#[derive(Debug)]
pub(crate) struct Answering(Work);

impl Room {
    /// For `most` connections.
    pub(crate) const fn new(most: usize) -> Self {
        Self { most, held: BTreeMap::new(), count: 0 }
    }

    /// Makes room for one more. `false`: every connection is being answered.
    pub(crate) fn make(&mut self) -> bool {
        self.held.retain(|_number, (task, _work)| !task.is_finished());
        if self.held.len() < self.most {
            return true;
        }
        let silent = self.held.iter().filter_map(|(number, (_task, work))| Some((work.silent_since()?, *number)));
        let Some((_since, number)) = silent.min() else { return false };
        if let Some((task, _work)) = self.held.remove(&number) {
            task.abort();
        }
        true
    }

    /// Takes a connection in, for which there is room.
    pub(crate) fn add(&mut self, task: AbortHandle, work: Work) {
        self.count += 1;
        self.held.insert(self.count, (task, work));
    }
}

impl Work {
    /// Of a connection that has not asked yet.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Doing { answers: 0, silent_since: Instant::now() })))
    }

    /// One more answer.
    pub(crate) fn begin(&self) -> Answering {
        self.0.lock().answers += 1;
        Answering(self.clone())
    }

    fn silent_since(&self) -> Option<Instant> {
        let doing = self.0.lock();
        (doing.answers == 0).then_some(doing.silent_since)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let mut doing = self.0.0.lock();
        doing.answers -= 1;
        doing.silent_since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_was_silent_the_longest_makes_room_and_who_is_answered_does_not() {
        let mut room = Room::new(3);
        let mut tasks = Vec::new();
        let mut works = Vec::new();
        for _ in 0..3 {
            assert!(room.make());
            let task = tokio::spawn(std::future::pending::<()>());
            let work = Work::new();
            room.add(task.abort_handle(), work.clone());
            tasks.push(task);
            works.push(work);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let first = works[0].begin();
        assert!(room.make());
        assert!(tasks.remove(1).await.unwrap_err().is_cancelled(), "the oldest of those that ask nothing");
        assert!(room.make(), "there is room already");
        room.add(tokio::spawn(std::future::pending::<()>()).abort_handle(), works[1].clone());
        let (_second, _third) = (works[1].begin(), works[2].begin());
        assert!(!room.make());
        drop(first);
        assert!(room.make());
        assert!(tasks.remove(0).await.unwrap_err().is_cancelled());
        assert!(!tasks.remove(0).is_finished());
    }
}

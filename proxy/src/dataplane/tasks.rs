//! The owner of everything that runs beside a connection: tasks are counted while they live and waited for at the end.

use tokio_util::task::TaskTracker;

/// Runs tasks and knows when the last of them ended. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tasks(TaskTracker);

impl Tasks {
    /// Runs a task. It ends by itself, with its connection or at its own deadline.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.0.spawn(task));
    }

    /// How many run.
    pub(crate) fn running(&self) -> usize {
        self.0.len()
    }

    /// Waits until none runs. Cancel-safe.
    pub(crate) async fn ended(&self) {
        self.0.close();
        self.0.wait().await;
        self.0.reopen();
    }
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        drop(self.0.spawn(task));
    }
}

//! The cluster's processes: started apart from who asks, known again by id and start time, ended by those alone.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use e2e::mesh::{kill, start_time, wait_for};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{RUN, STATE};

/// A process of the cluster.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Process {
    pub(super) name: String,
    pub(super) id: u32,
    /// In clock ticks after the machine's start: another process that is given the same id started at another time.
    started: u64,
    begun: Begun,
}

/// How it was started, for whoever starts it again.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct Begun {
    words: Vec<String>,
    environment: Vec<(String, String)>,
    folder: Option<PathBuf>,
}

/// How long one may take to end by itself.
const GRACE: Duration = Duration::from_secs(5);
/// For how long one that was started again is looked at.
const SETTLED: Duration = Duration::from_secs(1);

impl Process {
    /// Starts `command` with its output in a log of its name, in a session of its own.
    pub(super) fn start(name: &str, mut command: Command) -> Result<Self> {
        let logs = Path::new(STATE).join("log");
        std::fs::create_dir_all(&logs)?;
        let log = File::options().create(true).append(true).open(logs.join(format!("{name}.log")))?;
        let begun = Begun::of(&command);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let id = child.id();
        let started = start_time(id).with_context(|| format!("{name} ended at once"))?;
        let process = Self { name: name.to_owned(), id, started, begun };
        std::fs::create_dir_all(folder())?;
        std::fs::write(folder().join(name), serde_json::to_vec(&process)?)?;
        Ok(process)
    }

    /// Is it still that process?
    pub(super) fn is_alive(&self) -> bool {
        start_time(self.id).is_some_and(|started| started == self.started)
    }

    /// Waits until `ready`; ends early, with the last words of the log, where the process has ended.
    pub(super) fn wait(&self, limit: Duration, mut ready: impl FnMut() -> Result<()>) -> Result<()> {
        let log = Path::new(STATE).join("log").join(format!("{}.log", self.name));
        let ended = wait_for(&self.name, limit, || if self.is_alive() { ready().map(|()| false) } else { Ok(true) })
            .with_context(|| format!("see {}", log.display()))?;
        if ended {
            bail!("{} ended by itself; the last that it said is: {} ({})", self.name, self.last_words(), log.display());
        }
        Ok(())
    }

    /// The last line of its log.
    pub(super) fn last_words(&self) -> String {
        let log = Path::new(STATE).join("log").join(format!("{}.log", self.name));
        std::fs::read_to_string(log).unwrap_or_default().lines().next_back().unwrap_or("nothing").to_owned()
    }

    /// Ends it without a word, and starts it again after a while, as what looks after such parts on other machines does. One
    /// that is dead already is only started.
    pub(super) fn fail(&self, away: Duration) -> Result<()> {
        let Self { name, id, .. } = self;
        if self.is_alive() {
            kill(*id, Signal::KILL);
            let gone = || if self.is_alive() { bail!("{name} still runs") } else { Ok(()) };
            wait_for(name, GRACE, gone)?;
            println!("{name} (process {id}) is killed; it is started again in {} s", away.as_secs());
            std::thread::sleep(away);
        } else {
            println!("{name} (process {id}) was dead already");
        }
        let again = Self::start(name, self.begun.command()?)?;
        // One that cannot go on where the other was killed says so and ends.
        let until = Instant::now() + SETTLED;
        again.wait(GRACE, || if Instant::now() < until { bail!("{name} may still end") } else { Ok(()) })?;
        println!("{name} runs again (process {})", again.id);
        Ok(())
    }

    /// Ends it: asks, waits, then makes it.
    pub(super) fn end(&self) -> Result<()> {
        if self.is_alive() {
            kill(self.id, Signal::TERM);
            let gone = || if self.is_alive() { bail!("{} still runs", self.name) } else { Ok(()) };
            if wait_for(&self.name, GRACE, gone).is_err() {
                kill(self.id, Signal::KILL);
                wait_for(&self.name, GRACE, gone)?;
            }
        }
        std::fs::remove_file(folder().join(&self.name)).with_context(|| format!("cannot forget {}", self.name))
    }
}

impl Begun {
    fn of(command: &Command) -> Self {
        let text = |part: &OsStr| part.to_string_lossy().into_owned();
        let set = command.get_envs().filter_map(|(name, value)| Some((text(name), text(value?))));
        Self {
            words: std::iter::once(command.get_program()).chain(command.get_args()).map(text).collect(),
            environment: set.collect(),
            folder: command.get_current_dir().map(Path::to_path_buf),
        }
    }

    fn command(&self) -> Result<Command> {
        let (program, words) = self.words.split_first().context("nothing says how it was started")?;
        let mut command = Command::new(program);
        command.args(words).envs(self.environment.iter().cloned());
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        Ok(command)
    }
}

/// All that were started and not ended, in the order of their names.
pub(super) fn all() -> Result<Vec<Process>> {
    let mut found: Vec<Process> = Vec::new();
    let entries = match std::fs::read_dir(folder()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error.into()),
    };
    for entry in entries {
        found.push(serde_json::from_slice(&std::fs::read(entry?.path())?)?);
    }
    found.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

fn folder() -> PathBuf {
    Path::new(RUN).join("processes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_id_and_its_start_and_one_that_has_ended_is_none() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let started = start_time(child.id()).unwrap();
        let process = Process { name: "sleep".to_owned(), id: child.id(), started, begun: Begun::default() };
        assert!(process.is_alive());
        assert!(!Process { started: process.started + 1, ..process.clone() }.is_alive());
        child.kill().unwrap();
        // Until it is waited for, the kernel still tells of it.
        wait_for("its end", GRACE, || if process.is_alive() { bail!("it runs") } else { Ok(()) }).unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
    }
    #[test]
    fn what_is_started_again_is_started_as_before() {
        let mut command = Command::new("printenv");
        command.arg("WHAT").env("WHAT", "again").current_dir("/");
        let said = Begun::of(&command).command().unwrap().output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout), "again\n");
    }
}

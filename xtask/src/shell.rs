//! Running other programs: shown before they run, failing by name.

use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::Stop;

/// A program in the workspace's folder.
pub(crate) fn command(root: &Path, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root).args(arguments);
    command
}

/// The cargo that runs this, in the workspace's folder.
pub(crate) fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let program = std::env::var("CARGO").unwrap_or_else(|_unset| "cargo".to_owned());
    command(root, &program, arguments)
}

/// Says what is done. Bold on a terminal.
pub(crate) fn say(text: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("\x1b[1m=> {text}\x1b[0m");
    } else {
        eprintln!("=> {text}");
    }
}

/// Runs it with this process' output; a failure is a no.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = show(&command);
    say(&shown);
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if status.success() { Ok(()) } else { Err(Stop::No(format!("`{shown}` failed ({status})")).into()) }
}

/// Runs it, passes its standard output through line by line and hands each line to `see`. Returns whether it succeeded.
pub(crate) fn run_watched(mut command: Command, mut see: impl FnMut(&str)) -> Result<bool> {
    let shown = show(&command);
    say(&shown);
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {shown}"))?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            std::io::stdout().flush()?;
            see(&line);
        }
    }
    Ok(child.wait()?.success())
}

/// Runs it and returns what it wrote to its standard output.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let shown = show(&command);
    let output = command.stderr(Stdio::piped()).output().with_context(|| format!("cannot run {shown}"))?;
    anyhow::ensure!(output.status.success(), "`{shown}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Is there such a program on the path?
pub(crate) fn has(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// Does this process run as root?
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn show(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned();
    let mut shown = name;
    for argument in command.get_args() {
        shown.push(' ');
        shown.push_str(&argument.to_string_lossy());
    }
    if shown.chars().count() > 160 {
        shown = shown.chars().take(157).chain("...".chars()).collect();
    }
    shown
}

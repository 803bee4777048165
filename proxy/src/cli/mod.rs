//! The front door: reads the command line, hands over to one role or one tool, and turns its outcome into an exit code.
//!
//! Contract: exit code 0 is done, 1 the check says no, 2 wrong usage or invalid input, 3 the environment cannot. What
//! failed goes to stderr, one cause a line; what was asked for goes to stdout. Only this room reads arguments and
//! environment variables.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};

mod agent;
mod apply;
mod check;
mod client;
mod control;
mod doctor;
mod explain;
mod get;
mod given;
mod holder;
mod inject;
mod install;
mod local;
mod mesh;
mod node;
mod patience;
mod sidecar;
mod status;
mod table;
mod wait;

/// An eBPF-accelerated sidecar service mesh.
#[derive(Debug, Parser)]
#[command(name = "outrigger", version, arg_required_else_help = true, disable_help_subcommand = true, max_term_width = 80)]
#[command(after_help = "Examples:
  outrigger up --resources ./mesh          start the mesh on this machine
  outrigger run web -n shop -- ./web       run a program as a pod of it
  outrigger apply -f route.yaml --wait     change what it does
  outrigger proxies                        see which sidecars took the change

Exit codes: 0 done; 1 the check says no; 2 wrong usage or invalid input; 3 the environment cannot.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the control plane and the node agent on this machine
    Up(local::UpArgs),
    /// Stop the local mesh and remove everything that it made
    Down(local::DownArgs),
    /// Run a program as a local pod: own network namespace, own identity, own sidecar
    Run(local::RunArgs),
    /// Run a command inside a local pod
    Exec(local::ExecArgs),
    /// Stop a local pod
    Stop(local::StopArgs),
    /// Store documents in the control plane
    Apply(apply::ApplyArgs),
    /// Remove documents from the control plane
    Delete(apply::DeleteArgs),
    /// List documents, or show one; list connections that ended of late
    Get(get::GetArgs),
    /// Show whether the mesh is well: its parts, its pods, its certificates
    Status(status::StatusArgs),
    /// List sidecars, what each has acknowledged and what it refused
    Proxies(status::ProxiesArgs),
    /// Look at what a mesh needs of this machine, and say what to do about what is missing
    Doctor(doctor::DoctorArgs),
    /// Compile documents offline and print their problems
    Check(check::CheckArgs),
    /// Tell what would happen to a request, and by which rule
    Explain(explain::ExplainArgs),
    /// Print pods with their sidecars, as the webhook makes them
    Inject(inject::InjectArgs),
    /// Install the mesh on Kubernetes
    Install(install::InstallArgs),
    /// Bring what is installed on Kubernetes to this version
    Upgrade(install::UpgradeArgs),
    /// Remove the mesh from Kubernetes
    Uninstall(install::UninstallArgs),
    /// Role: the proxy beside one pod
    Sidecar(sidecar::SidecarArgs),
    /// Wait until the sidecar of this pod serves
    Wait(wait::WaitArgs),
    /// Role: the agent of one node
    Node(node::NodeArgs),
    /// Role: the control plane
    Control(control::ControlArgs),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  outrigger completion bash > /etc/bash_completion.d/outrigger")]
    Completion { shell: clap_complete::Shell },
}

/// Why a command did not do what was asked: the exit code, and one line per cause, the outermost first.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    causes: Vec<String>,
}

impl Failure {
    /// The check says no (exit code 1).
    pub(crate) fn refused(causes: impl IntoIterator<Item = impl Display>) -> Self {
        Self::new(1, causes)
    }

    /// Wrong usage or invalid input (exit code 2).
    pub(crate) fn invalid(causes: impl IntoIterator<Item = impl Display>) -> Self {
        Self::new(2, causes)
    }

    /// The environment cannot (exit code 3): `what` is missing or failed, `remedy` says what to do.
    pub(crate) fn environment(what: impl Display, remedy: impl Display) -> Self {
        Self::new(3, [what.to_string(), format!("remedy: {remedy}")])
    }

    /// The environment cannot (exit code 3): what a process of ours that was started said about it.
    pub(crate) fn environment_of(causes: impl IntoIterator<Item = impl Display>) -> Self {
        Self::new(3, causes)
    }

    fn new(code: u8, causes: impl IntoIterator<Item = impl Display>) -> Self {
        Self { code, causes: causes.into_iter().map(|cause| cause.to_string()).collect() }
    }
}

impl Display for Failure {
    /// In one line, for what goes on without what failed.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.causes.join("; "))
    }
}

impl From<anyhow::Error> for Failure {
    /// An error of the environment, with its chain of causes.
    fn from(error: anyhow::Error) -> Self {
        Self::new(3, error.chain())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(3, [error])
    }
}

/// Runs the command of the command line; the whole of the `outrigger` binary.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => {
            // Help and version are answers, not failures; clap says which is which, and where it goes.
            let code = if answer.use_stderr() { 2 } else { 0 };
            return if answer.print().is_ok() { ExitCode::from(code) } else { ExitCode::from(3) };
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            let mut stderr = io::stderr().lock();
            for (index, cause) in failure.causes.iter().enumerate() {
                let lead = if index == 0 { "outrigger: " } else { "  " };
                if writeln!(stderr, "{lead}{cause}").is_err() {
                    break;
                }
            }
            ExitCode::from(failure.code)
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Up(args) => local::up(args),
        Command::Down(args) => local::down(args),
        Command::Run(args) => local::run(args),
        Command::Exec(args) => local::exec(args),
        Command::Stop(args) => local::stop(args),
        Command::Apply(args) => apply::apply(&args),
        Command::Delete(args) => apply::delete(&args),
        Command::Get(args) => get::run(&args),
        Command::Status(args) => status::status(&args),
        Command::Proxies(args) => status::proxies(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Check(args) => check::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Inject(args) => inject::run(&args),
        Command::Install(args) => install::install(args),
        Command::Upgrade(args) => install::upgrade(args),
        Command::Uninstall(args) => install::uninstall(args),
        Command::Sidecar(args) => sidecar::run(args),
        Command::Wait(args) => wait::run(&args),
        Command::Node(args) => node::run(args),
        Command::Control(args) => control::run(args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "outrigger", &mut script);
            print(&String::from_utf8_lossy(&script))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// For roles, which hold keys and see tokens pass: their memory is nobody else's.
fn keep_to_itself() -> Result<(), Failure> {
    crate::base::secrecy::keep_to_itself().map_err(|error| {
        Failure::environment(
            format!("cannot close this process to others: {error}"),
            "let the filter of system calls permit prctl(PR_SET_DUMPABLE)",
        )
    })
}

/// Writes `text` to stdout as it is. A reader that left early (`outrigger get all | head -1`) is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    offer(text).map(|_is_read| ())
}

/// Writes `text` to stdout as it is; `false` if its reader left.
pub(crate) fn offer(text: &str) -> Result<bool, Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(true),
    }
}

/// Writes a line to stderr that is no failure.
pub(crate) fn warn(line: &str) {
    // Where stderr is gone, nobody is there to be warned.
    drop(writeln!(io::stderr().lock(), "{line}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_help_fits_eighty_columns_and_is_wrapped_once() {
        let mut cli = Cli::command();
        cli.build();
        let names: Vec<String> = cli.get_subcommands().map(|command| command.get_name().to_owned()).collect();
        let commands = std::iter::once(cli.clone()).chain(names.iter().filter_map(|name| cli.find_subcommand(name).cloned()));
        for mut command in commands {
            for help in [command.render_help().to_string(), command.render_long_help().to_string()] {
                for line in help.lines() {
                    assert!(line.chars().count() <= 80, "{}: {line}", command.get_name());
                }
            }
            // What is a paragraph is one line, which is wrapped where it is shown; what is indented stays as it is.
            let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for pair in lines.windows(2) {
                let is_prose = |line: &str| !line.is_empty() && !line.starts_with(' ');
                let wrapped = pair.iter().all(|line| is_prose(line));
                assert!(!wrapped, "{}: {pair:?}", command.get_name());
                assert!(is_prose(pair[0]) || pair[0].chars().count() <= 80, "{}: {}", command.get_name(), pair[0]);
            }
        }
    }
}

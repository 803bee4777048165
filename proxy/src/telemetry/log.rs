//! The process's own log: text for a person at a terminal, JSON lines for a machine, its level changeable while it runs.
//!
//! Errors and events go to stderr, so that stdout stays what a command answers.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry};

use super::TelemetryError;

/// How lines are written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    Text,
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("{text:?} is not a log format; write text, json or auto")),
        }
    }
}

/// Sets up the log of this process, once, from its first lines on. `filter` is a level or a list as
/// `info,outrigger::dataplane=debug`.
///
/// # Errors
/// The filter is none, or the log is set up already.
pub(crate) fn start(format: LogFormat, filter: &str) -> Result<(), TelemetryError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(terminal).boxed(),
        LogFormat::Auto if terminal => lines.with_ansi(true).boxed(),
        LogFormat::Json | LogFormat::Auto => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed()
        }
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).try_init().map_err(|_already| TelemetryError::LogTwice)?;
    if RELOAD.set(handle).is_err() {
        return Err(TelemetryError::LogTwice);
    }
    Ok(())
}

/// Changes what is logged from now on.
///
/// # Errors
/// The filter is none.
pub(crate) fn set_filter(filter: &str) -> Result<(), TelemetryError> {
    let filter = parse(filter)?;
    if let Some(handle) = RELOAD.get()
        && let Err(error) = handle.reload(filter)
    {
        tracing::warn!(%error, "cannot change log filter");
    }
    Ok(())
}

/// What is logged now; empty if the log was not set up.
pub(crate) fn filter() -> String {
    RELOAD.get().and_then(|handle| handle.with_current(ToString::to_string).ok()).unwrap_or_default()
}

/// Does the text say what is to be logged?
pub(crate) fn is_filter(text: &str) -> bool {
    parse(text).is_ok()
}

fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    // A level that is misspelt would be taken for the name of a module, and the log would fall silent.
    let is_level = |part: &str| !part.is_empty() && part.parse::<LevelFilter>().is_ok();
    if !filter.split(',').any(is_level) && !filter.contains('=') {
        return Err(TelemetryError::NoLevel(filter.to_owned()));
    }
    EnvFilter::builder().parse(filter).map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })
}

/// The process has one log, so the handle to its filter is one too.
static RELOAD: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_level_or_a_list_of_them() {
        for good in ["info", "warn,outrigger::dataplane=debug", "off"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["info,=x=", "wran", "", "outrigger"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

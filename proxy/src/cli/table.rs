//! How lists are printed: columns without borders, times as people say them.

use std::time::Duration;

use clap::ValueEnum;
use comfy_table::Table;
use serde_json::Value;

use super::{Failure, print};

/// How an answer is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    /// More columns
    Wide,
    Yaml,
    Json,
}

/// Prints rows under their titles.
pub(crate) fn rows(titles: &[&str], rows: Vec<Vec<String>>) -> Result<(), Failure> {
    print(&text(titles, rows))
}

/// Rows under their titles, each line ended.
pub(crate) fn text(titles: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(titles.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.lines().fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// Prints an answer as JSON.
pub(crate) fn json(value: &Value) -> Result<(), Failure> {
    print(&format!("{value:#}\n"))
}

/// Prints an answer as YAML.
pub(crate) fn yaml(value: &Value) -> Result<(), Failure> {
    let text = serde_saphyr::to_string(value).map_err(|error| Failure::invalid([error]))?;
    print(&(text.trim_end().to_owned() + "\n"))
}

/// A moment seen from `now`, both in seconds since the epoch: `in 54m`, `3d ago`.
pub(crate) fn moment(at: u64, now: u64) -> String {
    let span = |seconds| short(Duration::from_secs(seconds));
    if at > now { format!("in {}", span(at - now)) } else { format!("{} ago", span(now - at)) }
}

/// A day, as `2036-11-18`.
pub(crate) fn day(at: u64) -> String {
    let at = i64::try_from(at).ok().and_then(|at| jiff::Timestamp::from_second(at).ok());
    at.map_or_else(|| "never".to_owned(), |at| at.strftime("%Y-%m-%d").to_string())
}

/// The largest unit of a duration that says enough.
fn short(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_borders_and_no_trailing_blanks() {
        let rows = vec![vec!["shop".to_owned(), "web".to_owned()], vec!["a".to_owned(), "api-gateway".to_owned()]];
        assert_eq!(text(&["NAMESPACE", "NAME"], rows), "NAMESPACE   NAME\nshop        web\na           api-gateway\n");
    }

    #[test]
    fn moments_are_told_from_now() {
        assert_eq!(moment(100, 40), "in 60s");
        assert_eq!(moment(0, 3_000), "50m ago");
        assert_eq!(moment(0, 400_000), "4d ago");
        assert_eq!(day(2_099_000_000), "2036-07-06");
    }
}

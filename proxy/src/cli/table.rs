//! How lists are printed: columns without borders, times as people say them.

use std::io::IsTerminal as _;
use std::time::Duration;

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table};
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

/// How an answer for which text is the usual form is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum JsonOutput {
    Json,
}

/// Prints rows under their titles.
pub(crate) fn rows(titles: &[&str], rows: Vec<Vec<String>>) -> Result<(), Failure> {
    print(&text(titles, rows, width()))
}

/// How wide the terminal is to which answers go; none where they go elsewhere, and lines stay whole.
pub(crate) fn width() -> Option<usize> {
    let stdout = std::io::stdout();
    let columns = stdout.is_terminal().then(|| rustix::termios::tcgetwinsize(&stdout).ok()).flatten()?.ws_col;
    (columns > 0).then(|| usize::from(columns).max(WIDTH_LEAST))
}

/// One line, ended; or several where it is wider than `width`: further ones are indented. Between words, where there is a
/// place for that.
pub(crate) fn fold(line: &str, width: Option<usize>, indent: usize) -> String {
    let mut lines = String::new();
    let mut rest = line.to_owned();
    while let Some(width) = width.filter(|width| rest.chars().count() > *width) {
        // Where the letters end that have a place, and where the one behind them does.
        let end = |letters: usize| rest.char_indices().nth(letters).map_or(rest.len(), |(at, _)| at);
        let blank = rest.get(..end(width + 1)).and_then(|begin| begin.rfind(' '));
        let words_begin = end(indent.min(width / 2));
        let cut = blank.filter(|blank| *blank > words_begin).unwrap_or_else(|| end(width));
        let (line, more) = rest.split_at(cut);
        lines.push_str(line.trim_end());
        lines.push('\n');
        rest = " ".repeat(indent.min(width / 2)) + more.trim_start();
    }
    lines + &rest + "\n"
}

/// Rows under their titles, each line ended. Cells are wrapped where there is a `width` and they need it.
fn text(titles: &[&str], rows: Vec<Vec<String>>, width: Option<usize>) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(titles.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index + 1 == titles.len() { 0 } else { 3 }));
    }
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(u16::try_from(width).unwrap_or(u16::MAX));
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

/// A moment of the day, as `17:04:59`, in UTC.
pub(crate) fn time_of_day(at: u64) -> String {
    let at = i64::try_from(at).ok().and_then(|at| jiff::Timestamp::from_second(at).ok());
    at.map_or_else(|| "-".to_owned(), |at| at.strftime("%H:%M:%S").to_string())
}

/// How often something was: `once`, `3 times`.
pub(crate) fn times(count: u64) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
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

/// On a narrower terminal nothing can be read in any way.
const WIDTH_LEAST: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_borders_and_no_trailing_blanks() {
        let rows = vec![vec!["shop".to_owned(), "web".to_owned()], vec!["a".to_owned(), "api-gateway".to_owned()]];
        assert_eq!(text(&["NAMESPACE", "NAME"], rows, None), "NAMESPACE   NAME\nshop        web\na           api-gateway\n");
    }

    #[test]
    fn a_table_fits_a_terminal_that_is_narrower_than_its_rows() {
        let row = || vec!["shop".to_owned(), "spiffe://cluster.local/ns/shop/sa/default".to_owned(), "acknowledged".to_owned()];
        let table = text(&["NAMESPACE", "IDENTITY", "CONFIGURATION"], vec![row(), row()], Some(50));
        assert!(table.lines().all(|line| line.chars().count() <= 50), "{table}");
        let whole: String = table.split_whitespace().collect();
        assert!(whole.contains("acknowledged") && table.lines().count() > 3, "{table}");
    }

    #[test]
    fn a_line_is_folded_between_words_and_stays_whole_where_nobody_looks() {
        let line = "from            one two three spiffe://a-long-one";
        assert_eq!(fold(line, None, 16), format!("{line}\n"));
        assert_eq!(
            fold(line, Some(32), 16),
            "from            one two three\n                spiffe://a-long-\n                one\n"
        );
        assert_eq!(fold("a b", Some(40), 16), "a b\n");
        assert_eq!(fold("aüüüüüüüb", Some(4), 1), "aüüü\n üüü\n üb\n");
    }

    #[test]
    fn moments_are_told_from_now() {
        assert_eq!(moment(100, 40), "in 60s");
        assert_eq!(moment(0, 3_000), "50m ago");
        assert_eq!(moment(0, 400_000), "4d ago");
        assert_eq!(day(2_099_000_000), "2036-07-06");
        assert_eq!([times(1), times(2)], ["once", "2 times"]);
    }
}

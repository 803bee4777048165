//! Texts of documents: cut out of what holds several, with their places in it.
//!
//! Sources: YAML 1.2.2 (5.4 line breaks; 9.1.2 document markers).

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde_saphyr::Location;

use super::tree;

/// A place in a text; both count from 1.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Position {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// The text of one document, and how many lines stand before it.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) text: Arc<str>,
    lines_before: usize,
}

impl Source {
    /// A text that holds one document and nothing besides.
    pub(super) fn of(text: &str) -> Self {
        Self { text: text.into(), lines_before: 0 }
    }

    /// Where the field at `path` stands; where it is not written, where what should hold it stands.
    pub(super) fn place(&self, path: &str) -> Position {
        tree::locate(&self.text, path).map_or_else(|| self.start(), |(line, column)| self.position(line, column))
    }

    pub(super) fn at(&self, location: Option<Location>) -> Position {
        match location {
            Some(place) if place.line() > 0 => self.position(place.line(), place.column()),
            _ => self.start(),
        }
    }

    /// What is written at a place, as a message names it: a value in quotes, else what kind of thing it is.
    pub(super) fn written(&self, location: Option<Location>) -> String {
        let offset = location.and_then(|place| place.span().byte_offset()).and_then(|offset| usize::try_from(offset).ok());
        let Some(rest) = offset.and_then(|offset| self.text.get(offset..)) else { return "something else".to_owned() };
        let line = rest.lines().next().unwrap_or_default().trim_end();
        let quoted = |quote: char| line.strip_prefix(quote).and_then(|inner| inner.split(quote).next());
        if line.starts_with('[') || line == "-" || line.starts_with("- ") {
            return "a list".to_owned();
        }
        let plain = || line.split(" #").next().and_then(|line| line.split([',', '}', ']']).next()).unwrap_or_default().trim();
        let value = quoted('"').or_else(|| quoted('\'')).unwrap_or_else(plain);
        if line.starts_with('{') || value.ends_with(':') || value.contains(": ") {
            return "a mapping".to_owned();
        }
        if value.is_empty() {
            return "nothing".to_owned();
        }
        let shown: String = value.chars().take(SHOWN_MAX).collect();
        format!("{shown:?}{}", if shown.len() < value.len() { "…" } else { "" })
    }

    /// The first line with something on it.
    pub(super) fn start(&self) -> Position {
        let first = self.text.lines().position(|line| !is_blank(line) && !line.starts_with("---"));
        Position { line: self.lines_before + 1 + first.unwrap_or(0), column: 1 }
    }

    fn position(&self, line: u64, column: u64) -> Position {
        let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX).max(1);
        Position { line: self.lines_before.saturating_add(number(line)), column: number(column) }
    }
}

/// Cuts a text into documents. A line that begins with `---` or `...` is a marker wherever it stands: YAML allows it
/// neither in a block scalar nor in a quoted one.
pub(super) fn split(text: &str) -> Vec<Source> {
    let text = &*line_feeds(text);
    let mut sources = Vec::new();
    let mut begin = 0;
    let mut lines_before = 0;
    let mut at = 0;
    let mut add = |from: usize, to: usize, lines_before: usize| {
        let chunk = text.get(from..to).unwrap_or_default();
        if !chunk.lines().all(|line| is_blank(line) || line.trim_end() == "---" || line.starts_with('%')) {
            sources.push(Source { text: chunk.into(), lines_before });
        }
    };
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker =
            |mark: &str| line.strip_prefix(mark).is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker("---") {
            add(begin, at, lines_before);
            (begin, lines_before) = (at, number);
        } else if marker("...") {
            add(begin, at, lines_before);
            (begin, lines_before) = (at + line.len(), number + 1);
        }
        at += line.len();
    }
    add(begin, text.len(), lines_before);
    sources
}

/// The text with a line feed for each carriage return that stands alone: that is a line break too (YAML 1.2.2, 5.4), and
/// what follows it may be a marker.
fn line_feeds(text: &str) -> Cow<'_, str> {
    let lone = text.split('\r').skip(1).any(|rest| !rest.starts_with('\n'));
    if lone { text.replace("\r\n", "\n").replace('\r', "\n").into() } else { text.into() }
}

fn is_blank(line: &str) -> bool {
    let line = line.trim_start_matches('\u{feff}').trim();
    line.is_empty() || line.starts_with('#')
}

/// How much of a wrong value a message shows.
const SHOWN_MAX: usize = 60;

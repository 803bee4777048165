//! What the demo shows: titles, lines and claims, at most 80 columns wide; bold and colour on a terminal only.

use std::io::IsTerminal as _;

/// Prints, and remembers what did not hold.
#[derive(Debug, Default)]
pub(crate) struct Show {
    /// Claims that did not hold.
    pub(crate) failed: Vec<String>,
}

impl Show {
    /// A new section.
    pub(crate) fn title(&self, text: &str) {
        println!("\n{}", bold(text));
    }

    /// A line of the section, cut to the terminal's usual width.
    pub(crate) fn line(&self, text: &str) {
        println!("  {text}");
    }

    /// Something that must hold.
    pub(crate) fn claim(&mut self, holds: bool, text: &str) {
        if holds {
            println!("  {} {text}", paint("32", "ok"));
        } else {
            println!("  {} {text}", paint("31", "NO"));
            self.failed.push(text.to_owned());
        }
    }
}

/// Bold on a terminal.
pub(crate) fn bold(text: &str) -> String {
    paint("1", text)
}

/// Less visible on a terminal.
pub(crate) fn dim(text: &str) -> String {
    paint("2", text)
}

fn paint(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

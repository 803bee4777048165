//! A document of `docs/` as its reader works through it: the commands in its fenced blocks, and what is shown below them.

use anyhow::{Context as _, Result, bail, ensure};
use e2e::mesh::root;

/// One block of commands.
#[derive(Debug)]
pub(super) struct Step {
    /// The heading above it.
    pub(super) section: String,
    /// Where it begins in the document.
    pub(super) line: usize,
    pub(super) commands: String,
    /// What is shown below it, a line each; `...` stands for anything.
    pub(super) shown: Vec<String>,
}

impl Step {
    /// Which of the shown lines is not to be found in what was said, in their order.
    pub(super) fn missing<'a>(&'a self, said: &str) -> Option<&'a str> {
        let mut lines = said.lines();
        self.shown.iter().map(String::as_str).find(|shown| !lines.any(|line| fits(shown, line)))
    }
}

/// The steps of a document, in which every command is one of them.
pub(super) fn steps(path: &str) -> Result<Vec<Step>> {
    let text = std::fs::read_to_string(root().join(path)).with_context(|| path.to_owned())?;
    let (mut steps, mut section) = (Vec::<Step>::new(), String::new());
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        if let Some(heading) = line.strip_prefix("## ") {
            heading.clone_into(&mut section);
        }
        let at = index + 1;
        ensure!(!line.starts_with("    "), "{path}:{at}: a block without a fence is run by nobody");
        let Some(language) = line.strip_prefix("```") else { continue };
        let block: Vec<&str> = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        match language {
            "sh" => {
                steps.push(Step { section: section.clone(), line: at, commands: block.join("\n"), shown: Vec::new() });
            }
            "text" => {
                let above = steps.last_mut().with_context(|| format!("{path}:{at}: nothing is above it that shows it"))?;
                above.shown = block.into_iter().map(str::to_owned).collect();
            }
            other => bail!("{path}:{at}: nobody runs a block of {other:?}"),
        }
    }
    Ok(steps)
}

/// Is `line` what is shown? What stands between two `...` follows each other in it.
fn fits(shown: &str, line: &str) -> bool {
    let (shown, line) = (shown.trim(), line.trim());
    let Some((first, behind)) = shown.split_once("...") else { return shown == line };
    let (between, last) = behind.rsplit_once("...").unwrap_or(("", behind));
    let Some(mut rest) = line.strip_prefix(first).and_then(|rest| rest.strip_suffix(last)) else { return false };
    for part in between.split("...") {
        let Some((_, behind)) = rest.split_once(part) else { return false };
        rest = behind;
    }
    true
}

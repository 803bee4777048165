//! `cargo xtask tidy`: what the compiler does not check about the house.
//!
//! The direction of dependencies is read from the map in `proxy/src/lib.rs` (the line with the arrows), so that the map
//! cannot say one thing and the code another. The rules about what a room never names stand in [`ABSENCES`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::{Stop, shell};

/// Top-level names that belong to the house; everything else there is hidden or refused.
const TOP_LEVEL: [&str; 11] =
    ["Cargo.lock", "Cargo.toml", "LICENSE", "README.md", "deploy", "docs", "ebpf", "proxy", "proxy-common", "tests", "xtask"];

/// Words that must not stand in some files of `proxy/src`.
struct Absence {
    /// Paths below `proxy/src` for which the rule holds; a folder ends with `/`. Empty: all.
    within: &'static [&'static str],
    /// Paths for which it does not hold all the same.
    except: &'static [&'static str],
    words: &'static [&'static str],
    why: &'static str,
}

const ABSENCES: [Absence; 8] = [
    Absence {
        within: &["policy/", "model/", "snapshot/", "control/world", "control/select"],
        except: &[],
        words: &["async", "await", "tokio::net", "tokio::spawn", "spawn_local", "Instant::now", "SystemTime", "rand::"],
        why: "a decision is a pure function: the caller brings time, dice and bytes",
    },
    Absence {
        within: &["dataplane/"],
        except: &[],
        words: &["kube::", "aya::", "serde_saphyr"],
        why: "the data plane knows neither Kubernetes nor the kernel's programs nor YAML",
    },
    Absence { within: &["control/"], except: &[], words: &["hyper::server"], why: "the control plane serves no traffic" },
    Absence {
        within: &[],
        except: &[
            "control/source/kubernetes/",
            "control/join/kubernetes",
            "control/cluster/",
            "control/webhook/",
            "node/kubernetes/",
            "cli/install",
            "cli/doctor",
        ],
        words: &["kube::"],
        why: "only the rooms of Kubernetes, install and doctor know kube",
    },
    Absence {
        within: &[],
        except: &["node/kernel", "node/maps"],
        words: &["aya::", "aya_log::"],
        why: "only node/kernel and node/maps know aya",
    },
    Absence {
        within: &[],
        except: &["node/kernel", "node/netns", "base/memory", "base/sockopt"],
        words: &["unsafe"],
        why: "unsafe code stands in the kernel's rooms and in base/{memory,sockopt} only",
    },
    Absence {
        within: &[],
        except: &["cli/", "main.rs"],
        words: &["env::var", "env::vars", "env::var_os", "env::args"],
        why: "nothing below cli reads variables or arguments",
    },
    Absence {
        within: &["snapshot/"],
        except: &[],
        words: &["Serialize", "Deserialize"],
        why: "compiled types are never written or read: a dump is made of the resources",
    },
];

/// Marks of unfinished work, put together here so that this file does not hold them.
const UNFINISHED: [&str; 2] = [concat!("TO", "DO"), concat!("FIX", "ME")];

/// Checks the whole tree; prints each violation on a line of its own.
pub(crate) fn run(root: &Path) -> Result<()> {
    let found = violations(root)?;
    if found.is_empty() {
        shell::say("tidy: the house is in order");
        return Ok(());
    }
    for violation in &found {
        eprintln!("{violation}");
    }
    Err(Stop::No(format!("tidy: {} violations", found.len())).into())
}

/// All that is not as it should be, as `file:line: what; why`.
fn violations(root: &Path) -> Result<Vec<String>> {
    let mut found = top_level(root)?;
    let sources = root.join("proxy/src");
    let lib = std::fs::read_to_string(sources.join("lib.rs")).context("cannot read the map of the house")?;
    let map = Map::parse(&lib)?;
    for file in rust_files(&sources)? {
        let text = std::fs::read_to_string(&file)?;
        let name = file.strip_prefix(&sources).unwrap_or(&file).to_string_lossy().replace('\\', "/");
        found.extend(check_file(&map, &name, &text).into_iter().map(|violation| format!("proxy/src/{violation}")));
    }
    for folder in ["xtask/src", "tests/src", "proxy/fuzz/targets", "proxy-common/src", "ebpf/src"] {
        for file in rust_files(&root.join(folder))? {
            let text = std::fs::read_to_string(&file)?;
            let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            found.extend(form(&name, &text));
        }
    }
    Ok(found)
}

/// Unhidden names at the top of what is committed.
fn top_level(root: &Path) -> Result<Vec<String>> {
    if !root.join(".git").exists() || !shell::has("git") {
        shell::say("tidy: not a git clone, so the top level is left out");
        return Ok(Vec::new());
    }
    let listed = shell::output(shell::command(root, "git", &["ls-files"]))?;
    let names: BTreeSet<&str> = listed.lines().filter_map(|path| path.split('/').next()).collect();
    Ok(names
        .into_iter()
        .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(name))
        .map(|name| format!("{name}: not a name of the top level; it belongs into one of {}", TOP_LEVEL.join(", ")))
        .collect())
}

/// The rooms of the house in layers, highest first.
struct Map {
    rooms: Vec<Room>,
}

struct Room {
    name: String,
    layer: usize,
    /// Place in the listing; within a layer that is no set of strangers a room may use those after it.
    place: usize,
    strangers: bool,
}

impl Map {
    /// Reads the line with the arrows: `a → { b | c } → { d, e } → f`.
    fn parse(lib: &str) -> Result<Self> {
        let line = lib
            .lines()
            .find(|line| line.starts_with("//!") && line.contains('→'))
            .context("proxy/src/lib.rs has no line with the map (`cli → …`)")?;
        let mut rooms = Vec::new();
        for (layer, group) in line.trim_start_matches("//!").split('→').enumerate() {
            let group = group.trim().trim_start_matches('{').trim_end_matches('}');
            let strangers = group.contains('|');
            for name in group.split(['|', ',']) {
                rooms.push(Room { name: name.trim().to_owned(), layer, place: rooms.len(), strangers });
            }
        }
        Ok(Self { rooms })
    }

    fn room(&self, name: &str) -> Option<&Room> {
        self.rooms.iter().find(|room| room.name == name)
    }

    /// Why `from` may not use `to`; none where it may.
    fn objection(&self, from: &str, to: &str) -> Option<String> {
        if from == to {
            return None;
        }
        let (Some(from), Some(to)) = (self.room(from), self.room(to)) else {
            return Some(format!("`{from}` or `{to}` is not on the map in lib.rs"));
        };
        if from.layer == to.layer && from.strangers {
            return Some(format!("`{}` uses `{}`: the planes are strangers to each other", from.name, to.name));
        }
        (from.place > to.place).then(|| format!("`{}` uses `{}`, which stands above it in the map of lib.rs", from.name, to.name))
    }
}

/// Violations in one file of `proxy/src`, each beginning with its path there.
fn check_file(map: &Map, name: &str, text: &str) -> Vec<String> {
    let mut found = form(name, text);
    if text.starts_with("// Generated") {
        return found;
    }
    let code = blank(text);
    let room = name.split('/').next().unwrap_or(name).trim_end_matches(".rs");
    if !matches!(room, "lib" | "main") {
        for (line, used) in crate_paths(&code) {
            // What is used from the root itself (a macro, say) is no room.
            if map.room(&used).is_some()
                && let Some(objection) = map.objection(room, &used)
            {
                found.push(format!("{name}:{line}: {objection}"));
            }
        }
        if map.room(room).is_none() {
            found.push(format!("{name}:1: the room `{room}` is not on the map in lib.rs"));
        }
    }
    let product = without_tests(name, &code);
    for rule in &ABSENCES {
        let inside = rule.within.is_empty() || rule.within.iter().any(|path| name.starts_with(path));
        if !inside || rule.except.iter().any(|path| name.starts_with(path)) {
            continue;
        }
        for (index, line) in product.lines().enumerate() {
            for word in rule.words.iter().filter(|word| names(line, word)) {
                found.push(format!("{name}:{}: names `{word}`; {}", index + 1, rule.why));
            }
        }
    }
    found
}

/// What holds for every source file: it says what it is for, and nothing in it is marked as left to do.
fn form(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let first = text.lines().find(|line| !line.starts_with("#![")).unwrap_or_default();
    if !first.starts_with("//!") && !first.starts_with("// Generated") {
        found.push(format!("{name}:1: the first line does not say what the file is for (`//! …`)"));
    }
    for (index, line) in text.lines().enumerate() {
        for mark in UNFINISHED.iter().filter(|mark| names(line, mark)) {
            found.push(format!("{name}:{}: `{mark}` is left; do it or write down why it is so", index + 1));
        }
    }
    found
}

/// Does the line hold `word` as a word of its own?
fn names(line: &str, word: &str) -> bool {
    let part_of_a_word = |character: char| character.is_alphanumeric() || character == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_none_or(|character| !part_of_a_word(character));
        let after = word.ends_with(':') || line[at + word.len()..].chars().next().is_none_or(|next| !part_of_a_word(next));
        before && after
    })
}

/// The first path element after each `crate::`, with its line; groups (`crate::{a, b::c}`) are opened.
fn crate_paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        // `$crate::` is a macro's; `some_crate::` is another crate.
        if code[..at].chars().next_back().is_some_and(|before| before.is_alphanumeric() || before == '_' || before == '$') {
            continue;
        }
        let line = code[..at].matches('\n').count() + 1;
        let rest = code[at + prefix.len()..].trim_start();
        match rest.strip_prefix('{') {
            None => found.push((line, identifier(rest))),
            Some(group) => {
                let mut depth = 0_usize;
                let mut element = String::new();
                for character in group.chars() {
                    match character {
                        '}' if depth == 0 => break,
                        ',' if depth == 0 => {
                            found.push((line, identifier(element.trim())));
                            element.clear();
                            continue;
                        }
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        _ => {}
                    }
                    element.push(character);
                }
                found.push((line, identifier(element.trim())));
            }
        }
    }
    found.retain(|(_, name)| !name.is_empty());
    found
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
}

/// The code without its tests: those stand last in a file, or in a file of their own.
fn without_tests<'a>(name: &str, code: &'a str) -> &'a str {
    if name.ends_with("/tests.rs") || name.contains("/tests/") || name.contains("/sim/") {
        return "";
    }
    code.find("#[cfg(test)]\nmod ").map_or(code, |at| &code[..at])
}

/// The code with the inside of comments and literals blanked, so that a word in a text is no finding; lines stay.
fn blank(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let at = |index: usize| characters.get(index).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut index = 0;
    while index < characters.len() {
        let end = match (at(index), at(index + 1)) {
            ('/', '/') => (index..characters.len()).find(|&i| at(i) == '\n').unwrap_or(characters.len()),
            ('/', '*') => {
                (index + 2..characters.len()).find(|&i| at(i) == '*' && at(i + 1) == '/').map_or(characters.len(), |i| i + 2)
            }
            ('r', '"' | '#') if !is_word(at(index.wrapping_sub(1))) => raw_end(&characters, index).unwrap_or(index + 1),
            ('"', _) => string_end(&characters, index),
            ('\'', '\\') => (index + 3..characters.len()).find(|&i| at(i) == '\'').map_or(characters.len(), |i| i + 1),
            ('\'', _) if at(index + 2) == '\'' => index + 3,
            _ => index,
        };
        if end <= index + 1 {
            out.push(at(index));
            index += 1;
        } else {
            out.extend((index..end).map(|i| if at(i) == '\n' { '\n' } else { ' ' }));
            index = end;
        }
    }
    out
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Behind the closing quote of the string that opens at `start`.
fn string_end(characters: &[char], start: usize) -> usize {
    let mut index = start + 1;
    while let Some(character) = characters.get(index) {
        match character {
            '\\' => index += 2,
            '"' => return index + 1,
            _ => index += 1,
        }
    }
    characters.len()
}

/// Behind the raw string that opens at `start`; none where it is none.
fn raw_end(characters: &[char], start: usize) -> Option<usize> {
    let hashes = characters.iter().skip(start + 1).take_while(|character| **character == '#').count();
    let open = start + 1 + hashes;
    if characters.get(open) != Some(&'"') {
        return None;
    }
    let closes = |&index: &usize| {
        characters.get(index) == Some(&'"')
            && characters.iter().skip(index + 1).take(hashes).filter(|character| **character == '#').count() == hashes
    };
    (open + 1..characters.len()).find(closes).map(|index| index + 1 + hashes)
}

/// All Rust files below a folder, in order; none where there is no such folder.
fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if folder.is_dir() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                found.extend(rust_files(&path)?);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIB: &str = "//! ```text\n//! cli → { dataplane | control | node } → { admin, delta } → snapshot → model → policy → { identity, telemetry } → base\n//! ```\n";

    fn check(name: &str, code: &str) -> Vec<String> {
        check_file(&Map::parse(LIB).unwrap(), name, &format!("//! A file.\n{code}"))
    }

    #[test]
    fn a_room_may_use_what_stands_below_it() {
        assert_eq!(check("dataplane/mod.rs", "use crate::base::net;\nuse crate::{delta, snapshot::publish};\n"), [""; 0]);
    }

    #[test]
    fn a_room_may_not_use_what_stands_above_it() {
        let found = check("policy/jwt.rs", "use crate::snapshot::Snapshot;\n");
        assert_eq!(found, ["policy/jwt.rs:2: `policy` uses `snapshot`, which stands above it in the map of lib.rs"]);
    }

    #[test]
    fn the_planes_are_strangers_to_each_other() {
        let found = check("control/mod.rs", "fn f() { crate::node::start(); }\n");
        assert_eq!(found, ["control/mod.rs:2: `control` uses `node`: the planes are strangers to each other"]);
    }

    #[test]
    fn a_group_of_paths_is_opened() {
        let found = check("model/mod.rs", "use crate::{\n    base::{names, units},\n    cli::up,\n};\n");
        assert_eq!(found, ["model/mod.rs:2: `model` uses `cli`, which stands above it in the map of lib.rs"]);
    }

    #[test]
    fn neighbours_that_are_no_planes_may_use_those_listed_after_them() {
        assert_eq!(check("identity/mod.rs", "use crate::telemetry::log;\n"), [""; 0]);
        assert_eq!(check("telemetry/mod.rs", "use crate::identity::spiffe;\n").len(), 1);
    }

    #[test]
    fn a_room_that_is_not_on_the_map_is_found() {
        assert_eq!(check("attic/mod.rs", ""), ["attic/mod.rs:1: the room `attic` is not on the map in lib.rs"]);
    }

    #[test]
    fn a_decision_must_not_wait_or_read_the_clock() {
        let found = check("policy/retry.rs", "async fn f() {}\nfn g() { Instant::now(); }\n");
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("names `async`"), "{found:?}");
        assert!(found[1].contains("names `Instant::now`"), "{found:?}");
    }

    #[test]
    fn tests_of_a_decision_may_read_the_clock() {
        assert_eq!(check("policy/retry.rs", "#[cfg(test)]\nmod tests { fn f() { Instant::now(); } }\n"), [""; 0]);
    }

    #[test]
    fn words_in_comments_and_texts_are_no_findings() {
        let code = "// async here\n/* unsafe */ const A: &str = \"async \\\" unsafe\";\nconst B: &str = r#\"crate::cli \"async\"#;\nconst C: char = '\"';\n";
        assert_eq!(check("policy/retry.rs", code), [""; 0]);
    }

    #[test]
    fn unsafe_code_stands_in_its_rooms_only() {
        assert_eq!(check("node/kernel.rs", "unsafe fn f() {}\n"), [""; 0]);
        assert_eq!(check("node/pods.rs", "unsafe fn f() {}\n").len(), 1);
        // A lint of that name is no unsafe code.
        assert_eq!(check("node/pods.rs", "#![deny(unsafe_code)]\n"), [""; 0]);
    }

    #[test]
    fn variables_are_read_in_cli_only() {
        assert_eq!(check("cli/up.rs", "fn f() { std::env::var(\"HOME\"); }\n"), [""; 0]);
        assert_eq!(check("base/net.rs", "fn f() { std::env::var(\"HOME\"); }\n").len(), 1);
    }

    #[test]
    fn a_file_says_what_it_is_for() {
        assert_eq!(form("a.rs", "fn f() {}\n"), ["a.rs:1: the first line does not say what the file is for (`//! …`)"]);
    }

    #[test]
    fn this_very_tree_is_tidy() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        assert_eq!(violations(root).unwrap(), [""; 0]);
    }
}

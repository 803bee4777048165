//! A peer as a description file says it: what to start, where the load goes, whose processor time and memory count.
//!
//! nginx, HAProxy and Envoy are described in the same form (`xtask/peers`), so what is measured beside Outrigger can be
//! another proxy, or the same one with another configuration, without a change here. The form is told in
//! docs/performance.md.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use e2e::mesh::target;
use e2e::programs;
use serde::Deserialize;

/// What the descriptions' words between at signs stand for.
pub(crate) struct Places {
    /// Certificates, and the files of the descriptions.
    pub(crate) folder: PathBuf,
    /// The address of the pod with the server.
    pub(crate) server: String,
}

/// A description.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Description {
    pub(crate) name: String,
    /// Works that it has no part in, though it knows their way.
    #[serde(default)]
    pub(crate) skip: Vec<String>,
    pub(crate) way: BTreeMap<Way, Road>,
    pub(crate) process: BTreeMap<String, Process>,
    /// By name: what is written into the folder before anything starts.
    #[serde(default)]
    pub(crate) files: BTreeMap<String, String>,
}

/// How a request goes from the client to the server.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// One proxy, HTTP/1.1 on both sides.
    Hop,
    /// One proxy, gRPC over plaintext HTTP/2 on both sides.
    HopGrpc,
    /// Two, with mutual TLS and HTTP/2 between them, HTTP/1.1 at both ends.
    Pair,
    /// The same with plaintext HTTP/2 at both ends.
    PairH2,
    /// Two, and each connection in one of mutual TLS, not looked into.
    PairTcp,
}

/// What must run for a way, and where the load goes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Road {
    /// `HOST:PORT`, as the load generator in the client's pod sees it.
    pub(crate) to: String,
    /// They are started in this order.
    pub(crate) processes: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Process {
    pub(crate) pod: Side,
    pub(crate) command: Vec<String>,
    #[serde(default)]
    pub(crate) environment: BTreeMap<String, String>,
    /// The processes that count are those of this name (as /proc/PID/comm has it); unwritten: all that the command makes.
    #[serde(default)]
    pub(crate) counted: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    Client,
    Server,
}

const BUILT_IN: [(&str, &str); 3] = [
    ("nginx.toml", include_str!("../../peers/nginx.toml")),
    ("haproxy.toml", include_str!("../../peers/haproxy.toml")),
    ("envoy.toml", include_str!("../../peers/envoy.toml")),
];

/// The peers that come with the benchmark, then those of `files`: description files, or folders of them.
pub(crate) fn all(files: &[PathBuf]) -> Result<Vec<Description>> {
    let mut texts: Vec<(String, String)> = BUILT_IN.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    for path in files {
        for file in descriptions(path)? {
            let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            texts.push((file.display().to_string(), text));
        }
    }
    let mut all: Vec<Description> = Vec::new();
    for (file, text) in texts {
        let description = Description::parse(&text).with_context(|| format!("{file} describes no peer"))?;
        let taken = ["direct", "outrigger"].contains(&description.name.as_str());
        ensure!(!taken, "{file}: the name {} is taken", description.name);
        // Another description of a built-in peer takes its place.
        all.retain(|other| other.name != description.name);
        all.push(description);
    }
    Ok(all)
}

fn descriptions(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    ensure!(!files.is_empty(), "{} holds no .toml file", path.display());
    Ok(files)
}

impl Description {
    fn parse(text: &str) -> Result<Self> {
        let description: Self = toml::from_str(text)?;
        ensure!(!description.name.is_empty() && description.name.len() <= 16, "a name has 1 to 16 characters");
        ensure!(!description.way.is_empty(), "it has no way");
        for (way, road) in &description.way {
            for name in &road.processes {
                ensure!(description.process.contains_key(name), "way {way:?} wants a process {name:?}, which is not described");
            }
            ensure!(!road.processes.is_empty(), "way {way:?} has no process");
        }
        for (name, process) in &description.process {
            ensure!(!process.command.is_empty(), "process {name:?} has no command");
        }
        for name in description.files.keys() {
            ensure!(!name.contains('/'), "{name:?} is no file name");
        }
        Ok(description)
    }

    /// The program that is missing on this machine, if one is.
    pub(crate) fn missing(&self, places: &Places) -> Option<String> {
        let programs = self.process.values().filter_map(|process| process.command.first());
        let mut paths = programs.map(|program| places.fill(program)).filter(|program| program.contains('/'));
        paths.find(|program| !Path::new(program).exists())
    }

    /// Writes its files.
    pub(crate) fn write(&self, places: &Places) -> Result<()> {
        for (name, text) in &self.files {
            let file = places.folder.join(name);
            std::fs::write(&file, places.fill(text)).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }
}

impl Process {
    /// The whole command line, environment included.
    pub(crate) fn line(&self, places: &Places) -> Vec<String> {
        let mut line = vec!["env".to_owned()];
        line.extend(self.environment.iter().map(|(name, value)| format!("{name}={}", places.fill(value))));
        line.extend(self.command.iter().map(|word| places.fill(word)));
        line
    }
}

impl Places {
    fn fill(&self, text: &str) -> String {
        text.replace("@folder@", &self.folder.to_string_lossy())
            .replace("@server@", &self.server)
            .replace("@third-party@", &programs::third_party().to_string_lossy())
            .replace("@libraries@", &programs::libraries())
            .replace("@venv@", &target().join("venv").to_string_lossy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_peers_are_described_in_full() {
        let peers = all(&[]).expect("built in");
        let names: Vec<&str> = peers.iter().map(|peer| peer.name.as_str()).collect();
        assert_eq!(names, ["nginx", "haproxy", "envoy"]);
        let places = Places { folder: "/f".into(), server: "10.0.0.1".to_owned() };
        for peer in peers {
            for text in peer.files.values().map(|text| places.fill(text)) {
                for word in ["@folder", "@server", "@third", "@lib", "@venv"] {
                    assert!(!text.contains(word), "{}: {word} is left in {text}", peer.name);
                }
            }
        }
    }

    #[test]
    fn a_description_that_cannot_work_says_why() {
        for (text, why) in [
            ("name = \"x\"\n[way.hop]\nto = \"a:1\"\nprocesses = [\"gone\"]\n[process]\n", "gone"),
            ("name = \"x\"\n[way.fly]\nto = \"a:1\"\nprocesses = []\n[process]\n", "fly"),
            ("name = \"x\"\n[way]\n[process]\n", "no way"),
            ("name = \"x\"\nport = 1\n[way]\n[process]\n", "port"),
        ] {
            let error = format!("{:#}", Description::parse(text).expect_err(text));
            assert!(error.contains(why), "{error}");
        }
    }
}

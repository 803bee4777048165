//! The works: what is measured, one row group of the table each, as data.

use super::peer::Way;

/// One of them.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) name: &'static str,
    /// Another name that it answers to.
    also: Option<&'static str>,
    /// What it is, for people.
    pub(crate) text: &'static str,
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Kind {
    /// Requests, as fast as they come back or at a fixed rate.
    Traffic(Traffic),
    /// A fresh proxy with so many idle connections.
    Idle { connections: usize },
    /// A control plane, or a configuration, with so many services of which five are used.
    Scale { services: usize },
    /// Measured without peers, with a limit of its own.
    Alone,
}

#[derive(Debug)]
pub(crate) struct Traffic {
    pub(crate) way: Way,
    pub(crate) load: &'static [&'static str],
}

/// All of them, in the order of the table.
pub(crate) const WORKS: &[Work] = &[
    traffic("hop-h1-64", "one hop, 64 connections", Way::Hop, &["--connections", "64"]),
    traffic("hop-h1-1", "one hop, 1 connection", Way::Hop, &[]),
    traffic("hop-h1-64k", "one hop, 64 connections, 64 KiB answers", Way::Hop, &["--connections", "64", "--path", "/65536"]),
    traffic("hop-grpc", "one hop, gRPC, 8 x 8 streams", Way::HopGrpc, &["--grpc", "--connections", "8", "--streams", "8"]),
    traffic("capture-connect", "one hop, a connection per request", Way::Hop, &["--connections", "8", "--reconnect"]),
    traffic("pair-h1-64", "mutual TLS pair, 64 connections", Way::Pair, &["--connections", "64"]),
    traffic("pair-h1-1", "mutual TLS pair, 1 connection", Way::Pair, &[]),
    Work {
        also: Some("pair-h1-64k"),
        ..traffic("pair-64k", "pair, 64 connections, 64 KiB answers", Way::Pair, &["--connections", "64", "--path", "/65536"])
    },
    traffic("pair-h2-64", "pair, HTTP/2, 8 x 8 streams", Way::PairH2, &["--h2", "--connections", "8", "--streams", "8"]),
    traffic("pair-h2-1", "pair, HTTP/2, 1 stream", Way::PairH2, &["--h2"]),
    traffic("pair-grpc", "pair, gRPC, 8 x 8 streams", Way::PairH2, &["--grpc", "--connections", "8", "--streams", "8"]),
    traffic("pair-h1-2000rps", "pair at 2,000 requests/s", Way::Pair, &["--connections", "16", "--rate", "2000"]),
    Work {
        also: Some("pair-connect"),
        ..traffic("tls-connect", "pair, a TLS connection per request", Way::PairTcp, &["--connections", "8", "--reconnect"])
    },
    Work { name: "idle", also: None, text: "memory, no connection", kind: Kind::Idle { connections: 0 } },
    Work { name: "idle-1000", also: None, text: "memory, 1,000 idle connections", kind: Kind::Idle { connections: 1_000 } },
    Work { name: "idle-10000", also: None, text: "memory, 10,000 idle connections", kind: Kind::Idle { connections: 10_000 } },
    Work { name: "config-10", also: None, text: "10 services known, 5 used", kind: Kind::Scale { services: 10 } },
    Work { name: "config-1000", also: None, text: "1,000 services known, 5 used", kind: Kind::Scale { services: 1_000 } },
    Work { name: "config-10000", also: None, text: "10,000 services known, 5 used", kind: Kind::Scale { services: 10_000 } },
    Work { name: "start", also: None, text: "start of a pod until it is ready", kind: Kind::Alone },
    Work { name: "first-answer", also: None, text: "first answer of a sidecar started again", kind: Kind::Alone },
];

/// The metrics with their units, in the order of the table.
pub(crate) const METRICS: [(&str, &str); 11] = [
    ("cpu_us_per_request", "us"),
    ("rps", "1/s"),
    ("p50_us", "us"),
    ("p99_us", "us"),
    ("rss_mib", "MiB"),
    ("kib_per_idle_connection", "KiB"),
    ("ready_ms", "ms"),
    ("run_ms", "ms"),
    ("stream_kib", "KiB"),
    ("stream_bytes_per_change", "B"),
    ("cpu_ms_per_change", "ms"),
];

const fn traffic(name: &'static str, text: &'static str, way: Way, load: &'static [&'static str]) -> Work {
    Work { name, also: None, text, kind: Kind::Traffic(Traffic { way, load }) }
}

impl Work {
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.name == name || self.also == Some(name)
    }

    pub(crate) fn traffic(&self) -> Option<&Traffic> {
        match &self.kind {
            Kind::Traffic(traffic) => Some(traffic),
            Kind::Idle { .. } | Kind::Scale { .. } | Kind::Alone => None,
        }
    }
}

/// The works of these names, in the order of the table; without names, all.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<&'static Work>, String> {
    if let Some(unknown) = names.iter().find(|name| !WORKS.iter().any(|work| work.is_called(name))) {
        let known: Vec<&str> = WORKS.iter().map(|work| work.name).collect();
        return Err(format!("no work is called {unknown}; there are {}", known.join(", ")));
    }
    Ok(WORKS.iter().filter(|work| names.is_empty() || names.iter().any(|name| work.is_called(name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn works_answer_to_both_their_names_and_unknown_ones_are_told() {
        let names = |words: &[&str]| chosen(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&["pair-connect"]).map(|works| works[0].name), Ok("tls-connect"));
        assert_eq!(names(&[]).map(|works| works.len()), Ok(WORKS.len()));
        assert!(names(&["pair-h1-64", "pear"]).is_err_and(|text| text.contains("pear") && text.contains("hop-h1-64")));
    }

    #[test]
    fn no_two_works_share_a_name() {
        for (at, work) in WORKS.iter().enumerate() {
            assert!(!WORKS[at + 1..].iter().any(|other| other.is_called(work.name)), "{}", work.name);
        }
    }
}

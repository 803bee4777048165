//! Which headers of a message the line has to look for.
//!
//! A look-up in a header map costs a hash, and most headers that the line asks about are on few messages. One look at the
//! names that are there says which of the questions have an answer. Invariant: a mark that is missing is a header that is
//! missing, as long as nobody adds one.

use http::HeaderMap;

use super::normalize::RESERVED;

/// What is among the headers of a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Marks(u16);

/// One or several kinds of headers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Mark(u16);

impl Mark {
    pub(crate) const CONTENT_TYPE: Self = Self(1);
    pub(crate) const TRANSFER_ENCODING: Self = Self(1 << 1);
    pub(crate) const CONNECTION: Self = Self(1 << 2);
    pub(crate) const UPGRADE: Self = Self(1 << 3);
    pub(crate) const TRACE: Self = Self(1 << 4);
    pub(crate) const EXPECT: Self = Self(1 << 5);
    pub(crate) const GRPC_STATUS: Self = Self(1 << 6);
    pub(crate) const GRPC_TIMEOUT: Self = Self(1 << 7);
    pub(crate) const KEEP_ALIVE: Self = Self(1 << 8);
    pub(crate) const HOST: Self = Self(1 << 9);
    /// Headers of the sidecars' own, and some of them: a call of gRPC has one of those always, and the others never.
    pub(crate) const RESERVED: Self = Self(1 << 10);
    pub(crate) const CONTINUE: Self = Self(1 << 11);
    pub(crate) const HEADER_NAMES: Self = Self(1 << 12);
}

impl Marks {
    /// Looks at every name once.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        Self(headers.keys().fold(0, |marks, name| marks | mark(name.as_str())))
    }

    /// Is one of this kind there?
    pub(crate) fn has(self, mark: Mark) -> bool {
        self.0 & mark.0 != 0
    }
}

/// By length first: most names are told from all others by it.
fn mark(name: &str) -> u16 {
    let (known, mark) = match name.len() {
        4 => ("host", Mark::HOST),
        6 => ("expect", Mark::EXPECT),
        7 => ("upgrade", Mark::UPGRADE),
        10 if name.starts_with('k') => ("keep-alive", Mark::KEEP_ALIVE),
        10 if name.starts_with('t') => ("tracestate", Mark::TRACE),
        10 => ("connection", Mark::CONNECTION),
        11 if name.starts_with('t') => ("traceparent", Mark::TRACE),
        11 => ("grpc-status", Mark::GRPC_STATUS),
        12 if name.starts_with('g') => ("grpc-timeout", Mark::GRPC_TIMEOUT),
        12 => ("content-type", Mark::CONTENT_TYPE),
        17 if name.starts_with('t') => ("transfer-encoding", Mark::TRANSFER_ENCODING),
        _another => ("", Mark(0)),
    };
    if name == known {
        mark.0
    } else if let Some(own) = name.strip_prefix(RESERVED) {
        let which = match own {
            "continue" => Mark::CONTINUE,
            "header-names" => Mark::HEADER_NAMES,
            _another => Mark(0),
        };
        Mark::RESERVED.0 | which.0
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::super::expect::ASKED;
    use super::super::spelling::HEADER_NAMES;
    use super::*;

    #[test]
    fn what_is_there_is_marked_and_nothing_else() {
        let marks = |names: &[&'static str]| {
            Marks::of(&names.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1"))).collect())
        };
        for (name, mark) in [
            ("content-type", Mark::CONTENT_TYPE),
            ("transfer-encoding", Mark::TRANSFER_ENCODING),
            ("connection", Mark::CONNECTION),
            ("upgrade", Mark::UPGRADE),
            ("traceparent", Mark::TRACE),
            ("tracestate", Mark::TRACE),
            ("expect", Mark::EXPECT),
            ("grpc-status", Mark::GRPC_STATUS),
            ("grpc-timeout", Mark::GRPC_TIMEOUT),
            ("keep-alive", Mark::KEEP_ALIVE),
            ("host", Mark::HOST),
            ("outrigger-http-version", Mark::RESERVED),
            ("outrigger-a", Mark::RESERVED),
            ("outrigger-ab", Mark::RESERVED),
            ("outrigger-header", Mark::RESERVED),
            ("outrigger-headers", Mark::RESERVED),
        ] {
            assert_eq!(marks(&[name]), Marks(mark.0), "{name}");
            assert!(marks(&["accept", name, "etag"]).has(mark), "{name}");
        }
        let others =
            ["accept", "date", "server", "referer", "user-agent", "grpc-encodin", "kept-alive", "outrigger", "x-traceparent"];
        assert_eq!(marks(&others), Marks(0));
        assert!(marks(&["host", "expect"]).has(Mark::EXPECT));
        for (name, mark) in [(ASKED, Mark::CONTINUE), (HEADER_NAMES, Mark::HEADER_NAMES)] {
            let marks = Marks::of(&[(name, HeaderValue::from_static("1"))].into_iter().collect());
            assert_eq!(marks, Marks(mark.0 | Mark::RESERVED.0));
        }
    }
}

//! The one form that the path of a request has before anything is decided about it, and whether a path that a policy or a
//! route writes is in it. Pure.
//!
//! Sources: RFC 3986 2.1 (escapes) and 6.2.2 (normalisation). The path policy, by name: **decode-unreserved**. Percent-encoded
//! unreserved characters are decoded, the other escapes get upper-case digits, dot segments are resolved; nothing else
//! changes, no slash is collapsed. What some servers read otherwise than it is written - an escape for a separator or an end
//! (`%2F`, `%5C`, `%00`), a backslash, an empty segment (`//`, which many servers collapse), a parameter (`;`, which servlet
//! containers cut off, and `%3B`, which some decode before they do: CVE-2020-13933), a character outside ASCII, which is an escape to others - stays as it is and marks the path as
//! ambiguous: where an authorization policy decides about paths, such a one is refused, for nobody can know which path the
//! application will see. So it is with a `%` that begins no escape, and of such a path nothing at all is changed.
//!
//! Invariant: what [`check_spelling`] takes is compared with requests as it stands.

use std::borrow::Cow;

use crate::base::problems::{FieldPath, Problems};

/// Which part of a path a text is meant to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Part {
    Whole,
    Begin,
    End,
}

/// Refuses a path that no request has, because requests are brought into another spelling before they are looked at: in a DENY
/// it would be a hole. Says whether there is nothing to refuse.
pub(super) fn check_spelling(text: &str, part: Part, at: &FieldPath, problems: &mut Problems) -> bool {
    let Some(spelt) = spelling(text, part) else { return true };
    let remedy = match spelt {
        Some(spelt) => format!("write {spelt}"),
        None => "leave out the segments . and ..".to_owned(),
    };
    problems.refuse(at, format!("a request's path is never spelt as {text:?}"), remedy);
    false
}

/// Refuses what a request that comes to be authorized by its path cannot have in it. Says whether there is nothing to refuse.
pub(super) fn check_unambiguous(text: &str, part: Part, at: &FieldPath, problems: &mut Problems) -> bool {
    let (whole, _cut) = split_escape(text, part);
    let (_, ambiguous) = normal_path(whole);
    if ambiguous {
        problems.refuse(
            at,
            format!("servers read {text:?} differently: a request with such a path is refused before a rule is asked"),
            "leave out //, ;, \\, %2F, %3B, %5C, %00 and a % that begins no escape",
        );
    }
    !ambiguous
}

/// How requests spell what is written as `text`, where they never spell it so: `Some(None)` where nothing that is like it is
/// ever in a request.
fn spelling(text: &str, part: Part) -> Option<Option<String>> {
    let encoded = encode(text);
    let (whole, cut) = split_escape(&encoded, part);
    let Some((decoded, _)) = decode_unreserved(whole) else {
        // A path with a broken escape is compared as it stands.
        return (encoded != text).then(|| Some(encoded.into_owned()));
    };
    let decoded = decoded + &cut.to_ascii_uppercase();
    let spelt = match part {
        Part::Whole => Some(without_dots(&decoded)),
        Part::Begin => {
            // What stands behind the last slash may go on.
            let (folders, last) = decoded.rsplit_once('/').unwrap_or(("", &decoded));
            Some(without_dots(&format!("{folders}/")) + last)
        }
        // Nobody knows what stands before it.
        Part::End => {
            let has_dots = decoded.split('/').skip(1).any(|segment| matches!(segment, "." | ".."));
            (!has_dots).then_some(decoded)
        }
    };
    (spelt.as_deref() != Some(text)).then_some(spelt)
}

/// The text without an escape that its end cuts off, and that. Only what begins a path may end so.
fn split_escape(text: &str, part: Part) -> (&str, &str) {
    let tail = text.len().saturating_sub(2);
    match text.rfind('%') {
        Some(at) if part == Part::Begin && at >= tail && text.bytes().skip(at + 1).all(|digit| hex(digit).is_some()) => {
            text.split_at_checked(at).unwrap_or((text, ""))
        }
        _whole => (text, ""),
    }
}

/// Escapes what no path has as it is (RFC 3986 3.3, and what the codecs take beyond it).
fn encode(text: &str) -> Cow<'_, str> {
    let is_none = |byte: u8| !byte.is_ascii_graphic() || matches!(byte, b'<' | b'>' | b'`');
    if !text.bytes().any(is_none) {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len());
    for byte in text.bytes() {
        if is_none(byte) {
            out.extend_from_slice(&[b'%', upper_hex(byte >> 4), upper_hex(byte & 0xf)]);
        } else {
            out.push(byte);
        }
    }
    // Always text: nothing but ASCII is left.
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

/// The normal form of a path, and whether servers may differ about it.
pub(crate) fn normal_path(path: &str) -> (Cow<'_, str>, bool) {
    // Asked before dots are resolved: they may take the empty segment with them.
    let otherwise = path.contains(';') || path.contains("//") || !path.is_ascii();
    let suspicious = path.bytes().any(|byte| byte == b'%' || byte == b'\\') || path.contains("/.");
    if !suspicious && path.starts_with('/') {
        return (Cow::Borrowed(path), otherwise);
    }
    let Some((decoded, ambiguous)) = decode_unreserved(path) else { return (Cow::Borrowed(path), true) };
    (Cow::Owned(without_dots(&decoded)), ambiguous || otherwise)
}

/// The path as a server reads it that decodes every character which may stand in a path as it is, as most do; `None` where
/// that is how it is written. RFC 3986 2.2 lets `%3A` and `:` mean two things, so nobody else may take them for one.
pub(super) fn decoded(path: &str) -> Option<String> {
    let (mut out, mut rest, mut found) = (String::new(), path, false);
    while let Some((before, escape)) = rest.split_once('%') {
        out.push_str(before);
        let value = match escape.as_bytes() {
            [high, low, ..] => hex(*high).zip(hex(*low)).map(|(high, low)| high << 4 | low),
            _cut => None,
        };
        match value.filter(|value| value.is_ascii_graphic() && !b"%/?#\\".contains(value)) {
            Some(value) => {
                out.push(char::from(value));
                rest = escape.get(2..).unwrap_or_default();
                found = true;
            }
            None => {
                out.push('%');
                rest = escape;
            }
        }
    }
    found.then(|| out + rest)
}

/// `None`: there is a `%` that begins no escape. Nobody can say what a server makes of it, and to decode what stands beside it
/// could make an escape of it (`%%341`), so such a path is left as it is.
fn decode_unreserved(path: &str) -> Option<(String, bool)> {
    let mut out = Vec::with_capacity(path.len());
    let mut ambiguous = false;
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            ambiguous |= byte == b'\\';
            out.push(byte);
            continue;
        }
        let mut ahead = bytes.clone();
        let (high, low) = (ahead.next().and_then(hex)?, ahead.next().and_then(hex)?);
        bytes = ahead;
        let value = high << 4 | low;
        if value.is_ascii_alphanumeric() || b"-._~".contains(&value) {
            out.push(value);
        } else {
            ambiguous |= matches!(value, b'/' | b'\\' | b';' | 0);
            out.extend_from_slice(&[b'%', upper_hex(high), upper_hex(low)]);
        }
    }
    // Always text: only ASCII was put in for ASCII.
    Some((String::from_utf8(out).ok()?, ambiguous))
}

/// RFC 3986 5.2.4, for a path that begins with a slash. Empty segments stay: `/a//b` is not `/a/b`.
fn without_dots(path: &str) -> String {
    let mut out: Vec<&str> = Vec::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    out.pop();
                }
                // The segment's slash stays.
                if last {
                    out.push("");
                }
            }
            other => out.push(other),
        }
    }
    format!("/{}", out.join("/"))
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

fn upper_hex(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'A' + nibble - 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_escape_may_be_read_as_its_character() {
        for (path, read) in [
            ("/users%3Adelete", Some("/users:delete")),
            ("/a%2B%40%7Cb%3B", Some("/a+@|b;")),
            ("/users:delete", None),
            ("/%2F%5C%00%25%3F%23%20%C3%BC", None),
            ("/100%", None),
            ("/a%3", None),
            ("/%3A%", Some("/:%")),
            ("/%\u{fc}%3A", Some("/%\u{fc}:")),
        ] {
            assert_eq!(decoded(path).as_deref(), read, "{path}");
        }
    }

    #[test]
    fn paths_have_one_form() {
        for (path, normal, ambiguous) in [
            ("/", "/", false),
            ("/shop/cart", "/shop/cart", false),
            ("/%73hop/%7euser", "/shop/~user", false),
            ("/a/./b/../c", "/a/c", false),
            ("/a/b/..", "/a/", false),
            ("/a/.", "/a/", false),
            ("/../../etc", "/etc", false),
            ("/a//b", "/a//b", true),
            ("//admin", "//admin", true),
            ("/a//../b", "/a/b", true),
            ("/public/..;/admin", "/public/..;/admin", true),
            ("/a%3bb", "/a%3Bb", true),
            ("/%2e%2e/admin", "/admin", false),
            ("/a%2fb", "/a%2Fb", true),
            ("/a%5cb", "/a%5Cb", true),
            ("/a\\b", "/a\\b", true),
            ("/a%00", "/a%00", true),
            ("/50%", "/50%", true),
            ("/%zz", "/%zz", true),
            ("/%%33c", "/%%33c", true),
            ("/a%/../%41", "/a%/../%41", true),
            ("/caf%c3%a9", "/caf%C3%A9", false),
            ("/café", "/café", true),
            ("/./café", "/café", true),
            ("/.well-known", "/.well-known", false),
        ] {
            let (found, marked) = normal_path(path);
            assert_eq!((&*found, marked), (normal, ambiguous), "{path}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_normal_path_stays_as_it_is(path in "/[a-c./%2eE5f\\\\]{0,24}") {
            let (once, ambiguous) = normal_path(&path);
            let (twice, still) = normal_path(&once);
            proptest::prop_assert_eq!(&once, &twice);
            proptest::prop_assert!(ambiguous || !still);
            if !ambiguous {
                proptest::prop_assert!(!once.split('/').any(|segment| segment == "." || segment == ".."));
            }
        }
    }

    #[test]
    fn a_path_that_no_request_has_is_refused_with_the_one_that_requests_have() {
        for (text, part, expected) in [
            ("/m%c3%bc", Part::Whole, "write /m%C3%BC"),
            ("/a b", Part::Whole, "write /a%20b"),
            ("/ü", Part::Whole, "write /%C3%BC"),
            ("/c/../d", Part::Whole, "write /d"),
            ("/%61x", Part::Whole, "write /ax"),
            ("/a/.", Part::Whole, "write /a/"),
            ("/%2e%2e/x", Part::Whole, "write /x"),
            ("/a/./b", Part::Begin, "write /a/b"),
            ("/c/../d", Part::Begin, "write /d"),
            ("/m%c3", Part::Begin, "write /m%C3"),
            ("/m%c", Part::Begin, "write /m%C"),
            ("/a b", Part::Begin, "write /a%20b"),
            (".p h", Part::End, "write .p%20h"),
            ("%bc", Part::End, "write %BC"),
            ("/../x", Part::End, "leave out the segments . and .."),
            ("/..", Part::End, "leave out the segments . and .."),
        ] {
            let mut problems = Problems::of("p");
            assert!(!check_spelling(text, part, &FieldPath::root(), &mut problems), "{text} {part:?}");
            let said: Vec<_> = problems.iter().map(|problem| problem.remedy.clone()).collect();
            assert_eq!(said, [expected], "{text} {part:?}");
        }
        for (text, part) in [
            ("/m%C3%BC", Part::Whole),
            ("/a..b/.c", Part::Whole),
            ("/{id}/a:b", Part::Whole),
            ("/50%", Part::Whole),
            ("/a%", Part::Begin),
            ("/a%2", Part::Begin),
            ("/.", Part::Begin),
            ("/a/..", Part::Begin),
            ("..", Part::End),
            ("3%BC", Part::End),
            ("/", Part::End),
        ] {
            let mut problems = Problems::default();
            assert!(check_spelling(text, part, &FieldPath::root(), &mut problems), "{text} {part:?}");
            assert!(!problems.refused(), "{text} {part:?}");
        }
    }

    #[test]
    fn what_is_refused_before_rules_are_asked_is_no_part_of_a_rule() {
        let good = |text: &str, part| check_unambiguous(text, part, &FieldPath::root(), &mut Problems::default());
        for bad in ["/a//b", "/a;b", "/a\\b", "/a%2Fb", "/a%3Bb", "/a%5C", "/a%00"] {
            assert!(!good(bad, Part::Whole) && !good(bad, Part::Begin) && !good(bad, Part::End), "{bad}");
        }
        assert!(!good("/50%", Part::Whole));
        assert!(good("/a%", Part::Begin) && good("/a%2", Part::Begin) && good("/a", Part::Whole) && good("/", Part::Begin));
    }

    proptest::proptest! {
        #[test]
        fn what_is_taken_is_the_form_that_requests_have(path in "/[a-cü ./%2eE5f]{0,16}") {
            if check_spelling(&path, Part::Whole, &FieldPath::root(), &mut Problems::default()) {
                proptest::prop_assert_eq!(&*normal_path(&path).0, &*path);
            } else {
                // What is proposed is taken.
                if let Some(Some(spelt)) = spelling(&path, Part::Whole) {
                    proptest::prop_assert_eq!(spelling(&spelt, Part::Whole), None);
                }
            }
        }
    }
}

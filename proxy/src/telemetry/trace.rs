//! Trace context: which trace a request belongs to, carried from caller to callee.
//!
//! Sources: W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context-1/). Pure; the dice come from the caller.
//! Invariant: an invalid `traceparent` is as none at all, and takes its `tracestate` with it (section 3.3.1.5).

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::base::random::Dice;

/// The trace of a request and the span of one hop of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TraceContext {
    trace: TraceId,
    span: SpanId,
    /// The span that this one continues; none at the beginning of a trace.
    parent: Option<SpanId>,
    flags: u8,
}

/// 16 bytes, never all zero.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct TraceId([u8; 16]);

/// 8 bytes, never all zero.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) struct SpanId([u8; 8]);

impl TraceContext {
    /// The context of this hop's own span: it continues what the headers carry, or begins a trace. `sample` says whether
    /// a trace that begins here is exported; one that a caller began is carried on as the caller says. No headers: none of
    /// them is about traces.
    pub(crate) fn continue_or_begin(
        headers: Option<&HeaderMap>,
        dice: &mut Dice,
        sample: impl FnOnce(&mut Dice) -> bool,
    ) -> Self {
        match headers.and_then(Self::read) {
            Some(caller) => caller.child(dice),
            None => {
                let flags = u8::from(sample(dice)) * SAMPLED;
                Self { trace: TraceId::draw(dice), span: SpanId::draw(dice), parent: None, flags }
            }
        }
    }

    /// What the headers say; `None` where they say nothing valid.
    pub(crate) fn read(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let value = values.next()?;
        // Two of them say nothing: which one is meant cannot be known.
        if values.next().is_some() {
            return None;
        }
        Self::parse(value.as_bytes())
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let (head, rest) = text.split_at_checked(TRACEPARENT_LENGTH)?;
        let [v1, v2, b'-', middle @ .., b'-', f1, f2] = head else { return None };
        let (trace, span) = middle.split_at_checked(32)?;
        let [b'-', span @ ..] = span else { return None };
        let [version] = hex::<1>(&[*v1, *v2])?;
        // "Vendors MUST ... parse" what they know of a higher version; ff is forbidden, and 00 is never longer.
        if version == 0xff || (version == 0 && !rest.is_empty()) || (!rest.is_empty() && !rest.starts_with(b"-")) {
            return None;
        }
        let trace = hex::<16>(trace).filter(|id| *id != [0; 16])?;
        let span = hex::<8>(span).filter(|id| *id != [0; 8])?;
        let [flags] = hex::<1>(&[*f1, *f2])?;
        // Version 00 knows one flag; it is the only one that is passed on.
        Some(Self { trace: TraceId(trace), span: SpanId(span), parent: None, flags: flags & SAMPLED })
    }

    /// A new span of the same trace, under this one.
    pub(crate) fn child(&self, dice: &mut Dice) -> Self {
        Self { trace: self.trace, span: SpanId::draw(dice), parent: Some(self.span), flags: self.flags }
    }

    /// Writes the context into a request that goes out. `tracestate` stays as the caller sent it when the trace is the
    /// caller's, and goes when the trace begins here. `carried`: some of the headers are about traces.
    pub(crate) fn write(&self, headers: &mut HeaderMap, carried: bool) {
        if carried && self.parent.is_none() {
            headers.remove(TRACESTATE);
        }
        if let Ok(mut value) = HeaderValue::from_bytes(&self.traceparent()) {
            // It is another one for each request: in the table of a link it would only drive out what repeats (RFC 7541
            // 7.1.3, never-indexed literals).
            value.set_sensitive(true);
            headers.insert(TRACEPARENT, value);
        }
    }

    /// Lets the codec of a link keep the header's name in its table: of the requests that come after this one, only the value
    /// is spelled out. For the first request of a connection; every further one would keep a value that nobody repeats.
    pub(crate) fn introduce(headers: &mut HeaderMap) {
        if let Some(value) = headers.get_mut(TRACEPARENT) {
            value.set_sensitive(false);
        }
    }

    /// Is the trace exported?
    pub(crate) fn sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The trace.
    pub(crate) fn trace_id(&self) -> TraceId {
        self.trace
    }

    /// The span of this hop.
    pub(crate) fn span_id(&self) -> SpanId {
        self.span
    }

    /// The span that it continues.
    pub(crate) fn parent_id(&self) -> Option<SpanId> {
        self.parent
    }

    fn traceparent(&self) -> [u8; TRACEPARENT_LENGTH] {
        let mut out = *b"00-00000000000000000000000000000000-0000000000000000-00";
        // The template's dashes stay.
        let parts: [(_, &[u8]); 3] = [(3..35, &self.trace.0), (36..52, &self.span.0), (53..55, &[self.flags])];
        for (place, bytes) in parts {
            write_hex(out.get_mut(place).unwrap_or_default(), bytes);
        }
        out
    }
}

impl TraceId {
    fn draw(dice: &mut Dice) -> Self {
        let id = (u128::from(dice.bits()) << 64) | u128::from(dice.bits());
        // All zero is not an identifier.
        Self(id.max(1).to_be_bytes())
    }

    /// As bytes, the most significant first.
    pub(crate) fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl SpanId {
    fn draw(dice: &mut Dice) -> Self {
        Self(dice.bits().max(1).to_be_bytes())
    }

    /// As bytes, the most significant first.
    pub(crate) fn bytes(self) -> [u8; 8] {
        self.0
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// "Vendors MUST ignore the traceparent when ... not lowercase hex" (section 3.2.2): capitals are refused.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let mut good = true;
    // Without a branch for each digit: this runs for every request.
    let mut nibble = |digit: u8| {
        let (number, letter) = (digit.wrapping_sub(b'0'), digit.wrapping_sub(b'a'));
        good &= number < 10 || letter < 6;
        if number < 10 { number } else { letter.wrapping_add(10) }
    };
    if text.len() != N * 2 {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = nibble(*high) << 4 | nibble(*low) & 0x0f;
    }
    good.then_some(out)
}

fn write_hex(place: &mut [u8], bytes: &[u8]) {
    let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    for (pair, byte) in place.chunks_exact_mut(2).zip(bytes) {
        if let [high, low] = pair {
            (*high, *low) = (digit(byte >> 4), digit(byte & 0x0f));
        }
    }
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const TRACEPARENT_LENGTH: usize = 55;
const SAMPLED: u8 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn read(value: &str) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", HeaderValue::from_str(value).unwrap());
        TraceContext::read(&headers)
    }

    #[test]
    fn a_callers_trace_is_carried_on_under_a_span_of_our_own() {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", HeaderValue::from_static(GOOD));
        headers.insert("tracestate", HeaderValue::from_static("congo=t61rcWkgMzE"));
        let context = TraceContext::continue_or_begin(Some(&headers), &mut Dice::from_seed(1), |_| unreachable!());
        assert_eq!(context.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(context.parent_id().unwrap().to_string(), "00f067aa0ba902b7");
        assert!(context.sampled());
        context.write(&mut headers, true);
        let sent = read(headers["traceparent"].to_str().unwrap()).unwrap();
        assert_eq!((sent.trace_id(), sent.span_id()), (context.trace_id(), context.span_id()));
        assert_eq!(headers["tracestate"], "congo=t61rcWkgMzE");
    }

    #[test]
    fn a_trace_that_begins_here_drops_a_state_that_belongs_to_none() {
        let mut headers = HeaderMap::new();
        headers.insert("tracestate", HeaderValue::from_static("congo=t61rcWkgMzE"));
        let context = TraceContext::continue_or_begin(Some(&headers), &mut Dice::from_seed(1), |_| false);
        assert!(!context.sampled() && context.parent_id().is_none());
        context.write(&mut headers, true);
        assert!(headers["traceparent"].to_str().unwrap().ends_with("-00"));
        assert!(!headers.contains_key("tracestate"));
    }

    #[test]
    fn what_the_standard_calls_invalid_is_none() {
        for bad in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01x",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert!(read("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-comes").is_some());
        let mut twice = HeaderMap::new();
        twice.append("traceparent", HeaderValue::from_static(GOOD));
        twice.append("traceparent", HeaderValue::from_static(GOOD));
        assert_eq!(TraceContext::read(&twice), None);
    }

    proptest! {
        #[test]
        fn reading_any_bytes_never_panics(text in "[\\x20-\\x7e]{0,80}") {
            let _parsed = TraceContext::parse(text.as_bytes());
        }

        #[test]
        fn what_is_written_is_read_back(seed: u64, sampled: bool) {
            let context = TraceContext::continue_or_begin(None, &mut Dice::from_seed(seed), |_| sampled);
            prop_assert_eq!(TraceContext::parse(&context.traceparent()), Some(context));
        }
    }
}

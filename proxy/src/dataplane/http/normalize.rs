//! What a request asks for, in one form: what is matched, authorized and forwarded is the same text. Pure.
//!
//! Sources: RFC 3986 6.2.2 (normalisation), RFC 9110 7.2 and 7.6.1 (Host, connection headers), RFC 9112 3.2, RFC 9113 8.
//! What becomes of a path stands in `policy/path.rs`, where policies read theirs by it.

use std::borrow::Cow;
use std::cell::RefCell;

use h2::ext::Protocol;
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderName, TE, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};

use super::attempt::{HTTP_VERSION, STATUS, UPGRADE_TOKEN};
use super::expect;
use super::reject::{Limit, Reject};
use super::spelling::{HEADER_NAMES, Odd, REASON_PHRASE};
use crate::dataplane::sniff::is_token;
use crate::policy::limits::Limits;
use crate::policy::path::normal_path;

/// A request's target.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Target {
    /// Host and port as the caller named them, lower case; none where an HTTP/1.0 caller named none.
    pub(crate) authority: Option<Authority>,
    /// The path in normal form, and the query as it came.
    pub(crate) path_and_query: PathAndQuery,
    /// Servers differ about what the path means.
    pub(crate) ambiguous: bool,
    /// It asks for a tunnel to the authority (RFC 9110 9.3.6): there is no path, and what stands for one here is not read.
    pub(crate) tunnel: bool,
}

impl Target {
    /// What is decided about.
    pub(crate) fn path(&self) -> &str {
        if self.tunnel { "" } else { self.path_and_query.path() }
    }
}

/// Reads the target of a request.
///
/// # Errors
/// The request is not valid HTTP, or asks for something that a sidecar does not do.
pub(crate) fn target(request: &Parts) -> Result<Target, Reject> {
    let Odd { framed_twice, fragment } = request.extensions.get().copied().unwrap_or_default();
    if framed_twice {
        return Err(Reject::BadRequest("both a Content-Length and a Transfer-Encoding"));
    }
    // A target has none (RFC 9112 3.2.1), and what was left of it would be another target than the one that was asked for.
    if fragment {
        return Err(Reject::BadRequest("a target with a fragment"));
    }
    if request.uri.scheme().is_some_and(|scheme| *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS) {
        return Err(Reject::BadRequest("a scheme that is neither http nor https"));
    }
    // Only CONNECT names an authority and nothing else (RFC 9112 3.2.3); to the codec any word is one.
    let bare = request.version != Version::HTTP_2 && request.uri.authority().is_some() && request.uri.scheme().is_none();
    if bare && request.method != Method::CONNECT {
        return Err(Reject::BadRequest("a target that is neither a path nor a URI"));
    }
    let authority = authority(request)?;
    // The codec of HTTP/2 takes several, and one that is no number; to HTTP/1 behind us it would be a second framing (RFC 9110
    // 8.6).
    if request.version == Version::HTTP_2 {
        let mut lengths = request.headers.get_all(CONTENT_LENGTH).iter();
        let valid = |length: &HeaderValue| !length.is_empty() && length.as_bytes().iter().all(u8::is_ascii_digit);
        if lengths.next().is_some_and(|length| !valid(length)) || lengths.next().is_some() {
            return Err(Reject::BadRequest("the Content-Length is not valid, or there are several"));
        }
    }
    // The codecs' type for names takes a quote, which no name has (RFC 9110 5.6.2); that of HTTP/1 looks itself.
    if request.version == Version::HTTP_2 && request.headers.keys().any(|name| name.as_str().contains('"')) {
        return Err(Reject::BadRequest("the name of a header is none"));
    }
    match coding(&request.headers) {
        Coding::Undone => {}
        Coding::Left => return Err(Reject::TransferCoding),
        Coding::Faulty => return Err(Reject::BadRequest("a Transfer-Encoding that says chunked more than once, or not last")),
    }
    if request.method == Method::CONNECT && request.extensions.get::<Protocol>().is_none() {
        return tunnel(request, authority);
    }
    let path = request.uri.path();
    // "All HTTP/2 requests MUST include exactly one valid value for ... `:path`" (RFC 9113 8.3.1); the codec asks for it only where
    // there is an authority.
    if path.is_empty() && request.version == Version::HTTP_2 {
        return Err(Reject::BadRequest("no :path"));
    }
    // "The asterisk-form of request-target is only used for a server-wide OPTIONS request" (RFC 9112 3.2.4).
    if path == "*" && request.method != Method::OPTIONS {
        return Err(Reject::BadRequest("only OPTIONS has the target *"));
    }
    let (path, ambiguous) = if path == "*" { (Cow::Borrowed(path), false) } else { normal_path(path) };
    let path_and_query = match (path, request.uri.path_and_query()) {
        // A URL without a path is written with one (RFC 9110 4.2.3). Its own text says `/` too where it is none at all, and
        // is written as nothing by itself.
        (Cow::Borrowed(_), Some(written)) if written.as_str() == "/" => PathAndQuery::from_static("/"),
        // As usual nothing changed, and the text is shared with the request.
        (Cow::Borrowed(_), Some(written)) if written.as_str().starts_with(['/', '*']) => written.clone(),
        (path, _) => {
            let text = match request.uri.query() {
                Some(query) => format!("{path}?{query}"),
                None => path.into_owned(),
            };
            PathAndQuery::try_from(text).map_err(|_not_one| Reject::BadRequest("a target that cannot be passed on"))?
        }
    };
    Ok(Target { authority, path_and_query, ambiguous, tunnel: false })
}

/// Where a tunnel is to lead. "A server MUST reject a CONNECT request that targets an empty or invalid port number" (RFC 9110
/// 9.3.6), and the target "consists of only the host name and port number of the tunnel destination" (RFC 9112 3.2.3).
fn tunnel(request: &Parts, authority: Option<Authority>) -> Result<Target, Reject> {
    let uri = &request.uri;
    let bare = uri.authority().is_some() && uri.scheme().is_none() && uri.path_and_query().is_none();
    if !bare || authority.as_ref().and_then(Authority::port_u16).is_none_or(|port| port == 0) {
        return Err(Reject::BadRequest("CONNECT names a host and a port, and nothing else"));
    }
    // "A CONNECT request message does not have content" (RFC 9110 9.3.6): what comes behind the head is for the tunnel.
    if request.headers.contains_key(TRANSFER_ENCODING) || has_length(&request.headers) {
        return Err(Reject::BadRequest("a CONNECT with a body"));
    }
    Ok(Target { authority, path_and_query: PathAndQuery::from_static("/"), ambiguous: false, tunnel: true })
}

/// The protocol that an extended CONNECT asks for (RFC 8441 4), where a request is one.
///
/// # Errors
/// It is none that applications are asked for.
pub(crate) fn protocol_asked(request: &Parts) -> Result<Option<HeaderValue>, Reject> {
    let Some(protocol) = request.extensions.get::<Protocol>().filter(|_| request.method == Method::CONNECT) else {
        return Ok(None);
    };
    let none = Reject::BadRequest("a :protocol that no application is asked for");
    if !is_offerable(protocol.as_str().as_bytes()) {
        return Err(none);
    }
    HeaderValue::from_str(protocol.as_str()).map(Some).map_err(|_not_text| none)
}

/// Has the target's authority stand for the Host of a request that has its target in absolute form: "the proxy MUST ignore the
/// received Host header field (if any) and instead replace it" (RFC 9112 3.2.2).
///
/// # Errors
/// It cannot be written as a header.
pub(crate) fn host_of_absolute_form(request: &mut Parts) -> Result<(), Reject> {
    if request.version != Version::HTTP_2
        && let Some(authority) = request.uri.authority()
    {
        let host = HeaderValue::try_from(authority.as_str()).map_err(|_not_ascii| Reject::BadRequest("a Host that is none"))?;
        request.headers.insert(HOST, host);
    }
    Ok(())
}

/// How a body was coded for the connection on which it came.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Coding {
    /// Not at all, or in chunks, which the codec undoes.
    Undone,
    /// In another way beside, which the codec does not undo; and what says that there was one goes no further.
    Left,
    /// In chunks of chunks, or in something else behind the chunks: "A sender MUST NOT apply the chunked transfer coding more than
    /// once", and what comes behind it is no end (RFC 9112 6.1 and 6.3).
    Faulty,
}

/// How it was by the head of its message.
pub(crate) fn coding(headers: &HeaderMap) -> Coding {
    let mut lines = headers.get_all(TRANSFER_ENCODING).iter().peekable();
    if lines.peek().is_none() {
        return Coding::Undone;
    }
    let (mut chunked, mut coded) = (false, false);
    for coding in lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii) {
        // Nor may an empty element stand behind it: the codec takes it for the last coding.
        if chunked {
            return Coding::Faulty;
        }
        // "A recipient MUST parse and ignore a reasonable number of empty list elements" (RFC 9110 5.6.1.2).
        if !coding.is_empty() {
            chunked = coding.eq_ignore_ascii_case(b"chunked");
            coded |= !chunked;
        }
    }
    match (chunked, coded) {
        (_, true) => Coding::Left,
        (true, false) => Coding::Undone,
        (false, false) => Coding::Faulty,
    }
}

/// Has an answer say its length once, and only where it has one: "the Transfer-Encoding overrides the Content-Length", which
/// "MUST" then be taken away (RFC 9112 6.3); a 204 has none (RFC 9110 8.6); and the same one several times is one.
///
/// # Errors
/// It says several, or what is no length. The codec looks at none where there is no content.
pub(crate) fn one_length(status: StatusCode, headers: &mut HeaderMap) -> Result<(), Reject> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = lengths.next() else { return Ok(()) };
    if status == StatusCode::NO_CONTENT || status.is_informational() || headers.contains_key(TRANSFER_ENCODING) {
        remove_in_order(headers, |name| *name == CONTENT_LENGTH);
        return Ok(());
    }
    if lengths.next().is_none() && !first.is_empty() && first.as_bytes().iter().all(u8::is_ascii_digit) {
        return Ok(());
    }
    let mut all = headers.get_all(CONTENT_LENGTH).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let one = all.next().unwrap_or_default().trim_ascii().to_vec();
    if one.is_empty() || !one.iter().all(u8::is_ascii_digit) || all.any(|length| length.trim_ascii() != one) {
        return Err(Reject::UpstreamProtocol);
    }
    if let Ok(one) = HeaderValue::from_bytes(&one) {
        headers.insert(CONTENT_LENGTH, one);
    }
    Ok(())
}

/// The limits on a head, and what the codec of HTTP/2 lets pass. (Those of HTTP/1 are kept while one is read, but for that on
/// the target.)
///
/// # Errors
/// The head is over one of them, or malformed.
pub(crate) fn within_limits(request: &Parts, head_bytes: usize, limits: &Limits) -> Result<(), Reject> {
    let over = |size: usize, limit: u32| u32::try_from(size).map_or(true, |size| size > limit);
    let target = request.uri.path_and_query().map_or(0, |target| target.as_str().len());
    if over(target, limits.uri_bytes) {
        return Err(Reject::TooLarge(Limit::Target(limits.uri_bytes)));
    }
    if request.version != Version::HTTP_2 {
        return Ok(());
    }
    if over(request.headers.len(), limits.header_count) {
        return Err(Reject::TooLarge(Limit::HeaderCount(limits.header_count)));
    }
    if over(head_bytes, limits.header_bytes) {
        return Err(Reject::TooLarge(Limit::HeadBytes(limits.header_bytes)));
    }
    // "A field value MUST NOT start or end with an ASCII whitespace character" (RFC 9113 8.2.1).
    let at_an_end = |value: &HeaderValue| {
        let is_blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
        is_blank(value.as_bytes().first()) || is_blank(value.as_bytes().last())
    };
    if request.headers.values().any(at_an_end) {
        return Err(Reject::BadRequest("a header's value begins or ends with a blank"));
    }
    Ok(())
}

/// How large the head of a request is: its target and its headers.
pub(crate) fn head_bytes(request: &Parts) -> usize {
    request.uri.path_and_query().map_or(0, |target| target.as_str().len()) + list_bytes(&request.headers)
}

/// How large headers are as HTTP/2 counts them: each with 32 bytes beside its text (RFC 9113 10.5.1).
pub(crate) fn list_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + FIELD_BYTES).sum()
}

fn authority(request: &Parts) -> Result<Option<Authority>, Reject> {
    let mut hosts = request.headers.get_all(HOST).iter();
    let host = hosts.next();
    // "A server MUST respond with 400 ... to any request message that contains more than one Host" (RFC 9112 3.2).
    if hosts.next().is_some() {
        return Err(Reject::BadRequest("more than one Host header"));
    }
    let host = match host {
        Some(host) => Some(host.to_str().map_err(|_not_ascii| Reject::BadRequest("a Host that cannot be read"))?),
        None => None,
    };
    let authority = match (request.uri.authority(), host) {
        // In HTTP/2 both may be there and must agree (RFC 9113 8.3.1); in HTTP/1 the target's wins (RFC 9112 3.2.2).
        (Some(authority), Some(host)) if request.version == Version::HTTP_2 && !authority.as_str().eq_ignore_ascii_case(host) => {
            return Err(Reject::BadRequest("Host and :authority differ"));
        }
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host,
        (None, None) if request.version == Version::HTTP_11 => {
            return Err(Reject::BadRequest("no Host header"));
        }
        // An http URI has an authority, so one of them must be there (RFC 9113 8.3.1); to HTTP/1.1 behind us nothing else would do.
        (None, None) if request.version == Version::HTTP_2 => {
            return Err(Reject::BadRequest("neither :authority nor Host"));
        }
        (None, None) => return Ok(None),
    };
    // Most requests of a thread name what the last one did, which is good as it stands.
    if let Some(known) = LAST.with_borrow(|last| last.as_ref().filter(|last| last.as_str() == authority).cloned()) {
        return Ok(Some(known));
    }
    // An http URI has a host (RFC 9110 4.2.1), so a request without one has no target.
    if self::host(authority).is_empty() {
        return Err(Reject::BadRequest("a Host that is empty"));
    }
    let none = Reject::BadRequest("a Host that is none");
    if authority.contains('@') || !names_a_port_or_none(authority) {
        return Err(none);
    }
    let parsed = if authority.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Authority::try_from(authority.to_ascii_lowercase())
    } else {
        Authority::try_from(authority)
    };
    let parsed = parsed.map_err(|_not_one| none)?;
    LAST.set(Some(parsed.clone()));
    Ok(Some(parsed))
}

/// Does nothing but a number stand behind the host, if anything does? To the type for it any text behind the colon is a port. Which
/// number it is says nothing about where the request goes.
fn names_a_port_or_none(authority: &str) -> bool {
    let behind = match authority.rsplit_once(']') {
        Some((_, behind)) => behind,
        None => authority.find(':').and_then(|colon| authority.get(colon..)).unwrap_or_default(),
    };
    behind.is_empty() || behind.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

thread_local! {
    static LAST: RefCell<Option<Authority>> = const { RefCell::new(None) };
}

/// The host of an authority, without port.
pub(crate) fn host(authority: &str) -> &str {
    match authority.rfind(':') {
        // Inside brackets the colon belongs to an IPv6 address.
        Some(colon) if !authority.get(colon..).is_some_and(|rest| rest.contains(']')) => {
            authority.get(..colon).unwrap_or(authority)
        }
        _no_port => authority,
    }
}

/// The protocol that a request asks to be upgraded to, where it does so validly (RFC 9110 7.8).
pub(crate) fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    // A body would come before the other protocol, and a tunnel has no place for one. "A server MAY ignore a received Upgrade
    // header field if it wishes to continue using the current protocol" (RFC 9110 7.8).
    if headers.contains_key(TRANSFER_ENCODING) || has_length(headers) {
        return None;
    }
    let asked = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(',').any(|name| name.trim().eq_ignore_ascii_case("upgrade")));
    if !asked {
        return None;
    }
    // HTTP/2 in clear by upgrade is deprecated (RFC 9113 3.1), and TLS by upgrade (RFC 2817), which some clients offer with
    // every request, has no place below mutual TLS: neither is offered to anybody. Of the others the one that is wanted most is,
    // and what the receiver switches to is held against it.
    let offers = headers.get_all(UPGRADE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let offer = offers.map(<[u8]>::trim_ascii).find(|offer| is_offerable(offer));
    HeaderValue::from_bytes(offer?).ok()
}

/// May it be offered to a receiver?
fn is_offerable(protocol: &[u8]) -> bool {
    let name = protocol_name(protocol);
    let declined = name.is_empty() || name.eq_ignore_ascii_case(b"h2c") || name.eq_ignore_ascii_case(b"TLS");
    !declined && protocol.iter().all(|byte| is_token(*byte) || *byte == b'/')
}

/// Does a head say that bytes follow? A length of 0 is none.
fn has_length(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_LENGTH).iter().any(|length| length.as_bytes() != b"0")
}

/// Is the protocol that a receiver switches to the one that was offered? "A server MUST NOT switch to a protocol that was not
/// indicated by the client" (RFC 9110 7.8). A server may leave its version out, or spell it in another way.
pub(crate) fn is_offered(chosen: &HeaderValue, offer: &HeaderValue) -> bool {
    protocol_name(chosen.as_bytes()).eq_ignore_ascii_case(protocol_name(offer.as_bytes()))
}

/// A protocol's name without its version.
fn protocol_name(protocol: &[u8]) -> &[u8] {
    protocol.split(|byte| *byte == b'/').next().unwrap_or_default().trim_ascii()
}

/// The protocols that a server demands: "a server that sends a 426 ... MUST send an Upgrade header field in the response" (RFC 9110
/// 15.5.22). Another sidecar has them in a header of its own.
pub(crate) fn demanded(answer: &http::response::Parts, from_link: bool) -> Option<HeaderValue> {
    if answer.status != StatusCode::UPGRADE_REQUIRED {
        return None;
    }
    let name = if from_link { UPGRADE_TOKEN } else { UPGRADE };
    let lines: Vec<_> = answer.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    HeaderValue::from_bytes(&lines.join(b", ".as_slice())).ok().filter(|all| !all.is_empty())
}

/// Takes away what concerns only the connection on which a message came (RFC 9110 7.6.1).
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // Usually there is none but what gRPC sends with every request and what goes on as it is. One look at each name is cheaper
    // than seven searches.
    let mut met = 0;
    let mut goes_on = |name: &HeaderName, value: &HeaderValue| {
        met += 1;
        met == 1 && *name == TE && value == TRAILERS
    };
    if headers.iter().all(|(name, value)| !is_hop_by_hop(name) || goes_on(name, value)) {
        return;
    }
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    // A caller must not have the message's own framing or target taken away. `TE: trailers` is looked at below.
    let kept = [HOST, TE, CONTENT_LENGTH, http::header::TRAILER];
    let own = [CONNECTION, TRANSFER_ENCODING, UPGRADE, KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS];
    remove_in_order(headers, |name| own.contains(name) || (named.contains(name) && !kept.contains(name)));
    // "TE: trailers" is the one value that HTTP/2 carries (RFC 9113 8.2.2), and gRPC needs it.
    if !headers.contains_key(TE) {
        return;
    }
    let trailers = headers.get_all(TE).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').any(|coding| coding.split(';').next().is_some_and(|name| name.trim().eq_ignore_ascii_case(TRAILERS)))
    });
    if trailers {
        headers.insert(TE, HeaderValue::from_static(TRAILERS));
    } else {
        remove_in_order(headers, |name| *name == TE);
    }
}

/// Takes the length from a request that is to become a tunnel: there it would be that of what is tunnelled.
pub(crate) fn without_length(headers: &mut HeaderMap) {
    remove_in_order(headers, |name| *name == CONTENT_LENGTH);
}

/// Takes away what an answer says of its framing, which is to be ignored where it makes a tunnel (RFC 9110 9.3.6).
pub(crate) fn without_framing(headers: &mut HeaderMap) {
    let framing = [CONTENT_LENGTH, TRANSFER_ENCODING, http::header::TRAILER];
    remove_in_order(headers, |name| framing.contains(name));
}

/// Takes headers away and leaves the others in their order; what a map's own removal does is to put its last header into
/// the hole.
fn remove_in_order(headers: &mut HeaderMap, gone: impl Fn(&HeaderName) -> bool) {
    let Some(first) = headers.keys().position(&gone) else { return };
    if headers.keys().skip(first).all(&gone) {
        let names: Vec<HeaderName> = headers.keys().skip(first).cloned().collect();
        for name in names {
            headers.remove(name);
        }
        return;
    }
    let mut skip = false;
    let mut current = None;
    for (name, value) in std::mem::replace(headers, HeaderMap::with_capacity(headers.keys_len())) {
        // A name comes with the first of its values.
        if let Some(name) = name {
            skip = gone(&name);
            current = Some(name);
        }
        if let (false, Some(name)) = (skip, &current) {
            headers.append(name.clone(), value);
        }
    }
}

/// Takes away from a request the headers that only sidecars may set.
///
/// # Errors
/// Whoever sent it is no sidecar and set one that crosses a link: it would pass for the word of one.
pub(crate) fn take_reserved(headers: &mut HeaderMap, link: bool) -> Result<(), Reject> {
    // Usually there is none, and then nothing else is looked at.
    if headers.keys().any(|name| name.as_str().starts_with(RESERVED)) {
        if !link && let Some(name) = CROSSING.into_iter().find(|name| headers.contains_key(name)) {
            return Err(Reject::ReservedHeader(name));
        }
        strip_reserved(headers, None);
    }
    Ok(())
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    let names = ["connection", "transfer-encoding", "upgrade", "te", "keep-alive", "proxy-connection", "http2-settings"];
    names.contains(&name.as_str())
}

/// Takes away the headers that only sidecars may set, but for `except`.
pub(crate) fn strip_reserved(headers: &mut HeaderMap, except: Option<&HeaderName>) {
    remove_in_order(headers, |name| name.as_str().starts_with(RESERVED) && Some(name) != except);
}

/// What of trailers is for who reads the message itself; none: nothing. They are no place for what is said hop by hop
/// (RFC 9110 6.5.1), and HTTP/2 refuses to carry it.
pub(crate) fn cleaned_trailers(mut trailers: HeaderMap) -> Option<HeaderMap> {
    strip_reserved(&mut trailers, None);
    strip_hop_by_hop(&mut trailers);
    (!trailers.is_empty()).then_some(trailers)
}

const FIELD_BYTES: usize = 32;
/// What crosses a link.
const CROSSING: [HeaderName; 6] = [HTTP_VERSION, UPGRADE_TOKEN, STATUS, HEADER_NAMES, REASON_PHRASE, expect::ASKED];
/// Headers of this prefix are for sidecars alone.
pub(crate) const RESERVED: &str = "outrigger-";
const TRAILERS: &str = "trailers";
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserved_header_goes_from_among_more_values_than_a_map_has_names() {
        let mut headers: HeaderMap =
            [(HeaderName::from_static("outrigger-x"), HeaderValue::from_static("1"))].into_iter().collect();
        for _ in 0..30_000 {
            headers.append("a", HeaderValue::from_static(""));
        }
        strip_reserved(&mut headers, None);
        assert_eq!((headers.keys_len(), headers.len()), (1, 30_000));
    }

    #[test]
    fn connection_headers_go_and_trailers_stay() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, x-secret, host, te"),
            ("x-secret", "1"),
            ("host", "web"),
            ("te", "trailers, deflate"),
            ("upgrade", "websocket"),
            ("accept", "*/*"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("accept", "*/*"), ("host", "web"), ("te", "trailers")]);
    }

    #[test]
    fn a_body_is_chunked_once_and_last() {
        for (lines, expected) in [
            ([].as_slice(), Coding::Undone),
            (&[" Chunked "], Coding::Undone),
            (&["gzip", "chunked"], Coding::Left),
            (&["gzip, chunked"], Coding::Left),
            (&["identity"], Coding::Left),
            (&[", chunked"], Coding::Undone),
            (&["", ",,", "chunked"], Coding::Undone),
            (&[",gzip, ,chunked"], Coding::Left),
            (&["", " , "], Coding::Faulty),
            (&["chunked", ""], Coding::Faulty),
            (&["chunked, chunked"], Coding::Faulty),
            (&["chunked", "Chunked"], Coding::Faulty),
            (&["chunked, gzip, chunked"], Coding::Faulty),
            (&["chunked,gzip"], Coding::Faulty),
            (&["chunked,"], Coding::Faulty),
        ] {
            let headers = lines.iter().map(|line| (TRANSFER_ENCODING, HeaderValue::from_static(line))).collect();
            assert_eq!(coding(&headers), expected, "{lines:?}");
        }
    }

    #[test]
    fn what_grpc_asks_for_goes_on_as_it_is() {
        let mut headers: HeaderMap = [("te", "trailers"), ("accept", "*/*")]
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .into_iter()
            .collect();
        let asked = headers.clone();
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, asked);
        headers.append(TE, HeaderValue::from_static("trailers"));
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, asked, "once is enough");
        headers.append(TE, HeaderValue::from_static("deflate"));
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers, asked);
    }

    #[test]
    fn an_application_cannot_set_what_only_sidecars_may() {
        let mut headers = HeaderMap::new();
        headers.insert("outrigger-http-version", HeaderValue::from_static("2"));
        headers.insert("outrigger-reason", HeaderValue::from_static("denied"));
        let mut kept = headers.clone();
        strip_reserved(&mut headers, None);
        assert!(headers.is_empty());
        strip_reserved(&mut kept, Some(&super::super::reject::REASON));
        assert_eq!(kept.len(), 1);
    }

    #[test]
    fn a_request_has_one_host() {
        let request = |build: http::request::Builder| build.body(()).unwrap().into_parts().0;
        let good = request(http::Request::get("/a?b").header("host", "Web.Shop:8080"));
        assert_eq!(
            target(&good).unwrap(),
            Target {
                authority: Some(Authority::from_static("web.shop:8080")),
                path_and_query: PathAndQuery::from_static("/a?b"),
                ambiguous: false,
                tunnel: false
            }
        );
        for (url, written) in [("http://a", "/"), ("https://a?b", "/?b"), ("http://a/c", "/c"), ("*", "*")] {
            let request = request(http::Request::options(url).header("host", "a"));
            assert_eq!(http::Uri::from(target(&request).unwrap().path_and_query).to_string(), written, "{url}");
        }
        for lengths in [["5", "5"].as_slice(), &["", ""], &[""], &["+1"], &["1, 1"]] {
            let mut odd = request(http::Request::post("http://a/").version(Version::HTTP_2));
            for length in lengths {
                odd.headers.append(CONTENT_LENGTH, HeaderValue::from_str(length).unwrap());
            }
            assert!(matches!(target(&odd), Err(Reject::BadRequest(_))), "{lengths:?}");
        }
        let tunnel = target(&request(http::Request::connect("A.example:443").header("host", "a"))).unwrap();
        assert_eq!((tunnel.path(), tunnel.authority.as_ref().map(Authority::as_str)), ("", Some("a.example:443")));
        assert_eq!(host("web.shop:8080"), "web.shop");
        assert_eq!(host("[::1]:80"), "[::1]");
        assert_eq!(host("[::1]"), "[::1]");
        for bad in [
            http::Request::get("/"),
            http::Request::get("/").header("host", "a").header("host", "b"),
            http::Request::get("/").header("host", "user@a"),
            http::Request::get("/").header("host", "a b"),
            http::Request::get("/").header("host", "a:b"),
            http::Request::get("/").header("host", "[::1]:8x"),
            http::Request::get("/").header("host", "[::1]80"),
            http::Request::get("/").header("host", "::1"),
            http::Request::get("http://a:b/").version(Version::HTTP_2),
            http::Request::get("/").version(Version::HTTP_2),
            http::Request::get("http://a/").version(Version::HTTP_2).header(HeaderName::from_lowercase(b"a\"b").unwrap(), "a"),
            http::Request::builder()
                .uri(http::Uri::from_parts(http::uri::Parts::default()).unwrap())
                .version(Version::HTTP_2)
                .header("host", "a"),
            http::Request::get("/").header("host", ""),
            http::Request::get("/").header("host", ":80"),
            http::Request::get("/").version(Version::HTTP_10).header("host", ""),
            http::Request::get("*").header("host", "a"),
            http::Request::get("ftp://a/").header("host", "a"),
            http::Request::get("/").header("host", "a").extension(Odd { fragment: true, ..Odd::default() }),
            http::Request::connect("a").header("host", "a"),
            http::Request::connect("a:0").header("host", "a:0"),
            http::Request::connect("/").header("host", "a:80"),
            http::Request::connect("a:80").header("host", "a:80").header("content-length", "2"),
            http::Request::get("http://a/").version(Version::HTTP_2).header("host", "b"),
        ] {
            assert!(target(&request(bad)).is_err());
        }
    }
}

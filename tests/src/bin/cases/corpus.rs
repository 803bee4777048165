//! The odd requests of the differential test, and every difference between what an application sees of them behind nginx
//! and behind a pair of sidecars.
//!
//! In a difference, `-` is a line of nginx's alone and `+` one of the pair's. nginx is set up to forward what it can: Host
//! as it came, names with underscores, bodies as they arrive.

/// One request as it is sent, and the named difference with its justification.
pub(crate) struct Odd {
    pub(crate) name: &'static str,
    pub(crate) bytes: &'static [u8],
    pub(crate) differs: Option<(&'static str, &'static str)>,
}

/// All of them.
pub(crate) const CORPUS: &[Odd] = &[
    same("a plain GET", b"GET /a HTTP/1.1\r\nHost: app\r\nUser-Agent: a\r\nAccept: */*\r\n\r\n"),
    same("odd spelling", b"GET /a HTTP/1.1\r\nhOsT: app\r\nx-LOWER-Upper: 1\r\nACCEPT: a\r\nX-a-B-c: 2\r\n\r\n"),
    same("lower case", b"GET /a HTTP/1.1\r\nhost: app\r\naccept: a\r\nx-b: 2\r\n\r\n"),
    same("duplicates", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: 1\r\nX-A: 2\r\nx-a: 3\r\nB: 1\r\n\r\n"),
    other("interleaved duplicates", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: 1\r\nB: 1\r\nX-A: 2\r\n\r\n", "another order", "RFC 9110 5.3: only the order of the same name means something, and it is kept."),
    other("an empty value", b"GET /a HTTP/1.1\r\nHost: app\r\nX-Empty:\r\nX-B: 1\r\n\r\n", "- X-Empty: \n+ X-Empty:", "RFC 9112 5.1: white space before a value is no part of it."),
    other("white space around a value", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A:   1 2\t \r\n\r\n", "- X-A: 1 2\t\n+ X-A: 1 2", "RFC 9112 5.1: white space behind a value is no part of it, a tab no less than a space."),
    same("Latin-1 in a value", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: caf\xe9\r\n\r\n"),
    same("UTF-8 in a value", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: caf\xc3\xa9\r\n\r\n"),
    same("an underscore in a name", b"GET /a HTTP/1.1\r\nHost: app\r\nX_A: 1\r\n\r\n"),
    other("odd characters in a name", b"GET /a HTTP/1.1\r\nHost: app\r\nX!#$%&'*+.^`|~A: 1\r\n\r\n", "+ X!#$%&'*+.^`|~A: 1", "RFC 9110 5.6.2: they are characters of a name; nginx drops such a header."),
    same("two cookies", b"GET /a HTTP/1.1\r\nHost: app\r\nCookie: a=1\r\nCookie: b=2\r\n\r\n"),
    same("cookies in one", b"GET /a HTTP/1.1\r\nHost: app\r\nCookie: a=1; b=2;c=3\r\n\r\n"),
    other("a header of hops", b"GET /a HTTP/1.1\r\nHost: app\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n\r\n", "- X-Hop: 1", "RFC 9110 7.6.1: what Connection names MUST be removed."),
    other("Keep-Alive and Proxy-Connection", b"GET /a HTTP/1.1\r\nHost: app\r\nKeep-Alive: 5\r\nProxy-Connection: keep-alive\r\n\r\n", "- Proxy-Connection: keep-alive", "RFC 9110 7.6.1: Proxy-Connection concerns one connection and is removed, whether it is named or not."),
    other("TE with trailers", b"GET /a HTTP/1.1\r\nHost: app\r\nTE: trailers, deflate\r\nConnection: TE\r\n\r\n", "+ TE: trailers\n+ Connection: TE", "RFC 9110 10.1.4: it is generated anew, with its connection option, because trailers are forwarded."),
    same("forwarding headers of the client's", b"GET /a HTTP/1.1\r\nHost: app\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nVia: 1.0 fred\r\n\r\n"),
    same("an unknown method", b"BREW /pot HTTP/1.1\r\nHost: app\r\n\r\n"),
    other("a method in lower case", b"get /a HTTP/1.1\r\nHost: app\r\n\r\n", "- refused 400\n+ get /a HTTP/1.1\n+ host app\n+ no body", "RFC 9110 9.1: a method is any token, in the letters that it is written in; which there are is the application's to say."),
    other("OPTIONS of everything", b"OPTIONS * HTTP/1.1\r\nHost: app\r\n\r\n", "- refused 400\n+ OPTIONS * HTTP/1.1\n+ host app\n+ no body", "RFC 9112 3.2.4: it is a valid target."),
    same("HEAD", b"HEAD /a HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("DELETE without a body", b"DELETE /a HTTP/1.1\r\nHost: app\r\n\r\n"),
    other("TRACE", b"TRACE /a HTTP/1.1\r\nHost: app\r\n\r\n", "- refused 405\n+ TRACE /a HTTP/1.1\n+ host app\n+ no body", "RFC 9110 9.3.8: it is a method as any other; who wants to refuse it has a policy for that."),
    other("CONNECT", b"CONNECT app:80 HTTP/1.1\r\nHost: app:80\r\n\r\n", "- refused 400\n+ refused 501", "RFC 9110 9.1: so answers who does not implement a method; it is carried where a rule asks for it by name."),
    same("absolute-form", b"GET http://app/a?b HTTP/1.1\r\nHost: app\r\n\r\n"),
    other("absolute-form with another Host", b"GET http://app/a HTTP/1.1\r\nHost: other\r\n\r\n", "- host other\n+ host app", "RFC 9112 3.2.2: Host MUST be replaced by the target's."),
    same("a port in Host", b"GET /a HTTP/1.1\r\nHost: app:80\r\n\r\n"),
    same("Host in capitals", b"GET /a HTTP/1.1\r\nHost: APP\r\n\r\n"),
    same("no Host", b"GET /a HTTP/1.1\r\nAccept: a\r\n\r\n"),
    same("two Hosts", b"GET /a HTTP/1.1\r\nHost: app\r\nHost: app\r\n\r\n"),
    other("HTTP/1.0", b"GET /a HTTP/1.0\r\nHost: app\r\n\r\n", "- GET /a HTTP/1.1\n+ GET /a HTTP/1.0", "RFC 9110 2.5: the application is told what its caller can read. An intermediary should send its own version (RFC 9112 2.3); a sidecar stands for its own application and is not seen."),
    other("HTTP/1.0 without Host", b"GET /a HTTP/1.0\r\n\r\n", "- GET /a HTTP/1.1\n+ GET /a HTTP/1.0", "RFC 9110 2.5, as above."),
    other("HTTP/1.2", b"GET /a HTTP/1.2\r\nHost: app\r\n\r\n", "- GET /a HTTP/1.1\n- host app\n- no body\n+ refused 400", "RFC 9110 2.5 recommends to read it as HTTP/1.1, and does not demand it; there is no such version."),
    other("HTTP/0.9", b"GET /a\r\n\r\n", "- no answer\n+ refused 400", "RFC 9112 2.3 and 3: a request line has a version, and there is an answer for one that has not."),
    other("an escaped slash", b"GET /a%2Fb%2fc HTTP/1.1\r\nHost: app\r\n\r\n", "- GET /a%2Fb%2fc HTTP/1.1\n+ GET /a%2Fb%2Fc HTTP/1.1", "RFC 3986 6.2.2.1: escapes are equal in both cases; what was authorized is what is forwarded."),
    other("escapes of letters", b"GET /%61%7e HTTP/1.1\r\nHost: app\r\n\r\n", "- GET /%61%7e HTTP/1.1\n+ GET /a~ HTTP/1.1", "RFC 3986 6.2.2.2: escapes of unreserved characters are decoded; what was authorized is what is forwarded."),
    other("dot segments", b"GET /a/./b/../c HTTP/1.1\r\nHost: app\r\n\r\n", "- GET /a/./b/../c HTTP/1.1\n+ GET /a/c HTTP/1.1", "RFC 3986 6.2.2.3: dot segments are removed; what was authorized is what is forwarded."),
    other("dot segments above the root", b"GET /../../a HTTP/1.1\r\nHost: app\r\n\r\n", "- refused 400\n+ GET /a HTTP/1.1\n+ host app\n+ no body", "RFC 3986 5.2.4: nothing is above the root."),
    same("empty segments", b"GET //a//b HTTP/1.1\r\nHost: app\r\n\r\n"),
    other("a broken escape", b"GET /a%zz HTTP/1.1\r\nHost: app\r\n\r\n", "- refused 400\n+ GET /a%zz HTTP/1.1\n+ host app\n+ no body", "RFC 9112 3.2: the target is passed on as it came; where a policy decides about paths it is refused."),
    same("a query that is odd", b"GET /a?b=c&d[]=e{f}&%zz;+/?../ HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("an empty query", b"GET /a? HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("UTF-8 in a path", b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: app\r\n\r\n"),
    other("a fragment", b"GET /a#b HTTP/1.1\r\nHost: app\r\n\r\n", "- GET /a#b HTTP/1.1\n- host app\n- no body\n+ refused 400", "RFC 9112 3.2.1: a target has no fragment, and without it another one would be asked for."),
    same("a pipe and a quote in a path", b"GET /a|b\"c HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("a backslash in a path", b"GET /a\\b HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("a body with a length", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\nX-A: 1\r\n\r\nabc"),
    same("an empty body", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 0\r\n\r\n"),
    same("POST without a body", b"POST /a HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("GET with a body", b"GET /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\n\r\nabc"),
    other("chunks", b"POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n", "- length 3\n+ coded chunked", "RFC 9112 6.1: how a body is framed concerns one connection; a length cannot be known of a body that streams."),
    other("chunks and trailers", b"POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n", "- length 3\n+ coded chunked\n+ trailer x-t: 1", "RFC 9110 6.5: trailers are passed on; they need chunks (RFC 9112 7.1.2)."),
    other("the same length twice", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "- refused 400\n+ POST /a HTTP/1.1\n+ host app\n+ length 3\n+ body abc", "RFC 9112 6.3 rule 5: the same length, said twice, may be sent once."),
    same("two lengths", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
    same("a list of lengths", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3, 3\r\n\r\nabc"),
    same("a signed length", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: +3\r\n\r\nabc"),
    same("a length and chunks", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
    same("a coding that is unknown", b"POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
    other("a coding in capitals", b"POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "- length 3\n+ coded chunked", "RFC 9112 6.1, as with chunks; RFC 9112 7: names of codings know no case."),
    same("chunks in HTTP/1.0", b"POST /a HTTP/1.0\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"),
    other("an expectation", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc", "+ Expect: 100-continue", "RFC 9110 10.1.1: it is forwarded, and the application decides."),
    other("another expectation", b"POST /a HTTP/1.1\r\nHost: app\r\nContent-Length: 3\r\nExpect: wonders\r\n\r\nabc", "+ Expect: wonders", "RFC 9110 10.1.1: it is the application that knows whether it meets it."),
    other("an upgrade to HTTP/2", b"GET /a HTTP/1.1\r\nHost: app\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", "- HTTP2-Settings: AAMAAABkAAQAAP__", "RFC 9110 7.6.1: what Connection names MUST be removed; RFC 9113 3.1: that upgrade is no longer made."),
    same("two requests at once", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: 1\r\n\r\nGET /b HTTP/1.1\r\nhost: app\r\nx-B: 2\r\n\r\n"),
    same("empty lines before a request", b"\r\n\r\nGET /a HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("bare line feeds", b"GET /a HTTP/1.1\nHost: app\nX-A: 1\n\n"),
    same("a folded header", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: 1\r\n 2\r\n\r\n"),
    same("a space before the colon", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A : 1\r\n\r\n"),
    same("a space in the target", b"GET /a b HTTP/1.1\r\nHost: app\r\n\r\n"),
    same("a NUL in a value", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: 1\x002\r\n\r\n"),
    same("a bare carriage return in a value", b"GET /a HTTP/1.1\r\nHost: app\r\nX-A: 1\r2\r\n\r\n"),
    other("a header without a colon", b"GET /a HTTP/1.1\r\nHost: app\r\nnothing\r\n\r\n", "- GET /a HTTP/1.1\n- host app\n- no body\n- nothing: \n+ refused 400", "RFC 9112 5: it is no header, and RFC 9112 2.2: such a message is answered with 400."),
];

const fn same(name: &'static str, bytes: &'static [u8]) -> Odd {
    Odd { name, bytes, differs: None }
}

const fn other(name: &'static str, bytes: &'static [u8], difference: &'static str, why: &'static str) -> Odd {
    Odd { name, bytes, differs: Some((difference, why)) }
}

//! What the head of an answer may be.
//!
//! The codec of HTTP/1 reads 100 headers into a place of its own, and asks for memory with each answer where it is to read
//! more: it is told to where the limit of requests is raised, which is how an operator says that heads are large here. It is told
//! when a connection is opened, so connections that were opened under other limits carry no further request.
//!
//! That of HTTP/2 has no word of its own for a head that is too large, so it reads twice what may pass. Each answer is then held to
//! the limit of that moment, and refused in our words. Where the limit is raised, connections that read less carry no further request.

use http::HeaderMap;

use crate::dataplane::http::normalize::list_bytes;
use crate::dataplane::http::server::READ_BUFFER;
use crate::policy::limits::Limits;

/// The limits on the heads of answers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct AnswerLimits {
    pub(super) bytes: usize,
    /// None: as many as the codec reads without being told.
    pub(super) count: Option<usize>,
}

impl AnswerLimits {
    /// Those that go with the limits of requests.
    pub(crate) fn of(requests: &Limits) -> Self {
        let size = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
        let raised = requests.header_count > Limits::default().header_count;
        Self { bytes: READ_BUFFER.max(size(requests.header_bytes)), count: raised.then(|| size(requests.header_count)) }
    }

    /// What an answer in HTTP/2 may have, in its way of counting (RFC 9113 10.5.1), which adds to each header: more than in
    /// HTTP/1, so that what an application may answer crosses a link.
    fn list_bytes(self) -> usize {
        self.bytes.saturating_mul(2)
    }

    /// What the codec of HTTP/2 reads.
    pub(super) fn list_bytes_read(self) -> u32 {
        u32::try_from(self.list_bytes().saturating_mul(2)).unwrap_or(u32::MAX)
    }
}

impl Default for AnswerLimits {
    fn default() -> Self {
        Self::of(&Limits::default())
    }
}

/// The head of an answer is over a limit.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum HeadTooLarge {
    /// The codec of HTTP/1 has one word for all of it.
    #[error(
        "the answer says that it is longer than any body, or its head has more than {} headers (headerCount) \
         or is larger than {} bytes (headerBytes)",
        .0.count.unwrap_or(COUNT_USUAL),
        .0.bytes
    )]
    Http1(AnswerLimits),
    #[error(
        "the head of the answer is larger than {} bytes, each header counted with 32 bytes beside its text (headerBytes)",
        .0.list_bytes()
    )]
    Http2(AnswerLimits),
}

/// Holds the head of an answer in HTTP/2 to the limits of this moment.
///
/// # Errors
/// It is over them.
pub(super) fn within(limits: impl FnOnce() -> AnswerLimits, headers: &HeaderMap) -> Result<(), HeadTooLarge> {
    let bytes = list_bytes(headers);
    // No limit is lower than this, so those of most answers need not be known.
    if bytes <= LIST_BYTES_LEAST {
        return Ok(());
    }
    let limits = limits();
    if bytes > limits.list_bytes() { Err(HeadTooLarge::Http2(limits)) } else { Ok(()) }
}

/// What the codec of HTTP/1 reads.
const COUNT_USUAL: usize = 100;
const LIST_BYTES_LEAST: usize = 2 * READ_BUFFER;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::limits::HEADER_BYTES_MAX;

    #[test]
    fn larger_heads_of_requests_mean_larger_heads_of_answers() {
        let of = |header_bytes, header_count| {
            let limits = AnswerLimits::of(&Limits { header_bytes, header_count, ..Limits::default() });
            (limits.bytes, limits.count, limits.list_bytes())
        };
        assert_eq!(of(8 << 10, 32), (72 << 10, None, LIST_BYTES_LEAST));
        assert_eq!(of(64 << 10, 256), (72 << 10, None, LIST_BYTES_LEAST));
        assert_eq!(of(HEADER_BYTES_MAX, 257), (1 << 20, Some(257), 2 << 20));
    }

    #[test]
    fn an_answer_in_http_2_is_held_to_the_limit_of_its_moment() {
        let of = |header_bytes| AnswerLimits::of(&Limits { header_bytes, ..Limits::default() });
        let headers = |bytes: usize| -> HeaderMap {
            [(http::header::ETAG, http::HeaderValue::try_from("a".repeat(bytes - 36)).unwrap())].into_iter().collect()
        };
        let small = of(64 << 10);
        assert_eq!(within(|| panic!("it need not be known"), &headers(LIST_BYTES_LEAST)), Ok(()));
        assert_eq!(within(|| small, &headers(LIST_BYTES_LEAST + 1)), Err(HeadTooLarge::Http2(small)));
        assert_eq!(within(|| of(80 << 10), &headers(160 << 10)), Ok(()));
        assert!(within(|| of(80 << 10), &headers((160 << 10) + 1)).is_err());
    }
}

//! What the head of an answer may be.
//!
//! The codec of HTTP/1 reads 100 headers into a place of its own, and asks for memory with each answer where it is to read
//! more: it is told to where the limit of requests is raised, which is how an operator says that heads are large here.

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
    pub(super) fn list_bytes(self) -> u32 {
        u32::try_from(self.bytes.saturating_mul(2)).unwrap_or(u32::MAX)
    }

    /// What an answer is that the codec of HTTP/1 finds too large. It has one word for all of it.
    pub(crate) fn text(self) -> String {
        let Self { bytes, count } = self;
        let count = count.unwrap_or(COUNT_USUAL);
        format!(
            "the answer says that it is longer than any body, or its head has more than {count} headers or is larger than {bytes} bytes"
        )
    }
}

/// What the codec reads.
const COUNT_USUAL: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_heads_of_requests_mean_larger_heads_of_answers() {
        let of = |header_bytes, header_count| {
            let limits = AnswerLimits::of(&Limits { header_bytes, header_count, ..Limits::default() });
            (limits.bytes, limits.count, limits.list_bytes())
        };
        assert_eq!(of(8 << 10, 32), (72 << 10, None, 144 << 10));
        assert_eq!(of(64 << 10, 256), (72 << 10, None, 144 << 10));
        assert_eq!(of(1 << 20, 257), (1 << 20, Some(257), 2 << 20));
    }
}

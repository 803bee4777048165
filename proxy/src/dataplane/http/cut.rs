//! Cuts one direction of a connection of HTTP/2 into its frames, while the bytes pass.
//!
//! Sources: RFC 9113 3.4 (the preface), 4.1 (the nine bytes before each frame), 6.4 and 6.9 (the four behind
//! those of RST_STREAM and WINDOW_UPDATE).
//! Invariant: nothing is kept but what stands before a payload.

/// Where one direction stands.
#[derive(Debug)]
pub(super) struct Cutter {
    /// Bytes of the preface or of a payload that are passed over.
    skip: usize,
    head: [u8; HEAD_AND_WORD],
    have: usize,
}

/// What is met on the way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    Frame(Frame),
    /// The end of a payload that was not empty, or of the preface.
    End,
}

/// What stands before a payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) length: usize,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
    /// Of RST_STREAM: why; of WINDOW_UPDATE: how much.
    pub(super) word: u32,
}

impl Cutter {
    /// Of a direction that begins with so many bytes that are no frame.
    pub(super) fn new(preface: usize) -> Self {
        Self { skip: preface, head: [0; HEAD_AND_WORD], have: 0 }
    }

    /// The next thing that is met in these bytes, which are shortened by it; none when they are used up.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Option<Cut> {
        if self.skip > 0 {
            let part = self.skip.min(bytes.len());
            self.skip -= part;
            *bytes = bytes.get(part..).unwrap_or_default();
            return (part > 0 && self.skip == 0).then_some(Cut::End);
        }
        if self.have < HEAD {
            self.gather(bytes, HEAD);
        }
        if self.have < HEAD {
            return None;
        }
        let [high, middle, low, kind, flags, a, b, c, d, ..] = self.head;
        let length = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        let mut word = 0;
        if matches!(kind, RST_STREAM | WINDOW_UPDATE) && length == HEAD_AND_WORD - HEAD {
            self.gather(bytes, HEAD_AND_WORD);
            if self.have < HEAD_AND_WORD {
                return None;
            }
            let [.., e, f, g, h] = self.head;
            word = u32::from_be_bytes([e, f, g, h]);
        } else {
            self.skip = length;
        }
        self.have = 0;
        Some(Cut::Frame(Frame { length, kind, flags, stream: u32::from_be_bytes([a & 0x7f, b, c, d]), word }))
    }

    fn gather(&mut self, bytes: &mut &[u8], until: usize) {
        let part = until.saturating_sub(self.have).min(bytes.len());
        if let (Some(place), Some(taken)) = (self.head.get_mut(self.have..self.have + part), bytes.get(..part)) {
            place.copy_from_slice(taken);
        }
        self.have += part;
        *bytes = bytes.get(part..).unwrap_or_default();
    }
}

const HEAD: usize = 9;
const HEAD_AND_WORD: usize = 13;
pub(super) const PREFACE_BYTES: usize = 24;
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
pub(super) const PADDED: u8 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(preface: usize, bytes: &[u8], step: usize) -> Vec<String> {
        let mut cutter = Cutter::new(preface);
        let mut met = Vec::new();
        for mut part in bytes.chunks(step) {
            while let Some(cut) = cutter.next(&mut part) {
                met.push(match cut {
                    Cut::Frame(Frame { length, kind, flags, stream, word }) => {
                        format!("{length} {kind} {flags} {stream} {word}")
                    }
                    Cut::End => "end".to_owned(),
                });
            }
        }
        met
    }

    #[test]
    fn frames_are_the_same_however_their_bytes_come() {
        let bytes =
            b"abc\0\0\x02\x01\x05\x80\0\0\x03xy\0\0\0\x04\0\0\0\0\0\0\0\x04\x03\0\0\0\x01\x01\0\0\0\x07\0\0\x01\0\x01\0\0\0\x03z";
        for step in 1..=bytes.len() {
            assert_eq!(
                cut(3, bytes, step),
                ["end", "2 1 5 3 0", "end", "0 4 0 0 0", "4 3 0 257 7", "1 0 1 3 0", "end"],
                "{step}"
            );
        }
    }
}

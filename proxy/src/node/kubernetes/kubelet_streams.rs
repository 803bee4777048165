//! The kubelet's connections to a plugin's socket, as an HTTP/2 server can read them.
//!
//! Sources: RFC 9113 section 6.2 (HEADERS), RFC 7541 sections 5.2 and 6 (strings and fields of HPACK). The kubelet dials a
//! plugin's socket by its path, and its gRPC library sends that path as `:authority`, percent-encoded
//! (`%2Fvar%2Flib%2F…`), which is no authority by RFC 3986: servers that read it as one refuse the whole connection. Nobody
//! needs the value here, so its letters are overwritten before the server sees them. The length stays, and with it every
//! other byte of the stream; later requests name the overwritten value by its index.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, warn};

/// Hands on what connects to `socket` until nobody takes it any more.
pub(super) async fn accept(socket: UnixListener, readable: mpsc::Sender<io::Result<DuplexStream>>) {
    let mut connections = JoinSet::new();
    loop {
        // Cancel-safe: `accept` and `join_next` lose nothing when the other one is first.
        tokio::select! {
            accepted = socket.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _unnamed)) => {
                    let (ours, theirs) = tokio::io::duplex(BUFFER_BYTES);
                    connections.spawn(async move {
                        if let Err(error) = pass(stream, ours).await {
                            debug!(%error, "a connection of the kubelet failed");
                        }
                    });
                    if readable.send(Ok(theirs)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    // Out of descriptors: without a pause this would spin.
                    warn!(%error, "cannot accept on a socket of the kubelet's");
                    tokio::time::sleep(super::ACCEPT_PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

/// Passes one connection on until either side ends. A connection waits for its next call without a deadline: the kubelet keeps
/// it for as long as it likes.
async fn pass(stream: UnixStream, server: DuplexStream) -> io::Result<()> {
    let (mut from_kubelet, mut to_kubelet) = stream.into_split();
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let questions = async {
        let mut preface = [0; PREFACE_BYTES];
        from_kubelet.read_exact(&mut preface).await?;
        to_server.write_all(&preface).await?;
        loop {
            let mut head = [0; FRAME_HEAD_BYTES];
            from_kubelet.read_exact(&mut head).await?;
            let [a, b, c, kind, flags, ..] = head;
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            if length > FRAME_BYTES_MAX {
                return Err(io::Error::other("a frame is longer than the server allows"));
            }
            let mut payload = vec![0; length];
            from_kubelet.read_exact(&mut payload).await?;
            if kind == HEADERS {
                overwrite_authority(&mut payload, flags);
            }
            to_server.write_all(&head).await?;
            to_server.write_all(&payload).await?;
        }
    };
    // Cancel-safe: when one direction has ended the connection has.
    tokio::select! {
        ended = questions => ended,
        ended = tokio::io::copy(&mut from_server, &mut to_kubelet) => ended.map(drop),
    }
}

/// Overwrites the value of `:authority` in the payload of a HEADERS frame. What cannot be read is left as it is.
fn overwrite_authority(payload: &mut [u8], flags: u8) {
    let padded = usize::from(flags & PADDED != 0);
    let at = padded + if flags & PRIORITY != 0 { 5 } else { 0 };
    let Some(mut fields) = payload.get_mut(at..) else { return };
    while let Some(rest) = skip_field(fields) {
        fields = rest;
    }
}

/// Steps over one field of HPACK, and overwrites it if it is a new `:authority`.
fn skip_field(fields: &mut [u8]) -> Option<&mut [u8]> {
    let first = *fields.first()?;
    let index_bits = match first {
        // An indexed field: name and value stand in a table.
        0x80.. => return integer(fields, 7).map(|(_index, rest)| rest),
        // A new size of the table.
        0x20..0x40 => return integer(fields, 5).map(|(_size, rest)| rest),
        0x40..0x80 => 6,
        _not_indexed => 4,
    };
    let (name, rest) = integer(fields, index_bits)?;
    let rest = if name == 0 { string(rest, |_name| {})? } else { rest };
    string(rest, |value| {
        if name == AUTHORITY {
            value.fill(b'k');
        }
    })
}

/// An integer whose first byte has `bits` for it.
fn integer(bytes: &mut [u8], bits: u32) -> Option<(usize, &mut [u8])> {
    let mask = (1_u8 << bits) - 1;
    let (first, mut rest) = bytes.split_first_mut()?;
    let mut value = usize::from(*first & mask);
    if value < usize::from(mask) {
        return Some((value, rest));
    }
    for shift in [0, 7, 14] {
        let (byte, more) = rest.split_first_mut()?;
        rest = more;
        value += usize::from(*byte & 0x7f) << shift;
        if *byte & 0x80 == 0 {
            return Some((value, rest));
        }
    }
    None
}

/// A string; `look` sees its letters as they stand, and what it writes there is no Huffman code.
fn string(bytes: &mut [u8], look: impl FnOnce(&mut [u8])) -> Option<&mut [u8]> {
    // A short length, which fits into the first byte, is all that an authority's may be to be overwritten in place.
    let (length, prefix) = {
        let whole = bytes.len();
        let (length, rest) = integer(bytes, 7)?;
        (length, whole - rest.len())
    };
    let before = bytes.get(prefix..prefix + length)?.to_vec();
    let (head, rest) = bytes.split_at_mut_checked(prefix + length)?;
    let (prefix, letters) = head.split_at_mut_checked(prefix)?;
    look(letters);
    if *letters != *before {
        let first = prefix.first_mut()?;
        *first &= 0x7f;
    }
    Some(rest)
}

const PREFACE_BYTES: usize = 24;
const FRAME_HEAD_BYTES: usize = 9;
/// What a server allows that says nothing of it.
const FRAME_BYTES_MAX: usize = 16_384;
const HEADERS: u8 = 1;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;
/// Of `:authority` in the static table.
const AUTHORITY: usize = 1;
const BUFFER_BYTES: usize = 64 * 1024;
const CONNECTIONS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// `:method: POST`, `:path: /a` as a new field, `:authority` with that value, and a field with a name of its own.
    fn block(authority: &[u8], huffman: bool) -> Vec<u8> {
        let length = u8::try_from(authority.len()).unwrap() | if huffman { 0x80 } else { 0 };
        let mut block = vec![0x83, 0x44, 2, b'/', b'a', 0x41, length];
        block.extend_from_slice(authority);
        block.extend_from_slice(&[0x40, 2, b't', b'e', 1, b'x', 0x86]);
        block
    }

    #[test]
    fn only_the_letters_of_the_authority_change() {
        let mut plain = block(b"%2Frun%2Fa", false);
        overwrite_authority(&mut plain, 4);
        assert_eq!(plain, block(b"kkkkkkkkkk", false));
        let mut coded = block(&[0xff, 0x12, 0x34], true);
        overwrite_authority(&mut coded, 4);
        assert_eq!(coded, block(b"kkk", false), "it is no Huffman code any more");
    }

    #[test]
    fn padding_and_priority_are_stepped_over() {
        let mut payload = [&[3, 0, 0, 0, 0, 16][..], &block(b"%2F", false), &[0; 3]].concat();
        overwrite_authority(&mut payload, 4 | PADDED | PRIORITY);
        assert_eq!(payload, [&[3, 0, 0, 0, 0, 16][..], &block(b"kkk", false), &[0; 3]].concat());
    }

    #[test]
    fn what_is_cut_short_or_no_block_is_left_alone_and_ends() {
        let whole = block(b"%2F", false);
        for length in 0..whole.len() {
            let mut cut = whole[..length].to_vec();
            overwrite_authority(&mut cut, 4);
        }
        let mut strange = vec![0xff; 64];
        overwrite_authority(&mut strange, 0xff);
        let mut names = vec![0x82, 0x86];
        overwrite_authority(&mut names, 4);
        assert_eq!(names, [0x82, 0x86]);
    }
}

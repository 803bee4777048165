//! Secrets that prove a caller: the join token of new node agents, and the API's token of people and their tools.
//!
//! Each lies in a file of the state folder that its owner alone may read, so that holding it shows what the kernel would
//! say about the caller: that it may read that file. Only a fingerprint is kept in memory. Invariant: a guess is compared
//! without telling by its time how much of it was right, and no token is ever logged.

use std::io;
use std::path::Path;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};

use crate::base::state::write_atomic;

/// One secret, as it is checked.
pub(crate) struct Token([u8; 32]);

impl Token {
    /// Takes the token of `path`, or writes a new one there.
    ///
    /// # Errors
    /// The file cannot be read or written, or holds a token too short to be one.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::issue(path),
            read => read?,
        };
        let text = text.trim();
        if text.len() < TOKEN_BYTES_MIN {
            return Err(io::Error::other(format!("the token has fewer than {TOKEN_BYTES_MIN} characters")));
        }
        Ok(Self(fingerprint(text)))
    }

    /// Writes a new token to `path`; the one that was there is worth nothing from now on.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn issue(path: &Path) -> io::Result<Self> {
        let mut random = [0_u8; 32];
        SystemRandom::new().fill(&mut random).map_err(|_unspecified| io::Error::other("no random numbers"))?;
        let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        write_atomic(path, format!("{text}\n").as_bytes(), 0o600)?;
        Ok(Self(fingerprint(&text)))
    }

    /// Is it this one?
    pub(crate) fn fits(&self, guess: &str) -> bool {
        verify_slices_are_equal(&self.0, &fingerprint(guess.trim())).is_ok()
    }
}

fn fingerprint(text: &str) -> [u8; 32] {
    let mut fixed = [0; 32];
    for (to, from) in fixed.iter_mut().zip(digest(&SHA256, text.as_bytes()).as_ref()) {
        *to = *from;
    }
    fixed
}

/// A token of the operator's own making must not be guessed either.
const TOKEN_BYTES_MIN: usize = 16;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_token_is_kept_and_only_its_owner_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("join-token");
        let made = Token::open(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!((text.trim().len(), path.metadata().unwrap().permissions().mode() & 0o777), (64, 0o600));
        assert!(made.fits(&text) && Token::open(&path).unwrap().fits(&text));
        for guess in ["", "0", &text[1..], &text.to_uppercase()] {
            assert!(!made.fits(guess), "{guess:?}");
        }
        std::fs::write(&path, "short").unwrap();
        assert!(Token::open(&path).is_err());
    }

    #[test]
    fn an_issued_token_ends_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api-token");
        Token::issue(&path).unwrap();
        let old = std::fs::read_to_string(&path).unwrap();
        let new = Token::issue(&path).unwrap();
        assert!(!new.fits(&old) && new.fits(&std::fs::read_to_string(&path).unwrap()));
    }
}

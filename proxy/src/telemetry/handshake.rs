//! Why a peer's handshake failed: the `detail` of `handshake_failed` in the access log. A word here is a promise as those of
//! [`super::reason`] are: words are added, never renamed.

macro_rules! faults {
    ($($(#[doc = $text:literal])+ $variant:ident = $word:literal, $remedy:literal;)+) => {
        /// Why a peer's handshake failed.
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub(crate) enum HandshakeFault {
            $($(#[doc = $text])+ $variant,)+
        }

        impl HandshakeFault {
            /// All of them, in the order of the documentation.
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),+];

            /// The stable word.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// What to do about it.
            pub(crate) const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy,)+ }
            }

            /// One sentence for people.
            #[cfg(test)]
            pub(crate) const fn text(self) -> &'static str {
                match self { $(Self::$variant => concat!($($text),+).trim_ascii(),)+ }
            }
        }
    };
}

faults! {
    /// The peer showed no certificate.
    NoCertificate = "no_certificate", "have a sidecar speak for the peer, or find out who it is";
    /// The peer's certificate is not good any more.
    CertificateExpired = "certificate_expired", "see why the peer's sidecar gets no new one: `outrigger status`; compare the clocks of both machines";
    /// The peer's certificate is not good yet.
    CertificateNotYetValid = "certificate_not_yet_valid", "compare the clocks of both machines";
    /// No authority that is trusted here signed the peer's certificate.
    UnknownAuthority = "unknown_authority", "see which mesh the peer is of; where the authority was replaced, start its sidecar again";
    /// The peer is of another trust domain.
    TrustDomain = "trust_domain", "see which mesh the peer is of; only peers of the own trust domain are let in";
    /// The peer's certificate carries no SPIFFE ID, or several names.
    NoSpiffeId = "no_spiffe_id", "have the peer show the certificate that the mesh gave it";
    /// The peer's certificate cannot be read.
    CertificateUnreadable = "certificate_unreadable", "have the peer show the certificate that the mesh gave it";
    /// The peer's certificate is not for this use (an authority's, or not for clients), or the peer does not hold its key.
    CertificateInvalid = "certificate_invalid", "have the peer show the certificate that the mesh gave it";
    /// The peer speaks no TLS 1.3.
    ProtocolVersion = "protocol_version", "sidecars speak TLS 1.3: find out who the peer is";
    /// The peer offers no algorithm that is spoken here.
    NoCommonAlgorithm = "no_common_algorithm", "run one version of Outrigger on both sides";
    /// The peer chose none of the sidecars' protocols (ALPN).
    NoCommonProtocol = "no_common_protocol", "run one version of Outrigger on both sides";
    /// The peer itself refused: this sidecar's certificate is not what it expects.
    RefusedByPeer = "refused_by_peer", "see the log of the peer's sidecar";
    /// What the peer sent is no handshake of TLS.
    Malformed = "malformed", "find out who the peer is";
    /// The handshake took longer than the limit (`handshakeTimeout`).
    Timeout = "timeout", "see whether the peer's machine, or this one, has too little CPU";
    /// The peer left in the middle of the handshake.
    PeerLeft = "peer_left", "see the log of the peer's sidecar";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_fault_has_a_word_of_its_own_a_sentence_and_a_remedy() {
        let words: BTreeSet<_> = HandshakeFault::ALL.iter().map(|fault| fault.as_str()).collect();
        assert_eq!(words.len(), HandshakeFault::ALL.len());
        for fault in HandshakeFault::ALL {
            assert!(fault.as_str().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{fault:?}");
            assert!(fault.text().ends_with('.') && !fault.remedy().is_empty(), "{fault:?}");
        }
    }
}

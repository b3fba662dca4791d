use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;

use super::Digest;
use crate::model::Identity;

/// Why a certificate gives no identity. Reads well after its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// It can't be parsed.
    #[error("can't be parsed: {0}")]
    Unreadable(String),
    /// It has no name that identifies its owner.
    #[error(
        "has {uris} URI names and {dns} DNS names as alternative names; it needs exactly one URI name, or none and \
         exactly one DNS name"
    )]
    Names {
        /// Number of URI names.
        uris: usize,
        /// Number of DNS names.
        dns: usize,
    },
    /// The name is too long, or has other characters.
    #[error("has a name that is not 1 to {max} printable ASCII characters", max = Identity::MAX_LEN)]
    Unprintable,
}

/// The owner of a certificate whose chain is verified: its only URI name, or its only DNS name if it has no URI name.
/// Its common name does not count (RFC 9525, section 2).
///
/// # Errors
/// The certificate can't be parsed, or has no such name.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, NoIdentity> {
    let parsed = EndEntityCert::try_from(certificate).map_err(|error| NoIdentity::Unreadable(error.to_string()))?;
    let (uris, dns): (Vec<_>, Vec<_>) = (parsed.valid_uri_names().collect(), parsed.valid_dns_names().collect());
    of_names(&uris, &dns)
}

fn of_names(uris: &[&str], dns: &[&str]) -> Result<Identity, NoIdentity> {
    let name = match (uris, dns) {
        ([name], _) | ([], [name]) => *name,
        _ => return Err(NoIdentity::Names { uris: uris.len(), dns: dns.len() }),
    };
    Identity::of_certificate(name).ok_or(NoIdentity::Unprintable)
}

/// The SHA-256 of the public key in a certificate (its SubjectPublicKeyInfo, RFC 5280, 4.1.2.7). Not of the whole
/// certificate: anybody can change its signature, if that is one of ECDSA, so that it stays valid and has other bytes.
#[must_use]
pub fn key_of(certificate: &[u8]) -> Option<Digest> {
    let certificate = CertificateDer::from(certificate);
    let parsed = EndEntityCert::try_from(&certificate).ok()?;
    Some(Digest::of(&parsed.subject_public_key_info()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_known_by_its_only_uri_or_else_by_its_only_dns_name() {
        let of = |uris: &[&str], dns: &[&str]| of_names(uris, dns).map(|it| it.to_string());
        assert_eq!(of(&["spiffe://a/b"], &["x", "y"]).unwrap(), "cert:spiffe://a/b");
        assert_eq!(of(&[], &["core.dreamnet"]).unwrap(), "cert:core.dreamnet");
        for (uris, dns) in [(&["a:1", "a:2"][..], &["x"][..]), (&[], &["x", "y"]), (&[], &[])] {
            assert_eq!(of(uris, dns), Err(NoIdentity::Names { uris: uris.len(), dns: dns.len() }));
        }
        for name in ["spiffe://a b", "spiffe://ä", &"a".repeat(257), ""] {
            assert_eq!(of(&[name], &[]), Err(NoIdentity::Unprintable), "{name}");
        }
    }

    #[test]
    fn the_common_name_of_a_certificate_does_not_count() {
        let of = |names: &[&str]| {
            let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
            parameters.distinguished_name.push(rcgen::DnType::CommonName, "admin");
            let uri = |name: &&str| rcgen::SanType::URI((*name).try_into().unwrap());
            parameters.subject_alt_names = names.iter().map(uri).collect();
            let key = rcgen::KeyPair::generate().unwrap();
            identity_of(parameters.self_signed(&key).unwrap().der())
        };
        assert_eq!(of(&["spiffe://a/b"]).unwrap().to_string(), "cert:spiffe://a/b");
        assert_eq!(of(&[]), Err(NoIdentity::Names { uris: 0, dns: 0 }));
        let nonsense = CertificateDer::from(&b"nonsense"[..]);
        assert!(matches!(identity_of(&nonsense), Err(NoIdentity::Unreadable(_))));
    }
}

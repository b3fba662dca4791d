//! Certificates and private keys in PEM. The files are read elsewhere.

#![cfg(feature = "tls")]

use std::{error::Error, fmt::Display, path::PathBuf, time::Duration};

use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage};

/// A file and its contents.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Pem {
    /// As messages name it: the setting and the path.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
}

impl Pem {
    /// The message for a file with this problem, which reads well behind its name.
    pub(crate) fn unusable(&self, problem: impl Display) -> String {
        format!("{} {problem}", self.name)
    }

    /// The message for a file that a library has refused.
    pub(crate) fn refused(&self, error: &dyn Error) -> String {
        self.unusable(format!("can't be used: {error}"))
    }

    /// The message for a private key that is not that of a certificate.
    pub(crate) fn belongs_elsewhere(&self, certificate: &Self) -> String {
        self.unusable(format!("is not the key of the certificate in {}", certificate.name))
    }

    /// Its certificates; at least one.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let read = CertificateDer::pem_slice_iter(&self.bytes).collect::<Result<Vec<_>, _>>();
        let certificates = read.map_err(|error| self.unusable(format!("is not PEM: {error}")))?;
        if certificates.is_empty() {
            let problem = "contains no certificate; give PEM, which begins with -----BEGIN CERTIFICATE-----";
            return Err(self.unusable(problem));
        }
        Ok(certificates)
    }

    /// Its private key: PKCS #8, PKCS #1 or SEC 1, not encrypted.
    pub(crate) fn private_key(&self) -> Result<PrivateKeyDer<'static>, String> {
        PrivateKeyDer::from_pem_slice(&self.bytes).map_err(|error| {
            let is_encrypted = self.bytes.windows(9).any(|it| it == b"ENCRYPTED");
            let problem = match error {
                _ if is_encrypted => "is encrypted; give a key without a passphrase".to_owned(),
                pem::Error::NoItemsFound => {
                    "contains no private key; give PEM, which begins with -----BEGIN PRIVATE KEY-----".to_owned()
                }
                error => format!("is not PEM: {error}"),
            };
            self.unusable(problem)
        })
    }
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Validity {
    from: Timestamp,
    until: Timestamp,
}

impl Validity {
    /// That of this certificate. The library tells it only as the reason why a certificate is not valid at another
    /// time, which it checks before anything else.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Result<Self, webpki::Error> {
        let parsed = EndEntityCert::try_from(certificate)?;
        let why_not_at = |seconds| {
            let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            parsed.verify_for_usage(&[], &[], &[], time, KeyUsage::server_auth(), None, None).err()
        };
        let timestamp = |time: UnixTime| {
            let seconds = time.as_secs().try_into().ok();
            seconds.and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or(Timestamp::MAX)
        };
        let from = match why_not_at(0) {
            Some(webpki::Error::CertNotValidYet { not_before, .. }) => timestamp(not_before),
            Some(error @ (webpki::Error::BadDer | webpki::Error::InvalidCertValidity)) => return Err(error),
            _ => Timestamp::UNIX_EPOCH,
        };
        let until = match why_not_at(u64::MAX) {
            Some(webpki::Error::CertExpired { not_after, .. }) => timestamp(not_after),
            _ => Timestamp::MAX,
        };
        Ok(Self { from, until })
    }

    /// The problem of the certificate at this time: it is not valid yet, or no longer.
    pub(crate) fn problem(&self, now: Timestamp) -> Option<String> {
        let Self { from, until } = self;
        match now {
            now if now < *from => Some(format!("is not valid before {from}")),
            now if now > *until => Some(format!("has expired at {until}")),
            _ => None,
        }
    }
}

/// When the first of these expires. One whose end can't be read, such as an authority of version 1, is left out.
pub(crate) fn first_expiry(certificates: &[CertificateDer<'_>]) -> Option<Timestamp> {
    expiries(certificates).min()
}

/// When the first of those expires that have not expired at this time.
pub(crate) fn next_expiry(certificates: &[CertificateDer<'_>], now: Timestamp) -> Option<Timestamp> {
    expiries(certificates).filter(|expiry| *expiry >= now).min()
}

fn expiries(certificates: &[CertificateDer<'_>]) -> impl Iterator<Item = Timestamp> {
    certificates.iter().filter_map(|it| Validity::of(it).ok()).map(|it| it.until)
}

/// A time in the form of the libraries. Times before 1970 are 1970: no certificate is valid then.
pub(crate) fn unix_time(at: Timestamp) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(at.as_second().try_into().unwrap_or(0)))
}

//! TLS for `https` endpoints: one configuration for all of them, because reading the system's certificates is slow. The
//! files are read elsewhere; here their contents become one complete configuration, which replaces the earlier one as a
//! whole.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};
use tokio::sync::OnceCell;
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{CryptoProvider, aws_lc_rs},
    server::ParsedCertificate,
    sign::{CertifiedKey, SingleCertAndKey},
    time_provider::TimeProvider,
};

use crate::{
    clock::Clock,
    pem::{Pem, Validity, first_expiry, unix_time},
};

/// The file contains no certificate.
#[derive(Debug, thiserror::Error)]
#[error("contains no certificate; give PEM, which begins with -----BEGIN CERTIFICATE-----")]
pub struct NoCertificate;

/// Everything that makes the TLS of all endpoints.
#[derive(Default, PartialEq, Eq)]
pub(crate) struct Material {
    /// The certificates of authorities that are trusted in addition to those of the system.
    pub(crate) authorities: Option<Pem>,
    /// True if those of the system are not trusted.
    pub(crate) without_system: bool,
    /// The certificate of the service with the intermediate ones, and its private key, for subsystems that ask for it.
    pub(crate) own: Option<(Pem, Pem)>,
}

/// A complete configuration.
pub(crate) struct Loaded {
    clock: Clock,
    material: Material,
    authorities: Vec<CertificateDer<'static>>,
    own: Option<(Arc<CertifiedKey>, Validity)>,
    /// When the first certificate of each file expires.
    expiries: Vec<(PathBuf, Timestamp)>,
    config: OnceCell<Arc<ClientConfig>>,
}

impl Loaded {
    /// Trusts the authorities of the system, and shows no certificate.
    fn of_system(clock: Clock) -> Self {
        let material = Material::default();
        Self { clock, material, authorities: Vec::new(), own: None, expiries: Vec::new(), config: OnceCell::new() }
    }

    /// Makes it from these contents. Certificates may have expired. Those of servers must be valid by this clock.
    ///
    /// # Errors
    /// A file has other contents than expected, or the key belongs to another certificate.
    pub(crate) fn of(material: Material, clock: Clock) -> Result<Self, String> {
        let mut expiries = Vec::new();
        let mut note = |file: &Pem, certificates: &[_]| {
            expiries.extend(first_expiry(certificates).map(|expiry| (file.path.clone(), expiry)));
        };
        let authorities = match &material.authorities {
            Some(file) => {
                let authorities = authorities(&file.bytes).map_err(|error| file.unusable(error))?;
                note(file, &authorities);
                authorities
            }
            None => Vec::new(),
        };
        let own = match &material.own {
            Some((certificate, key)) => {
                let chain = certificate.certificates()?;
                note(certificate, &chain);
                let validity = Validity::of(&chain[0]).map_err(|error| certificate.refused(&error))?;
                let pair = CertifiedKey::from_der(chain, key.private_key()?, &provider());
                let pair = pair.map_err(|error| match error {
                    rustls::Error::InconsistentKeys(_) => key.belongs_elsewhere(certificate),
                    rustls::Error::InvalidCertificate(_) => certificate.refused(&error),
                    error => key.refused(&error),
                })?;
                Some((Arc::new(pair), validity))
            }
            None => None,
        };
        Ok(Self { clock, material, authorities, own, expiries, config: OnceCell::new() })
    }

    /// The problem of the service's own certificate at this time: it is not valid yet, or no longer.
    pub(crate) fn invalid(&self, now: Timestamp) -> Option<String> {
        self.own.as_ref().and_then(|(_, validity)| validity.problem(now))
    }

    /// When the first certificate of each file expires.
    pub(crate) fn expiries(&self) -> &[(PathBuf, Timestamp)] {
        &self.expiries
    }

    /// The time by which certificates of servers are valid.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// The configuration of connections. The first call waits until the system's certificates are read on a blocking
    /// thread.
    ///
    /// # Errors
    /// There are no trusted certificates; the message is for people.
    pub(super) async fn config(&self) -> Result<Arc<ClientConfig>, String> {
        let read = async {
            let (authorities, own) = (self.authorities.clone(), self.own.as_ref().map(|(own, _)| own.clone()));
            let (trusts_system, clock) = (!self.material.without_system, self.clock);
            let read = tokio::task::spawn_blocking(move || config(authorities, trusts_system, own, clock)).await;
            read.map_err(|error| error.to_string())?
        };
        self.config.get_or_try_init(|| read).await.cloned()
    }
}

/// The TLS of all endpoints.
pub struct Tls(Mutex<Arc<Loaded>>);

impl Tls {
    /// Trusts the authorities of the system, and shows no certificate.
    pub(super) fn of_system(clock: Clock) -> Self {
        Self::new(Loaded::of_system(clock))
    }

    /// TLS with this configuration.
    pub(crate) fn new(loaded: Loaded) -> Self {
        Self(Mutex::new(Arc::new(loaded)))
    }

    /// The configuration of new connections.
    pub(crate) fn current(&self) -> Arc<Loaded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses this configuration for new connections. Calls that begin from now on use such ones; others keep theirs.
    /// Returns false if it is the earlier configuration, which then stays.
    pub(crate) fn replace(&self, loaded: Loaded) -> bool {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let differs = current.material != loaded.material;
        if differs {
            *current = Arc::new(loaded);
        }
        differs
    }
}

/// The certificates in `ca`, in PEM, that can be trusted. Other contents are ignored.
///
/// # Errors
/// `ca` contains no certificate.
pub fn authorities(ca: &[u8]) -> Result<Vec<CertificateDer<'static>>, NoCertificate> {
    let readable = CertificateDer::pem_slice_iter(ca).flatten();
    let usable = readable.filter(|it| webpki::anchor_from_trusted_cert(it).is_ok()).collect::<Vec<_>>();
    if usable.is_empty() { Err(NoCertificate) } else { Ok(usable) }
}

/// The message for a failed TLS handshake: that of rustls is not understandable if the peer does not speak TLS. Other
/// messages are not changed.
#[must_use]
pub fn tls_in_words(why: String) -> String {
    if why.contains("InvalidContentType") { format!("it does not speak TLS, so give http:// ({why})") } else { why }
}

fn provider() -> CryptoProvider {
    aws_lc_rs::default_provider()
}

fn config(
    authorities: Vec<CertificateDer<'static>>,
    trusts_system: bool,
    own: Option<Arc<CertifiedKey>>,
    clock: Clock,
) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    if trusts_system {
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::debug!(%error, "some of the system's certificates can't be read");
        }
        roots.add_parsable_certificates(system.certs);
    }
    roots.add_parsable_certificates(authorities);
    if roots.is_empty() {
        let remedy = "give some with dial.ca_file, or to a command with --ca-file";
        return Err(format!("the system trusts no certificate, so none can be checked; {remedy}"));
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(provider()));
    let usual = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
    let usual = usual.map_err(|error| error.to_string())?;
    let config = ClientConfig::builder_with_details(provider.clone(), Arc::new(clock))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Chain { roots, provider, usual }));
    let mut config = match own {
        Some(own) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(own))),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would have the certificates of the server as they were, without verifying them again.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(self.now()))
    }
}

/// Verifies the certificate of a server, but not its name: subsystems with one endpoint share a connection, and each
/// may expect another name. `Server::check` compares it before each call.
#[derive(Debug)]
struct Chain {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    /// Verifies the rest.
    usual: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for Chain {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

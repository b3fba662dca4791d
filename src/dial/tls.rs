//! TLS for `https` endpoints: one configuration for all of them, because reading the system's certificates is slow.

use std::sync::Arc;

use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::OnceCell;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};

/// The file contains no certificate.
#[derive(Debug, thiserror::Error)]
#[error("contains no certificate; give PEM, which begins with -----BEGIN CERTIFICATE-----")]
pub struct NoCertificate;

/// The certificates of the system, and others.
#[derive(Debug, Default)]
pub(super) struct Trust {
    others: Vec<CertificateDer<'static>>,
    config: OnceCell<Arc<ClientConfig>>,
}

impl Trust {
    /// Also trusts the certificates in `ca`, in PEM. Other contents are ignored.
    ///
    /// # Errors
    /// `ca` contains no certificate.
    pub(super) fn and(&self, ca: &[u8]) -> Result<Self, NoCertificate> {
        let new = authorities(ca)?;
        Ok(Self { others: [&self.others[..], &new].concat(), config: OnceCell::new() })
    }

    /// The configuration. The first call waits until the system's certificates are read on a blocking thread.
    ///
    /// # Errors
    /// There are no trusted certificates; the message is for people.
    pub(super) async fn config(&self) -> Result<Arc<ClientConfig>, String> {
        let read = async {
            let others = self.others.clone();
            let read = tokio::task::spawn_blocking(move || read(others)).await;
            read.map_err(|error| error.to_string())?
        };
        self.config.get_or_try_init(|| read).await.cloned()
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

fn read(others: Vec<CertificateDer<'static>>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::debug!(%error, "some of the system's certificates can't be read");
    }
    roots.add_parsable_certificates(system.certs);
    roots.add_parsable_certificates(others);
    if roots.is_empty() {
        return Err("the system trusts no certificate, so none can be checked; give some with dial.ca_file".into());
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

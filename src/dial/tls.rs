//! Whom `https` endpoints are trusted to be: one configuration for all of them, because reading the system's certificates
//! takes long.

use std::sync::Arc;

use rustls_pki_types::{CertificateDer, pem::PemObject};
use tokio::sync::OnceCell;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};

/// There is no certificate where one should be.
#[derive(Debug, thiserror::Error)]
#[error("holds no certificate; give PEM, which begins with -----BEGIN CERTIFICATE-----")]
pub struct NoCertificate;

/// The certificates of the system, and others.
#[derive(Debug, Default)]
pub(super) struct Trust {
    others: Vec<CertificateDer<'static>>,
    config: OnceCell<Arc<ClientConfig>>,
}

impl Trust {
    /// One that trusts the certificates in `ca`, which is PEM, as well. What else is in it is passed over.
    ///
    /// # Errors
    /// There is none in it.
    pub(super) fn and(&self, ca: &[u8]) -> Result<Self, NoCertificate> {
        let readable = CertificateDer::pem_slice_iter(ca).flatten();
        let new = readable.filter(|it| webpki::anchor_from_trusted_cert(it).is_ok()).collect::<Vec<_>>();
        if new.is_empty() {
            return Err(NoCertificate);
        }
        Ok(Self { others: [&self.others[..], &new].concat(), config: OnceCell::new() })
    }

    /// The configuration. The first who asks waits until the system's certificates are read, beside the workers.
    ///
    /// # Errors
    /// Nobody is trusted, in words.
    pub(super) async fn config(&self) -> Result<Arc<ClientConfig>, String> {
        let read = async {
            let others = self.others.clone();
            let read = tokio::task::spawn_blocking(move || read(others)).await;
            read.map_err(|error| error.to_string())?
        };
        self.config.get_or_try_init(|| read).await.cloned()
    }
}

/// Why there is no connection over TLS, as people may be told: rustls says nothing they would understand of an answer that is
/// no TLS. Anything else stays as it is.
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

//! The TLS of connections.

use std::{path::Path, sync::Arc};

use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, crypto};

use super::url::{OwnCertificate, Verification};
use crate::{clock::Clock, file, pem::Pem};

/// The TLS of connections to servers that are verified in this way, with an own certificate, if any.
pub(super) fn config(
    verification: &Verification,
    own: Option<&OwnCertificate>,
    clock: Clock,
) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match verification {
        // It is not used.
        Verification::Disabled => {}
        Verification::Full(Some(path)) => add_file(&mut roots, path)?,
        Verification::Full(None) => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                let remedy = "name the file of its authority in store.url: sslrootcert=PATH";
                return Err(format!(
                    "the system trusts no certificate, so that of the server can't be checked; {remedy}"
                ));
            }
        }
    }
    let config = ClientConfig::builder_with_details(crypto::aws_lc_rs::default_provider().into(), Arc::new(clock))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let config = config.with_root_certificates(roots);
    let Some(OwnCertificate { certificate, key }) = own else { return Ok(config.with_no_client_auth()) };
    let (certificate, name) = (read_file("sslcert", certificate)?, format!("sslkey {}", key.display()));
    let secret = file::read_secret(key).map_err(|error| format!("{name} {error}"))?;
    let key = Pem { name, path: key.clone(), bytes: secret };
    let own = config.with_client_auth_cert(certificate.certificates()?, key.private_key()?);
    own.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => key.belongs_elsewhere(&certificate),
        error => certificate.refused(&error),
    })
}

/// Reads a file that this parameter names.
fn read_file(parameter: &str, path: &Path) -> Result<Pem, String> {
    let name = format!("{parameter} {}", path.display());
    let bytes = file::read(path).map_err(|error| format!("{name} {error}"))?;
    Ok(Pem { name, path: path.to_owned(), bytes })
}

/// Adds the certificates in a file.
fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let pem = read_file("sslrootcert", path)?;
    for certificate in pem.certificates()? {
        roots.add(certificate).map_err(|error| pem.refused(&error))?;
    }
    Ok(())
}

//! TLS of a server of subsystems: its files, which are read again when they change, and the one caller.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;
use tokio::task::spawn_blocking;
use tokio_util::task::AbortOnDropHandle;

use super::ListenError;
use crate::{
    file::{self, Changes, FileError},
    listen::{self, Clients, Loaded, Material, Protocol, Secure},
    pem::Pem,
};

/// TLS 1.3 with the one client that may call: the orchestrator. All files are PEM. When they change, they are read
/// again within two seconds, for new connections; files that can't be used leave the earlier ones in use.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The certificate of this server, and after it the intermediate ones that verify it.
    pub certificate: PathBuf,
    /// Its private key, not encrypted. Other users may not have access to the file.
    pub key: PathBuf,
    /// The authorities of the orchestrator's certificate.
    pub authorities: PathBuf,
    /// The URI in the certificate of the orchestrator, such as `spiffe://fleet/core`. Others are refused, even if the
    /// same authorities have signed their certificates: any subsystem could otherwise lock the orchestrator out with a
    /// call of a high epoch.
    pub caller: String,
}

impl Tls {
    /// With the files `cert.pem`, `key.pem` and `ca.pem` of this directory, as `orchestrator certs issue` makes them.
    pub fn in_directory(directory: impl AsRef<Path>, caller: impl Into<String>) -> Self {
        let [certificate, key, authorities] =
            ["cert.pem", "key.pem", "ca.pem"].map(|name| directory.as_ref().join(name));
        Self { certificate, key, authorities, caller: caller.into() }
    }

    /// Reads the files. Also returns the task that reads them again.
    pub(super) async fn start(self) -> Result<(Arc<Secure>, AbortOnDropHandle<()>), ListenError> {
        // Before the first read, so that no change is missed in between.
        let paths = [&self.certificate, &self.key, &self.authorities].map(Clone::clone);
        let changes = Changes::of(paths).await;
        let loaded = self.clone().load().await.map_err(ListenError::Tls)?;
        let tls = listen::Tls::new(Protocol::Http2, loaded, false);
        Ok((tls.secure(), AbortOnDropHandle::new(tokio::spawn(self.keep_current(tls, changes)))))
    }

    async fn keep_current(self, tls: Arc<listen::Tls>, mut changes: Changes) {
        loop {
            changes.next().await;
            match self.clone().load().await {
                Ok(loaded) => tls.replace(loaded),
                Err(error) => tracing::error!(error, "the files of TLS can't be used: the earlier ones stay in use"),
            }
        }
    }

    /// Reads the files on a blocking thread: a file system can be slow.
    async fn load(self) -> Result<Loaded, String> {
        let load = move || {
            let clients =
                Clients { ca: pem(&self.authorities, file::read)?, are_required: true, only: Some(self.caller) };
            let material = Material {
                certificate: pem(&self.certificate, file::read)?,
                key: pem(&self.key, file::read_secret)?,
                clients: Some(clients),
                allows_1_2: false,
            };
            #[expect(clippy::disallowed_methods, reason = "certificates are valid by the time of the system")]
            Loaded::of(&material, Protocol::Http2, Arc::new(Timestamp::now))
        };
        // It ends only because of a defect.
        spawn_blocking(load).await.unwrap_or_else(|defect| Err(format!("the files of TLS were not read: {defect}")))
    }
}

fn pem(path: &Path, read: fn(&Path) -> Result<Vec<u8>, FileError>) -> Result<Pem, String> {
    let name = path.display().to_string();
    match read(path) {
        Ok(bytes) => Ok(Pem { name, path: path.to_owned(), bytes }),
        Err(error) => Err(format!("{name} {error}")),
    }
}

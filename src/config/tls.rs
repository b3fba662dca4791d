//! The settings of TLS: as they are written for each address, and what they mean together.

use std::path::PathBuf;

use super::{Config, DialSettings, reader::Reader};
use crate::{access::Mode, file::NamedFile};

/// The settings of TLS of one address, as far as they are written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// The certificate of the service and the intermediate ones, in PEM.
    pub cert_file: Option<PathBuf>,
    /// Its private key, in PEM.
    pub key_file: Option<PathBuf>,
    /// The certificates of the authorities that sign those of clients, in PEM.
    pub client_ca_file: Option<PathBuf>,
    /// Whether clients show a certificate.
    pub client_auth: Option<ClientAuth>,
    /// The oldest version that clients may speak.
    pub min_version: Option<TlsVersion>,
}

/// Whether clients show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// They are not asked for one.
    Off,
    /// They may; one that can't be verified is refused.
    Optional,
    /// They must.
    Required,
}

impl ClientAuth {
    pub(super) const WORDS: &[(&str, Self)] =
        &[("off", Self::Off), ("optional", Self::Optional), ("required", Self::Required)];
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// RFC 5246.
    V1_2,
    /// RFC 8446.
    V1_3,
}

impl TlsVersion {
    pub(super) const WORDS: &[(&str, Self)] = &[("1.3", Self::V1_3), ("1.2", Self::V1_2)];
}

/// The TLS of one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The certificate of the service.
    pub certificate: NamedFile,
    /// Its private key.
    pub key: NamedFile,
    /// The authorities that sign certificates of clients, and true if clients must show one. `None`: they are not asked
    /// for one.
    pub clients: Option<(NamedFile, bool)>,
    /// The oldest version that clients may speak.
    pub min_version: TlsVersion,
}

/// The files of TLS to subsystems.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialTls {
    /// The authorities that sign certificates of subsystems, in addition to those of the system.
    pub authorities: Option<NamedFile>,
    /// The certificate of the service and its private key, for subsystems that ask for one.
    pub own: Option<(NamedFile, NamedFile)>,
}

/// The keys of the files of one address.
struct Keys {
    cert_file: &'static str,
    key_file: &'static str,
    client_ca_file: &'static str,
    client_auth: &'static str,
    min_version: &'static str,
}

const SERVER: Keys = Keys {
    cert_file: "server.tls.cert_file",
    key_file: "server.tls.key_file",
    client_ca_file: "server.tls.client_ca_file",
    client_auth: "server.tls.client_auth",
    min_version: "server.tls.min_version",
};

const ADMIN: Keys = Keys {
    cert_file: "admin.tls.cert_file",
    key_file: "admin.tls.key_file",
    client_ca_file: "admin.tls.client_ca_file",
    client_auth: "admin.tls.client_auth",
    min_version: "admin.tls.min_version",
};

const DIAL_CERT_FILE: &str = "dial.cert_file";
const DIAL_KEY_FILE: &str = "dial.key_file";

impl TlsSettings {
    fn pair(&self, keys: &Keys) -> Option<(NamedFile, NamedFile)> {
        Some((named(keys.cert_file, self.cert_file.as_ref())?, named(keys.key_file, self.key_file.as_ref())?))
    }
}

fn named(key: &'static str, path: Option<&PathBuf>) -> Option<NamedFile> {
    path.map(|path| NamedFile { key, path: path.clone() })
}

impl Config {
    /// The TLS of the gRPC server, if it has a certificate. With a file of authorities, clients may show a certificate
    /// by default. TLS 1.3 by default.
    pub fn server_tls(&self) -> Option<Tls> {
        let tls = &self.server.tls;
        let (certificate, key) = tls.pair(&SERVER)?;
        let ca = named(SERVER.client_ca_file, tls.client_ca_file.as_ref());
        let clients = clients(ca, tls.client_auth.unwrap_or(ClientAuth::Optional));
        Some(Tls { certificate, key, clients, min_version: tls.min_version.unwrap_or(TlsVersion::V1_3) })
    }

    /// The TLS of the admin address: with the files of the gRPC server where it has none of its own. Clients are not
    /// asked for a certificate by default, since a browser would ask the person in front of it.
    pub fn admin_tls(&self) -> Option<Tls> {
        let (server, tls) = (&self.server.tls, &self.admin.tls);
        let (certificate, key) = tls.pair(&ADMIN).or_else(|| server.pair(&SERVER))?;
        let ca = named(ADMIN.client_ca_file, tls.client_ca_file.as_ref())
            .or_else(|| named(SERVER.client_ca_file, server.client_ca_file.as_ref()));
        let clients = clients(ca, tls.client_auth.unwrap_or(ClientAuth::Off));
        let min_version = tls.min_version.or(server.min_version).unwrap_or(TlsVersion::V1_3);
        Some(Tls { certificate, key, clients, min_version })
    }
}

impl Config {
    /// True if addresses with TLS accept clients without it as well, so that the clients of a fleet can move to TLS one
    /// after the other: in the mode `dry_run`, if other machines are allowed.
    pub fn takes_plaintext(&self) -> bool {
        self.is_insecure() && self.access.mode == Mode::DryRun
    }

    /// TLS to subsystems. The service shows them the certificate of its gRPC server unless it has another one for them.
    pub fn dial_tls(&self) -> DialTls {
        let DialSettings { ca_file, cert_file, key_file, .. } = &self.dial;
        let own = named(DIAL_CERT_FILE, cert_file.as_ref()).zip(named(DIAL_KEY_FILE, key_file.as_ref()));
        DialTls {
            authorities: named("dial.ca_file", ca_file.as_ref()),
            own: own.or_else(|| self.server.tls.pair(&SERVER)),
        }
    }
}

fn clients(ca: Option<NamedFile>, client_auth: ClientAuth) -> Option<(NamedFile, bool)> {
    match client_auth {
        ClientAuth::Off => None,
        ClientAuth::Optional => ca.map(|ca| (ca, false)),
        ClientAuth::Required => ca.map(|ca| (ca, true)),
    }
}

/// Refuses settings that need another one which is missing.
pub(super) fn refuse_incomplete(read: &mut Reader<'_>, config: &Config) {
    let (server, admin) = (&config.server.tls, &config.admin.tls);
    let dial = &config.dial;
    refuse_alone(read, [(&dial.cert_file, DIAL_CERT_FILE), (&dial.key_file, DIAL_KEY_FILE)]);
    for (tls, keys, has_server) in [(server, &SERVER, false), (admin, &ADMIN, server.cert_file.is_some())] {
        refuse_alone(read, [(&tls.cert_file, keys.cert_file), (&tls.key_file, keys.key_file)]);
        let has_certificate = tls.cert_file.is_some() || tls.key_file.is_some() || has_server;
        for key in [keys.client_ca_file, keys.client_auth, keys.min_version] {
            if !has_certificate && read.is_written(key) {
                read.refuse(key, format!("has no effect without TLS; give {} and {}", keys.cert_file, keys.key_file));
            }
        }
        let has_ca = tls.client_ca_file.is_some() || (has_server && server.client_ca_file.is_some());
        let asks = matches!(tls.client_auth, Some(ClientAuth::Optional | ClientAuth::Required));
        if asks && !has_ca && read.is_written(keys.client_auth) {
            let ca = keys.client_ca_file;
            read.refuse(keys.client_auth, format!("needs {ca}, the authorities that sign certificates of clients"));
        }
    }
}

/// Refuses a certificate without its key, and a key without its certificate.
fn refuse_alone(read: &mut Reader<'_>, pair: [(&Option<PathBuf>, &str); 2]) {
    let [certificate, key] = pair;
    for ((one, name), (other, missing)) in [(certificate, key), (key, certificate)] {
        if one.is_some() && other.is_none() {
            read.refuse(name, format!("needs {missing} as well"));
        }
    }
}

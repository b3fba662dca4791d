//! `serve --secure DIR`: the settings for the files of a directory that `orchestrator certs` creates.

use std::path::{Path, PathBuf};

use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::reader::{Table, append, parse};
use crate::{access::identity_of, file, model::Identity};

/// The certificate of the authority; also in the directory of each certificate.
pub const AUTHORITY: &str = "ca.pem";
/// The directory of the service's certificate.
pub const SERVICE: &str = "core";
/// The certificate in the directory of its owner.
pub const CERTIFICATE: &str = "cert.pem";
/// Its private key.
pub const KEY: &str = "key.pem";
/// Static tokens, if there are any.
const TOKENS: &str = "tokens.toml";

/// The identity of each replica, and a grant for each role: to certificates of the fleet with the role in their
/// identity, and to tokens with the role in their name.
const GRANTS: &str = r#"
peers = ["cert:spiffe://FLEET/core"]

[[grants]]
who = ["cert:spiffe://FLEET/admin/*", "token:admin-*"]
role = "admin"

[[grants]]
who = ["cert:spiffe://FLEET/operator/*", "token:operator-*"]
role = "operator"
subsystems = ["*"]
loops = ["*"]

[[grants]]
who = ["cert:spiffe://FLEET/viewer/*", "token:viewer-*"]
role = "viewer"
subsystems = ["*"]

[[grants]]
who = ["cert:spiffe://FLEET/auditor/*", "token:auditor-*"]
role = "auditor"
subsystems = ["*"]

[[grants]]
who = ["cert:spiffe://FLEET/monitor/*", "token:monitor-*"]
role = "monitor"

[[grants]]                   # each subsystem, for the registration of its own name
who = ["cert:spiffe://FLEET/subsystem/*"]
role = "registrar"
subsystems = ["{1}"]
reads = ["*"]
phases = [0, 100]
endpoints = ["https://*:*", "http://localhost:*", "http://127.0.0.1:*"]
"#;

/// The settings for the files of this directory, by key.
pub(super) fn settings(dir: &Path) -> Vec<(&'static str, PathBuf)> {
    let service = dir.join(SERVICE);
    let mut settings = vec![
        ("server.tls.cert_file", service.join(CERTIFICATE)),
        ("server.tls.key_file", service.join(KEY)),
        ("server.tls.client_ca_file", dir.join(AUTHORITY)),
        ("dial.ca_file", dir.join(AUTHORITY)),
    ];
    let tokens = dir.join(TOKENS);
    settings.extend(tokens.exists().then_some(("access.tokens_file", tokens)));
    settings
}

/// Adds the replicas and the grants of the fleet of this directory to those that are written.
///
/// # Errors
/// The certificate of its authority can't be read, or names no fleet.
pub(super) fn add_grants(table: &mut Table, dir: &Path) -> Result<(), String> {
    let path = dir.join(AUTHORITY);
    let fleet = fleet_of_file(&path).map_err(|problem| {
        format!("needs {}, which {problem}; `orchestrator certs init` creates such a directory", path.display())
    })?;
    let grants = parse("--secure", &GRANTS.replace("FLEET", &fleet)).map_err(|error| error.to_string())?;
    for (key, list) in grants {
        append(table, if key == "peers" { "cluster" } else { "access" }, &key, list);
    }
    Ok(())
}

/// The identity of the service in the fleet of an authority, if the authority names one.
pub fn service_of(authority: &CertificateDer<'_>) -> Option<Identity> {
    let fleet = fleet(authority).ok()?;
    Identity::of_certificate(&format!("spiffe://{fleet}/{SERVICE}"))
}

fn fleet_of_file(path: &Path) -> Result<String, String> {
    let pem = file::read(path).map_err(|error| error.to_string())?;
    let certificate = CertificateDer::from_pem_slice(&pem).map_err(|error| format!("is not PEM: {error}"))?;
    fleet(&certificate)
}

/// The fleet of an authority: its identity is `spiffe://FLEET`. Only the identities of this fleet get grants, also if
/// other authorities are trusted as well.
fn fleet(authority: &CertificateDer<'_>) -> Result<String, String> {
    let identity = identity_of(authority).map_err(|error| error.to_string())?;
    let identity = identity.to_string();
    let fleet = identity.strip_prefix("cert:spiffe://").filter(|fleet| !fleet.contains(['/', '*', '{', '}', '"']));
    fleet.map(ToOwned::to_owned).ok_or_else(|| "names no fleet".to_owned())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::super::*;

    /// A directory whose authority has this identity.
    fn of(identity: &str) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names.push(rcgen::SanType::URI(identity.try_into().unwrap()));
        let certificate = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        directory
    }

    fn load(dir: &Path, config: Option<&Path>, set: &[&str]) -> Result<Config, ConfigError> {
        let overrides = Overrides {
            config: config.map(Into::into),
            secure: Some(dir.into()),
            set: set.iter().map(ToString::to_string).collect(),
            ..Overrides::default()
        };
        Config::load(&overrides, [])
    }

    #[test]
    fn a_directory_gives_tls_and_a_grant_for_each_role() {
        let directory = of("spiffe://fleet");
        let dir = directory.path();
        let config = load(dir, None, &[]).unwrap();
        assert_eq!(config.access.mode, Mode::Enforce);
        assert_eq!(config.access.grants.len(), Role::ALL.len());
        assert_eq!(config.server_tls().unwrap().certificate.path, dir.join("core/cert.pem"));
        assert_eq!(config.dial.ca_file, Some(dir.join("ca.pem")));
        assert_eq!(config.cluster.peers, [Identity::parse("cert:spiffe://fleet/core").unwrap()].into());
        // The flag --set takes precedence.
        let config = load(dir, None, &["access.mode=dry_run", "dial.ca_file=other.pem"]).unwrap();
        assert_eq!((config.access.mode, config.dial.ca_file), (Mode::DryRun, Some("other.pem".into())));
    }

    #[test]
    fn grants_are_for_the_fleet_of_the_directory_only() {
        let directory = of("spiffe://fleet");
        let AccessSettings { mode, revoked, grants, .. } = load(directory.path(), None, &[]).unwrap().access;
        let policy = crate::access::Policy::new(mode, grants, Vec::new(), revoked, 1);
        let rights =
            |identity: &str| policy.rights(&crate::model::Identity::parse(identity).unwrap(), &[]).iter().count();
        assert_eq!(rights("cert:spiffe://fleet/admin/a"), 1);
        assert_eq!(rights("cert:spiffe://other/admin/a"), 0);
    }

    #[test]
    fn settings_take_precedence_over_a_file_whose_grants_are_added() {
        let directory = of("spiffe://fleet");
        let file = directory.path().join("orchestrator.toml");
        let written = "[access]\nmode = \"off\"\n[[access.grants]]\nwho = [\"token:a\"]\nrole = \"monitor\"\n";
        std::fs::write(&file, written).unwrap();
        let config = load(directory.path(), Some(&file), &[]).unwrap();
        assert_eq!((config.access.mode, config.access.grants.len()), (Mode::Enforce, 1 + Role::ALL.len()));
    }

    #[test]
    fn a_directory_without_a_fleet_is_refused() {
        let empty = tempfile::tempdir().unwrap();
        for (directory, problem) in [(empty, "can't be read"), (of("spiffe://fleet/a"), "names no fleet")] {
            let refused = load(directory.path(), None, &[]).unwrap_err().to_string();
            assert!(refused.contains(problem) && refused.contains("certs init"), "{refused}");
        }
    }
}

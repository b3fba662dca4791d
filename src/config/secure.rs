//! `serve --secure DIR`: the settings for the files of a directory that `orchestrator certs` creates.

use std::path::{Path, PathBuf};

use super::reader::{Table, append, parse};

/// The names in such a directory.
#[derive(Clone, Copy, Debug)]
pub struct SecureDirectory;

impl SecureDirectory {
    /// The certificate of the authority; also in the directory of each certificate.
    pub const AUTHORITY: &str = "ca.pem";
    /// The directory of the service's certificate.
    pub const SERVICE: &str = "core";
    /// The certificate in the directory of its owner.
    pub const CERTIFICATE: &str = "cert.pem";
    /// Its private key.
    pub const KEY: &str = "key.pem";
    /// Static tokens, if there are any.
    pub const TOKENS: &str = "tokens.toml";
}

/// A grant for each role: to certificates with the role in their identity, and to tokens with the role in their name.
const GRANTS: &str = r#"
[[grants]]
who = ["cert:spiffe://*/admin/*", "token:admin-*"]
role = "admin"

[[grants]]
who = ["cert:spiffe://*/operator/*", "token:operator-*"]
role = "operator"
subsystems = ["*"]
loops = ["*"]

[[grants]]
who = ["cert:spiffe://*/viewer/*", "token:viewer-*"]
role = "viewer"
subsystems = ["*"]

[[grants]]
who = ["cert:spiffe://*/auditor/*", "token:auditor-*"]
role = "auditor"
subsystems = ["*"]

[[grants]]
who = ["cert:spiffe://*/monitor/*", "token:monitor-*"]
role = "monitor"

[[grants]]                   # each subsystem, for the registration of its own name
who = ["cert:spiffe://*/subsystem/*"]
role = "registrar"
subsystems = ["{2}"]
reads = ["*"]
phases = [0, 100]
endpoints = ["https://*:*", "http://localhost:*", "http://127.0.0.1:*"]
"#;

/// The settings for the files of this directory, by key.
pub(super) fn settings(dir: &Path) -> Vec<(&'static str, PathBuf)> {
    use SecureDirectory as Names;
    let service = dir.join(Names::SERVICE);
    let mut settings = vec![
        ("server.tls.cert_file", service.join(Names::CERTIFICATE)),
        ("server.tls.key_file", service.join(Names::KEY)),
        ("server.tls.client_ca_file", dir.join(Names::AUTHORITY)),
        ("dial.ca_file", dir.join(Names::AUTHORITY)),
    ];
    let tokens = dir.join(Names::TOKENS);
    settings.extend(tokens.exists().then_some(("access.tokens_file", tokens)));
    settings
}

/// Adds the grants to those that are written.
pub(super) fn add_grants(table: &mut Table) {
    if let Ok(mut grants) = parse("--secure", GRANTS)
        && let Some(grants) = grants.remove("grants")
    {
        append(table, "access", "grants", grants);
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;

    #[test]
    fn a_directory_gives_tls_and_a_grant_for_each_role() {
        let overrides = |set: &[&str]| Overrides {
            secure: Some("pki".into()),
            set: set.iter().map(ToString::to_string).collect(),
            ..Overrides::default()
        };
        let config = Config::load(&overrides(&[]), []).unwrap();
        assert_eq!(config.access.mode, Mode::Enforce);
        assert_eq!(config.access.grants.len(), Role::ALL.len());
        assert_eq!(config.server_tls().unwrap().certificate.path, Path::new("pki/core/cert.pem"));
        assert_eq!(config.dial.ca_file.as_deref(), Some(Path::new("pki/ca.pem")));
        // Other flags take precedence.
        let config = Config::load(&overrides(&["access.mode=dry_run", "dial.ca_file=other.pem"]), []).unwrap();
        assert_eq!((config.access.mode, config.dial.ca_file), (Mode::DryRun, Some("other.pem".into())));
    }

    #[test]
    fn grants_of_a_file_are_added_to_those_of_a_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let written = "[[access.grants]]\nwho = [\"token:a\"]\nrole = \"monitor\"\n";
        std::fs::write(file.path(), written).unwrap();
        let overrides =
            Overrides { config: Some(file.path().into()), secure: Some("pki".into()), ..Overrides::default() };
        assert_eq!(Config::load(&overrides, []).unwrap().access.grants.len(), 1 + Role::ALL.len());
    }
}

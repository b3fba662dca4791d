//! The credentials of commands: a token that they send to the service, or a certificate that they show to it.

use std::path::{Path, PathBuf};

use tonic::{Request, Status, metadata::AsciiMetadataValue, service::Interceptor};

use super::{Exit, Failure};
use crate::file;

/// Where the credentials are. Never a token itself: other users of a machine can see the arguments of a command.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Credentials {
    /// File with a token that proves who calls, or a directory with a certificate, as `orchestrator certs` creates it
    #[arg(long = "credentials", value_name = "PATH", env = "ORCHESTRATOR_CREDENTIALS", global = true)]
    path: Option<PathBuf>,
}

/// Adds the token, if there is one, to each call.
#[derive(Clone, Debug, Default)]
pub(super) struct Bearer(Option<AsciiMetadataValue>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Credentials {
    /// Reads the token, which is only sent to this machine or with TLS.
    ///
    /// # Errors
    /// The file can't be read, others can read it, it contains no token, or the token would be sent in clear. Or a
    /// certificate would not be used.
    pub(super) fn read(&self, address: &str) -> Result<Bearer, Failure> {
        let Some(path) = &self.path else { return Ok(Bearer::default()) };
        if path.is_dir() {
            return if address.starts_with("https://") {
                Ok(Bearer::default())
            } else {
                let problem =
                    format!("is a certificate, which is not used at {address}; give an address with https://");
                Err(unusable(path, &problem))
            };
        }
        if !address.starts_with("https://") && !is_local(address) {
            let problem = format!("the token would be sent in clear to {address}; give an address with https://");
            return Err(unusable(path, &problem));
        }
        let text = file::read_secret(path).map_err(|error| unusable(path, &error.to_string()))?;
        let token = String::from_utf8_lossy(&text);
        let token = Some(token.trim()).filter(|token| !token.is_empty() && !token.contains(char::is_whitespace));
        let value = token.and_then(|token| AsciiMetadataValue::try_from(format!("Bearer {token}")).ok());
        let mut value =
            value.ok_or_else(|| unusable(path, "contains no token; it has the form orc_ID_SECRET, or is a JWT"))?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }

    /// The directory with a certificate, if that is what they are.
    pub(super) fn directory(&self) -> Option<&Path> {
        self.path.as_deref().filter(|path| path.is_dir())
    }

    /// The flag that another command needs to be the same caller.
    pub(super) fn flag(&self) -> String {
        self.path.as_ref().map_or_else(String::new, |path| format!(" --credentials {}", path.display()))
    }
}

fn unusable(path: &Path, problem: &str) -> Failure {
    Failure::new(Exit::Usage, format!("--credentials {} {problem}", path.display()))
}

/// True if the address can only be on this machine.
fn is_local(address: &str) -> bool {
    if address.starts_with("unix:") {
        return true;
    }
    let host = address.strip_prefix("http://").and_then(|place| place.rsplit_once(':')).map_or("", |(host, _)| host);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<std::net::IpAddr>() {
        Ok(ip) => ip.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_sent_in_clear_to_this_machine_only() {
        for address in
            ["http://127.0.0.1:7700", "http://[::1]:7700", "http://localhost:7700", "http://127.1.2.3:1", "unix:/o"]
        {
            assert!(is_local(address), "{address}");
        }
        for address in ["http://10.0.0.1:7700", "http://localhost.example:1", "http://example:80", "http://[::]:1"] {
            assert!(!is_local(address), "{address}");
        }
    }
}

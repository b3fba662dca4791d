//! The issuer of JWTs, and the file of its keys.

use std::{path::PathBuf, time::Duration};

use super::{ConfigError, Problem, Source, file_text, reader::Reader};
use crate::{
    access::{Claims, Issuer},
    file,
};

/// The issuer of JWTs: none unless `issuer`, `audience` and `jwks_file` are set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtSettings {
    /// The claim `iss`. Default: none.
    pub issuer: Option<String>,
    /// What the claim `aud` must contain: the name of this service for the issuer. Default: none.
    pub audience: Option<String>,
    /// The file with the public keys of the issuer, a JWK set (RFC 7517). Default: none.
    pub jwks_file: Option<PathBuf>,
    /// The claim with the name of the caller. Default `sub`.
    pub name_claim: String,
    /// The claim with the groups of the caller. Default `groups`.
    pub groups_claim: String,
    /// Longest time from the claim `iat`, which is then required, to `exp`. 1 s to 366 days. Default: none.
    pub max_lifetime: Option<Duration>,
}

impl Default for JwtSettings {
    fn default() -> Self {
        Self {
            issuer: None,
            audience: None,
            jwks_file: None,
            name_claim: "sub".to_owned(),
            groups_claim: "groups".to_owned(),
            max_lifetime: None,
        }
    }
}

/// The value of a claim, or its name.
pub(super) fn claim(text: &str) -> Result<String, String> {
    const MAX_LEN: usize = 256;
    if (1..=MAX_LEN).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err(format!("give 1 to {MAX_LEN} printable ASCII characters without spaces"))
    }
}

/// Refuses a part of the settings: without its issuer or its audience, a JWT for another service would be accepted.
pub(super) fn refuse_incomplete(read: &mut Reader<'_>, settings: &JwtSettings) {
    let required = [
        ("access.jwt.issuer", settings.issuer.is_some()),
        ("access.jwt.audience", settings.audience.is_some()),
        ("access.jwt.jwks_file", settings.jwks_file.is_some()),
    ];
    let (set, missing): (Vec<_>, Vec<_>) = required.into_iter().partition(|(_, is_set)| *is_set);
    let missing: Vec<_> = missing.into_iter().map(|(key, _)| key).collect();
    if let Some((key, _)) = set.first().filter(|_| !missing.is_empty()) {
        read.refuse(key, format!("needs {} as well", missing.join(" and ")));
    }
}

/// Reads the keys of the issuer. `None` if no issuer is set.
///
/// # Errors
/// The file can't be read, or its keys can't be used.
pub fn read_issuer(settings: &JwtSettings) -> Result<Option<Issuer>, ConfigError> {
    let JwtSettings { issuer: Some(issuer), audience: Some(audience), jwks_file: Some(path), .. } = settings else {
        return Ok(None);
    };
    let name = path.display().to_string();
    let text = file_text(&name, file::read(path))?;
    let claims = Claims {
        issuer: issuer.clone(),
        audience: audience.clone(),
        name: settings.name_claim.clone(),
        groups: settings.groups_claim.clone(),
        max_lifetime: settings.max_lifetime,
    };
    let issuer = Issuer::from_key_set(claims, &text);
    let refused = |problem| ConfigError::of(Problem::new(Source::File(name.as_str().into(), 0), "", problem));
    issuer.map(Some).map_err(refused)
}

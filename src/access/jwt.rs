//! JSON Web Tokens (RFC 7519) of one issuer, by the advice of RFC 8725: the algorithm comes from the key and never from
//! the token, and issuer, audience, subject and end are all required.

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::model::Identity;

/// A presented JWT, which is not verified yet.
#[derive(Clone, PartialEq, Eq)]
pub struct Jwt(Arc<str>);

/// Hides it: whoever reads it can be its owner.
impl fmt::Debug for Jwt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Jwt(…)")
    }
}

impl Jwt {
    /// Most bytes: half of what the headers of a call may have.
    pub const MAX_LEN: usize = 8 << 10;

    /// Accepts three parts in base64url, with dots in between (RFC 7515, section 7.1).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let is_base64url = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let is_one = text.len() <= Self::MAX_LEN
            && text.split('.').count() == 3
            && text.split('.').take(2).all(|part| !part.is_empty())
            && text.bytes().all(|byte| byte == b'.' || is_base64url(byte));
        is_one.then(|| Self(text.into()))
    }

    /// Its text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The issuer whose JWTs are accepted, and its keys.
#[derive(Clone, Debug)]
pub struct Issuer {
    claims: Claims,
    keys: Vec<Key>,
}

/// The claims that a JWT must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The issuer, `iss`.
    pub issuer: String,
    /// The audience, one of `aud`.
    pub audience: String,
    /// The claim with the name of the caller.
    pub name: String,
    /// The claim with the groups of the caller: a list of texts, or one text.
    pub groups: String,
    /// The longest time from `iat` to `exp`. `None` means any.
    pub max_lifetime: Option<Duration>,
}

/// A verified JWT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) identity: Identity,
    pub(super) groups: Vec<String>,
    pub(super) expires_at: Timestamp,
}

/// Why a JWT is refused. Reads well after the name of the credential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// The service accepts none.
    #[error("is a JWT, and the service accepts none: `access.jwt` in its configuration is not set")]
    NoIssuer,
    /// It has not the form of one.
    #[error("is not a JWT of a form that the service can read")]
    Malformed,
    /// No key has its `kid`, or it has none and there are several keys.
    #[error("is a JWT whose `kid` is not that of a key of its issuer")]
    UnknownKey,
    /// Its `alg` is not the algorithm of the key.
    #[error("is a JWT whose `alg` is not the algorithm of its key")]
    Algorithm,
    /// The key has not signed it.
    #[error("is a JWT with a wrong signature")]
    Signature,
    /// A claim is missing, or has another type or value. With its name.
    #[error("is a JWT whose claim `{0}` is missing or not the one that the service expects")]
    Claim(String),
    /// It is not valid before this time.
    #[error("is a JWT that is not valid before {0}")]
    NotYetValid(Timestamp),
    /// It is valid for longer than the service allows.
    #[error("is a JWT that is valid for longer than `access.jwt.max_lifetime`")]
    Lifetime,
}

/// A public key, and the one algorithm that it is for.
#[derive(Clone, Debug)]
struct Key {
    id: Option<String>,
    algorithm: Algorithm,
    public: DecodingKey,
}

/// A set of keys (RFC 7517, section 5), whose keys are parsed one by one: those of unknown kinds are skipped.
#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Value>,
}

impl Issuer {
    /// Most keys of an issuer: some that are being replaced, for each kind of clients.
    pub const MAX_KEYS: usize = 64;
    /// Most groups of a caller that grants are compared with; a JWT with more is refused.
    pub const MAX_GROUPS: usize = 256;

    /// The issuer with the public keys in the text of a JWKS file.
    ///
    /// # Errors
    /// The text is not a set of keys, contains a secret key, has no key that signs, or too many. Reads well after the
    /// name of the file.
    pub fn from_key_set(claims: Claims, text: &str) -> Result<Self, String> {
        let set: KeySet = serde_json::from_str(text)
            .map_err(|error| format!("is not a set of keys, {{\"keys\": [...]}} as in RFC 7517: {error}"))?;
        if set.keys.len() > Self::MAX_KEYS {
            return Err(format!("has {} keys; the limit is {}", set.keys.len(), Self::MAX_KEYS));
        }
        let mut keys = Vec::new();
        for (number, value) in set.keys.into_iter().enumerate() {
            match Key::parse(value) {
                Ok(key) => keys.extend(key),
                Err(problem) => return Err(format!("keys[{number}] {problem}")),
            }
        }
        if keys.is_empty() {
            return Err("has no key that signs: give keys of RSA (from 2,048 bits), P-256, P-384 or Ed25519".into());
        }
        Ok(Self { claims, keys })
    }

    /// Verifies a JWT. It may have expired already.
    ///
    /// # Errors
    /// It is not valid, or not yet.
    pub(super) fn verify(&self, Jwt(text): &Jwt, now: Timestamp) -> Result<Verified, JwtError> {
        let header = decode_header(text.as_bytes()).map_err(|error| error_of(error.kind()))?;
        let found = match (&header.kid, &self.keys[..]) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(id), keys) => keys.iter().find(|key| key.id.as_ref() == Some(id)),
        };
        let key = found.ok_or(JwtError::UnknownKey)?;
        let claims = decode::<Map<String, Value>>(text.as_bytes(), &key.public, &self.validation(key.algorithm));
        let claims = claims.map_err(|error| error_of(error.kind()))?.claims;
        let bad = |claim: &str| JwtError::Claim(claim.to_owned());
        // The library also takes a list of issuers, which is not in the standard.
        if claims.get("iss").and_then(Value::as_str) != Some(&self.claims.issuer) {
            return Err(bad("iss"));
        }
        let expires_at = claims.get("exp").and_then(time).ok_or_else(|| bad("exp"))?;
        let not_before = claims.get("nbf").map(|value| time(value).ok_or_else(|| bad("nbf"))).transpose()?;
        if let Some(at) = not_before.filter(|at| *at > now) {
            return Err(JwtError::NotYetValid(at));
        }
        if let Some(longest) = self.claims.max_lifetime {
            let issued_at = claims.get("iat").and_then(time).ok_or_else(|| bad("iat"))?;
            // One that claims to be issued later does not live longer.
            if Duration::try_from(expires_at.duration_since(issued_at.min(now)))
                .is_ok_and(|lifetime| lifetime > longest)
            {
                return Err(JwtError::Lifetime);
            }
        }
        let name = claims.get(&self.claims.name).and_then(Value::as_str);
        let identity = name.and_then(Identity::of_subject).ok_or_else(|| bad(&self.claims.name))?;
        let groups = claims.get(&self.claims.groups).map_or(Some(Vec::new()), texts);
        let groups = groups.filter(|groups| groups.len() <= Self::MAX_GROUPS);
        Ok(Verified { identity, groups: groups.ok_or_else(|| bad(&self.claims.groups))?, expires_at })
    }

    /// The checks of the library. Those of times are ours: they need the clock by which all callers are judged.
    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.set_audience(&[&self.claims.audience]);
        validation.set_issuer(&[&self.claims.issuer]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation
    }
}

impl Key {
    /// The least length of an RSA key, in bytes: 2,048 bits (RFC 7518, section 3.3).
    const RSA_LEAST: usize = 256;

    /// A key, or `None` if it is not for signatures, or of a kind that is not known here (RFC 7517, section 5).
    ///
    /// # Errors
    /// It is secret or malformed. Reads well after its name.
    fn parse(value: Value) -> Result<Option<Self>, String> {
        const SECRET: &str = "is secret: whoever can verify with it can sign; give public keys only";
        // A private key has this field, by RFC 7518, sections 6.2.2 and 6.3.2, and RFC 8037, section 2.
        if value.get("d").is_some() {
            return Err(SECRET.into());
        }
        let Ok(jwk) = serde_json::from_value::<Jwk>(value) else { return Ok(None) };
        if jwk.common.public_key_use.as_ref().is_some_and(|purpose| *purpose != PublicKeyUse::Signature) {
            return Ok(None);
        }
        let (default, length) = match &jwk.algorithm {
            AlgorithmParameters::OctetKey(_) => return Err(SECRET.into()),
            // The default is that of OpenID Connect, Core 1.0, section 15.1.
            AlgorithmParameters::RSA(_) => (Algorithm::RS256, None),
            AlgorithmParameters::EllipticCurve(key) => match key.curve {
                EllipticCurve::P256 => (Algorithm::ES256, Some(65)),
                EllipticCurve::P384 => (Algorithm::ES384, Some(97)),
                _ => return Ok(None),
            },
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                (Algorithm::EdDSA, Some(32))
            }
            _ => return Ok(None),
        };
        let algorithm = match jwk.common.key_algorithm {
            None => default,
            Some(KeyAlgorithm::UNKNOWN_ALGORITHM) => return Ok(None),
            Some(named) => match Algorithm::try_from(named) {
                // Each curve has one algorithm, and RSA several.
                Ok(named) if named == default || (length.is_none() && named.family() == default.family()) => named,
                Ok(_) => return Err(format!("has the `alg` {named}, which is not one of its `kty` and `crv`")),
                // For encryption.
                Err(_) => return Ok(None),
            },
        };
        let key = DecodingKey::from_jwk(&jwk).map_err(|error| format!("is malformed: {error}"))?;
        let fits = match key.kind() {
            DecodingKeyKind::SecretOrDer(point) => Some(point.len()) == length,
            DecodingKeyKind::RsaModulusExponent { n, .. } => n.len() >= Self::RSA_LEAST,
        };
        if !fits {
            return Err("has a wrong length: RSA keys have at least 2,048 bits".into());
        }
        Ok(Some(Self { id: jwk.common.key_id, algorithm, public: key }))
    }
}

/// Seconds since 1970 (`NumericDate`, RFC 7519, section 2), rounded down.
fn time(value: &Value) -> Option<Timestamp> {
    #[expect(clippy::cast_possible_truncation, reason = "it saturates, and a timestamp has a smaller range")]
    let second = value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds.floor() as i64))?;
    Timestamp::from_second(second).ok()
}

/// A list of texts, or one text.
fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(all) => all.iter().map(|text| text.as_str().map(ToOwned::to_owned)).collect(),
        _ => None,
    }
}

fn error_of(kind: &ErrorKind) -> JwtError {
    match kind {
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName | ErrorKind::UnsupportedAlgorithm => {
            JwtError::Algorithm
        }
        ErrorKind::InvalidSignature => JwtError::Signature,
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => JwtError::Claim(claim.clone()),
        ErrorKind::InvalidIssuer => JwtError::Claim("iss".to_owned()),
        ErrorKind::InvalidAudience => JwtError::Claim("aud".to_owned()),
        _ => JwtError::Malformed,
    }
}

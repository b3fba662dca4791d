//! Callers that are known by a JWT.

use std::{fs, path::Path};

use crate::common::{
    command::{orchestrator, run},
    http::send,
    patiently,
    service::{Home, Service, next_event, reason as reason_of, registration},
    tokens::write_private,
};
use aws_lc_rs::signature::Ed25519KeyPair;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, jwk::Jwk};
use orchestrator_core::proto::orchestrator::v1 as pb;
use rcgen::KeyPair;
use serde_json::{Value, json};
use tokio::process::Command;
use tonic::{Code, Request, Status};

const ISSUER: &str = "https://login.example.org";
const AUDIENCE: &str = "orchestrator";

/// A key of the issuer.
struct Key {
    id: &'static str,
    algorithm: Algorithm,
    private: EncodingKey,
}

impl Key {
    fn p256(id: &'static str) -> Self {
        let pair = KeyPair::generate().unwrap();
        Self { id, algorithm: Algorithm::ES256, private: EncodingKey::from_ec_der(&pair.serialize_der()) }
    }

    fn ed25519(id: &'static str) -> Self {
        let pair = Ed25519KeyPair::generate().unwrap().to_pkcs8v1().unwrap();
        Self { id, algorithm: Algorithm::EdDSA, private: EncodingKey::from_ed_der(pair.as_ref()) }
    }

    async fn rsa(id: &'static str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("key").display().to_string();
        let mut openssl = Command::new("sh");
        let script = "openssl genrsa 2048 | openssl rsa -traditional -outform der -out \"$0\"";
        openssl.args(["-c", script, &file]);
        let (exit, said) = run(openssl).await;
        assert_eq!(exit, 0, "{said}");
        Self { id, algorithm: Algorithm::RS256, private: EncodingKey::from_rsa_der(&fs::read(file).unwrap()) }
    }

    /// As it stands in the file of the issuer's keys.
    fn public(&self) -> Value {
        let mut jwk = serde_json::to_value(Jwk::from_encoding_key(&self.private, self.algorithm).unwrap()).unwrap();
        jwk["kid"] = self.id.into();
        jwk["use"] = "sig".into();
        jwk
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some(self.id.to_owned()), ..Header::new(self.algorithm) };
        encode(&header, claims, &self.private).unwrap()
    }
}

fn set(keys: &[&Key]) -> String {
    json!({"keys": keys.iter().map(|key| key.public()).collect::<Vec<_>>()}).to_string()
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// The claims of a JWT that is valid for an hour.
fn claims(name: &str, groups: &[&str]) -> Value {
    json!({"iss": ISSUER, "aud": AUDIENCE, "sub": name, "groups": groups, "iat": now(), "exp": now() + 3600})
}

/// The claims of a JWT that is valid for this many seconds.
fn claims_until(seconds: i64) -> Value {
    with(claims("alice", &[]), "exp", (now() + seconds).into())
}

/// The claims with another value of one of them; with null, without it.
fn with(mut claims: Value, claim: &str, value: Value) -> Value {
    if value.is_null() {
        claims.as_object_mut().unwrap().remove(claim);
    } else {
        claims[claim] = value;
    }
    claims
}

/// A service that accepts the JWTs of these keys.
struct Stage {
    home: Home,
    service: Service,
}

impl Stage {
    async fn new(keys: &[&Key], jwt: &str, grants: &str) -> Self {
        let home = Home::new().in_memory();
        fs::write(home.path("jwks.json"), set(keys)).unwrap();
        let config = config(&home.path("jwks.json"), jwt, grants);
        let home = home.with_config(&config);
        let service = home.serve().await;
        Self { home, service }
    }

    /// A request with this token.
    fn request<Q>(token: &str, request: Q) -> Request<Q> {
        let mut request = Request::new(request);
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request
    }

    async fn status(&self, token: &str) -> Result<(), Status> {
        let mut client = self.service.client().await;
        client.get_status(Self::request(token, pb::GetStatusRequest::default())).await.map(drop)
    }

    /// Why a call with this token is refused.
    async fn refusal(&self, token: &str) -> (Code, String, String) {
        let status = self.status(token).await.unwrap_err();
        (status.code(), reason_of(&status).why, status.message().to_owned())
    }

    /// A file with this token, as the command line takes it, and what `whoami` says of it.
    async fn whoami(&self, token: &str) -> (i32, String) {
        let file = self.home.path("token");
        write_private(&file, token);
        orchestrator(Some(&file), &["whoami", "--address", &format!("http://{}", self.service.address())]).await
    }
}

fn config(jwks: &Path, jwt: &str, grants: &str) -> String {
    let jwks = jwks.display();
    format!(
        "[access]\nmode = \"enforce\"\n[access.jwt]\nissuer = \"{ISSUER}\"\naudience = \"{AUDIENCE}\"\njwks_file = \
         \"{jwks}\"\n{jwt}\n{grants}"
    )
}

const VIEWERS: &str = "[[access.grants]]\nwho = [\"jwt:*\"]\nrole = \"viewer\"\nsubsystems = [\"*\"]\n";

#[tokio::test]
async fn a_jwt_is_an_identity_with_groups_that_grants_name() {
    let (p256, ed25519, rsa) = (Key::p256("a"), Key::ed25519("b"), Key::rsa("c").await);
    let grants = "[[access.grants]]\nwho = [\"group:team-*\"]\nrole = \"registrar\"\nsubsystems = [\"{1}\"]\n\
                  endpoints = [\"http://127.0.0.1:*\"]\nphases = [0, 0]\n";
    let stage = Stage::new(&[&p256, &ed25519, &rsa], "", &(VIEWERS.to_owned() + grants)).await;
    for key in [&p256, &ed25519, &rsa] {
        let (exit, said) = stage.whoami(&key.sign(&claims("alice", &["team-prices"]))).await;
        assert!(exit == 0 && said.contains("jwt:alice") && said.contains("VIEWER"), "{said}");
        assert!(said.contains("REGISTRAR") && said.contains("prices"), "{said}");
    }
    let token = p256.sign(&claims("alice", &["team-prices", "team-news", "other"]));
    let mut client = stage.service.client().await;
    let mut register = async |name| {
        let registration = Some(registration(name, "http://127.0.0.1:9"));
        let request = pb::RegisterSubsystemRequest { registration, lease: None };
        client.register_subsystem(Stage::request(&token, request)).await.map(tonic::Response::into_inner)
    };
    for name in ["prices", "news"] {
        let registered = register(name).await.unwrap().subsystem.unwrap();
        assert_eq!(registered.owner, "jwt:alice", "{name}");
    }
    assert_eq!(register("other").await.unwrap_err().code(), Code::PermissionDenied);
    // One text is one group, and an audience may be one of several.
    let one = with(claims("bob", &[]), "groups", "team-prices".into());
    let (_, said) = stage.whoami(&p256.sign(&with(one, "aud", json!(["x", AUDIENCE])))).await;
    assert!(said.contains("jwt:bob") && said.contains("REGISTRAR"), "{said}");
    // Over HTTP.
    let authorization = format!("Authorization: Bearer {token}");
    let answer = send(stage.service.admin(), "GET /api/status", &["Host: localhost", &authorization]).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_jwt_that_is_not_valid_is_refused() {
    let (key, unknown, other) = (Key::p256("a"), Key::p256("b"), Key::p256("a"));
    let rsa = Key::rsa("r").await;
    let stage = Stage::new(&[&key, &rsa], "max_lifetime = \"1h\"", VIEWERS).await;
    let good = claims("alice", &[]);
    stage.status(&key.sign(&good)).await.unwrap();
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    let none = |signature: &str| format!("{}.{}.{signature}", part(&json!({"alg": "none", "kid": "a"})), part(&good));
    // With what everybody knows as the secret.
    let public = BASE64_URL_SAFE_NO_PAD.decode(key.public()["x"].as_str().unwrap()).unwrap();
    let hs256 = Header { kid: Some("a".to_owned()), ..Header::new(Algorithm::HS256) };
    let hs256 = encode(&hs256, &good, &EncodingKey::from_secret(&public).unwrap()).unwrap();
    let of_rsa = Header { kid: Some("r".to_owned()), ..Header::new(Algorithm::RS512) };
    let no_kid = encode(&Header::new(Algorithm::ES256), &good, &key.private).unwrap();
    let mut critical = Header { kid: Some("a".to_owned()), ..Header::new(Algorithm::ES256) };
    critical.crit = Some(vec!["x".to_owned()]);
    let many: Vec<_> = (0..257).map(|n| n.to_string()).collect();
    let claim = |claim: &str, value: Value| key.sign(&with(good.clone(), claim, value));
    let signed = key.sign(&good);
    let (start, signature) = signed.rsplit_once('.').unwrap();
    let (_, other_signature) = other.sign(&good).rsplit_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    for (what, token, why) in [
        ("alg none", none(""), "JWT"),
        ("alg none, signed", none(signature), "JWT"),
        ("HS256 with the public key", hs256, "`alg`"),
        ("another algorithm of RSA", encode(&of_rsa, &good, &rsa.private).unwrap(), "`alg`"),
        ("an unknown kid", unknown.sign(&good), "`kid`"),
        ("no kid", no_kid, "`kid`"),
        ("a critical extension", encode(&critical, &good, &key.private).unwrap_or_default(), ""),
        ("another key with its kid", other.sign(&good), "signature"),
        ("the signature of another key", format!("{start}.{other_signature}"), "signature"),
        ("no signature", format!("{start}."), "signature"),
        (
            "another payload",
            format!("{}.{}.{signature}", start.split('.').next().unwrap(), part(&claims("bob", &[]))),
            "signature",
        ),
        ("another issuer", claim("iss", "https://elsewhere".into()), "`iss`"),
        ("a list of issuers", claim("iss", json!([ISSUER])), "`iss`"),
        ("no issuer", claim("iss", Value::Null), "`iss`"),
        ("another audience", claim("aud", "other".into()), "`aud`"),
        ("no audience", claim("aud", Value::Null), "`aud`"),
        ("no exp", claim("exp", Value::Null), "`exp`"),
        ("exp as text", claim("exp", (now() + 60).to_string().into()), "`exp`"),
        ("exp far away", claim("exp", json!(1e300)), "`exp`"),
        ("no sub", claim("sub", Value::Null), "`sub`"),
        ("a sub with a space", claim("sub", "a b".into()), "`sub`"),
        ("a sub that is too long", claim("sub", "a".repeat(257).into()), "`sub`"),
        ("groups that are no texts", claim("groups", json!([1])), "`groups`"),
        ("too many groups", claim("groups", json!(many)), "`groups`"),
        ("not valid yet", claim("nbf", (now() + 600).into()), "not valid before"),
        ("nbf as text", claim("nbf", "0".into()), "`nbf`"),
        ("no iat", claim("iat", Value::Null), "`iat`"),
        ("too long", claim("iat", (now() - 100).into()), "max_lifetime"),
        ("issued later", key.sign(&with(claims_until(7200), "iat", (now() + 7000).into())), "max_lifetime"),
        ("two parts", "a.b".to_owned(), "JWT"),
        ("four parts", format!("{signed}.a"), "JWT"),
        ("not base64url", format!("{signed}="), "JWT"),
        ("not JSON", "YQ.YQ.YQ".to_owned(), "JWT"),
        ("too large", key.sign(&with(good.clone(), "x", "x".repeat(7 << 10).into())), "JWT"),
    ] {
        assert!(stage.status(&token).await.is_err(), "{what}");
        let (code, reason, message) = stage.refusal(&token).await;
        assert_eq!((code, reason.as_str()), (Code::Unauthenticated, "CREDENTIAL_INVALID"), "{what}: {message}");
        assert!(message.contains(why), "{what}: {message}");
    }
    let expired = with(with(good.clone(), "iat", (now() - 60).into()), "exp", (now() - 1).into());
    let (code, reason, message) = stage.refusal(&key.sign(&expired)).await;
    assert_eq!((code, reason.as_str()), (Code::Unauthenticated, "CREDENTIAL_EXPIRED"), "{message}");
    // No token is written down.
    let log = stage.home.log();
    assert!(log.contains("a call was denied") && !log.contains(start), "{log}");
}

#[tokio::test]
async fn a_watch_ends_when_its_jwt_expires_is_revoked_or_loses_its_key() {
    let (old, new) = (Key::p256("old"), Key::p256("new"));
    let stage = Stage::new(&[&old], "", VIEWERS).await;
    let watch = async |token: &str| {
        let mut client = stage.service.client().await;
        let watch = client.watch_cycles(Stage::request(token, pb::WatchCyclesRequest::default()));
        let mut events = watch.await.unwrap().into_inner();
        patiently("the first event", next_event(&mut events)).await.unwrap();
        events
    };
    let end = async |mut events| loop {
        match patiently("the end of the stream", next_event(&mut events)).await {
            Ok(_) => {}
            Err(status) => break (status.code(), reason_of(&status).why),
        }
    };
    let short = with(claims("alice", &[]), "exp", (now() + 5).into());
    let (of_short, of_old) = (watch(&old.sign(&short)).await, watch(&old.sign(&claims("alice", &[]))).await);
    assert_eq!(end(of_short).await, (Code::Unauthenticated, "CREDENTIAL_EXPIRED".into()));
    // The file of the keys is replaced as a whole.
    fs::write(stage.home.path("new.json"), set(&[&new])).unwrap();
    fs::rename(stage.home.path("new.json"), stage.home.path("jwks.json")).unwrap();
    assert_eq!(end(of_old).await, (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    let (of_alice, mut of_bob) =
        (watch(&new.sign(&claims("alice", &[]))).await, watch(&new.sign(&claims("bob", &[]))).await);
    // A file that can't be used leaves the keys as they are.
    fs::write(stage.home.path("jwks.json"), "{").unwrap();
    stage.home.logged("the credentials of callers are invalid", 1).await;
    let revoked =
        config(&stage.home.path("jwks.json"), "", VIEWERS).replace("[access]", "[access]\nrevoked = [\"jwt:alice\"]");
    fs::write(stage.home.path("jwks.json"), set(&[&new])).unwrap();
    fs::write(stage.home.path("orchestrator.toml"), revoked).unwrap();
    assert_eq!(end(of_alice).await, (Code::Unauthenticated, "CREDENTIAL_INVALID".into()));
    assert!(futures_util::FutureExt::now_or_never(of_bob.message()).is_none(), "it is still open");
}

#[tokio::test]
async fn an_issuer_that_can_not_be_used_is_refused_at_the_start() {
    let key = Key::p256("a");
    let short = json!({"kty": "RSA", "e": "AQAB", "n": BASE64_URL_SAFE_NO_PAD.encode([0xff; 128])});
    let mut secret = key.public();
    secret["d"] = "AAAA".into();
    let mut mixed = key.public();
    mixed["alg"] = "RS256".into();
    let keys = |keys: Value| json!({"keys": keys}).to_string();
    let home = Home::new();
    let (config_file, jwks) = (home.path("orchestrator.toml"), home.path("jwks.json"));
    for (text, problem) in [
        ("[]".to_owned(), "is not a set of keys"),
        (keys(json!([])), "has no key that signs"),
        (keys(json!([{"kty": "oct", "kid": "a", "k": "AAAA"}])), "keys[0] is secret"),
        (keys(json!([key.public(), secret])), "keys[1] is secret"),
        (keys(json!([mixed])), "keys[0] has the `alg` RS256, which is not one of its"),
        (keys(json!([short])), "at least 2,048 bits"),
        // Skipped, as the standard wants.
        (
            keys(json!([{"kty": "new"}, {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"}])),
            "has no key that signs",
        ),
        (keys(vec![key.public(); 65].into()), "has 65 keys; the limit is 64"),
    ] {
        fs::write(&jwks, text).unwrap();
        fs::write(&config_file, config(&jwks, "", VIEWERS)).unwrap();
        let args = ["serve", "--config", &config_file.display().to_string(), "--listen", "127.0.0.1:0"];
        let (exit, said) =
            orchestrator(None, &[&args[..], &["--admin-listen", "off", "--store", "memory:"]].concat()).await;
        assert!(exit != 0 && said.contains("jwks.json") && said.contains(problem), "{problem}: {exit} {said}");
    }
    fs::write(&config_file, "[access.jwt]\nissuer = \"a\"\n").unwrap();
    let (exit, said) = orchestrator(None, &["check", "--config", &config_file.display().to_string()]).await;
    assert!(
        exit == 2 && said.contains("access.jwt.issuer needs access.jwt.audience and access.jwt.jwks_file as well"),
        "{said}"
    );
}

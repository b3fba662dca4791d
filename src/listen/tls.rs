//! TLS of a listening address, by rustls. The files are read elsewhere; here their contents become one complete
//! configuration, which replaces the earlier one as a whole.

use std::{
    fmt::{self, Debug, Display},
    io,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use super::{
    connection::{Secure, Secured},
    peer::{Certificates, Untrusted},
    repeated::Repeated,
};
use crate::{
    pem::{Pem, Validity, first_expiry, unix_time},
    transport::{Origin, Stream},
};
use bytes::Bytes;
use futures_util::FutureExt;
use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, copy, sink},
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig,
        crypto::aws_lc_rs,
        server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
        time_provider::TimeProvider,
        version::{TLS12, TLS13},
    },
};
use webpki::EndEntityCert;

/// Everything that makes the TLS of one address.
pub(crate) struct Material {
    /// The certificate of the service, and after it the intermediate ones that its clients need to verify it.
    pub(crate) certificate: Pem,
    /// Its private key: PKCS #8, PKCS #1 or SEC 1, not encrypted.
    pub(crate) key: Pem,
    /// The verifier of clients' certificates. Without it, none are requested.
    pub(crate) clients: Option<Clients>,
    /// True if clients may speak TLS 1.2; otherwise only 1.3.
    pub(crate) allows_1_2: bool,
}

/// How certificates of clients are verified.
pub(crate) struct Clients {
    /// The certificates of the trusted authorities.
    pub(crate) ca: Pem,
    /// True if connections without a certificate are refused.
    pub(crate) are_required: bool,
    /// The only URI in the certificate of a client, if other clients are refused.
    pub(crate) only: Option<String>,
}

/// The protocol over TLS.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    /// Its name in ALPN.
    /// <https://www.iana.org/assignments/tls-extensiontype-values/tls-extensiontype-values.xhtml#alpn-protocol-ids>
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }

    /// The answer to a client whose connection is refused, with the reason.
    fn refusal(self, words: &str) -> Vec<u8> {
        match self {
            Self::Http1 => {
                let head = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n";
                format!("{head}content-length: {}\r\n\r\n{words}\n", words.len() + 1).into_bytes()
            }
            Self::Http2 => {
                /// Each connection begins with these settings: none.
                const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
                /// GOAWAY. RFC 9113, 6.8.
                const GOAWAY: [u8; 6] = [7, 0, 0, 0, 0, 0];
                /// No stream was processed; INADEQUATE_SECURITY.
                const REASON: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 0xc];
                // RFC 9113, 4.1: a frame begins with its length in three bytes.
                #[allow(clippy::cast_possible_truncation, reason = "it is short")]
                let [_, length @ ..] = ((REASON.len() + words.len()) as u32).to_be_bytes();
                [&SETTINGS[..], &length, &GOAWAY, &REASON, words.as_bytes()].concat()
            }
        }
    }
}

/// A complete configuration.
pub(crate) struct Loaded {
    config: Arc<ServerConfig>,
    /// Verifies the certificates of clients.
    clients: Option<Arc<dyn ClientCertVerifier>>,
    /// The only URI in the certificate of a client, if other clients are refused.
    only: Option<String>,
    /// When the certificate of the service is valid.
    validity: Validity,
    /// When the first certificate of each file expires.
    expiries: Vec<(PathBuf, Timestamp)>,
}

impl Loaded {
    /// Makes it from these contents. Certificates may have expired.
    ///
    /// # Errors
    /// A file has other contents than expected, or the key belongs to another certificate.
    pub(crate) fn of(material: &Material, protocol: Protocol, now: Now) -> Result<Self, String> {
        let Material { certificate, key, clients, allows_1_2 } = material;
        let chain = certificate.certificates()?;
        let validity = Validity::of(&chain[0]).map_err(|error| certificate.refused(&error))?;
        let mut expiries: Vec<_> = first_expiry(&chain).map(|it| (certificate.path.clone(), it)).into_iter().collect();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let versions: &[_] = if *allows_1_2 { &[&TLS13, &TLS12] } else { &[&TLS13] };
        let config = ServerConfig::builder_with_details(provider.clone(), Arc::new(Time(now)))
            .with_protocol_versions(versions)
            .map_err(|error| certificate.refused(&error))?;
        let only = clients.as_ref().and_then(|clients| clients.only.clone());
        let clients = match clients {
            None => None,
            Some(Clients { ca, are_required, .. }) => {
                let authorities = ca.certificates()?;
                expiries.extend(first_expiry(&authorities).map(|it| (ca.path.clone(), it)));
                let mut roots = RootCertStore::empty();
                for authority in authorities {
                    roots.add(authority).map_err(|error| ca.refused(&error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                let verifier = if *are_required { verifier } else { verifier.allow_unauthenticated() };
                Some(verifier.build().map_err(|error| ca.refused(&error))?)
            }
        };
        let config = match &clients {
            None => config.with_no_client_auth(),
            Some(verifier) => config.with_client_cert_verifier(verifier.clone()),
        };
        let made = config.with_single_cert(chain, key.private_key()?);
        let mut config = made.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => key.belongs_elsewhere(certificate),
            rustls::Error::InvalidCertificate(_) => certificate.refused(&error),
            error => key.refused(&error),
        })?;
        config.alpn_protocols = vec![protocol.alpn().to_vec()];
        // A resumed session would have the certificates of the client as they were, without verifying them again.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self { config: Arc::new(config), clients, only, validity, expiries })
    }

    /// Why a client that has shown these certificates is refused, if it is.
    fn refusal(&self, shown: Option<&[CertificateDer<'_>]>) -> Option<String> {
        let only = self.only.as_deref()?;
        let own = shown.and_then(<[_]>::first).and_then(|own| EndEntityCert::try_from(own).ok());
        let is_accepted = own.is_some_and(|own| own.valid_uri_names().eq([only]));
        (!is_accepted).then(|| format!("only {only} may call"))
    }

    /// The problem of the service's certificate at this time: it is not valid yet, or no longer.
    pub(crate) fn invalid(&self, now: Timestamp) -> Option<String> {
        self.validity.problem(now)
    }

    /// When the first certificate of each file expires.
    pub(crate) fn expiries(&self) -> &[(PathBuf, Timestamp)] {
        &self.expiries
    }
}

/// The clock by which certificates of clients are verified.
pub(crate) type Now = Arc<dyn Fn() -> Timestamp + Send + Sync>;

struct Time(Now);

impl Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Time")
    }
}

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time((self.0)()))
    }
}

/// The TLS of one address.
pub(crate) struct Tls {
    protocol: Protocol,
    /// True if clients without TLS are accepted as well.
    takes_plaintext: bool,
    current: Mutex<Arc<Loaded>>,
    plaintext: Repeated,
    failed: Repeated,
}

impl Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

impl Tls {
    /// Bytes of records that rustls may hold until the socket takes them: a piece of an answer, with the head of its
    /// frame. The default is 64 KiB for each connection.
    const MAX_UNSENT: usize = 20 << 10;
    /// Time for a client to read why it is refused.
    const PARTING: Duration = Duration::from_secs(1);
    /// Bytes that are still read from such a client: a connection that is closed with unread bytes is reset, and then
    /// the client may not see the reason.
    const LEFT: u64 = 64 << 10;

    /// TLS with this configuration. If it `takes_plaintext`, clients without TLS are accepted as well.
    pub(crate) fn new(protocol: Protocol, loaded: Loaded, takes_plaintext: bool) -> Arc<Self> {
        let (plaintext, failed) = Default::default();
        Arc::new(Self { protocol, takes_plaintext, current: Mutex::new(Arc::new(loaded)), plaintext, failed })
    }

    /// The protocol over it.
    pub(crate) fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The configuration of new connections.
    pub(crate) fn current(&self) -> Arc<Loaded> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses this configuration for new connections; those that are open keep theirs.
    pub(crate) fn replace(&self, loaded: Loaded) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(loaded);
    }

    /// Makes the handshake of accepted connections.
    pub(crate) fn secure(self: &Arc<Self>) -> Arc<Secure> {
        let tls = self.clone();
        Arc::new(move |stream, state| {
            let (tls, peer) = (tls.clone(), state.origin());
            async move { tls.accept(stream, peer).await }.boxed()
        })
    }

    async fn accept(self: Arc<Self>, mut stream: Box<dyn Stream>, peer: Origin) -> io::Result<Secured> {
        /// The first byte of a handshake. RFC 8446, 5.1.
        const HANDSHAKE: u8 = 22;
        // Load balancers connect and leave, which is no failure.
        let first = stream.read_u8().await?;
        if first != HANDSHAKE && self.takes_plaintext {
            if let Some(times) = self.plaintext.note() {
                tracing::warn!(%peer, times, "a client speaks without TLS, which access.mode = \"enforce\" will refuse");
            }
            return Ok(Secured { stream: Box::new(Again { first: Some(first), stream }), certificates: None });
        }
        if first != HANDSHAKE {
            if let Some(times) = self.plaintext.note() {
                tracing::warn!(%peer, times, "a client speaks without TLS to an address with TLS: it needs https://");
            }
            stream.write_all(&self.protocol.refusal("this address speaks TLS: use https://")).await?;
            part(stream).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the client does not speak TLS"));
        }
        let stream = Again { first: Some(first), stream };
        let current = self.current();
        let acceptor = TlsAcceptor::from(current.config.clone());
        let handshake = acceptor.accept_with(stream, |connection| connection.set_buffer_limit(Some(Self::MAX_UNSENT)));
        match handshake.into_fallible().await {
            Ok(mut stream) => {
                if let Some(refusal) = current.refusal(stream.get_ref().1.peer_certificates()) {
                    if let Some(times) = self.failed.note() {
                        tracing::warn!(%peer, times, "a client was refused: {refusal}");
                    }
                    stream.write_all(&self.protocol.refusal(&refusal)).await?;
                    part(stream).await;
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, refusal));
                }
                let shown = stream.get_ref().1.peer_certificates();
                let shown = shown.map(|chain| {
                    let chain = chain.iter().map(|it| Bytes::copy_from_slice(it)).collect();
                    Arc::new(Shown::of(chain, self, Some(current))) as Arc<dyn Certificates>
                });
                Ok(Secured { stream: Box::new(stream), certificates: shown })
            }
            Err((error, stream)) => {
                if let Some(times) = self.failed.note() {
                    tracing::warn!(%peer, %error, times, "a TLS handshake failed");
                }
                part(stream).await;
                Err(error)
            }
        }
    }
}

/// The certificates that a client has shown.
struct Shown {
    chain: Vec<Bytes>,
    /// When its own certificate expires.
    expires_at: Timestamp,
    /// When the first of all of them expires: the others may not be needed to verify its own.
    all_expire_at: Timestamp,
    tls: Arc<Tls>,
    /// The configuration by which they were verified last: under the same one, only time can end their validity.
    verified_by: Mutex<Option<Arc<Loaded>>>,
}

impl Shown {
    fn of(chain: Vec<Bytes>, tls: Arc<Tls>, verified_by: Option<Arc<Loaded>>) -> Self {
        let shown: Vec<_> = chain.iter().map(|it| CertificateDer::from(&it[..])).collect();
        let own = first_expiry(&shown[..shown.len().min(1)]).unwrap_or(Timestamp::MAX);
        let all = first_expiry(&shown).unwrap_or(Timestamp::MAX);
        Self { chain, expires_at: own, all_expire_at: all, tls, verified_by: Mutex::new(verified_by) }
    }

    fn verified_by(&self) -> MutexGuard<'_, Option<Arc<Loaded>>> {
        // A panic leaves the value usable.
        self.verified_by.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

impl Certificates for Shown {
    fn chain(&self) -> &[Bytes] {
        &self.chain
    }

    fn verify(&self, now: Timestamp) -> Result<Timestamp, Untrusted> {
        if self.expires_at <= now {
            return Err(Untrusted::Expired(self.expires_at));
        }
        let current = self.tls.current();
        let is_same = self.verified_by().as_ref().is_some_and(|by| Arc::ptr_eq(&current, by));
        if is_same && now < self.all_expire_at {
            return Ok(self.expires_at);
        }
        let refused = |problem: &dyn Display| Untrusted::Other(problem.to_string());
        let verifier = current.clients.as_ref();
        let verifier = verifier.ok_or_else(|| refused(&"no authorities of clients are configured any more"))?;
        let mut chain = self.chain.iter().map(|it| CertificateDer::from(&it[..]));
        let own = chain.next().ok_or_else(|| refused(&"the client has shown no certificate"))?;
        let intermediates: Vec<_> = chain.collect();
        verifier.verify_client_cert(&own, &intermediates, unix_time(now)).map_err(|error| refused(&error))?;
        *self.verified_by() = Some(current);
        Ok(self.expires_at)
    }

    fn of_another(&self, chain: Vec<Bytes>) -> Arc<dyn Certificates> {
        Arc::new(Self::of(chain, self.tls.clone(), None))
    }
}

/// Closes the connection of a refused client, after it has read the reason.
async fn part(mut stream: impl Stream) {
    let parting = async {
        stream.shutdown().await?;
        copy(&mut stream.take(Tls::LEFT), &mut sink()).await
    };
    let _ = timeout(Tls::PARTING, parting).await;
}

/// A stream whose first byte has been looked at, and is read again.
struct Again<S> {
    first: Option<u8>,
    stream: S,
}

impl<S: AsyncRead + Unpin> AsyncRead for Again<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.first.take() {
            Some(first) if buf.remaining() > 0 => {
                buf.put_slice(&[first]);
                Poll::Ready(Ok(()))
            }
            first => {
                self.first = first;
                Pin::new(&mut self.stream).poll_read(cx, buf)
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Again<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use rustls_pki_types::{PrivateKeyDer, ServerName, pem::PemObject};
    use tokio::{
        io::{DuplexStream, duplex},
        time::Instant,
    };
    use tokio_rustls::{TlsConnector, rustls::ClientConfig};

    use super::{super::connection::Connection, *};

    /// TLS with a certificate of its own, and of clients that trust it and, if asked, show it.
    fn tls() -> (Arc<Tls>, TlsConnector) {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let pem = |key: &str, text: String| Pem { name: String::from(key), path: key.into(), bytes: text.into_bytes() };
        let material = Material {
            certificate: pem("cert_file", cert.pem()),
            key: pem("key_file", signing_key.serialize_pem()),
            clients: Some(Clients { ca: pem("client_ca_file", cert.pem()), are_required: false, only: None }),
            allows_1_2: false,
        };
        let loaded = Loaded::of(&material, Protocol::Http2, Arc::new(Timestamp::now)).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
        let client = client.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let key = PrivateKeyDer::from_pem_slice(signing_key.serialize_pem().as_bytes()).unwrap();
        let mut client = client.with_client_auth_cert(vec![cert.der().clone()], key).unwrap();
        client.alpn_protocols = vec![b"h2".to_vec()];
        (Tls::new(Protocol::Http2, loaded, false), TlsConnector::from(Arc::new(client)))
    }

    async fn accepted(tls: &Arc<Tls>) -> (DuplexStream, Connection) {
        let (peer, stream) = duplex(64 << 10);
        (peer, Connection::secured(stream, Some(&*tls.secure())).await)
    }

    fn localhost() -> ServerName<'static> {
        ServerName::try_from("localhost").unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_gone_after_ten_seconds_wherever_it_hangs() {
        let (tls, client) = tls();
        for said in [&[][..], &[22], &[22, 3, 1, 2, 0, 1]] {
            // The first of the polled operations drives the handshake and the limit.
            for is_written in [false, true] {
                let (mut peer, mut connection) = accepted(&tls).await;
                let begun = Instant::now();
                peer.write_all(said).await.unwrap();
                let ended = if is_written {
                    connection.write_all(b"hello").await
                } else {
                    connection.read_u8().await.map(drop)
                };
                assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
                assert_eq!(begun.elapsed().as_secs(), 10);
                assert!(connection.broken().is_set());
            }
        }
        // It is silent after the handshake.
        let (peer, mut connection) = accepted(&tls).await;
        let begun = Instant::now();
        let client = tokio::spawn(async move { client.connect(localhost(), peer).await });
        assert_eq!(connection.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 10);
        client.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn certificates_of_a_peer_are_known_after_the_handshake() {
        let (tls, client) = tls();
        let (peer, mut connection) = accepted(&tls).await;
        let state = connection.state();
        assert!(state.peer().certificates.is_none());
        let client = tokio::spawn(async move {
            let mut stream = client.connect(localhost(), peer).await.unwrap();
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
            stream.flush().await.unwrap();
            stream
        });
        assert_eq!(connection.read_u8().await.unwrap(), b'P');
        let shown = state.peer().certificates.unwrap();
        let [shown] = shown.chain() else { panic!("it has shown {} certificates", shown.chain().len()) };
        let stream = client.await.unwrap();
        assert_eq!(shown[..], stream.get_ref().1.peer_certificates().unwrap()[0][..], "both have the same");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_breaks_its_connection_after_a_minute() {
        let (tls, client) = tls();
        let (peer, mut connection) = accepted(&tls).await;
        let state = connection.state();
        let client = tokio::spawn(async move { client.connect(localhost(), peer).await });
        connection.write_all(&[0; 16 << 10]).await.unwrap();
        connection.flush().await.unwrap();
        let _client = client.await.unwrap().unwrap();
        let begun = Instant::now();
        // Small writes do not renew its time, though the buffer of TLS takes some.
        let error = loop {
            let written = match connection.write_all(&[0; 1 << 10]).await {
                Ok(()) => connection.flush().await,
                failed => failed,
            };
            if let Err(error) = written {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 60);
        assert!(state.is_stalled());
    }

    #[tokio::test]
    async fn a_client_without_tls_is_told_so_by_its_own_protocol() {
        let (tls, _) = tls();
        let (mut peer, mut connection) = accepted(&tls).await;
        peer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        let told = tokio::spawn(async move {
            let (mut send, connection) = h2::client::handshake(peer).await.unwrap();
            tokio::spawn(async move { drop(connection.await) });
            let request = http::Request::get("http://localhost/").body(()).unwrap();
            let (answer, _) = send.send_request(request, true).unwrap();
            answer.await.unwrap_err().to_string()
        });
        assert!(connection.read_u8().await.is_err());
        let told = told.await.unwrap();
        assert!(told.contains("this address speaks TLS: use https://"), "{told}");
    }
}

//! The sockets of this machine, with their options.

use std::{
    fs::Permissions,
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::BoxFuture;
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpListener, TcpStream, ToSocketAddrs, UnixListener, UnixStream},
    time::{Instant, timeout_at},
};

use super::{Admit, Connected, Destination, Listener, Origin, Transport, resolve::Resolver, was_refused};

/// The kernel detects dead peers, not HTTP/2 pings: servers of grpcio and grpc-go treat pings as abuse, and end working
/// calls. The first TCP keepalive probe is sent after this silence,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// further ones at this interval,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// and after this number of unanswered probes the connection is closed.
const KEEPALIVE_PROBES: u32 = 3;
/// Data that is not acknowledged or not received for this long closes the connection as well.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED: Duration = Duration::from_mins(1);

/// Most bytes that the kernel accepts but can't send yet. By default it accepts megabytes, and no more before a third
/// of them is sent: a slow peer would look like a stalled one, and keepalive frames would wait behind them.
#[cfg(target_os = "linux")]
const MAX_UNSENT: u32 = 16 << 10;

/// The sockets of this machine: TCP, and sockets in the file system.
#[derive(Debug)]
pub struct Sockets {
    resolver: Resolver,
}

impl Default for Sockets {
    fn default() -> Self {
        Self { resolver: Resolver::system() }
    }
}

impl Transport for Sockets {
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<(Box<dyn Listener>, SocketAddr)>> {
        Box::pin(listen_at(address))
    }

    fn listen_at_path<'a>(&'a self, path: &'a Path, mode: u32) -> BoxFuture<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(listen_at_path(path, Some(mode)))
    }

    fn connect<'a>(
        &'a self,
        to: &'a Destination,
        admit: Admit<'a>,
        timeout: Duration,
    ) -> BoxFuture<'a, io::Result<Connected>> {
        let time = Time { timeout, until: Instant::now() + timeout };
        Box::pin(async move {
            match to {
                Destination::Unix { path, within } => {
                    let path = match within {
                        Some(directory) => time.limit(inside(directory, path)).await,
                        None => Ok(path.clone()),
                    };
                    let socket = match path {
                        Ok(path) => time.limit(UnixStream::connect(path)).await,
                        Err(why) => Err(why),
                    };
                    let socket = socket.map_err(|why| unconnected(&why))?;
                    let origin = user_of(&socket);
                    Ok((Box::new(socket) as _, origin))
                }
                Destination::Tcp { host, port } => {
                    let addresses = time.limit(self.resolver.resolve(host, *port)).await;
                    let unknown = |why| io::Error::other(format!("can't find the address of {host}: {why}"));
                    let addresses = addresses.map_err(unknown)?;
                    let (mut admitted, mut refused) = (Vec::new(), None);
                    for address in addresses {
                        match admit(address.ip()) {
                            Ok(()) => admitted.push(address),
                            Err(why) => refused = refused.or(Some(why)),
                        }
                    }
                    if let Some(why) = refused.filter(|_| admitted.is_empty()) {
                        return Err(io::Error::other(format!("can't connect to {host}, {why}")));
                    }
                    let socket = first_of(&admitted, time).await;
                    let socket = socket.map_err(|why| unconnected(&why))?;
                    let origin = socket.peer_addr().map_or(Origin::Unknown, |peer| Origin::Address(peer.ip()));
                    Ok((Box::new(socket) as _, origin))
                }
            }
        })
    }
}

/// The error if no address takes a connection, of the same kind.
fn unconnected(why: &io::Error) -> io::Error {
    io::Error::new(why.kind(), format!("can't connect: {why}"))
}

/// The path without links, if it is in this directory.
async fn inside(directory: &Path, path: &Path) -> io::Result<PathBuf> {
    let (real, directory) = (tokio::fs::canonicalize(path).await?, tokio::fs::canonicalize(directory).await?);
    if real.starts_with(&directory) {
        return Ok(real);
    }
    let (path, directory) = (path.display(), directory.display());
    Err(io::Error::other(format!("{path} is a link that leads out of {directory}")))
}

/// The user of the process at the other end of a connection, as of the time when that process connected, or began to
/// listen.
fn user_of(socket: &UnixStream) -> Origin {
    socket.peer_cred().map_or(Origin::Unknown, |peer| Origin::User(peer.uid()))
}

/// Listens at an address, or at that of a name.
pub(crate) async fn listen_at(address: impl ToSocketAddrs) -> io::Result<(Box<dyn Listener>, SocketAddr)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    Ok((Box::new(listener), address))
}

/// Listens at a path of the file system, as [`Transport::listen_at_path`]; without a mode, the file has that which the
/// process gives to new files.
pub(crate) async fn listen_at_path(path: &Path, mode: Option<u32>) -> io::Result<Box<dyn Listener>> {
    let listener = match bind(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path).await => {
            tokio::fs::remove_file(path).await?;
            bind(path, mode)
        }
        bound => bound,
    }?;
    let file = std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))?;
    Ok(Box::new(AtPath { listener, path: path.to_owned(), file }))
}

fn bind(path: &Path, mode: Option<u32>) -> io::Result<UnixListener> {
    /// Connections that the kernel keeps until they are accepted, as tokio has it.
    const WAITING: i32 = 1024;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    if let Some(mode) = mode {
        // Before it listens: nobody can connect in between.
        std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    socket.listen(WAITING)?;
    UnixListener::from_std(socket.into())
}

/// True if an earlier process has left a socket at this path. A connection to any other file is refused as well.
async fn is_left_over(path: &Path) -> bool {
    let is_socket = tokio::fs::symlink_metadata(path).await.is_ok_and(|file| file.file_type().is_socket());
    let connected = UnixStream::connect(path).await;
    is_socket && connected.is_err_and(|refused| refused.kind() == io::ErrorKind::ConnectionRefused)
}

/// Listens at a path, and removes its file at the end.
struct AtPath {
    listener: UnixListener,
    path: PathBuf,
    /// Its device and inode: another process may have replaced the file.
    file: (u64, u64),
}

impl Drop for AtPath {
    fn drop(&mut self) {
        let is_there = std::fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if is_there && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "can't remove the socket");
        }
    }
}

/// The time that connecting may take.
#[derive(Clone, Copy)]
struct Time {
    timeout: Duration,
    until: Instant,
}

impl Time {
    async fn limit<T>(self, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {:?}", self.timeout));
        timeout_at(self.until, step).await.map_err(late)?
    }
}

/// The first address that takes a connection. Each has its part of the time that is left, so that one that does not
/// answer leaves some for the next.
///
/// # Errors
/// No address does. The kind says that they refused it only if all of them did.
async fn first_of(addresses: &[SocketAddr], time: Time) -> io::Result<TcpStream> {
    let mut kind = io::ErrorKind::ConnectionRefused;
    let mut errors = Vec::new();
    for (tried, address) in addresses.iter().enumerate() {
        let left = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        let now = Instant::now();
        let part = Time { until: now + time.until.saturating_duration_since(now) / left, ..time };
        match part.limit(TcpStream::connect(address)).await {
            Ok(socket) => {
                let unusable = |error| io::Error::other(format!("the socket can't be set up: {error}"));
                set_up_connected(&socket).map_err(unusable)?;
                return Ok(socket);
            }
            Err(error) if addresses.len() == 1 => return Err(error),
            Err(error) => {
                if was_refused(kind) {
                    kind = error.kind();
                }
                errors.push(format!("{address}: {error}"));
            }
        }
    }
    Err(io::Error::new(kind, errors.join("; ")))
}

fn set_up_connected(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
    Ok(())
}

fn set_up_accepted(socket: &TcpStream) {
    // Without it small messages wait for acknowledgements of earlier ones.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "can't set TCP_NODELAY");
    }
    #[cfg(target_os = "linux")]
    if let Err(error) = SockRef::from(socket).set_tcp_notsent_lowat(MAX_UNSENT) {
        tracing::debug!(%error, "can't set TCP_NOTSENT_LOWAT");
    }
}

impl Listener for TcpListener {
    fn accept(&self) -> BoxFuture<'_, io::Result<Connected>> {
        Box::pin(async {
            let (stream, peer) = self.accept().await?;
            set_up_accepted(&stream);
            Ok((Box::new(stream) as _, Origin::Address(peer.ip())))
        })
    }
}

impl Listener for AtPath {
    fn accept(&self) -> BoxFuture<'_, io::Result<Connected>> {
        Box::pin(async {
            let (stream, _path) = self.listener.accept().await?;
            let origin = user_of(&stream);
            Ok((Box::new(stream) as _, origin))
        })
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::net::IpAddr;

    use futures_util::FutureExt;
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn only_admitted_addresses_of_a_name_are_connected_to() {
        let [admitted, refused] = [TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.2:0")];
        let (admitted, refused) = (admitted.await.unwrap(), refused.await.unwrap());
        let addresses = [refused.local_addr().unwrap(), admitted.local_addr().unwrap()];
        let sockets = Sockets { resolver: Resolver::by(move |_, _| Ok(addresses.to_vec())) };
        let to = Destination::Tcp { host: "both".into(), port: 1 };
        let connect = async |last: u8| {
            let admit = move |address| match address {
                IpAddr::V4(v4) if v4.octets()[3] == last => Ok(()),
                _ => Err(format!("where {address} is refused")),
            };
            let connected = sockets.connect(&to, &admit, Duration::from_secs(10)).await;
            connected.map(|(_, origin)| origin).map_err(|why| why.to_string())
        };
        assert_eq!(connect(1).await, Ok(Origin::Address([127, 0, 0, 1].into())));
        assert_eq!(connect(3).await, Err("can't connect to both, where 127.0.0.2 is refused".into()));
        // The kernel accepts connections by itself, so one that had been made would be there.
        assert!(refused.accept().now_or_never().is_none());
        drop(admitted);
    }

    #[tokio::test]
    async fn a_link_does_not_lead_out_of_the_directory_of_sockets() {
        let home = tempfile::tempdir().unwrap();
        let (inside, outside) = (home.path().join("in"), home.path().join("out"));
        std::fs::create_dir(&inside).unwrap();
        let [own, other] = [inside.join("own"), outside.clone()].map(|path| UnixListener::bind(path).unwrap());
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        std::os::unix::fs::symlink("own", inside.join("alias")).unwrap();
        let connect = async |name: &str| {
            let to = Destination::Unix { path: inside.join(name), within: Some(inside.clone()) };
            Sockets::default().connect(&to, &|_| Ok(()), Duration::from_secs(10)).await.map(|(_, origin)| origin)
        };
        let own_user = Origin::User(rustix::process::geteuid().as_raw());
        assert_eq!((connect("own").await.unwrap(), connect("alias").await.unwrap()), (own_user, own_user));
        for path in ["link", "../out", "nothing"] {
            assert!(connect(path).await.is_err(), "{path}");
        }
        assert!(other.accept().now_or_never().is_none());
        drop(own);
    }

    #[tokio::test]
    async fn what_a_slow_peer_takes_is_soon_seen() {
        const PATIENCE: Duration = Duration::from_secs(10);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        set_up_accepted(&stream);
        let fill = || {
            let mut filled = 0;
            while let Ok(written) = stream.try_write(&[0; 16 << 10]) {
                filled += written;
            }
            filled
        };
        stream.writable().await.unwrap();
        // The peer's side of the kernel gathers some before it tells ours.
        let some = fill().min(256 << 10);
        peer.read_exact(&mut vec![0; some]).await.unwrap();
        tokio::time::timeout(PATIENCE, stream.writable()).await.unwrap().unwrap();
        assert!(fill() > 0);
    }
}

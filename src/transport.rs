//! The network of a process: its listeners and connections. The sockets of this machine are one implementation, a
//! simulated network is another. TLS and HTTP/2 are layered on top of it.

mod resolve;
mod sockets;

use std::{
    fmt, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

pub use self::sockets::Sockets;
pub(crate) use self::sockets::{listen_at, listen_at_path};

/// A network, and the place of this process in it.
pub trait Transport: Send + Sync {
    /// Listens at an address, whose port may be 0, which takes a free one. Returns the address with the port that was
    /// taken.
    ///
    /// # Errors
    /// The address is in use, or is not an address of this process.
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<(Box<dyn Listener>, SocketAddr)>>;

    /// Listens at a path of the file system. The file is created with this mode, and removed when listening ends. A
    /// socket that an earlier process left there is replaced.
    ///
    /// # Errors
    /// A process listens there, something else is there, the file can't be created, or this network has no file system.
    fn listen_at_path<'a>(&'a self, path: &'a Path, mode: u32) -> BoxFuture<'a, io::Result<Box<dyn Listener>>>;

    /// Connects to a destination within the timeout, which includes the lookup of its name. Only addresses that are
    /// admitted are connected to: exactly those, without another lookup.
    ///
    /// # Errors
    /// There is no connection. The text is for people, such as "can't connect: Connection refused", and the kind says
    /// whether it [was refused](was_refused).
    fn connect<'a>(
        &'a self,
        to: &'a Destination,
        admit: Admit<'a>,
        timeout: Duration,
    ) -> BoxFuture<'a, io::Result<Connected>>;
}

/// True if connecting failed because no process listens there, or because no route leads there: not by a timeout, and
/// not by anything that the peer does once it is connected.
#[must_use]
pub fn was_refused(connecting: io::ErrorKind) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, NotFound};
    // A socket in the file system may have no file.
    matches!(connecting, ConnectionRefused | HostUnreachable | NetworkUnreachable | NotFound)
}

/// Accepts connections.
pub trait Listener: Send + Sync {
    /// Waits for a connection.
    ///
    /// # Errors
    /// The connection failed, or the process has no free file; later ones may be accepted. After EBADF, EINVAL and
    /// ENOTSOCK none will.
    fn accept(&self) -> BoxFuture<'_, io::Result<Connected>>;
}

/// A connection, and its other side.
pub type Connected = (Box<dyn Stream>, Origin);

/// Decides whether an address of a host may be connected to. The error reads well after the host and a comma.
pub type Admit<'a> = &'a (dyn Fn(IpAddr) -> Result<(), String> + Send + Sync);

/// The other side of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// The system does not say.
    #[default]
    Unknown,
    /// This address.
    Address(IpAddr),
    /// A process of this user, through a socket in the file system.
    User(u32),
}

impl Origin {
    /// The address, if it has one.
    #[must_use]
    pub fn address(self) -> Option<IpAddr> {
        if let Self::Address(address) = self { Some(address) } else { None }
    }

    /// The network that counts as one peer: an IPv4 address, or the 64-bit prefix of an IPv6 address, since a host may
    /// use any address in it (RFC 7421).
    #[must_use]
    pub fn network(self) -> Option<IpAddr> {
        Some(match self.address()?.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
            v4 @ IpAddr::V4(_) => v4,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown"),
            Self::Address(address) => write!(f, "{address}"),
            Self::User(uid) => write!(f, "uid:{uid}"),
        }
    }
}

/// The bytes of one connection, both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A destination of connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A host and its port.
    Tcp {
        /// A name or an address. An address of IPv6 may be in brackets, as in a URI.
        host: String,
        /// The port.
        port: u16,
    },
    /// A socket in the file system.
    Unix {
        /// Its path.
        path: PathBuf,
        /// The directory that it must be in, after links are followed.
        within: Option<PathBuf>,
    },
}

//! Resolves names by the system's own resolver (`getaddrinfo`), so that `/etc/hosts`, search domains and other sources
//! of the system apply.
//!
//! That resolver blocks its thread for an unlimited time and can't be interrupted. So each lookup has its own thread,
//! separate from the runtime's blocking threads, and a hanging thread is never awaited, not even at the end of the
//! process.

use std::{
    collections::HashSet,
    fmt, io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use tokio::sync::{Semaphore, oneshot};

/// Most concurrent lookups. Each uses a thread.
const AT_ONCE: usize = 64;
/// Most concurrent lookups of names whose last lookup got no answer, so that threads are left for other names.
const DOUBTFUL_AT_ONCE: usize = 16;
/// Most names that are remembered as not answered.
const MAX_DOUBTFUL: usize = 10_000;

type Lookup = Arc<dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync>;

/// Resolves names.
#[derive(Clone)]
pub(super) struct Resolver {
    lookup: Lookup,
    places: Arc<Semaphore>,
    doubtful_places: Arc<Semaphore>,
    /// Names whose latest lookup has failed or not ended yet.
    doubtful: Arc<Mutex<HashSet<String>>>,
}

impl Resolver {
    /// The system's resolver.
    pub(super) fn system() -> Self {
        Self::by(|host, port| Ok((host, port).to_socket_addrs()?.collect()))
    }

    /// A resolver with this lookup function.
    pub(super) fn by(lookup: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static) -> Self {
        let [places, doubtful_places] = [AT_ONCE, DOUBTFUL_AT_ONCE].map(|places| Arc::new(Semaphore::new(places)));
        Self { lookup: Arc::new(lookup), places, doubtful_places, doubtful: Arc::default() }
    }

    /// The addresses of a host: at least one. Waits without a limit.
    ///
    /// # Errors
    /// The host has no address, or the lookup failed.
    pub(super) async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        // In a URI, an IPv6 address is in brackets.
        if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let is_doubtful = self.doubtful().contains(host);
        let places = if is_doubtful { &self.doubtful_places } else { &self.places };
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        self.doubt(host);
        let (tell, told) = oneshot::channel();
        let (lookup, name) = (self.lookup.clone(), host.to_owned());
        thread::Builder::new().name("resolve".into()).spawn(move || {
            // Kept until the lookup has ended, even if its caller no longer waits.
            let _place = place;
            let _ = tell.send(lookup(&name, port));
        })?;
        let addresses = told.await.map_err(io::Error::other)??;
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        self.doubtful().remove(host);
        Ok(addresses)
    }

    fn doubt(&self, host: &str) {
        let mut doubtful = self.doubtful();
        if doubtful.len() >= MAX_DOUBTFUL {
            doubtful.clear();
        }
        doubtful.insert(host.to_owned());
    }

    fn doubtful(&self) -> MutexGuard<'_, HashSet<String>> {
        self.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use futures_util::future::join_all;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lookups_that_hang_do_not_block_others() {
        let (_never, hang) = mpsc::channel::<()>();
        let hang = Mutex::new(hang);
        let resolver = Resolver::by(move |host, port| {
            if host.starts_with("hanging") {
                let _ = hang.lock().unwrap().recv();
            }
            Ok(vec![([127, 0, 0, 1], port).into()])
        });
        let names: Vec<_> = (0..AT_ONCE - 1).map(|i| format!("hanging-{i}")).collect();
        // From the second time on they wait only for each other.
        for _ in 0..2 {
            let lookups = names.iter().map(|name| timeout(Duration::from_secs(1), resolver.resolve(name, 1)));
            assert!(join_all(lookups).await.iter().all(Result::is_err));
            assert_eq!(resolver.resolve("healthy", 7).await.unwrap(), [([127, 0, 0, 1], 7).into()]);
        }
        assert_eq!(resolver.resolve("[::1]", 7).await.unwrap(), ["[::1]:7".parse().unwrap()]);
    }
}

//! Replicas of one orchestrator over a store in PostgreSQL, and a fleet that they can reach.

use std::path::Path;

use futures_util::future::join_all;
use orchestrator_core::proto::orchestrator::v1 as pb;
use tempfile::TempDir;

use super::{
    door::Door,
    fleet::Fleet,
    http, patiently,
    postgres::Server,
    service::{Client, Home, Service, registration},
};

/// Replicas, each with a name.
pub struct Replicas {
    names: Vec<&'static str>,
    ttl: String,
    pub homes: Vec<Home>,
    pub services: Vec<Option<Service>>,
    /// Where the others reach each of them.
    pub doors: Vec<Option<Door>>,
    pub fleet: Fleet,
    /// The directory of what they share, such as their key.
    pub shared: TempDir,
}

impl Replicas {
    /// Replicas with these names and leases of this TTL, over a new store on a server. The first one is started first,
    /// and leads.
    pub async fn start(server: &Server, names: &[&'static str], ttl: &str) -> Self {
        Self::start_with(server, names, ttl, "http", |_, _| String::new()).await
    }

    /// The same, with another scheme, and with further configuration of each home. The directory has what they share.
    pub async fn start_with(
        server: &Server,
        names: &[&'static str],
        ttl: &str,
        scheme: &str,
        config: impl Fn(&Path, &Home) -> String,
    ) -> Self {
        let (store, mut replicas) = (server.url(), Self::none(ttl).await);
        for name in names {
            replicas.add_with(name, &store, scheme, &config).await;
            replicas.serve(name).await;
        }
        replicas
    }

    /// Replicas with these names and URLs of their common store, started together. One of them leads when this returns,
    /// and the others know it.
    pub async fn together(stores: impl IntoIterator<Item = (&'static str, String)>, ttl: &str) -> Self {
        let mut replicas = Self::none(ttl).await;
        for (name, store) in stores {
            replicas.add(name, &store).await;
        }
        replicas.serve_together().await;
        replicas
    }

    /// No replicas yet.
    pub async fn none(ttl: &str) -> Self {
        let (names, homes, services, doors) = Default::default();
        let (fleet, shared) = (Fleet::start().await, tempfile::tempdir().unwrap());
        Self { names, ttl: ttl.to_owned(), homes, services, doors, fleet, shared }
    }

    /// Adds a replica with the store at this URL, which is not started yet.
    pub async fn add(&mut self, name: &'static str, store: &str) {
        self.add_with(name, store, "http", |_, _| String::new()).await;
    }

    async fn add_with(
        &mut self,
        name: &'static str,
        store: &str,
        scheme: &str,
        config: impl Fn(&Path, &Home) -> String,
    ) {
        let (door, home) = (Door::open().await, Home::new().with_store(store));
        let (key_file, address) = (self.shared.path().join("log.key").display().to_string(), door.address());
        let cluster = format!(
            "[ledger]\nkey_files = [{key_file:?}]\n[cluster]\nreplica = {name:?}\nlease_ttl = {:?}\nadvertise = \
             \"{scheme}://{address}\"\n",
            self.ttl
        );
        let config = cluster + &config(self.shared.path(), &home);
        self.names.push(name);
        self.homes.push(home.with_config(&config));
        self.services.push(None);
        self.doors.push(Some(door));
    }

    /// Starts a replica that does not run.
    pub async fn serve(&mut self, name: &str) {
        let service = self.home(name).serve().await;
        self.serves(name, service);
    }

    /// Starts all of them at once. One of them leads when this returns, and the others know it.
    pub async fn serve_together(&mut self) {
        let services = join_all(self.homes.iter().map(Home::serve)).await;
        for (name, service) in self.names.clone().into_iter().zip(services) {
            self.serves(name, service);
        }
        let leader = self.leader().await;
        for name in self.names.iter().filter(|name| **name != leader) {
            self.follows(name).await;
        }
    }

    fn serves(&mut self, name: &str, service: Service) {
        let index = self.index(name);
        if let Some(door) = &self.doors[index] {
            door.lead_to(Some(&service));
        }
        self.services[index] = Some(service);
    }

    pub fn index(&self, name: &str) -> usize {
        self.names.iter().position(|it| *it == name).unwrap()
    }

    pub fn home(&self, name: &str) -> &Home {
        &self.homes[self.index(name)]
    }

    pub fn service(&self, name: &str) -> &Service {
        self.services[self.index(name)].as_ref().unwrap()
    }

    /// Takes a replica away from the others, so that it can be ended.
    pub fn take(&mut self, name: &str) -> Service {
        let index = self.index(name);
        self.services[index].take().unwrap()
    }

    pub async fn client(&self, name: &str) -> Client {
        self.service(name).client().await
    }

    /// Kills a replica for good: its connections end, and further ones are refused.
    pub async fn kill(&mut self, name: &str) {
        let index = self.index(name);
        self.doors[index] = None;
        self.take(name).kill().await;
    }

    /// Waits until a replica leads. Returns its name.
    pub async fn leader(&self) -> &'static str {
        self.leader_but("").await
    }

    /// The same, where one is not asked.
    pub async fn leader_but(&self, other: &str) -> &'static str {
        let leads = async {
            loop {
                for (name, service) in self.names.iter().zip(&self.services).filter(|(name, _)| **name != other) {
                    if let Some(service) = service
                        && http::get(service.admin(), "/leader").await.status == 200
                    {
                        return *name;
                    }
                }
            }
        };
        patiently("a replica to lead", leads).await
    }

    /// Waits until a replica follows a leader that it can reach. Returns the name of that.
    pub async fn follows(&self, name: &str) -> String {
        let follows = async {
            loop {
                let mut client = self.client(name).await;
                if let Ok(status) = client.status().await
                    && status.role() == pb::ReplicaRole::Follower
                    && let Some(leader) = status.leader
                {
                    return leader.name;
                }
            }
        };
        patiently("the replica to know its leader", follows).await
    }

    /// Waits until a replica is ready: a follower reaches its leader, and could take over.
    pub async fn ready(&self, name: &str) {
        let admin = self.service(name).admin();
        patiently("the replica to be ready", async { while http::get(admin, "/readyz").await.status != 200 {} }).await;
    }

    /// The value of a metric of a replica.
    pub async fn metric(&self, name: &str, metric: &str) -> Option<u64> {
        let metrics = http::get(self.service(name).admin(), "/metrics").await.text().await;
        let line = metrics.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '))?;
        Some(line.parse().unwrap())
    }

    /// Registers subsystems with only defaults, by calls of the last replica: a follower passes them on.
    pub async fn register(&self, names: &[&str]) {
        let mut client = self.client(self.names[self.names.len() - 1]).await;
        for name in names {
            client.register(registration(name, self.fleet.endpoint())).await.unwrap();
        }
    }

    /// The log of each of them.
    pub fn logs(&self) -> String {
        let of_each = self.names.iter().zip(&self.homes).map(|(name, home)| format!("{name}: {}\n", home.log()));
        of_each.collect::<Vec<_>>().join("---\n")
    }
}

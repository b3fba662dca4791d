//! The front-door test kit: a scripted fleet of fake subsystems, and a handle on the real service.

#![allow(unreachable_pub, reason = "what is `pub` is the interface of the kit")]

pub mod command;
#[cfg(target_os = "linux")]
pub mod disk;
pub mod door;
pub mod fleet;
pub mod http;
pub mod network;
pub mod pki;
pub mod postgres;
pub mod process;
pub mod raw;
pub mod replicas;
pub mod service;
pub mod terminal;
pub mod tokens;

use std::{future::Future, time::Duration};

use orchestrator_core::proto::orchestrator::v1 as pb;

use self::{
    fleet::Fleet,
    service::{Client, Home, Service, registration},
};

/// Most time for which a test waits for an event. It only turns a hang into a failure that names the event.
const PATIENCE: Duration = Duration::from_mins(1);

/// Waits for an event that must happen.
pub async fn patiently<T>(what: &str, awaited: impl Future<Output = T>) -> T {
    let came = tokio::time::timeout(PATIENCE, awaited).await;
    came.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"))
}

/// A service, a client of it, and a fleet that it can reach.
pub struct Stage {
    pub fleet: Fleet,
    pub home: Home,
    pub service: Service,
    pub client: Client,
}

impl Stage {
    /// A service with an empty home.
    pub async fn new() -> Self {
        Self::at(Home::new()).await
    }

    /// A service with this home.
    pub async fn at(home: Home) -> Self {
        let (fleet, service) = (Fleet::start().await, home.serve().await);
        let client = service.client().await;
        Self { fleet, home, service, client }
    }

    /// The same, after its service was stopped and started again.
    pub async fn restarted(self) -> Self {
        let Self { fleet, home, service, client: _ } = self;
        assert!(service.stop().await.success(), "{}", home.log());
        Self::again(fleet, home).await
    }

    /// The same, after its service was killed and started again.
    pub async fn killed(self) -> Self {
        let Self { fleet, home, service, client: _ } = self;
        service.kill().await;
        Self::again(fleet, home).await
    }

    /// A service that is started again in this home.
    pub async fn again(fleet: Fleet, home: Home) -> Self {
        let service = home.serve().await;
        let client = service.client().await;
        Self { fleet, home, service, client }
    }

    /// A registration with only defaults, behind the fleet's first endpoint.
    pub fn registration(&self, name: &str) -> pb::Registration {
        registration(name, self.fleet.endpoint())
    }

    /// Registers a subsystem behind the fleet's first endpoint, with these changes to the defaults.
    pub async fn register(&mut self, name: &str, change: impl FnOnce(&mut pb::Registration)) {
        let mut registration = self.registration(name);
        change(&mut registration);
        self.client.register(registration).await.unwrap();
    }

    /// Registers subsystems with only defaults.
    pub async fn register_all(&mut self, names: &[&str]) {
        for name in names {
            self.register(name, |_| {}).await;
        }
    }
}

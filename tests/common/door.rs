//! An address for services that come and go.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::service::Service;

/// An address that stays the same while what is behind it changes. Those who connect while nothing is there are
/// turned away.
pub struct Door {
    address: SocketAddr,
    behind: watch::Sender<Option<SocketAddr>>,
    _tasks: JoinSet<()>,
}

impl Door {
    /// Leads nowhere yet.
    pub async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let behind = watch::Sender::new(None);
        let target = behind.subscribe();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                let target = *target.borrow();
                connections.spawn(async move {
                    let Some(target) = target else { return };
                    let Ok(mut to) = TcpStream::connect(target).await else { return };
                    let _ = copy_bidirectional(&mut from, &mut to).await;
                });
            }
        });
        Self { address, behind, _tasks: tasks }
    }

    /// The address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads to this service from now on, or nowhere.
    pub fn lead_to(&self, service: Option<&Service>) {
        self.behind.send_replace(service.map(Service::address));
    }
}

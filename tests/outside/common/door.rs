//! An address for services that come and go.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::service::Service;

/// An address that stays the same while the services behind it change.
pub struct Door {
    address: SocketAddr,
    behind: watch::Sender<Behind>,
    _tasks: JoinSet<()>,
}

#[derive(Clone, Copy, PartialEq)]
enum Behind {
    /// New connections are refused.
    Nothing,
    /// New connections are refused, and existing ones are closed.
    Wall,
    /// New and existing connections get no data any more.
    Silence,
    Service(SocketAddr),
}

impl Door {
    /// A door that leads nowhere yet.
    pub async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let behind = watch::Sender::new(Behind::Nothing);
        let now = behind.subscribe();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                let mut behind = now.clone();
                let target = *behind.borrow();
                connections.spawn(async move {
                    let target = match target {
                        Behind::Nothing | Behind::Wall => return,
                        Behind::Silence => std::future::pending().await,
                        Behind::Service(address) => address,
                    };
                    let Ok(mut to) = TcpStream::connect(target).await else { return };
                    let fell_silent = tokio::select! {
                        _ = copy_bidirectional(&mut from, &mut to) => false,
                        now = behind.wait_for(|behind| matches!(behind, Behind::Silence | Behind::Wall)) => {
                            now.is_ok_and(|behind| *behind == Behind::Silence)
                        }
                    };
                    if fell_silent {
                        std::future::pending::<()>().await;
                    }
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
        self.lead_to_address(service.map(Service::address));
    }

    /// Leads to what listens at this address from now on, or nowhere.
    pub fn lead_to_address(&self, address: Option<SocketAddr>) {
        self.behind.send_replace(address.map_or(Behind::Nothing, Behind::Service));
    }

    /// Leads nowhere from now on, and the connections through it end.
    pub fn shut(&self) {
        self.behind.send_replace(Behind::Wall);
    }

    /// Drops all data silently. Connections that are made once it has a target again work.
    pub fn fall_silent(&self) {
        self.behind.send_replace(Behind::Silence);
    }
}

//! The end of a task ends the service.

use std::{
    net::{Shutdown, SocketAddr},
    os::fd::OwnedFd,
};

use crate::common::service::Home;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::Socket;

/// Shuts down the listening socket of another process at this address.
fn shut(pid: Pid, address: SocketAddr) {
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let sockets = (0..256).filter_map(|fd| {
        let fd: OwnedFd = pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).ok()?;
        Some(Socket::from(fd))
    });
    let listens_there = |socket: &Socket| {
        socket.is_listener().unwrap_or_default() && socket.local_addr().is_ok_and(|it| it.as_socket() == Some(address))
    };
    let listener = { sockets }.find(listens_there).unwrap();
    listener.shutdown(Shutdown::Both).unwrap();
}

#[tokio::test]
async fn a_server_that_can_no_longer_accept_ends_the_service_and_is_named() {
    for task in ["the gRPC server", "the admin server"] {
        let home = Home::new().with_log_format("json");
        let mut service = home.serve().await;
        // Connected clients do not keep the service running.
        let mut client = service.client().await;
        let _watch = client.watch_after(0).await.unwrap();
        let address = if task == "the gRPC server" { service.address() } else { service.admin() };
        shut(service.pid(), address);
        let ended = service.ended().await;
        let log = home.log();
        assert_eq!(ended.code(), Some(1), "{log}");
        let logged = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let logged: Vec<_> = logged.filter(|line| line["task"] == task).collect();
        assert_eq!(logged.len(), 1, "{log}");
        assert_eq!((&logged[0]["level"], &logged[0]["why"]), (&"ERROR".into(), &"it returned".into()));
        assert!(!log.contains("the last state was not written"), "{log}");
    }
}

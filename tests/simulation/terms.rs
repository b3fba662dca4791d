//! Courses of terms that are too rare to wait for: here the fate of each statement is chosen, and the network has no
//! faults.

use std::{
    future::{pending, ready},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use orchestrator_core::{
    config::Config,
    host::Host,
    model::{Begin, Epoch, Replica},
    ports::{Claim, ClaimId, Claimed},
    serve::{Exit, Service},
    store::{Fate, Fates, SimulatedDatabase, Statement},
};
use tokio::{
    join,
    time::{Instant, sleep},
};

use crate::{chance::Chance, network::Network};

#[tokio::test(start_paused = true)]
async fn a_replica_whose_term_is_over_before_it_has_begun_follows_at_once() {
    const LOOKS: Duration = Duration::from_millis(100);
    let config = r#"
        server.listen = "127.0.0.1:1"
        admin.listen = "off"
        store.url = "memory:"
        memory.max_bytes = 268435456
        cluster.lease_ttl = "10s"
    "#;
    let config = Config::from_toml_str("simulated.toml", config).unwrap();
    let network = Arc::new(Network::new(Chance::new(0)).host("orchestrator"));
    let (host, database) = (Host::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1), SimulatedDatabase::new(false));
    let clock = host.clock;
    // Once it has claimed to lead, its next read of the store takes very long.
    let has_claimed = Arc::<AtomicBool>::default();
    let is_next = has_claimed.clone();
    let fates: Fates = Box::new(move |statement| {
        if statement == Statement::Read && is_next.swap(false, Ordering::Relaxed) {
            return Fate { travels: Duration::from_hours(1), ..Fate::default() };
        }
        Fate { returns: 3 * LOOKS, ..Fate::default() }
    });
    let store = database.share(clock, clock, fates);
    let other = database.share(clock, clock, Box::new(|_| Fate::default())).leadership().unwrap();
    let claims = async {
        let seen = loop {
            sleep(LOOKS).await;
            let seen = other.observe().await.unwrap();
            if seen.leader.is_some() {
                break seen;
            }
        };
        has_claimed.store(true, Ordering::Relaxed);
        let replica = Replica { name: "other".into(), address: None };
        let lease_ttl = Duration::from_secs(10);
        let orchestrator_id = seen.orchestrator_id.clone().unwrap();
        let claim = Claim { id: ClaimId(1), replica, orchestrator_id, lease_ttl, at_least: Epoch::default() };
        assert!(matches!(other.claim(&seen, &claim).await.unwrap(), Claimed::Won(_)));
        Instant::now()
    };
    let starts = Service::start_over(&config, Begin::Again, host, network, async { Ok(store) });
    let (service, claimed) = join!(starts, claims);
    let took = claimed.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    let stopped = ready(());
    assert_eq!(service.unwrap().run(stopped, async || pending().await).await, Exit::Drained);
}

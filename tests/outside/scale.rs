//! Many subsystems, many watchers of which half never read, and peers that don't speak the protocol.

use std::{collections::HashSet, fmt::Write, sync::Arc};

use crate::common::{
    fleet::{Fleet, Method, Run},
    http::get,
    patiently,
    service::{Client, Home, Service, decode, registration},
};
use orchestrator_core::proto::orchestrator::v1::{self as pb, CycleState, SubsystemState, cycle_event::Event};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::Barrier,
    task::JoinSet,
};
use tonic::{Streaming, transport::Endpoint};

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_subsystems_run_in_one_cycle() {
    const SUBSYSTEMS: usize = 10_000;
    let fleet = Fleet::behind(5).await;
    let mut config = String::new();
    for i in 0..SUBSYSTEMS {
        let endpoint = &fleet.endpoints()[i % 5];
        // Chains of ten.
        let after = if i % 10 == 0 { String::new() } else { format!("s{}", i - 1) };
        writeln!(config, "[[subsystems]]\nname = \"s{i}\"\nendpoint = {endpoint:?}\nafter = [{after:?}]").unwrap();
    }
    let config = config.replace("after = [\"\"]\n", "");
    let home = Home::new().with_config(&config);
    let service = home.serve().await;
    let mut client = service.client().await;

    for cycle_id in [1, 2] {
        let cycle = client.run().await.unwrap();
        assert_eq!((cycle.cycle_id, cycle.state()), (cycle_id, CycleState::Succeeded), "{}", cycle.error);
        assert_eq!(cycle.subsystems.len(), SUBSYSTEMS);
        assert!(cycle.subsystems.iter().all(|part| part.state() == SubsystemState::Succeeded && part.attempts == 1));
        assert_eq!(cycle.critical_path.len(), 10);
        let ran: HashSet<_> = fleet.now(|state| {
            let calls = state.calls.iter().filter(|call| call.method == Method::RunCycle && call.cycle_id == cycle_id);
            calls.map(|call| call.subsystem.clone()).collect()
        });
        assert_eq!(ran.len(), SUBSYSTEMS);
    }
    // Ready subsystems are called in order: the starts of the chains wait for each other, not for the fleet.
    let last_beginning = fleet.now(|state| {
        let beginnings = state.calls.iter().filter(|call| call.cycle_id == 1 && call.subsystem.ends_with('0'));
        beginnings.map(|call| call.began).max().unwrap()
    });
    let (whole_fleet, its_initialization) = (2 * SUBSYSTEMS as u64, 2 * SUBSYSTEMS as u64);
    assert!(last_beginning < (whole_fleet + its_initialization) / 4, "{last_beginning}");
    assert_eq!(fleet.now(|state| state.connections), 5);
    assert_eq!(client.subsystems().await.unwrap().len(), SUBSYSTEMS);
    metrics_of_all_are_sent_in_pieces(&service, SUBSYSTEMS).await;
}

async fn metrics_of_all_are_sent_in_pieces(service: &Service, subsystems: usize) {
    /// Scrapers that request more than 20 MB each, and never read.
    const STALLED: usize = 16;
    /// Most memory of one of them: a piece, and the server's buffer.
    const EACH: u64 = 1 << 20;
    let (before, _) = service.memory();
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(service.admin()).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        stalled.push(stream);
    }
    let text = get(service.admin(), "/metrics").await.text().await;
    let (after, _) = service.memory();
    println!("{} bytes of metrics; MiB: {} before, {} after", text.len(), before >> 20, after >> 20);
    assert!(after < before + EACH * (STALLED as u64 + 1), "{before} bytes became {after}");

    let up = text.lines().filter(|line| line.starts_with("orchestrator_subsystem_up{") && line.ends_with(" 1"));
    assert_eq!(up.count(), subsystems);
    let heads = text.lines().filter(|line| line.starts_with("# TYPE "));
    let families: HashSet<_> = heads.clone().collect();
    assert_eq!(heads.count(), families.len(), "the head of a family is written once");
}

/// The output of one subsystem, in every record: so large that few records fill the buffers of a stalled watcher.
const OUTPUT_BYTES: usize = 16 << 10;
const STALLED: usize = 500;
const HEALTHY: usize = 500;

#[tokio::test(flavor = "multi_thread")]
async fn watchers_that_never_read_take_a_bounded_buffer_and_delay_no_others() {
    /// After this number of cycles, all buffers of a stalled watcher are full.
    const TO_FILL: u64 = 32;
    const CYCLES: u64 = 128;
    /// Most growth of the service while stalled watchers miss more and more; they miss 750 MB.
    const GROWTH: u64 = 64 << 20;
    /// Most memory of one stalled watcher, including its connection.
    const EACH: u64 = 512 << 10;

    let fleet = Fleet::start().await;
    fleet.run("large", Run::large_output(OUTPUT_BYTES));
    let home = Home::new();
    let service = home.serve().await;
    let mut client = service.client().await;
    client.register(pb::Registration { record_output: true, ..registration("large", fleet.endpoint()) }).await.unwrap();

    let address = format!("http://{}", service.address());
    let all_watch = Arc::new(Barrier::new(HEALTHY / 10 + 1));
    let mut healthy = JoinSet::new();
    for _ in 0..HEALTHY / 10 {
        let (client, all_watch) = (service.client().await, all_watch.clone());
        healthy.spawn(async move {
            let mut watchers = JoinSet::new();
            for _ in 0..10 {
                let stream = client.clone().watch_after(0).await.unwrap();
                watchers.spawn(async move { sees_everything(stream, CYCLES).await });
            }
            all_watch.wait().await;
            watchers.join_all().await;
        });
    }
    all_watch.wait().await;
    let (before, _) = service.memory();

    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        // The window is small, so that unread records stay with the service.
        let endpoint = Endpoint::from_shared(address.clone()).unwrap();
        let endpoint = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535);
        let mut client = Client::new(endpoint.connect().await.unwrap());
        stalled.push(client.watch_after(0).await.unwrap());
    }
    let status = client.status().await.unwrap();
    assert_eq!(status.watchers as usize, HEALTHY + STALLED);

    for _ in 0..TO_FILL {
        client.run().await.unwrap();
    }
    let (full, _) = service.memory();
    for _ in TO_FILL..CYCLES {
        client.run().await.unwrap();
    }
    // All reading watchers have received everything, while the others have read nothing.
    patiently("the watchers that read", healthy.join_all()).await;
    let (after, peak) = service.memory();
    let mib = |bytes: u64| bytes >> 20;
    println!("MiB: {} before, {} full, {} after, {} at most", mib(before), mib(full), mib(after), mib(peak));
    assert!(after < full + GROWTH, "{} MiB became {}", mib(full), mib(after));
    assert!(after < before + EACH * STALLED as u64, "{} MiB became {}", mib(before), mib(after));

    // Watchers that resume receive the missing records, without a gap.
    let mut woken = JoinSet::new();
    for stream in stalled {
        woken.spawn(sees_everything(stream, CYCLES));
    }
    patiently("the watchers that have woken up", woken.join_all()).await;
}

/// Reads every record from the first one on.
async fn sees_everything(mut stream: Streaming<pb::WatchCyclesResponse>, revisions: u64) {
    let mut seen = 0;
    while seen < revisions {
        let event = stream.message().await.unwrap().unwrap().event.unwrap();
        match event.event.unwrap() {
            Event::Recorded(record) => {
                assert_eq!(event.revision, seen + 1);
                assert!(record.len() > OUTPUT_BYTES);
                seen = event.revision;
            }
            Event::Bookmark(_) => assert_eq!(event.revision, seen),
            live => panic!("{live:?} was not requested"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_answers_while_peers_send_garbage_or_nothing() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
    const IDLE: usize = 300;

    let fleet = Fleet::start().await;
    let home = Home::new();
    let service = home.serve().await;
    let mut client = service.client().await;
    client.register(registration("a", fleet.endpoint())).await.unwrap();

    // Some send nothing, some stop in the middle; all of them stay connected.
    let mut open = Vec::new();
    for i in 0..IDLE {
        let mut stream = TcpStream::connect(service.address()).await.unwrap();
        let said: &[&[u8]] = match i % 4 {
            0 => &[],
            1 => &[&PREFACE[..10]],
            2 => &[PREFACE, SETTINGS],
            // The beginning of a HEADERS frame that never ends.
            _ => &[PREFACE, SETTINGS, b"\0\x40\0\x01\0\0\0\0\x01\x82"],
        };
        stream.write_all(&said.concat()).await.unwrap();
        open.push(stream);
    }
    // The service disconnects the others.
    let mut rng = fastrand::Rng::with_seed(7);
    let mut noise: Vec<_> = std::iter::repeat_with(|| rng.u8(..)).take(100_000).collect();
    noise[0] = 0;
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        // A TLS hello.
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
        &noise,
        &[PREFACE, &noise].concat(),
        // A frame of 16 MiB.
        &[PREFACE, SETTINGS, b"\xff\xff\xff\0\0\0\0\0\x01", &noise].concat(),
    ];
    for said in garbage {
        let mut stream = TcpStream::connect(service.address()).await.unwrap();
        // The service may close before it has received everything.
        let _ = stream.write_all(said).await;
        let _ = stream.shutdown().await;
        let _ = patiently("the connection to be closed", stream.read_to_end(&mut Vec::new())).await;
    }
    // And some reset the connection.
    for _ in 0..IDLE {
        let stream = TcpStream::connect(service.address()).await.unwrap();
        stream.set_zero_linger().unwrap();
    }

    let cycle = client.run().await.unwrap();
    assert_eq!(cycle.state(), CycleState::Succeeded);
    let mut newcomer = service.client().await;
    assert_eq!(decode(newcomer.status().await.unwrap().last_cycle), cycle);
    drop(open);
    assert_eq!(service.stop().await.code(), Some(0));
}

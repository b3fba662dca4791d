//! The commits of a cycle, in each store that outlives the process, beside the floor of that store in the same run.
//!
//! A cycle has two. `begin` notes that it has begun, which has to survive only the process: in a file, it waits for no
//! disk. `commit` has its record, of 20 KB, and the outputs of 28 subsystems, and is durable. The floor is the smallest
//! durable write in the same place: the overwriting of a block of a file, or the change of a number in a row over a
//! connection to the same server. `bare`, `sqlite`, `postgres` and `standby` are the stores of the sides of the same
//! names. The rounds of all stores alternate, and within them the three writes.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use orchestrator_core::{
    ledger::{SealKeys, Signer},
    model::{CycleId, CycleState, Epoch, Name, Output, Payload, Revision, Trigger},
    ports::{Durability, OpenCycle, Record, Seals, Stage, Store, Write},
    store::StoreUrl,
};
use tokio_postgres::{Client, NoTls, Statement};

use crate::{Bare, Result, Servers, open, postgres, quantiles};

/// What names them on the command line.
pub(crate) const NAME: &str = "commits";

/// Number of cycles of one store before the next store's turn.
const CYCLES: usize = 50;
const ROUNDS: usize = 20;

const SUBSYSTEMS: usize = 28;
const RECORD_BYTES: usize = 20_000;
const OUTPUT_BYTES: usize = 256;
/// Size of a page of SQLite, in bytes.
const BLOCK: usize = 4096;

const WRITES: [&str; 3] = ["floor", "begin", "commit"];

/// Measures the writes in each store, or only checks that they work.
pub(crate) async fn compare(measure: bool, servers: Option<&Servers>) -> Result<()> {
    let (cycles, rounds) = if measure { (CYCLES, ROUNDS) } else { (1, 1) };
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = |name: &str| directory.path().join(name);
    let bare = Arc::new(Bare::create(&path("bare.db"), open(&StoreUrl::Memory).await?)?);
    let sqlite = open(&StoreUrl::Sqlite(path("sqlite.db"))).await?;
    let mut sides = vec![
        Side::take_over("bare", Floor::of_disk(&path("bare-floor"))?, bare).await?,
        Side::take_over("sqlite", Floor::of_disk(&path("sqlite-floor"))?, sqlite).await?,
    ];
    for (name, server) in servers.iter().flat_map(|servers| servers.sides()) {
        let store = open(&StoreUrl::parse(&server.url())?).await?;
        sides.push(Side::take_over(name, Floor::of_server(server).await?, store).await?);
    }
    // The first round of each side fills caches.
    for round in 0..=rounds {
        for side in &mut sides {
            if round == 1 {
                side.durations = Default::default();
            }
            for _ in 0..cycles {
                side.cycle().await?;
            }
        }
    }
    println!("{:>12} {:>7} {:>10} {:>10} {:>12}", "store", "write", "p50 ms", "p99 ms", "p50 / floor");
    for Side { name, durations, .. } in &mut sides {
        let mut floor = None;
        for (write, durations) in WRITES.iter().zip(durations) {
            let [p50, p99] = quantiles(durations);
            let ratio = p50 / *floor.get_or_insert(p50);
            println!("{name:>12} {write:>7} {p50:>10.3} {p99:>10.3} {ratio:>12.2}");
            let json = serde_json::json!({
                "store": name, "write": write, "p50_ms": p50, "p99_ms": p99, "p50_to_floor": ratio,
            });
            println!("{json}");
        }
    }
    Ok(())
}

struct Side {
    name: &'static str,
    floor: Floor,
    store: Arc<dyn Store>,
    epoch: Epoch,
    /// The number of cycles so far: the last id, and the last revision.
    last: u64,
    /// How long each of [`WRITES`] took.
    durations: [Vec<Duration>; WRITES.len()],
}

impl Side {
    async fn take_over(name: &'static str, floor: Floor, store: Arc<dyn Store>) -> Result<Self> {
        let seals = Seals::Checked(SealKeys::of(&Signer::generate("bench")?));
        let epoch = store.take_over(seals).await?.epoch;
        Ok(Self { name, floor, store, epoch, last: 0, durations: Default::default() })
    }

    async fn cycle(&mut self) -> Result<()> {
        self.last += 1;
        let (begin, commit) = (Arc::new(self.begin()), Arc::new(self.commit()?));
        let start = Instant::now();
        self.floor.write().await?;
        let floor_written = Instant::now();
        self.store.commit(begin).await?;
        let begun = Instant::now();
        self.store.commit(commit).await?;
        let taken = [floor_written - start, begun - floor_written, begun.elapsed()];
        for (durations, taken) in self.durations.iter_mut().zip(taken) {
            durations.push(taken);
        }
        Ok(())
    }

    /// The write that the orchestrator makes before the first call of a cycle.
    fn begin(&self) -> Write {
        let now = Timestamp::now();
        let open = OpenCycle {
            cycle_id: CycleId(self.last),
            trigger: Trigger::Manual,
            scheduled_at: now,
            request_id: None,
            triggered_by: None,
            trace_id: None,
            audit: None,
            stage: Stage::Begun(now),
        };
        Write { durability: Durability::Buffered, open: vec![open], ..self.write() }
    }

    /// The write that the orchestrator makes at the end of a cycle, before anyone hears of it.
    fn commit(&self) -> Result<Write> {
        let cycle_id = CycleId(self.last);
        let record = Record {
            cycle_id,
            revision: Revision(self.last),
            epoch: self.epoch,
            state: CycleState::Succeeded,
            trigger: Trigger::Manual,
            request_id: None,
            triggered_by: None,
            finished_at: Timestamp::now(),
            // No store can compress it.
            bytes: std::iter::repeat_with(|| fastrand::u8(..)).take(RECORD_BYTES).collect(),
        };
        let outputs = (0..SUBSYSTEMS).map(|i| {
            let text: String = std::iter::repeat_with(fastrand::alphanumeric).take(OUTPUT_BYTES).collect();
            let object = serde_json::Map::from_iter([("text".to_owned(), text.into())]);
            Ok((Name::parse(&format!("s{i}"))?, Output { cycle_id, payload: Payload::from_json(&object)? }))
        });
        let outputs = outputs.collect::<Result<_>>()?;
        Ok(Write { durability: Durability::Durable, records: vec![record], outputs, ..self.write() })
    }

    fn write(&self) -> Write {
        Write { epoch: self.epoch, last_cycle_id: CycleId(self.last), ..Write::default() }
    }
}

/// The smallest durable write.
enum Floor {
    Disk(File),
    Row(Client, Statement),
}

impl Floor {
    fn of_disk(path: &Path) -> Result<Self> {
        let file = File::create(path)?;
        file.write_all_at(&[0; BLOCK], 0)?;
        file.sync_all()?;
        Ok(Self::Disk(file))
    }

    async fn of_server(server: &postgres::Server) -> Result<Self> {
        let url = format!("postgres://owner@{}/postgres", server.host());
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await?;
        // It ends with the client.
        tokio::spawn(connection);
        client.batch_execute("CREATE TABLE floor (number bigint); INSERT INTO floor VALUES (0)").await?;
        let update = client.prepare("UPDATE floor SET number = number + 1").await?;
        Ok(Self::Row(client, update))
    }

    async fn write(&self) -> Result<()> {
        match self {
            // This thread does nothing else meanwhile.
            Self::Disk(file) => {
                file.write_all_at(&[1; BLOCK], 0)?;
                file.sync_data()?;
            }
            Self::Row(client, update) => _ = client.execute(update, &[]).await?,
        }
        Ok(())
    }
}

use super::*;
use crate::store::suite::{recorded, seals};

#[tokio::test(start_paused = true)]
async fn nothing_is_taken_over_that_the_loss_of_power_can_undo() {
    const NEVER: Duration = Duration::from_hours(1);
    let database = SimulatedDatabase::new(false);
    let first = database.open(Clock::system(), Box::new(|_| Fate { replicates: NEVER, ..Fate::default() }));
    let epoch = first.take_over(seals()).await.unwrap().epoch;
    let executed = tokio::time::timeout(NEVER / 2, first.commit(Arc::new(recorded(1..=1, epoch)))).await;
    assert!(executed.is_err(), "{executed:?}");
    assert_eq!((database.at_risk(), database.surviving()), (1, Revision(0)));

    let second = database.open(Clock::system(), Box::new(|_| Fate::default()));
    let contents = second.take_over(seals()).await.unwrap();
    database.lose_power(0);
    assert_eq!((contents.last_revision, database.surviving()), (Revision(1), Revision(1)));
}

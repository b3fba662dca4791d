//! The engine: orders subsystems ([`Plan`]) and runs one cycle over them ([`Engine::run`]). Knows nothing of how
//! calls travel, of the record, or of who asked.

mod breaker;
mod cycle;
mod member;
mod order;
mod plan;
mod retry;
mod trace;

pub use breaker::{Breaker, BreakerState};
pub use cycle::{Cycle, Engine, Observer, Ran};
pub use member::{LastPart, Member, Outcomes, Standing, Tally};
pub use order::{Order, Undo};
pub use plan::{Plan, PlannedSubsystem, Ring, Schedule};
pub use trace::{Collected, Trace};

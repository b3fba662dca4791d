//! The engine: orders subsystems ([`Plan`]) and runs cycles over them, each by [`Engine::run`]. Knows nothing of how
//! calls are sent, of the record, or of callers, except that subsystems have owners.
//!
//! Nothing that a cycle makes is shown before [`Engine::publish`], which comes after its record is committed.

mod breaker;
mod cut;
mod cycle;
mod member;
mod order;
mod plan;
mod refusals;
mod retry;
mod revoked;
mod slots;
#[cfg(test)]
mod tests;
mod trace;

pub use breaker::{Breaker, BreakerState};
pub use cycle::{CycleRun, Engine, Observer, Ran};
pub use member::{LastPart, Member, Part, Standing, SubsystemCounts};
pub use order::{Order, Undo};
pub use plan::{Plan, PlannedSubsystem, Ring, Schedule};
pub use revoked::RevokedOwners;
pub use slots::{InputRoom, Slots};
pub use trace::{Collected, Trace};

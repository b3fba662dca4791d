//! What the subsystems of a running cycle hand to each other: inputs are collected when a call is about to begin, and
//! an output is kept when it has ended, each with its memory.

use tokio::time::Instant;

use super::{EndedPart, NotNow, Run};
use crate::{
    engine::{
        BreakerState, Standing,
        plan::{Named, Step},
    },
    memory::Held,
    model::{Code, Freshness, Input, Output, Subsystem, SubsystemState},
    ports::Reply,
};

impl Run<'_> {
    /// Asks the breaker, and collects the inputs and their memory. Also returns true if this is a probe call.
    pub(super) fn prepare(&mut self, position: usize) -> Result<(Vec<Input>, Option<Held>, bool), NotNow> {
        let step = &self.plan.steps[position];
        let is_probe = match step.member.breaker(Instant::now()) {
            BreakerState::Closed => false,
            BreakerState::HalfOpen => true,
            BreakerState::Open(_) => {
                let failures = step.member.standing.lock().breaker.failures();
                let failures =
                    if failures == 1 { "a failure".to_owned() } else { format!("{failures} failures in a row") };
                let message = format!("not called after {failures}");
                return Err(NotNow::Ends(SubsystemState::CircuitOpen(message)));
            }
        };
        let inputs = self.inputs(step);
        let bytes = inputs.iter().flat_map(|input| &input.output).map(|(output, _)| output.payload.len()).sum();
        let max = self.engine.inputs.max().min(Subsystem::MAX_INPUT_BYTES);
        if bytes > max {
            let message = format!("its inputs are {bytes} bytes; the limit is {max} bytes");
            return Err(NotNow::Ends(SubsystemState::Failed(Code::ResourceExhausted, message)));
        }
        let room = if bytes > 0 { Some(self.room_for(bytes).ok_or(NotNow::NeedsRoom(bytes))?) } else { None };
        Ok((inputs, room, is_probe))
    }

    /// The awaited memory, if it is enough: inputs may have grown meanwhile.
    fn room_for(&mut self, bytes: usize) -> Option<Held> {
        let mut room = self.room.take()?;
        room.resize(bytes).ok().map(|()| room)
    }

    fn inputs(&self, step: &Step) -> Vec<Input> {
        let stale = |standing: &Standing| Some((standing.latest()?, Freshness::Stale));
        let inputs = step.inputs.iter().map(|(name, named)| {
            let output = match named {
                Named::Step(position) => match self.parts[*position].ended() {
                    Some(EndedPart { state: SubsystemState::Succeeded, answer, .. }) => {
                        let output = Output { cycle_id: self.cycle.cycle_id, payload: answer.output.clone() };
                        Some((output, Freshness::Fresh))
                    }
                    _ => stale(&self.plan.steps[*position].member.standing),
                },
                Named::LeftOut(standing) => stale(standing),
                Named::Nowhere => self.cycle.request.inputs.get(name).cloned(),
            };
            Input { name: name.clone(), output }
        });
        inputs.collect()
    }

    /// Keeps an answer, if there is memory for its output.
    pub(super) fn keep(&self, standing: &Standing, reply: Reply) -> Result<Reply, SubsystemState> {
        let Reply { answer, mut held } = reply;
        let bytes = answer.output.len();
        standing.lock().make_room(bytes, &self.engine.outputs).map_err(|full| {
            let message = format!("no memory for its output of {bytes} bytes: {full}");
            SubsystemState::Failed(Code::ResourceExhausted, message)
        })?;
        // Fewer than before, so it fits.
        let _ = held.resize(held.bytes().saturating_sub(bytes));
        Ok(Reply { answer, held })
    }
}

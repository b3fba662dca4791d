//! The plan over all registered subsystems: computed again after changes, once for all users, on a thread that no other
//! task waits for.

use std::sync::Arc;

use super::{NotRegistered, Orchestrator, Shared, offload::offload};
use crate::{
    engine::{Plan, Schedule},
    model::{CycleId, Name},
};

impl Orchestrator {
    /// The plan of a cycle that would start now. The result contains the names that are not registered.
    pub async fn plan_cycle(&self, subset: Option<Arc<[Name]>>) -> Schedule {
        let plan = self.0.plan().await;
        let (size, revoked) = (plan.members().len(), self.0.engine.revoked.clone());
        offload(size, move || plan.schedule(subset.as_deref(), &revoked)).await
    }

    /// These names as the registry holds them, so that requests share their memory.
    ///
    /// # Errors
    /// A name is not registered.
    pub async fn registered_names(&self, subset: Option<Arc<[Name]>>) -> Result<Option<Arc<[Name]>>, NotRegistered> {
        self.0.registered_names(subset).await
    }
}

impl Shared {
    /// The plan over all registered subsystems. After changes it is computed again, once for all of them, without
    /// blocking further changes.
    pub(super) async fn plan(&self) -> Arc<Plan> {
        if let Ok(plan) = self.state().registry.plan() {
            return plan;
        }
        let _planning = self.planning.lock().await;
        let snapshot = match self.state().registry.plan() {
            Ok(plan) => return plan,
            Err(snapshot) => snapshot,
        };
        let (snapshot, plan) = offload(snapshot.registered.len(), move || {
            let plan = snapshot.plan();
            (snapshot, plan)
        })
        .await;
        self.state().registry.planned(&snapshot, plan)
    }

    /// The plan of a running cycle over this subset, or over all subsystems.
    pub(super) async fn plan_of(&self, cycle_id: CycleId, subset: Option<Arc<[Name]>>) -> Arc<Plan> {
        let all = self.plan().await;
        let Some(subset) = subset else { return all };
        let locked = self.state().line.locked_names(cycle_id).unwrap_or_else(|| subset.clone());
        // One subsystem may wait for all others.
        offload(subset.len().max(all.relations()), move || all.of_locked(&subset, &locked)).await
    }

    /// These names as the registry holds them, so that requests share their memory.
    pub(super) async fn registered_names(
        &self,
        subset: Option<Arc<[Name]>>,
    ) -> Result<Option<Arc<[Name]>>, NotRegistered> {
        let Some(subset) = subset else { return Ok(None) };
        let plan = self.plan().await;
        let names = offload(subset.len(), move || plan.own_names(&subset)).await;
        names.map(Some).map_err(|name| self.state().registry.not_registered(name))
    }
}

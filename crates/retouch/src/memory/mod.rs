//! What of a model is in memory when: planned before an edit, from what its parts and its work will take.
//!
//! [`ModelMemory`] counts parameters (from files' headers, or the shapes of a known model), `work` counts what is computed
//! with them, [`Budget`] is what there is, and [`MemoryPlan::fastest`] chooses.

mod budget;
mod encoders;
mod model;
mod plan;
mod planner;
mod transfer;
mod work;

pub use budget::{Budget, DeviceKind};
pub(crate) use budget::{free_of, give_back};
pub use encoders::{ByPlace, Encoders};
pub use model::ModelMemory;
pub use plan::{MemoryPlan, Pixels, Resident, StagePlan};
pub use transfer::{BUS, Transfer};
pub use work::{Bands, Work};

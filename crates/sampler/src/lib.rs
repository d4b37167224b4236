//! From noise to latents: noise generators, schedules, the step loop and guidance.

mod denoise;
mod noise;
mod schedule;

pub use denoise::{Step, denoise, guide};
pub use noise::TorchGenerator;
pub use schedule::{Schedule, SchedulerConfig};

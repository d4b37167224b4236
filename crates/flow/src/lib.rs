//! The FLUX.1 flow transformer with reference-image conditioning.
//!
//! ```text
//! ModulationTable::compute   timesteps, guidance, pooled prompt -> every block's vectors for every step
//! FluxTransformer::condition prompt, reference, positions       -> Conditioning, once per edit
//! FluxTransformer::velocity  latents, Conditioning, step        -> velocity, once per step
//! ```

mod blocks;
mod cache;
mod config;
mod modulation;
mod rotary;
mod saving;
pub mod tokens;
mod transformer;

pub use cache::StepCache;
pub use config::FluxConfig;
pub use modulation::ModulationTable;
pub use saving::Saving;
pub use transformer::{Conditioning, FluxTransformer, Reference};

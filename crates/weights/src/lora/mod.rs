//! LoRAs: files of small matrices that change some of a model's parameters.
//!
//! ```text
//! LoraFile::open   a file, whatever its naming       -> changes to layers, by the code's names   (file, names, config)
//! Adapters::new    several files with their scales   -> changes to one component of a model      (adapters)
//! Weights          with adapters                     -> dense parameters with the changes merged (delta)
//! Linear           of a matrix in fewer bits         -> the changes added to its output          (run_time)
//! Weights          with adapters, before reading     -> what all of this takes                   (memory)
//! ```
//!
//! A change is `W + scale * delta`, where delta is `up down` (LoRA: Hu et al., arXiv:2106.09685), the Kronecker product
//! of two matrices (LoKr: Yeh et al., arXiv:2309.14859), or given in full.

mod adapters;
mod config;
mod delta;
mod describe;
mod file;
mod memory;
mod names;
mod run_time;

pub use adapters::Adapters;
pub use describe::LoraDescription;
pub use file::LoraFile;
pub use memory::LoraBytes;
pub(crate) use {delta::merge, file::is_lora_key, run_time::Added};

//! Edit images with words, on your own machine: FLUX.1 Kontext in Rust.
//!
//! ```no_run
//! use retouch::{EditRequest, Engine, EngineOptions, ModelSource, Silent};
//!
//! # fn main() -> retouch::Result<()> {
//! let photo = std::fs::read("photo.jpg").map_err(|e| retouch::Error::Io { file: "photo.jpg".into(), source: e })?;
//! let request = EditRequest {
//!     prompt: "make the circle blue".into(),
//!     image: Some(retouch::image::read_image(&photo, "photo.jpg")?),
//!     ..Default::default()
//! };
//! // The embedded nano-kontext; `base: Some("black-forest-labs/FLUX.1-Kontext-dev".into())` for the real one.
//! let mut engine = Engine::open(&ModelSource::default(), EngineOptions::default(), &mut retouch::NoProgress)?;
//! let result = engine.edit(&request, &mut Silent)?;
//! let png = retouch::image::encode(&result.images[0].pixels, Default::default(), None, None)?;
//! retouch::image::write_atomically("edited.png".as_ref(), &png, true)?;
//! # Ok(())
//! # }
//! ```

mod convert;
mod device;
mod engine;
mod error;
mod flux1;
pub mod image;
mod loras;
pub mod memory;
mod paths;
mod preview;
mod profile;
mod request;
mod rules;
mod sizes;
mod source;
mod trace;

pub use convert::{Converted, convert};
pub use device::{DeviceChoice, Precision};
pub use engine::{Engine, EngineOptions, KeepLoaded};
pub use error::{Error, Result};
pub use loras::{Lora, StoredLora};
pub use memory::{Encoders, MemoryPlan};
pub use profile::{Profile, StageProfile};
pub use request::{
    AspectRatio, Control, EditRequest, EditResult, EditedImage, Event, MAX_IMAGES, MAX_PROMPT_BYTES, MAX_STEPS,
    Observer, OutputSize, Parameters, ReferenceSize, Seeds, Silent, Stage, Timings,
};
pub use retouch_kernels::{Operation, Total};
pub use retouch_models as models;
pub use retouch_weights::{
    self as weights, WeightsError,
    convert::Target,
    hub::{DownloadProgress, NoProgress},
};
pub use rules::{ModelRules, Settings};
pub use source::ModelSource;
pub use trace::Trace;

/// Compiles the README's example with the tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

//! From a name on disk or on a hub to tensors.
//!
//! A [`Folder`] finds files, a [`Store`] checks them and reads tensors by name, and [`Weights`] is what a model's
//! module takes its parameters from, under the names that the code uses (see [`naming`]).

pub mod convert;
mod describe;
mod detect;
mod embedding;
mod error;
mod folder;
mod format;
mod held;
pub mod hub;
mod layers;
mod linear;
mod lora;
mod matrix;
mod model_index;
pub mod naming;
mod shapes;
mod store;
mod streamed;
mod tally;
mod weights;

pub use describe::{Description, FileDescription, ModelDescription, describe, describe_model};
pub use detect::{Component, Kind, Layout, detect};
pub use embedding::Embedding;
pub use error::{Result, WeightsError, readable};
pub use folder::{Bytes, EmbeddedFiles, Folder, ModelFile};
pub use format::Encoding;
pub use layers::{Layers, Stay};
pub use linear::Linear;
pub use lora::{Adapters, LoraBytes, LoraDescription, LoraFile};
pub use matrix::Matrix;
pub use model_index::Pipeline;
pub use shapes::{ClipShape, FluxShape, T5Shape, VaeShape};
pub use store::{Store, bytes_read};
pub use tally::Counted;
pub use weights::Weights;

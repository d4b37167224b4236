//! Between pixels and latents: the variational autoencoder that FLUX.1 uses (diffusers' `AutoencoderKL`).
//!
//! [`VaeEncoder`] and [`VaeDecoder`] load separately, so that an edit keeps only the half it needs in memory. Both
//! follow diffusers' `models/autoencoders/autoencoder_kl.py` and `vae.py`, and take their parameters under the names
//! used there.
//!
//! Both take and return tensors of any float dtype on the device that the weights were loaded on, and compute in the
//! dtype that the weights were asked for, with two exceptions where that would not work: on the CPU everything is
//! computed in f32 (candle has no half-precision convolution there), and f16 becomes f32 where the model's
//! configuration says that its activations overflow f16 (`force_upcast`).

mod blocks;
mod config;
mod conv;
mod decoder;
mod encoder;
mod norm;
mod tiling;

pub use config::VaeConfig;
pub use decoder::VaeDecoder;
pub use encoder::VaeEncoder;
pub use tiling::{MIN_ROWS, Tiling};

//! The intermediates of an edit, for comparison with other implementations.

use std::{collections::BTreeMap, path::Path};

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result, image::write_atomically};

/// Collects tensors by name while an edit runs; those of several images are stacked along the first axis.
///
/// Names: `clip_ids`, `t5_ids`, `clip_pooled`, `t5_embeds` (the same with `negative_` for a negative prompt),
/// `ref_latents` (unpacked, scaled), `noise` (unpacked), `sigmas`, `velocity.0`..., `latents` (unpacked, final, scaled),
/// `image` (f32, from 0 to 1, channels first; of a single image without a batch axis).
#[derive(Default)]
pub struct Trace(BTreeMap<String, Vec<Tensor>>);

impl Trace {
    pub(crate) fn record(&mut self, name: impl Into<String>, tensor: &Tensor) {
        self.0.entry(name.into()).or_default().push(tensor.clone());
    }

    /// All tensors by name, on the CPU; floating-point ones in f32.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let stacked = |name: &str, parts: &[Tensor]| -> Result<Tensor> {
            let whole = Tensor::cat(parts, 0)?.to_device(&Device::Cpu)?;
            let whole = if whole.dtype().is_float() { whole.to_dtype(DType::F32)? } else { whole };
            Ok(if name == "image" && whole.dim(0)? == 1 { whole.squeeze(0)? } else { whole })
        };
        self.0.iter().map(|(name, parts)| Ok((name.clone(), stacked(name, parts)?))).collect()
    }

    /// Writes a safetensors file, over an existing one.
    pub fn write(&self, path: &Path) -> Result<()> {
        let tensors = self.tensors()?;
        let bytes = safetensors::serialize(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), None)
            .map_err(|e| Error::Io { file: path.display().to_string(), source: std::io::Error::other(e) })?;
        write_atomically(path, &bytes, true)
    }
}

//! What LoRAs take in memory, told before anything is read.

use candle_core::DType;

use super::{
    Adapters,
    adapters::{factor_shape, place},
    file::{Change, Factor, Stored},
    names::Part,
};
use crate::{Result, Weights};

/// Bytes beside a component's own parameters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoraBytes {
    /// What is added to the outputs of layers whose matrices stay as they are, for as long as the component is there.
    pub resident: u64,
    /// What the largest of the parameters takes while a change is merged into it: its values in f32, and the change's.
    pub merging: u64,
}

impl Weights {
    /// What the LoRAs of these weights take.
    ///
    /// # Errors
    /// Those of reading a tensor's header.
    pub fn lora_bytes(&self) -> Result<LoraBytes> {
        let mut bytes = LoraBytes::default();
        let Some(adapters) = self.adapters() else { return Ok(bytes) };
        for parameter in adapters.parameters() {
            let shape = self.shape_by_full_name(parameter).unwrap_or_default();
            if self.stays_packed(parameter, &shape)? {
                bytes.resident += adapters.beside(parameter, self);
            } else {
                bytes.merging = bytes.merging.max(adapters.merging(parameter, &shape, self));
            }
        }
        Ok(bytes)
    }
}

impl Adapters {
    /// Of the changes to a matrix that stays as it is.
    fn beside(&self, parameter: &str, weights: &Weights) -> u64 {
        let values = self.changes_to(parameter).map(|(file, change)| {
            let [out, input] = layer(change, weights);
            let size = |factor: &Factor| factor_shape(file.store(), factor).map_or(0, |[a, b]| a as u64 * b as u64);
            match &change.delta {
                // Zero in the rows that it does not change.
                Stored::LowRank { down, .. } => {
                    let rank = file.store().shape(down).and_then(<[usize]>::first).copied().unwrap_or_default();
                    rank as u64 * (out + input)
                }
                Stored::Kronecker { left, right } if change.target.part != Part::SwappedHalves => {
                    size(left) + size(right)
                }
                Stored::Kronecker { .. } | Stored::Full(_) => rows(change, weights) * input,
            }
        });
        values.sum::<u64>() * element(weights.dtype())
    }

    /// Of the changes to a parameter of that shape into which they are merged: see [`super::merge`].
    fn merging(&self, parameter: &str, shape: &[usize], weights: &Weights) -> u64 {
        let all = shape.iter().product::<usize>() as u64;
        let changed = |change: &Change| match *shape {
            [_, input] => rows(change, weights) * input as u64,
            _ => all,
        };
        let change = self.changes_to(parameter).map(|(_, change)| 2 * 4 * changed(change)).max().unwrap_or(0);
        // What it becomes counts as the component's own.
        let own = all * element(weights.dtype());
        let copied = if weights.dtype() == DType::F32 { 0 } else { own };
        4 * all + change.max(copied) - own
    }
}

fn element(dtype: DType) -> u64 {
    dtype.size_in_bytes() as u64
}

/// Outputs and inputs of the layer that is changed.
fn layer(change: &Change, weights: &Weights) -> [u64; 2] {
    match place(change, weights).as_deref() {
        Some(&[out, input]) => [out as u64, input as u64],
        _ => [0, 0],
    }
}

/// Those of its rows that are changed.
fn rows(change: &Change, weights: &Weights) -> u64 {
    let [out, input] = layer(change, weights);
    change.target.part.rows(out as usize, input as usize).map_or(0, |rows| rows.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use candle_core::Device;

    use super::*;
    use crate::{Component, LoraFile, ModelFile, Store, naming::flux};

    fn weights(model: &str, dtype: DType, lora: &str) -> Weights {
        let fixture = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name);
        let store = Store::open(vec![ModelFile::open(fixture(model)).unwrap()]).unwrap();
        let weights = Component::Transformer.in_store(store, dtype, &Device::Cpu).unwrap();
        let file = Arc::new(LoraFile::open(&fixture("lora").join(lora)).unwrap());
        let files = [(file.clone(), 0.5), (file, -1.0)];
        let adapters = Adapters::new(&files, Component::Transformer, &weights).unwrap();
        weights.with_adapters(Arc::new(adapters))
    }

    /// Counted from the headers as many bytes as there are, layer by layer.
    #[test]
    fn what_stays_beside_packed_matrices_is_counted_to_the_byte() -> Result<()> {
        for lora in ["diffusers.safetensors", "kohya.safetensors", "lokr.safetensors"] {
            for dtype in [DType::F32, DType::BF16] {
                let weights = weights("quantised/flux-q4_0.gguf", dtype, lora);
                let mut there = 0;
                for name in flux::parameters(2, 3) {
                    let Some(shape) = weights.shape(&name) else { continue };
                    let Some(layer) = name.strip_suffix(".weight") else { continue };
                    if weights.stays_packed(&name, &shape)? {
                        there += weights.pp(layer).added(shape[0])?.map_or(0, |added| added.bytes());
                    }
                }
                assert_eq!(weights.lora_bytes()?.resident, there, "{lora} in {dtype:?}");
                assert!(there > 0, "{lora}");
            }
        }
        Ok(())
    }

    #[test]
    fn of_what_is_merged_nothing_stays() -> Result<()> {
        // Dense in bf16, and computed with in bf16.
        let weights = weights("tiny-kontext/flux1-kontext-dev.safetensors", DType::BF16, "fal.safetensors");
        let LoraBytes { resident, merging } = weights.lora_bytes()?;
        // The largest changed matrix: linear1, [7, 1] times 64 squared, in f32, with its change and their sum, less what stays.
        let values = 7 * 64 * 64;
        assert_eq!((resident, merging), (0, values * (4 + 8 - 2)));
        Ok(())
    }
}

//! Everything that is done with a file of weights.

use std::{io, ops::ControlFlow, path::Path};

use candle_core::{DType, Device};
use retouch_flow::{FluxConfig, FluxTransformer};
use retouch_text_encoder::{ClipConfig, ClipEncoder, T5Config, T5Encoder};
use retouch_vae::{VaeConfig, VaeDecoder};
use retouch_weights::{
    Component, Counted, ModelFile, Result, Store, Weights,
    convert::{Conversion, FileFormat, Target},
    describe,
};

use crate::unless_refused;

/// Describes a file, reads each of its tensors in every way, takes its sizes, and converts it.
pub fn read_weights(path: &Path) {
    let open = || Store::open(vec![ModelFile::open(path).unwrap()]);
    let Some(store) = unless_refused(open()) else { return };
    for name in store.names() {
        for dtype in [DType::F32, DType::BF16] {
            if let Some(tensor) = unless_refused(store.tensor(name, dtype, &Device::Cpu)) {
                assert_eq!(Some(tensor.dims()), store.shape(name));
            }
            if let Some(Some(part)) = unless_refused(store.packed(name, dtype, &Device::Cpu)) {
                unless_refused(part.dequantise(dtype));
            }
        }
        unless_refused(store.raw(name));
        unless_refused(store.rows(name, 0..1));
        let rows = store.shape(name).and_then(<[usize]>::first).copied().unwrap_or_default();
        unless_refused(store.rows(name, rows.saturating_sub(1)..rows));
    }
    unless_refused(describe(path));
    for component in Component::ALL {
        let Ok(store) = open() else { return };
        if let Some(weights) = unless_refused(component.in_store(store, DType::F32, &Device::Cpu)) {
            unless_refused(count(component, &weights));
        }
    }
    for (format, target) in [(FileFormat::Gguf, "q8_0"), (FileFormat::Safetensors, "fp8_scaled")] {
        let target: Target = target.parse().unwrap();
        if let Some(conversion) = unless_refused(Conversion::plan(path, format, target, &[])) {
            unless_refused(conversion.bytes());
            unless_refused(conversion.write(&mut io::sink(), &mut |_| ControlFlow::Continue(())));
        }
    }
}

/// Takes a component's sizes from its tensors' shapes, and compares them with all of its tensors.
fn count(component: Component, weights: &Weights) -> Result<Counted> {
    match component {
        Component::Transformer => {
            let config = FluxConfig::of(weights)?;
            config.check("")?;
            weights.count(|weights| FluxTransformer::load(weights, &config))
        }
        Component::Vae => {
            let config = VaeConfig::of(weights)?;
            weights.count(|weights| VaeDecoder::load(weights, &config))
        }
        Component::Clip => {
            let config = ClipConfig::of(weights)?;
            config.check("")?;
            weights.count(|weights| ClipEncoder::load(weights, &config))
        }
        Component::T5 => {
            let config = T5Config::of(weights)?;
            config.check("")?;
            weights.count(|weights| T5Encoder::load(weights, &config))
        }
    }
}

#![no_main]

use std::sync::{Arc, LazyLock};

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use retouch_fuzz::{bounded, file, fixture, unless_refused};
use retouch_weights::{Adapters, Component, Linear, LoraFile, ModelFile, Store, Weights, naming::flux};

/// The fixtures' transformer in f32, into which LoRAs are merged, and in Q4_0, beside which they are computed.
static MODELS: LazyLock<[Weights; 2]> = LazyLock::new(|| {
    ["tiny-kontext/flux1-kontext-dev.safetensors", "quantised/flux-q4_0.gguf"].map(|name| {
        let store = Store::open(vec![ModelFile::open(fixture(name)).unwrap()]).unwrap();
        Component::Transformer.in_store(store, DType::F32, &Device::Cpu).unwrap()
    })
});

fuzz_target!(|input: &[u8]| {
    let (path, models) = (file("lora.safetensors", input), &*MODELS);
    // Parameters of the model are read as well: the largest of them, twice.
    bounded(input, 16, 1 << 21, || {
        let Some(lora) = unless_refused(LoraFile::open(&path)) else { return };
        lora.describe();
        unless_refused(lora.check_places(true, |_| Ok(models[0].clone())));
        let lora = Arc::new(lora);
        for weights in models {
            let files = [(lora.clone(), 0.5), (lora.clone(), -1.0)];
            let adapters = unless_refused(Adapters::new(&files, Component::Transformer, weights));
            if let Some(adapters) = adapters.filter(|adapters| !adapters.is_empty()) {
                read(&weights.clone().with_adapters(Arc::new(adapters)));
            }
        }
    });
});

fn read(weights: &Weights) {
    unless_refused(weights.lora_bytes());
    for name in flux::parameters(2, 2) {
        let Some(shape) = weights.shape(&name) else { continue };
        match (shape.as_slice(), name.strip_suffix(".weight")) {
            (&[output, input], Some(module)) => {
                unless_refused(Linear::load_no_bias(&weights.pp(module), input, output));
            }
            _ => {
                unless_refused(weights.get(shape, &name));
            }
        }
    }
}

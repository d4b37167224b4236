#![no_main]

use std::{fs, sync::LazyLock};

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use retouch::models::ModelDefaults;
use retouch_flow::{FluxConfig, FluxTransformer};
use retouch_fuzz::{bounded, file, fixture, scratch, unless_refused};
use retouch_sampler::{Schedule, SchedulerConfig};
use retouch_text_encoder::{ClipConfig, ClipEncoder, T5Config, T5Encoder};
use retouch_vae::{VaeConfig, VaeDecoder, VaeEncoder};
use retouch_weights::{Component, Folder, LoraFile, ModelFile, Pipeline, Store, Weights};

const INPUT: &str = "model_index.json";

/// The other files as which the input is read, by their own names: the same file once more.
const OTHERS: [&str; 2] = ["model.safetensors.index.json", "adapter_config.json"];

/// The fixtures' components, whose sizes are compared with those of a configuration; of their values nothing is read.
static MODEL: LazyLock<[Weights; 4]> = LazyLock::new(|| {
    file(INPUT, b"");
    for name in OTHERS {
        fs::hard_link(scratch().join(INPUT), scratch().join(name)).unwrap();
    }
    fs::copy(fixture("lora/fal.safetensors"), scratch().join("adapter_model.safetensors")).unwrap();
    let folder = Folder::on_disk(fixture("tiny-kontext"));
    Component::ALL.map(|component| component.in_folder(&folder, DType::F32, &Device::Cpu).unwrap())
});

fuzz_target!(|input: &[u8]| {
    let [transformer, vae, clip, t5] = &*MODEL;
    let path = file(INPUT, input);
    bounded(input, 16, 1 << 21, || {
        let json = ModelFile::open(&path).unwrap();
        if let Some(config) = unless_refused(json.json::<FluxConfig>())
            && unless_refused(config.check("")).is_some()
        {
            unless_refused(transformer.count(|weights| FluxTransformer::load(weights, &config)));
        }
        if let Some(config) = unless_refused(json.json::<VaeConfig>())
            && unless_refused(config.check("")).is_some()
        {
            unless_refused(vae.count(|weights| VaeEncoder::load(weights, &config)));
            unless_refused(vae.count(|weights| VaeDecoder::load(weights, &config)));
        }
        if let Some(config) = unless_refused(json.json::<ClipConfig>())
            && unless_refused(config.check("")).is_some()
        {
            unless_refused(clip.count(|weights| ClipEncoder::load(weights, &config)));
        }
        if let Some(config) = unless_refused(json.json::<T5Config>())
            && unless_refused(config.check("")).is_some()
        {
            unless_refused(t5.count(|weights| T5Encoder::load(weights, &config)));
        }
        if let Some(config) = unless_refused(json.json::<SchedulerConfig>())
            && config.unsupported().is_none()
        {
            Schedule::new(&config, 4, 4096).timesteps();
        }
        if let Some(defaults) = unless_refused(json.json::<ModelDefaults>()) {
            unless_refused(defaults.check(16));
        }
        let folder = Folder::on_disk(scratch());
        unless_refused(Pipeline::of(&folder));
        unless_refused(Store::open_component(&folder, "model"));
        unless_refused(LoraFile::open(&scratch().join("adapter_model.safetensors")));
    });
});

//! Our text encoder against candle-transformers' of the same model: two implementations that share no code.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::t5::{Config, T5EncoderModel};
use retouch::weights::{Component, Folder};
use retouch_text_encoder::{T5Config, T5Encoder};

#[test]
fn t5_equals_candle_transformers() {
    let folder = Folder::on_disk(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-kontext"));
    let weights = Component::T5.in_folder(&folder, DType::F32, &Device::Cpu).unwrap();
    let ours: T5Config = folder.json("text_encoder_2/config.json").unwrap();
    let ours = T5Encoder::load(&weights, &ours).unwrap();
    let theirs: Config = folder.json("text_encoder_2/config.json").unwrap();
    let mut theirs = T5EncoderModel::load(weights.var_builder(), &theirs).unwrap();

    let ids: Vec<u32> = (0..300).map(|i| (i * 37 + i * i) % 400).collect();
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let (ours, theirs) = (ours.embed(&ids).unwrap(), theirs.forward(&ids).unwrap());
    let max = |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let error = max((&ours - &theirs).unwrap()) / max(theirs);
    // The inherent error of T5's unscaled scores in f32 is of order 1e-5.
    assert!(error < 1e-4, "{error:e}");
}

//! What the cancellation of a request ends.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::{DType, Device, Module, Tensor};
use retouch_weights::{Layers, Linear, ModelFile, Stay, Store, Weights, naming::SameNames};

#[test]
fn layers_that_serve_later_requests_are_read_after_the_first_one_was_cancelled() {
    const LAYERS: usize = 3;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layers.safetensors");
    let x = Tensor::ones((2, 8), DType::F32, &Device::Cpu).unwrap();
    let one = |i: usize| [(format!("{i}.weight"), Tensor::eye(8, DType::F32, &Device::Cpu).unwrap())];
    let biases = (0..LAYERS).map(|i| (format!("{i}.bias"), x.get(0).unwrap()));
    let tensors: HashMap<_, _> = (0..LAYERS).flat_map(one).chain(biases).collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let store = Store::open(vec![ModelFile::open(&path).unwrap()]).unwrap();
    let cancel = Arc::new(AtomicBool::new(false));
    let weights = Weights::new(store, SameNames, DType::F32, &Device::Cpu).with_cancel(cancel.clone());
    let load = |for_one_request| {
        let stay = Stay { resident: Some(1), on_host: false, for_one_request };
        Layers::load(&weights, LAYERS, stay, |weights, i| Linear::load(&weights.pp(i), 8, 8)).unwrap()
    };
    let (own, shared) = (load(true), load(false));
    cancel.store(true, Ordering::Relaxed);
    let run = |layers: &Layers<Linear>| layers.run(0..LAYERS, x.clone(), |x, _, layer| layer.forward(&x));
    assert!(run(&own).unwrap_err().to_string().contains("cancelled"));
    assert_eq!(run(&shared).unwrap().to_vec2::<f32>().unwrap(), [[4.0; 8]; 2]);
}

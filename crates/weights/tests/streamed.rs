//! Layers that are sent to a device for each pass: where their parameters come from. The only test of its file: what this process
//! has read is counted.

#[path = "support/feed.rs"]
mod feed;

use std::collections::HashMap;

use candle_core::{DType, Device, Module, Tensor};
use feed::HostFeed;
use retouch_sampler::TorchGenerator;
use retouch_weights::{Layers, Linear, ModelFile, Stay, Store, Weights, bytes_read, naming::SameNames};

const LAYERS: usize = 4;
const WIDTH: usize = 640; // 1.6 MB a matrix

#[test]
fn large_parameters_are_read_once_where_they_stay_on_the_host_and_else_at_each_pass() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layers.safetensors");
    let mut numbers = TorchGenerator::new(0);
    let mut random = |shape: &[usize]| {
        let values = numbers.normal(shape.iter().product());
        (Tensor::from_vec(values, shape, &Device::Cpu).unwrap() * 0.05).unwrap()
    };
    let mut tensors = HashMap::new();
    for i in 0..LAYERS {
        tensors.insert(format!("{i}.weight"), random(&[WIDTH, WIDTH]));
        tensors.insert(format!("{i}.bias"), random(&[WIDTH]));
    }
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let weights =
        Weights::new(Store::open(vec![ModelFile::open(&path).unwrap()]).unwrap(), SameNames, DType::F32, &Device::Cpu);
    let x = random(&[3, WIDTH]);
    let load = |weights: &Weights, stay| {
        Layers::load(weights, LAYERS, stay, |weights, i| Linear::load(&weights.pp(i), WIDTH, WIDTH)).unwrap()
    };
    let run = |layers: &Layers<Linear>| {
        let y = layers.run(0..LAYERS, x.clone(), |x, _, layer| layer.forward(&x)).unwrap();
        y.to_vec2::<f32>().unwrap()
    };
    let expected = run(&load(&weights, Stay::default()));

    let (matrices, biases) = (3 * WIDTH * WIDTH * 4, 3 * WIDTH * 4);
    for (on_host, pins) in [(false, true), (false, false), (true, true), (true, false)] {
        let feed = HostFeed::new(pins);
        let layers =
            load(&weights.clone().with_feed(feed.clone()), Stay { resident: Some(1), on_host, for_one_request: true });
        for pass in 0..3 {
            let before = bytes_read();
            assert_eq!(run(&layers), expected, "pass {pass}");
            let read = (bytes_read() - before) as usize;
            let (from_pinned, from_elsewhere) = feed.sent();
            match (on_host, pins) {
                (false, true) => assert_eq!((from_pinned, from_elsewhere), (biases, matrices)),
                (true, true) => assert_eq!((from_pinned, from_elsewhere), (biases + matrices, 0)),
                (_, false) => assert_eq!((from_pinned, from_elsewhere), (0, biases + matrices)),
            }
            // Without pinned memory, what the file has as the device takes it is as well read from there.
            let again = if pins && on_host { 0 } else { matrices };
            let small = if pins { 0 } else { biases };
            assert_eq!(read, if pass == 0 { matrices + biases } else { again + small }, "{on_host} {pins} {pass}");
        }
    }
}

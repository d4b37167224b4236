//! What reading weights takes at its peak, beside what stays. The only test of its file: it counts the whole process's memory.
#![cfg(all(target_os = "linux", target_env = "gnu"))]

use std::{collections::HashMap, fs, fs::File, io::sink, ops::ControlFlow, path::Path};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use retouch_sampler::TorchGenerator;
use retouch_weights::{
    Component, FluxShape, Linear, ModelFile, Store, Weights,
    convert::{Conversion, FileFormat, Target},
    naming::{SameNames, flux},
};
use tempfile::TempDir;

const LAYERS: usize = 128;
const SHAPE: (usize, usize) = (256, 1024);

/// A few matrices, the allocator's own, and what the threads touch first.
const FIXED: u64 = 8 << 20;

/// A line of proc_pid_status(5) in bytes.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

unsafe extern "C" {
    fn malloc_trim(keep: usize) -> i32;
}

/// The most memory that `f` takes, mapped pages of files included.
fn peak<T>(f: impl FnOnce() -> T) -> (u64, T) {
    // SAFETY: may be called at any time. What was freed before is given back, lest it be taken again unseen.
    unsafe { malloc_trim(0) };
    let before = status("VmRSS:");
    fs::write("/proc/self/clear_refs", "5").unwrap(); // the peak counts anew
    let result = f();
    (status("VmHWM:").saturating_sub(before), result)
}

fn open(path: &Path) -> Weights {
    Weights::new(Store::open(vec![ModelFile::open(path).unwrap()]).unwrap(), SameNames, DType::F32, &Device::Cpu)
}

fn load(weights: &Weights) -> retouch_weights::Result<Vec<Linear>> {
    (0..LAYERS).map(|i| Linear::load_no_bias(&weights.pp(format!("layer.{i}")), SHAPE.1, SHAPE.0)).collect()
}

#[test]
fn reading_takes_no_more_than_what_stays_and_copying_next_to_nothing() {
    let folder = TempDir::new().unwrap();
    let place = |name: &str| folder.path().join(name);
    let matrix = Tensor::from_vec(TorchGenerator::new(0).normal(SHAPE.0 * SHAPE.1), SHAPE, &Device::Cpu).unwrap();
    let name = |i: usize| format!("layer.{i}.weight");
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F8E4M3] {
        let matrix = matrix.to_dtype(dtype).unwrap();
        let tensors: HashMap<_, _> = (0..LAYERS).map(|i| (name(i), matrix.clone())).collect();
        candle_core::safetensors::save(&tensors, place(dtype.as_str())).unwrap();
    }
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4K] {
        let matrix = QTensor::quantize(&matrix, kind).unwrap();
        let names: Vec<String> = (0..LAYERS).map(name).collect();
        let tensors: Vec<_> = names.iter().map(|name| (name.as_str(), &matrix)).collect();
        gguf_file::write(&mut File::create(place(&format!("{kind:?}"))).unwrap(), &[], &tensors).unwrap();
    }
    let quantised =
        |name: &str, target: &str| open(&place(name)).quantised(Component::Transformer, target.parse().unwrap());
    // Once for what is only touched once.
    load(&quantised("f32", "q8_0")).unwrap();
    for (what, weights) in [
        ("F32", open(&place("f32"))),
        ("BF16", open(&place("bf16"))),
        ("F16", open(&place("f16"))),
        ("fp8", open(&place("f8e4m3"))),
        ("GGUF Q8_0", open(&place("Q8_0"))),
        ("GGUF Q4_K", open(&place("Q4K"))),
        ("F32 to q8_0", quantised("f32", "q8_0")),
        ("BF16 to q4_k", quantised("bf16", "q4_k")),
        ("F16 to fp8", quantised("f16", "fp8_scaled")),
    ] {
        let stays: u64 = weights.count(load).unwrap().values().sum();
        let (peak, layers) = peak(|| load(&weights).unwrap());
        assert!(peak <= stays + stays / 10 + FIXED, "{what}: {peak} bytes at the peak, of which {stays} stay");
        assert!(
            peak >= stays / 2,
            "{what}: {peak} bytes at the peak, of which {stays} should stay: what was measured?"
        );
        drop(layers);
    }
    copying_takes_next_to_nothing(&place("flux"));
}

/// Of a transformer whose types stay as they are.
fn copying_takes_next_to_nothing(path: &Path) {
    // The small tensors decide the sizes; one large matrix in each block makes the file.
    let tensors: HashMap<_, _> = flux::parameters(12, 1)
        .into_iter()
        .map(|name| {
            let shape: &[usize] = match name.rsplit_once('.').unwrap() {
                (module, "weight") if module.ends_with("mlp.0") => &[2048, 1024],
                (_, "weight") => &[4, 4],
                _ => &[4],
            };
            (name, Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap())
        })
        .collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
    drop(tensors);
    let weights = Component::Transformer
        .in_store(Store::open(vec![ModelFile::open(path).unwrap()]).unwrap(), DType::F32, &Device::Cpu)
        .unwrap();
    assert_eq!(FluxShape::of(&weights).unwrap().double_blocks, 12);
    let conversion = Conversion::plan(path, FileFormat::Safetensors, Target::Bf16, &[]).unwrap();
    let (peak, written) = peak(|| conversion.write(&mut sink(), &mut |_| ControlFlow::Continue(())));
    written.unwrap();
    let bytes = conversion.bytes().unwrap() as u64;
    assert!(bytes > 12 * FIXED && peak < FIXED + (4 << 20), "{peak} bytes for a file of {bytes}");
}

//! Each fused operation beside its portable definition, at the sizes of a 512 px edit with FLUX.1 (some with fewer heads
//! or tokens, so that all of them fit a few minutes).
//!
//! `cargo bench --bench kernels`. Operations that are limited by arithmetic report floating-point operations per second
//! ("elem"), the others bytes per second, counted as each input read once and each result written once. In bf16 on CUDA, in f32
//! on the CPU; on CUDA also what cuDNN computes beside our own kernels.

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use retouch_kernels::{Activation, Kernels, Packed, Part, Portable, Rotation, Stream, Window, check_fp8, for_device};

fn device() -> Device {
    #[cfg(feature = "cuda")]
    {
        // One device: tensors of two that are the same GPU do not meet.
        static GPU: std::sync::LazyLock<Device> = std::sync::LazyLock::new(|| retouch_kernels::cuda::open(0).unwrap());
        GPU.clone()
    }
    #[cfg(not(feature = "cuda"))]
    Device::Cpu
}

fn random(shape: impl Into<candle_core::Shape>) -> Tensor {
    let dtype = if device().is_cuda() { DType::BF16 } else { DType::F32 };
    Tensor::randn(0f32, 1., shape, &device()).unwrap().to_dtype(dtype).unwrap()
}

fn bytes(tensors: &[&Tensor]) -> Throughput {
    Throughput::Bytes(tensors.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum::<usize>() as u64)
}

fn flop(count: usize) -> Throughput {
    Throughput::Elements(count as u64)
}

fn compare<R>(c: &mut Criterion, name: &str, throughput: Throughput, operation: impl Fn(&dyn Kernels) -> Result<R>) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10).throughput(throughput);
    let fused: &dyn Kernels = for_device(&device());
    for (label, kernels) in [("fused", fused), ("portable", &Portable)] {
        group.bench_function(label, |b| {
            b.iter(|| {
                let y = operation(kernels).unwrap();
                device().synchronize().unwrap();
                y
            })
        });
    }
}

fn transformer(c: &mut Criterion) {
    const TOKENS: usize = 2560;
    const HIDDEN: usize = 3072;
    let (x, y, vector) = (random((1, TOKENS, HIDDEN)), random((1, TOKENS, HIDDEN)), random((1, HIDDEN)));
    compare(c, "modulated_norm", bytes(&[&x, &x]), |k| k.modulated_norm(&x, &vector, &vector));
    compare(c, "gated_residual", bytes(&[&x, &x, &x]), |k| k.gated_residual(&x, &y, &vector));

    let (heads, head_dim) = (8, 128);
    let qkv = random((1, TOKENS, 3 * heads * head_dim));
    let (scale, angles) = (random(head_dim), random((TOKENS, head_dim / 2)).to_dtype(DType::F32).unwrap());
    let rotation = Rotation { cos: angles.cos().unwrap(), sin: angles.sin().unwrap() };
    compare(c, "heads", bytes(&[&qkv, &qkv]), |k| {
        k.heads(&[Stream { qkv: &qkv, query_scale: &scale, key_scale: &scale }], &rotation)
    });

    let heads = 4;
    let q = random((1, TOKENS, heads, head_dim));
    compare(c, "attention", flop(4 * heads * TOKENS * TOKENS * head_dim), |k| {
        k.attention(&q, &q, &q, None, (head_dim as f64).powf(-0.5))
    });

    let (rows, outputs) = (512, 4 * HIDDEN);
    let (x, weight, bias) = (random((1, rows, HIDDEN)), random((outputs, HIDDEN)), random(outputs));
    compare(c, "linear_gelu", flop(2 * rows * HIDDEN * outputs), |k| {
        k.linear(&x, &weight, Some(&bias), Activation::Gelu)
    });
    let narrow = [&x, &weight, &bias].map(|x| x.to_dtype(DType::BF16).unwrap());
    compare(c, "linear_bf16", flop(2 * rows * HIDDEN * outputs), |k| {
        k.linear(&narrow[0], &narrow[1], Some(&narrow[2]), Activation::None)
    });
    packed(c, rows, HIDDEN, outputs);

    let (q, inner) = (random((1, rows, heads, head_dim)), random((1, rows, outputs)));
    compare(c, "attention_beside_gelu", bytes(&[&inner, &inner]), |k| {
        k.attention_beside_gelu(&q, &q, &q, (head_dim as f64).powf(-0.5), &inner)
    });
}

/// Linear layers whose matrix has fewer bits than are computed with.
fn packed(c: &mut Criterion, rows: usize, inputs: usize, outputs: usize) {
    let work = flop(2 * rows * inputs * outputs);
    let (x, weight) = (random((1, rows, inputs)), random((outputs, inputs)).to_dtype(DType::F32).unwrap());
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4K] {
        let blocks = QTensor::quantize_onto(&weight.to_device(&Device::Cpu).unwrap(), kind, &device()).unwrap();
        let weight = Packed::stack(vec![Part::blocks(blocks).unwrap()]).unwrap();
        compare(c, &format!("linear_{kind:?}"), work.clone(), |k| k.linear_packed(&x, &weight, None, Activation::None));
        let moved = weight.bytes() + outputs * inputs * x.dtype().size_in_bytes();
        compare(c, &format!("dequantise_{kind:?}"), Throughput::Bytes(moved as u64), |k| {
            k.dequantise(&weight, x.dtype())
        });
    }
    if let Err(reason) = check_fp8(&device()) {
        println!("8-bit floats are left out: {reason}");
        return;
    }
    compare(c, "quantise_rows", bytes(&[&x]), |k| k.quantise_rows(&x));
    let weight = for_device(&device()).quantise_rows(&weight).unwrap();
    compare(c, "linear_fp8", work, |k| k.linear_fp8(&x, &weight, None, Activation::None));
}

fn text(c: &mut Criterion) {
    let (gate, value) = (random((1, 512, 10240)), random((1, 512, 10240)));
    compare(c, "gated_gelu", bytes(&[&gate, &gate, &gate]), |k| k.gated_gelu(&gate, &value));

    let (tokens, heads, head_dim) = (512, 64, 64);
    let (q, bias) = (random((1, tokens, heads, head_dim)), random((1, heads, tokens, tokens)));
    compare(c, "attention_with_bias", flop(4 * heads * tokens * tokens * head_dim), |k| {
        k.attention(&q, &q, &q, Some(&bias), 1.0)
    });
}

fn vae(c: &mut Criterion) {
    const CHANNELS: usize = 128;
    const SIDE: usize = 256;
    let x = random((1, CHANNELS, SIDE, SIDE));
    let (weight, bias) = (random((CHANNELS, CHANNELS, 3, 3)), random(CHANNELS));
    compare(c, "group_norm_silu", bytes(&[&x, &x]), |k| k.group_norm(&x, &bias, &bias, 32, 1e-6, true));
    let band = x.narrow(2, SIDE / 4, SIDE / 2).unwrap();
    compare(c, "group_moments_of_rows", bytes(&[&band]), |k| k.group_moments(&band, 32));
    let moments = Portable.group_moments(&x, 32).unwrap();
    compare(c, "group_norm_silu_of_rows", bytes(&[&band, &band]), |k| {
        k.group_norm_by(&band, &moments, &bias, &bias, 1e-6, true)
    });
    compare(c, "conv2d", flop(2 * 9 * CHANNELS * CHANNELS * SIDE * SIDE), |k| {
        k.conv2d(&x, &weight, &bias, None, Window::Same)
    });
}

/// What cuDNN may compute beside our own, at the sizes of 1024x1024 without and with a reference.
#[cfg(feature = "cuda")]
fn cudnn(c: &mut Criterion) {
    use retouch_kernels::cuda::{Use, cudnn_status, with_cudnn};

    let Device::Cuda(gpu) = device() else { return };
    let beside = |c: &mut Criterion, name: &str, work: usize, operation: &dyn Fn(&dyn Kernels) -> Result<Tensor>| {
        let mut group = c.benchmark_group(name);
        group.sample_size(10).throughput(flop(work));
        for (label, when) in [("cudnn", Use::Always), ("own", Use::Never)] {
            let kernels = with_cudnn(&gpu, when);
            let run = || {
                let y = operation(kernels).unwrap();
                y.device().synchronize().unwrap();
                y
            };
            run(); // makes the plan, and compares its result
            group.bench_function(label, |b| b.iter(run));
        }
    };
    let (heads, head_dim) = (24, 128);
    for tokens in [4608, 8704] {
        let qkv = random((1, tokens, 3, heads, head_dim));
        let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2);
        let work = 4 * heads * tokens * tokens * head_dim;
        beside(c, &format!("attention_bf16/{tokens}"), work, &|k| {
            k.attention(&part(0)?, &part(1)?, &part(2)?, None, (head_dim as f64).powf(-0.5))
        });
    }
    for (channels, side) in [(512, 128), (512, 256), (256, 512), (128, 1024)] {
        let x = random((1, channels, side, side));
        let (weight, bias) = (random((channels, channels, 3, 3)), random(channels));
        let work = 2 * 9 * channels * channels * side * side;
        beside(c, &format!("conv2d_bf16/{channels}_{side}"), work, &|k| {
            k.conv2d(&x, &weight, &bias, None, Window::Same)
        });
    }
    println!("cuDNN: {}", cudnn_status(&gpu, Use::Always));
}

#[cfg(not(feature = "cuda"))]
fn cudnn(_: &mut Criterion) {}

criterion_group!(kernels, transformer, text, vae, cudnn);
criterion_main!(kernels);

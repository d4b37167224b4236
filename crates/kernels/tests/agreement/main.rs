//! Every device's operations against their definition (`portable`, in f64 on the CPU), for odd sizes and every dtype.
//!
//! The CPU always, and the CUDA kernels as emulated on the CPU where there is a C++ compiler; a CUDA device with the feature
//! `cuda`; a Metal device where there is one and the feature is on.

mod attention;
mod blocks;
mod emulator;
mod images;
mod library;
mod linear;
mod packed;
mod random;

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};
#[cfg(feature = "cuda")]
use retouch_kernels::cuda::Use;
use retouch_kernels::{
    Activation, Fp8, Fp8Rows, Kernels, Packed, Part, Portable, Rotation, Stream, Window, for_device,
};

use random::random;

/// What to compare, and where its tensors are.
type Place = (String, Device, &'static dyn Kernels);

fn devices() -> Vec<Place> {
    let mut devices = vec![Device::Cpu];
    #[cfg(feature = "cuda")]
    {
        // Where there is a driver, without which this would not have started, there is a GPU to check.
        static GPU: std::sync::LazyLock<Device> = std::sync::LazyLock::new(|| retouch_kernels::cuda::open(0).unwrap());
        devices.push(GPU.clone());
    }
    if cfg!(feature = "metal") {
        devices.extend(Device::new_metal(0).ok());
    }
    let mut places = Vec::new();
    for device in devices {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(gpu) = &device {
            let kernels = retouch_kernels::cuda::with_cudnn(gpu, Use::Always);
            places.push((format!("{device:?} with cuDNN where it is found"), device.clone(), kernels));
        }
        places.push((format!("{device:?}"), device.clone(), for_device(&device)));
    }
    places
}

/// The emulated kernels.
fn emulated() -> Vec<Place> {
    emulator::gpus().iter().map(|(name, gpu)| (name.to_string(), Device::Cpu, gpu as &dyn Kernels)).collect()
}

fn everywhere() -> Vec<Place> {
    devices().into_iter().chain(emulated()).collect()
}

/// Runs `operation` by its definition in f64 on `inputs` as rounded to each dtype, and with each device's kernels on
/// those inputs in that dtype; the largest difference must stay below `tolerance` (f32) of the largest magnitude, or
/// below two roundings of a narrow dtype.
fn agree(name: &str, tolerance: f64, inputs: &[Tensor], operation: impl Fn(&dyn Kernels, &[Tensor]) -> Result<Tensor>) {
    agree_at(everywhere(), name, tolerance, inputs, operation);
}

fn agree_at(
    places: Vec<Place>,
    name: &str,
    tolerance: f64,
    inputs: &[Tensor],
    operation: impl Fn(&dyn Kernels, &[Tensor]) -> Result<Tensor>,
) {
    agree_in(&[DType::F32, DType::BF16, DType::F16], places, name, [tolerance, 2.0], inputs, operation);
}

/// [`agree_at`] in some dtypes, with the number of roundings of a narrow one.
fn agree_in(
    dtypes: &[DType],
    places: Vec<Place>,
    name: &str,
    [tolerance, roundings]: [f64; 2],
    inputs: &[Tensor],
    operation: impl Fn(&dyn Kernels, &[Tensor]) -> Result<Tensor>,
) {
    let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    for (place, device, kernels) in places {
        for &dtype in dtypes {
            let rounded: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
            let wide: Vec<Tensor> = rounded.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
            let here: Vec<Tensor> = rounded.iter().map(|x| x.to_device(&device).unwrap()).collect();
            let expected = operation(&Portable, &wide).unwrap();
            let found = operation(kernels, &here).unwrap();
            assert_eq!((found.shape(), found.dtype()), (expected.shape(), dtype), "{name}");
            let found = found.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
            // A sum, unlike a maximum, shows every NaN.
            assert!(found.sum_all().unwrap().to_scalar::<f64>().unwrap().is_finite(), "{name} on {place} in {dtype:?}");
            let difference = largest(&(found - &expected).unwrap()) / largest(&expected).max(1e-30);
            let bound = match dtype {
                DType::F32 => tolerance,
                DType::F16 => roundings / 2048.0,
                _ => roundings / 256.0,
            };
            assert!(difference <= bound, "{name} on {place} in {dtype:?}: {difference:e} > {bound:e}");
        }
    }
}

#[test]
fn operations_launch_the_kernels_that_there_are() {
    let Some((_, gpu)) = emulator::gpus().first() else { return };
    let narrow = |shape: &[usize]| random(shape).to_dtype(DType::BF16).unwrap();
    let launched = |operation: &dyn Fn(&dyn Kernels) -> Result<Tensor>| {
        let log = gpu.0.logged();
        operation(&log).unwrap();
        log.0.log()
    };
    let (x, vector) = (narrow(&[2, 3, 64]), narrow(&[1, 64]));
    // The product is not a kernel of ours; its GELU is in f32.
    let (rows, weight) = (random((2, 3)), random((4, 3)));
    assert_eq!(launched(&|k| k.linear(&rows, &weight, None, Activation::Gelu)), ["gelu_rows_f32"]);
    let fp8 = Fp8Rows::quantise(&random((16, 64))).unwrap();
    let in_fp8 = |k: &dyn Kernels| k.linear_fp8(&x, &fp8, None, Activation::Gelu);
    assert_eq!(launched(&in_fp8), ["quantise_rows_bf16"]);
    // A library that does not scale rows leaves that to a kernel.
    if let Some((_, gpu)) = emulator::gpus().get(1) {
        let log = gpu.0.logged();
        in_fp8(&log).unwrap();
        assert_eq!(log.0.log(), ["quantise_rows_bf16", "scaled_sums_bf16"]);
    }
    // One kernel for each part that is not yet what is computed with.
    let blocks = Part::blocks(QTensor::quantize(&random((4, 64)), GgmlDType::Q8_0).unwrap()).unwrap();
    let codes = Part::Fp8 { codes: fp8.codes.clone(), format: Fp8::E4m3, scale: 0.5 };
    let half = Part::Dense(random((4, 64)).to_dtype(DType::F16).unwrap());
    for (parts, kernels) in [
        (vec![blocks, codes, half], &["dequantise_q8_0_bf16", "dequantise_e4m3_bf16", "dequantise_f16_bf16"][..]),
        (vec![Part::Dense(narrow(&[4, 64]))], &[]),
    ] {
        let packed = Packed::stack(parts).unwrap();
        assert_eq!(launched(&|k| k.linear_packed(&x, &packed, None, Activation::None)), kernels);
    }
    assert_eq!(launched(&|k| k.modulated_norm(&x, &vector, &vector)), ["modulated_norm_bf16"]);
    assert_eq!(launched(&|k| k.gated_residual(&x, &x, &vector)), ["gated_residual_bf16"]);
    assert_eq!(launched(&|k| k.gated_gelu(&x, &x)), ["gated_gelu_bf16"]);
    let (qkv, scale) = (narrow(&[1, 5, 3, 2, 128]), narrow(&[128]));
    let flat = qkv.flatten_from(2).unwrap();
    let stream = || Stream { qkv: &flat, query_scale: &scale, key_scale: &scale };
    let rotation = Rotation { cos: random((10, 64)), sin: random((10, 64)) };
    assert_eq!(launched(&|k| k.heads(&[stream(), stream()], &rotation)), ["heads_bf16"; 2]);
    let part = |i: usize| qkv.narrow(2, i, 1).unwrap().squeeze(2).unwrap();
    let [q, k, v] = [0, 1, 2].map(part);
    assert_eq!(launched(&|kernels| kernels.attention(&q, &k, &v, None, 0.1)), ["attention_128_64_bf16"]);
    let inner = narrow(&[1, 5, 8]);
    let both = ["attention_128_64_bf16", "gelu_rows_bf16"];
    assert_eq!(launched(&|kernels| kernels.attention_beside_gelu(&q, &k, &v, 0.1, &inner)), both);
    // As T5 calls it, and CLIP; there is none for other heads.
    let (heads, bias, mask) = (narrow(&[1, 77, 3, 64]), narrow(&[1, 3, 77, 77]), narrow(&[1, 1, 77, 77]));
    for bias in [&bias, &mask] {
        let biased = launched(&|kernels| kernels.attention(&heads, &heads, &heads, Some(bias), 1.0));
        assert_eq!(biased, ["attention_64_64_bias_bf16"]);
    }
    let bias = narrow(&[1, 2, 5, 5]);
    assert!(launched(&|kernels| kernels.attention(&q, &k, &v, Some(&bias), 0.1)).is_empty());
    let image = narrow(&[1, 64, 4, 4]);
    let vector = vector.squeeze(0).unwrap();
    let both = ["group_norm_measure_bf16", "group_norm_apply_bf16"];
    assert_eq!(launched(&|k| k.group_norm(&image, &vector, &vector, 32, 1e-6, true)), both);
    let by_moments = |k: &dyn Kernels| {
        let moments = k.group_moments(&image.narrow(2, 1, 2)?, 32)?;
        k.group_norm_by(&image, &moments, &vector, &vector, 1e-6, true)
    };
    assert_eq!(launched(&by_moments), both);
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    for (place, device, kernels) in everywhere() {
        let random = |shape: &[usize]| random(shape).to_device(&device).unwrap();
        let (x, y) = (random(&[1, 3, 8]), random(&[1, 3, 6]));
        let (q, k) = (random(&[1, 3, 2, 4]), random(&[1, 5, 2, 4]));
        let image = random(&[1, 4, 4, 4]);
        let (gate, shift, mask, inner) = (random(&[1, 8]), random(&[1, 6]), random(&[1, 2, 3, 4]), random(&[1, 4, 8]));
        let (three, four) = (random(&[3]), random(&[4]));
        let packed = |columns: usize| {
            Packed::stack(vec![Part::Dense(random(&[4, columns]).to_dtype(DType::BF16).unwrap())]).unwrap()
        };
        let fp8 = |columns: usize| kernels.quantise_rows(&random(&[4, columns])).unwrap();
        for (what, result) in [
            ("weight", kernels.linear(&x, &random(&[4, 6]), None, Activation::None)),
            ("bias", kernels.linear(&x, &random(&[4, 8]), Some(&three), Activation::None)),
            ("packed weight", kernels.linear_packed(&x, &packed(6), None, Activation::None)),
            ("bias of a packed weight", kernels.linear_packed(&x, &packed(8), Some(&three), Activation::None)),
            ("8-bit weight", kernels.linear_fp8(&x, &fp8(6), None, Activation::None)),
            ("bias of an 8-bit weight", kernels.linear_fp8(&x, &fp8(8), Some(&three), Activation::None)),
            ("residual", kernels.gated_residual(&x, &y, &gate)),
            ("shift", kernels.modulated_norm(&x, &shift, &gate)),
            ("value", kernels.gated_gelu(&x, &y)),
            ("values", kernels.attention(&q, &k, &q, None, 1.0)),
            ("mask", kernels.attention(&q, &k, &k, Some(&mask), 1.0)),
            ("inner", kernels.attention_beside_gelu(&q, &k, &k, 1.0, &inner)),
            ("groups", kernels.group_norm(&image, &four, &four, 3, 1e-6, false)),
            ("channels", kernels.conv2d(&image, &random(&[2, 3, 3, 3]), &random(&[2]), None, Window::Same)),
            ("image", kernels.conv2d(&image, &random(&[2, 4, 3, 3]), &random(&[2]), Some(&image), Window::Same)),
        ] {
            assert!(result.is_err(), "{what} on {place}");
        }
        assert!(kernels.group_moments(&image, 3).is_err(), "groups of moments on {place}");
    }
}

//! Every device's operations against their definition (`portable`, in f64 on the CPU), for odd sizes and every dtype.
//!
//! The CPU always, and the CUDA kernels as emulated on the CPU where there is a C++ compiler; a CUDA device with the feature
//! `cuda`; a Metal device where there is one and the feature is on.

mod emulator;
mod random;

use candle_core::{
    D, DType, Device, Result, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
#[cfg(feature = "cuda")]
use retouch_kernels::cuda::Use;
use retouch_kernels::{
    Activation, Fp8, Fp8Rows, Kernels, Packed, Part, Portable, Rotation, Stream, Window, cuda::Verdict, for_device,
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

#[cfg(feature = "cuda")]
#[test]
fn cudnn_agrees_with_our_kernels_where_it_is_found() {
    let inputs = inputs_of_two();
    for (_, device, _) in devices() {
        let Device::Cuda(gpu) = &device else { continue };
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_device(&device).unwrap()).collect();
        for operation in two_operations() {
            operation(retouch_kernels::cuda::with_cudnn(gpu, Use::Always), &inputs).unwrap();
        }
        let status = retouch_kernels::cuda::cudnn_status(gpu, Use::Always);
        // Not `println`, which is shown of failed tests only.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("cuDNN: {status}\n"));
        assert!(!status.contains("any more"), "{status}");
    }
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
fn linear() {
    for (rows, input, output) in [(1, 1, 1), (3, 5, 7), (2, 33, 1500), (70, 128, 96), (257, 64, 2049), (600, 40, 50)] {
        let scale = (input as f64).powf(-0.5);
        let inputs = [random((2, rows, input)), (random((output, input)) * scale).unwrap(), random(output)];
        for activation in [Activation::None, Activation::Gelu] {
            let name = format!("linear {rows}x{input}x{output} {activation:?}");
            agree(&name, 2e-6, &inputs, |k, x| k.linear(&x[0], &x[1], Some(&x[2]), activation));
            agree(&name, 2e-6, &inputs, |k, x| k.linear(&x[0], &x[1], None, activation));
        }
        // Views: the last tokens; the last channels with the weights for them; one token of each image.
        agree("linear of some tokens", 2e-6, &inputs, |k, x| {
            k.linear(&x[0].narrow(1, rows / 2, rows - rows / 2)?, &x[1], Some(&x[2]), Activation::None)
        });
        agree("linear of some channels", 2e-6, &inputs, |k, x| {
            let last = |x: &Tensor| x.narrow(D::Minus1, input / 2, input - input / 2);
            k.linear(&last(&x[0])?, &last(&x[1])?, Some(&x[2]), Activation::None)
        });
        agree("linear of one token", 2e-6, &inputs, |k, x| {
            k.linear(&x[0].narrow(1, rows - 1, 1)?, &x[1].narrow(0, 0, 1)?, None, Activation::Gelu)
        });
    }
}

/// The same bytes on another device.
fn moved(blocks: &QTensor, device: &Device) -> QTensor {
    let storage = QStorage::from_data(blocks.data().unwrap(), device, blocks.dtype()).unwrap();
    QTensor::new(storage, blocks.shape()).unwrap()
}

#[test]
fn linear_with_packed_matrices() {
    use GgmlDType::*;
    let (input, rows) = (512, 1300); // more rows than the CPU widens at a time
    let weight = (random((rows, input)) * (input as f64).powf(-0.5)).unwrap();
    let inputs = [random((2, 33, input)), random(rows)];
    let check = |name: &str, packed: &dyn Fn(&Device) -> Packed| {
        for activation in [Activation::None, Activation::Gelu] {
            let name = format!("linear with {name} {activation:?}");
            agree_at(devices(), &name, 2e-6, &inputs, |k, x| {
                k.linear_packed(&x[0], &packed(x[0].device()), Some(&x[1]), activation)
            });
        }
        agree_at(devices(), &format!("some outputs of {name}"), 2e-6, &inputs, |k, x| {
            k.linear_packed(&x[0], &packed(x[0].device()).narrow(3..1200)?, None, Activation::None)
        });
    };
    let part = |kind: GgmlDType| {
        let blocks = QTensor::quantize(&weight, kind).unwrap();
        move |device: &Device| Part::blocks(moved(&blocks, device)).unwrap()
    };
    for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        let part = part(kind);
        check(&format!("{kind:?}"), &|device| Packed::stack(vec![part(device)]).unwrap());
    }
    // Without the exponents of infinity and NaN.
    let codes: Vec<u8> = (0..rows * input).map(|i| (i * 7 + i / 251) as u8).map(|c| c & 0xb7).collect();
    let codes = Tensor::from_vec(codes, (rows, input), &Device::Cpu).unwrap();
    let fp8 = |format| {
        let codes = codes.clone();
        move |device: &Device| Part::Fp8 { codes: codes.to_device(device).unwrap(), format, scale: 0.03 }
    };
    for format in [Fp8::E4m3, Fp8::E5m2] {
        let part = fp8(format);
        check(&format!("{format:?}"), &|device| Packed::stack(vec![part(device)]).unwrap());
    }
    let half = weight.to_dtype(DType::F16).unwrap();
    let (q8, q4, fp8) = (part(Q8_0), part(Q4K), fp8(Fp8::E4m3));
    check("parts of every form", &|device| {
        Packed::stack(vec![q8(device), fp8(device), Part::Dense(half.to_device(device).unwrap()), q4(device)])
            .unwrap()
            .narrow(1000..1000 + rows)
            .unwrap()
    });
}

#[test]
fn rows_become_the_same_8_bit_floats_everywhere() {
    for (rows, columns) in [(7, 1), (9, 37), (8, 192), (7, 3072)] {
        // Of every magnitude, and what is none.
        let exponents = Tensor::arange(0f32, rows as f32, &Device::Cpu).unwrap().reshape((rows, 1)).unwrap();
        let values = random((rows, columns)).broadcast_mul(&(exponents * 2.0).unwrap().exp().unwrap()).unwrap();
        let mut values = values.to_vec2::<f32>().unwrap();
        values[1].fill(0.0);
        values[2][columns / 2] = f32::NAN;
        values[3][columns - 1] = f32::NEG_INFINITY;
        values[4].iter_mut().for_each(|x| *x *= 1e-30);
        values[5].iter_mut().for_each(|x| *x = if *x > 0.0 { 1e-44 } else { -1e-44 });
        let values = Tensor::new(values, &Device::Cpu).unwrap();
        for (place, device, kernels) in everywhere() {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let x = values.to_dtype(dtype).unwrap();
                // All rows; views of some rows and of some columns.
                for (first, column) in [(0, 0), (2, 0), (0, columns / 2)] {
                    let part = |x: &Tensor| x.narrow(0, first, rows - first)?.narrow(1, column, columns - column);
                    let expected = Fp8Rows::quantise(&part(&x).unwrap()).unwrap();
                    let found = kernels.quantise_rows(&part(&x.to_device(&device).unwrap()).unwrap()).unwrap();
                    let what = format!("{rows}x{columns} from {first},{column} on {place} in {dtype:?}");
                    let codes = |rows: &Fp8Rows| rows.codes.to_vec2::<u8>().unwrap();
                    assert_eq!(codes(&found), codes(&expected), "{what}");
                    let scales = |rows: &Fp8Rows| rows.scales.to_vec1::<f32>().unwrap();
                    assert_eq!(scales(&found), scales(&expected), "{what}");
                }
            }
        }
    }
}

#[test]
fn linear_in_8_bit_floats() {
    // Whole pieces of 16 and others; more outputs than the CPU widens at a time.
    for (rows, input, output) in [(1, 16, 16), (70, 128, 96), (33, 64, 2064), (5, 24, 40), (3, 5, 7)] {
        let inputs = [random((2, rows, input)), random(output)];
        let weight = Fp8Rows::quantise(&(random((output, input)) * (input as f64).powf(-0.5)).unwrap()).unwrap();
        let weight_on = |device: &Device| Fp8Rows {
            codes: weight.codes.to_device(device).unwrap(),
            scales: weight.scales.to_device(device).unwrap(),
        };
        for activation in [Activation::None, Activation::Gelu] {
            let name = format!("linear in 8-bit floats {rows}x{input}x{output} {activation:?}");
            agree(&name, 2e-6, &inputs, |k, x| k.linear_fp8(&x[0], &weight_on(x[0].device()), Some(&x[1]), activation));
            agree(&name, 2e-6, &inputs, |k, x| k.linear_fp8(&x[0], &weight_on(x[0].device()), None, activation));
        }
        agree("linear in 8-bit floats of some tokens and outputs", 2e-6, &inputs, |k, x| {
            let weight = weight_on(x[0].device()).narrow(output / 2..output)?;
            let bias = x[1].narrow(0, output / 2, output - output / 2)?;
            k.linear_fp8(&x[0].narrow(1, rows / 2, rows - rows / 2)?, &weight, Some(&bias), Activation::None)
        });
        // What is not a number in a token is none in all of its outputs, and in no others.
        let mut values = inputs[0].to_vec3::<f32>().unwrap();
        values[1][rows / 2][input / 3] = f32::NAN;
        let x = Tensor::new(values, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        for (place, device, kernels) in everywhere() {
            let x = x.to_device(&device).unwrap();
            let y = kernels.linear_fp8(&x, &weight_on(&device), None, Activation::None).unwrap();
            let y = y.to_dtype(DType::F32).unwrap().to_vec3::<f32>().unwrap();
            for (image, tokens) in y.iter().enumerate() {
                for (token, outputs) in tokens.iter().enumerate() {
                    let expected = (image, token) == (1, rows / 2);
                    assert!(outputs.iter().all(|y| y.is_nan() == expected), "{image}, {token} on {place}");
                }
            }
        }
    }
}

/// How far a layer norm in f32 may be off: its mean by a few roundings of a row's largest magnitude, which the division by the
/// row's deviation makes so much larger.
fn norm_tolerance(x: &Tensor) -> f64 {
    let mut conditioning = 0f64;
    for row in x.flatten_to(D::Minus2).unwrap().to_vec2::<f32>().unwrap() {
        let count = row.len() as f64;
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        let largest = row.iter().fold(0f64, |largest, &x| largest.max(f64::from(x).abs()));
        conditioning = conditioning.max(largest / (variance + 1e-6).sqrt());
    }
    10.0 * 2f64.powi(-24) * (1.0 + conditioning)
}

#[test]
fn modulated_norm_and_gated_residual() {
    for (tokens, hidden) in [(1, 2), (5, 37), (33, 192), (9, 3072)] {
        // A mean far from 0 shows a variance that loses its precision.
        let inputs = [
            (random((2, tokens, hidden)) + 3.0).unwrap(),
            random((2, tokens, hidden)),
            random((1, hidden)),
            random((1, hidden)),
        ];
        let name = format!("{tokens}x{hidden}");
        let tolerance = norm_tolerance(&inputs[0]);
        agree(&format!("modulated norm {name}"), tolerance, &inputs, |k, x| k.modulated_norm(&x[0], &x[2], &x[3]));
        agree(&format!("gated residual {name}"), 1e-6, &inputs, |k, x| k.gated_residual(&x[0], &x[1], &x[2]));
        agree(&format!("gated GELU {name}"), 1e-6, &inputs, |k, x| k.gated_gelu(&x[1], &x[0]));
        agree(&format!("views {name}"), norm_tolerance(&inputs[1]), &inputs, |k, x| {
            let view = |i: usize| x[i].narrow(1, tokens / 2, tokens - tokens / 2);
            k.gated_residual(&view(0)?, &k.modulated_norm(&view(1)?, &x[2], &x[3])?, &x[2])
        });
    }
}

#[test]
fn heads() {
    for (text, image, heads, head_dim, beside) in
        [(1, 1, 1, 2, 10), (3, 5, 2, 6, 10), (7, 20, 3, 32, 10), (2, 9, 2, 128, 24), (4, 3, 5, 64, 8)]
    {
        let (width, tokens) = (3 * heads * head_dim, text + image);
        let inputs = [
            random((2, text, width)),
            // Wider than the projection, as in a single block.
            random((2, image, width + beside)),
            random(head_dim),
            random(head_dim),
        ];
        let angles = random((tokens, head_dim / 2));
        agree(&format!("heads {tokens}x{heads}x{head_dim}"), 2e-6, &inputs, |k, x| {
            let device = x[0].device();
            let rotation = Rotation { cos: angles.cos()?.to_device(device)?, sin: angles.sin()?.to_device(device)? };
            let image = x[1].narrow(2, 0, width)?;
            let streams = [
                Stream { qkv: &x[0], query_scale: &x[2], key_scale: &x[3] },
                Stream { qkv: &image, query_scale: &x[3], key_scale: &x[2] },
            ];
            k.heads(&streams, &rotation)
        });
    }
}

#[test]
fn attention() {
    // Below, at and above the tiles' sizes (128 queries; 512 keys on the CPU, 32 and 64 on CUDA), and none a multiple of them.
    for (queries, keys, heads, head_dim) in [
        (1, 1, 1, 2),
        (5, 3, 2, 8),
        (130, 515, 2, 32),
        (129, 33, 2, 64),
        (40, 191, 2, 64),
        (130, 136, 2, 64),
        (128, 512, 1, 128),
        (150, 97, 2, 128),
        (300, 1100, 3, 16),
        (64, 70, 1, 512),
    ] {
        let hidden = heads * head_dim;
        let scale = (head_dim as f64).powf(-0.5);
        let inputs = [
            (random((2, queries, heads, head_dim)) * 3.0).unwrap(),
            random((2, keys, heads, head_dim)),
            random((2, keys, heads, head_dim)),
            random((1, heads, queries, keys)),
            random((2, queries, hidden + 5)),
        ];
        let name = format!("attention {queries}x{keys}x{heads}x{head_dim}");
        agree(&name, 5e-6, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], None, scale));
        agree(&format!("{name} with bias"), 5e-6, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], Some(&x[3]), scale));
        // The same for all heads, and no later keys for the first half of the queries.
        let mask = Tensor::from_vec(
            (0..queries * keys)
                .map(|i| if i % keys > i / keys && i / keys < queries / 2 { f64::NEG_INFINITY } else { 0.5 })
                .collect(),
            (1, 1, queries, keys),
            &Device::Cpu,
        );
        let mask = mask.unwrap();
        agree(&format!("{name} with a mask"), 5e-6, &inputs, |k, x| {
            let mask = mask.to_dtype(x[0].dtype())?.to_device(x[0].device())?;
            k.attention(&x[0], &x[1], &x[2], Some(&mask), scale)
        });
        agree(&format!("{name} beside GELU"), 5e-6, &inputs, |k, x| {
            k.attention_beside_gelu(&x[0], &x[1], &x[2], scale, &x[4].narrow(2, 5, hidden)?)
        });
    }
}

#[test]
fn attention_takes_parts_of_a_packed_projection() {
    for head_dim in [16, 64, 128] {
        let inputs = [random((2, 40, 3, 2, head_dim)), random((2, 20, 3 * 2 * head_dim + 64))];
        let scale = (head_dim as f64).powf(-0.5);
        agree("packed attention", 5e-6, &inputs, |k, x| {
            let part = |i: usize| x[0].narrow(2, i, 1)?.squeeze(2);
            k.attention(&part(0)?.narrow(1, 10, 20)?, &part(1)?, &part(2)?, None, scale)
        });
        agree("packed attention beside GELU", 5e-6, &inputs, |k, x| {
            let part = |i: usize| x[0].narrow(2, i, 1)?.squeeze(2);
            let inner = x[1].narrow(2, 6 * head_dim, 64)?;
            k.attention_beside_gelu(&part(0)?.narrow(1, 10, 20)?, &part(1)?, &part(2)?, scale, &inner)
        });
    }
}

#[test]
fn attention_takes_a_bias_as_it_lies() {
    let (tokens, heads, head_dim) = (70, 2, 64);
    let part = || random((2, tokens, heads, head_dim));
    let inputs = [part(), part(), part(), random((1, heads, tokens + 4, tokens + 5))];
    // From pairs of neighbours that begin at a multiple of their size, and from others; in rows and in columns.
    for (row, column) in [(0, 0), (3, 4), (4, 5)] {
        for turned in [false, true] {
            agree(&format!("bias from {row}, {column}, turned {turned}"), 5e-6, &inputs, |k, x| {
                let bias = x[3].narrow(2, row, tokens)?.narrow(3, column, tokens)?;
                let bias = if turned { bias.transpose(2, 3)? } else { bias };
                k.attention(&x[0], &x[1], &x[2], Some(&bias), 0.125)
            });
        }
    }
}

#[test]
fn attention_sees_what_the_mask_leaves_and_nothing_else() {
    // Of every other query whole tiles of the first keys are hidden, of the others such of the last.
    let (queries, keys, heads, head_dim) = (150, 600, 2, 64);
    let hidden = |query: usize, key: usize| if query.is_multiple_of(2) { key < 4 * query } else { key > 4 * query };
    let mask = |hidden: &dyn Fn(usize, usize) -> bool| {
        let mask = (0..queries * keys).map(|i| if hidden(i / keys, i % keys) { f32::NEG_INFINITY } else { 0.0 });
        Tensor::from_vec(mask.collect(), (1, 1, queries, keys), &Device::Cpu).unwrap()
    };
    let inputs = [
        random((2, queries, heads, head_dim)),
        random((2, keys, heads, head_dim)),
        random((2, keys, heads, head_dim)),
        mask(&hidden),
    ];
    agree("masked attention", 5e-6, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], Some(&x[3]), 0.125));
    // A query that sees no key has no result, and no others lose theirs.
    const BLIND: usize = 131;
    let mask = mask(&|query, key| query == BLIND || hidden(query, key));
    for (place, device, kernels) in everywhere() {
        for dtype in [DType::F32, DType::BF16] {
            let on = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(&device).unwrap();
            let y = kernels.attention(&on(&inputs[0]), &on(&inputs[1]), &on(&inputs[2]), Some(&on(&mask)), 0.125);
            let y = y.unwrap().to_dtype(DType::F32).unwrap().to_vec3::<f32>().unwrap();
            for (query, y) in y.iter().flat_map(|image| image.iter().enumerate()) {
                assert!(y.iter().all(|y| y.is_nan() == (query == BLIND)), "query {query} on {place} in {dtype:?}");
            }
        }
    }
}

#[test]
fn attention_survives_scores_that_grow_from_tile_to_tile() {
    // Scores of up to +-1000: without the running maximum their exponentials are infinite. They are rounded to 6e-5, in
    // several steps, and the exponentials with them.
    let keys = 1300;
    let ramp = Tensor::arange(0f32, keys as f32, &Device::Cpu).unwrap().reshape((1, keys, 1, 1)).unwrap();
    let k = ((ramp - 650.0).unwrap() / 650.0).unwrap().broadcast_as((1, keys, 1, 32)).unwrap().contiguous().unwrap();
    let inputs = [(random((1, 9, 1, 32)) * 60.0).unwrap(), k, random((1, keys, 1, 32))];
    agree("attention", 5e-4, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], None, 1.0));
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
fn group_norm() {
    // The last two are more than a chunk of the CUDA kernel.
    for (channels, groups, height, width) in
        [(4, 2, 3, 5), (8, 8, 1, 1), (6, 1, 16, 16), (32, 4, 7, 9), (4, 2, 70, 72), (2, 1, 67, 71)]
    {
        // A mean far from 0, which a sum of squares in f32 would not survive.
        let inputs = [(random((2, channels, height, width)) + 30.).unwrap(), random(channels), random(channels)];
        for silu in [false, true] {
            let name = format!("group norm {channels} in {groups}, {height}x{width}, SiLU {silu}");
            agree(&name, 2e-5, &inputs, |k, x| k.group_norm(&x[0], &x[1], &x[2], groups, 1e-6, silu));
            if height == 1 {
                continue;
            }
            // The rows of an image in two parts, each by the moments of both.
            agree(&format!("{name}, in parts"), 2e-5, &inputs, |k, x| {
                let (upper, lower) = (x[0].narrow(2, 0, height / 2)?, x[0].narrow(2, height / 2, height.div_ceil(2))?);
                let moments = k.group_moments(&upper, groups)?.and(&k.group_moments(&lower, groups)?);
                let part = |part: &Tensor| k.group_norm_by(part, &moments, &x[1], &x[2], 1e-6, silu);
                Tensor::cat(&[part(&upper)?, part(&lower)?], 2)
            });
        }
    }
}

#[test]
fn rows_of_a_convolution_equal_those_of_the_whole() {
    for window in [Window::Point, Window::Same, Window::Halving, Window::Doubling] {
        let (height, width) = (14, 6);
        let side = window.kernel();
        let inputs = [random((1, 3, height, width)), random((2, 3, side, side)), random(2)];
        for (first, last) in [(0, 0), (0, 3), (1, 1), (2, 4), (3, 6), (5, 6), (0, 6)] {
            agree_at(devices(), &format!("{window:?} {first}..={last}"), 3e-6, &inputs, |k, x| {
                let all = k.conv2d(&x[0], &x[1], &x[2], None, window)?;
                // Only the definition computes in f64: it takes the whole, the device under test the rows alone.
                if x[0].dtype() == DType::F64 {
                    return all.narrow(2, first, last + 1 - first);
                }
                let (rows, before) = window.reach(first..last + 1, height);
                let part = x[0].narrow(2, rows.start, rows.len())?.contiguous()?;
                k.conv2d(&part, &x[1], &x[2], None, window)?.narrow(2, before, last + 1 - first)
            });
        }
    }
}

#[test]
fn conv2d() {
    for window in [Window::Point, Window::Same, Window::Halving, Window::Doubling] {
        for (batch, input, height, width) in [
            (1, 1, 2, 2),
            (2, 3, 4, 6),
            (1, 7, 34, 62),
            (1, 2, 2, 700),
            (1, 2, 700, 2),
            (1, 2, 4, 3000),
            (2, 64, 34, 70),
        ] {
            let (output, side) = (5, window.kernel());
            let scale = ((input * side * side) as f64).powf(-0.5);
            let inputs = [
                random((batch, input, height, width)),
                (random((output, input, side, side)) * scale).unwrap(),
                random(output),
                random((batch, output, window.out_size(height), window.out_size(width))),
            ];
            let name = format!("{window:?} over {batch}x{input}x{height}x{width}");
            let alone = |k: &dyn Kernels, x: &[Tensor]| k.conv2d(&x[0], &x[1], &x[2], None, window);
            let with_residual = |k: &dyn Kernels, x: &[Tensor]| k.conv2d(&x[0], &x[1], &x[2], Some(&x[3]), window);
            // Where products, bias and residual are added one after the other, each sum is rounded, and may be larger than the last.
            let tolerance = [3e-6, 4.0];
            let all = [DType::F32, DType::BF16, DType::F16];
            agree_in(&all, devices(), &name, tolerance, &inputs, alone);
            agree_in(&all, devices(), &name, tolerance, &inputs, with_residual);
            // candle multiplies no bf16 on the CPU.
            let some = [DType::F32, DType::F16];
            agree_in(&some, emulated(), &name, tolerance, &inputs, alone);
            agree_in(&some, emulated(), &name, tolerance, &inputs, with_residual);
        }
    }
}

type Operation = fn(&dyn Kernels, &[Tensor]) -> Result<Tensor>;

/// Attention over parts of a packed projection beside GELU, and a convolution, in f16.
fn two_operations() -> [Operation; 2] {
    [
        |k, x| {
            let part = |i: usize| x[0].narrow(2, i, 1)?.squeeze(2);
            k.attention_beside_gelu(&part(0)?.narrow(1, 30, 97)?, &part(1)?, &part(2)?, 0.125, &x[1])
        },
        |k, x| k.conv2d(&x[2], &x[3], &x[4], None, Window::Same),
    ]
}

#[test]
fn a_library_is_used_once_its_results_agree_with_ours() {
    let Some((_, gpu)) = emulator::gpus().first() else { return };
    let x = inputs_of_two();
    let gpu = gpu.0.with_planner(None);
    for (i, operation) in two_operations().iter().enumerate() {
        let first = operation(&gpu, &x).unwrap();
        let (ran, verdicts) = gpu.0.planned();
        // Rows at the beginning, in the middle and at the end.
        assert_eq!((ran.len(), &verdicts[3 * i..]), (2 * i + 1, &[Verdict::Agrees; 3][..]));
        let launched = gpu.0.log().len();
        let second = operation(&gpu, &x).unwrap();
        let (ran, verdicts) = gpu.0.planned();
        assert_eq!((ran.len(), verdicts.len()), (2 * i + 2, 3 * i + 3), "compared once");
        let again = gpu.0.log().split_off(launched);
        assert_eq!(again, if i == 0 { vec!["gelu_rows_f16"] } else { vec![] }, "nothing but GELU is ours");
        assert_eq!(bits(&first), bits(&second));
    }
}

#[test]
fn a_library_that_is_wrong_anywhere_is_not_used() {
    let Some((_, ours)) = emulator::gpus().first() else { return };
    let x = inputs_of_two();
    // A head that is exchanged with its neighbour, or a channel; one channel or column too large; nothing written; no numbers.
    let distortions: [fn(&Tensor) -> Result<Tensor>; 4] = [
        |y| if y.rank() == 3 { y.roll(128, 2) } else { y.roll(1, 1) },
        |y| {
            let (axis, size) = if y.rank() == 3 { (2, 128) } else { (1, 1) };
            Tensor::cat(&[(y.narrow(axis, 0, size)? * 1.25)?, y.narrow(axis, size, y.dim(axis)? - size)?], axis)
        },
        |y| y.zeros_like(),
        |y| y * f64::NAN,
    ];
    for (i, distortion) in distortions.into_iter().enumerate() {
        for operation in two_operations() {
            let gpu = ours.0.with_planner(Some(distortion));
            let expected = bits(&operation(ours, &x).unwrap());
            assert_eq!(bits(&operation(&gpu, &x).unwrap()), expected, "distortion {i}");
            let (ran, verdicts) = gpu.0.planned();
            assert!(matches!(verdicts.last(), Some(Verdict::Differs(_))), "distortion {i}: {verdicts:?}");
            assert_eq!(bits(&operation(&gpu, &x).unwrap()), expected, "distortion {i}");
            assert_eq!(gpu.0.planned().0.len(), ran.len(), "it is not asked again");
        }
    }
}

#[test]
fn what_is_no_number_proves_nothing_about_a_library() {
    let Some((_, gpu)) = emulator::gpus().first() else { return };
    let gpu = gpu.0.with_planner(None);
    let mut x = inputs_of_two();
    for x in &mut x {
        *x = (&*x * f64::NAN).unwrap();
    }
    for operation in two_operations() {
        operation(&gpu, &x).unwrap();
    }
    assert_eq!(gpu.0.planned().1, [Verdict::Unknown; 6]);
}

/// For [`two_operations`].
fn inputs_of_two() -> Vec<Tensor> {
    let inputs =
        [random((1, 150, 3, 3, 128)), random((1, 97, 56)), random((1, 24, 19, 33)), random((7, 24, 3, 3)), random(7)];
    inputs.iter().map(|x| x.to_dtype(DType::F16).unwrap()).collect()
}

fn bits(x: &Tensor) -> Vec<u16> {
    x.flatten_all().unwrap().to_vec1::<half::f16>().unwrap().iter().map(|x| x.to_bits()).collect()
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

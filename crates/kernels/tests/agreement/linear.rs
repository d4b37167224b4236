//! Linear layers: dense, packed and in 8-bit floats.

use candle_core::{
    D, DType, Device, Result, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
use retouch_kernels::{Activation, Fp8, Fp8Rows, Kernels, Packed, Part};

use crate::{agree, agree_at, devices, emulated, everywhere, random::random};

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
pub fn moved(blocks: &QTensor, device: &Device) -> QTensor {
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
        // The emulated ones differ in nothing that concerns this; some rows are enough.
        let first = emulated().into_iter().take(1).collect();
        agree_at(first, &format!("a few outputs of {name}"), 2e-6, &inputs, |k, x| {
            let (packed, bias) = (packed(x[0].device()).narrow(290..420)?, x[1].narrow(0, 290, 130)?);
            k.linear_packed(&x[0].narrow(1, 3, 5)?, &packed, Some(&bias), Activation::Gelu)
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

/// [`agree`], but for tensor cores, which add up products of 8-bit floats with some 14 bits (Hopper's, as DeepSeek-V3's report
/// has it): a few such roundings of the largest sum.
fn agree_in_fp8(name: &str, inputs: &[Tensor], operation: impl Fn(&dyn Kernels, &[Tensor]) -> Result<Tensor>) {
    let (cores, exact): (Vec<_>, Vec<_>) = everywhere().into_iter().partition(|(_, device, _)| device.is_cuda());
    agree_at(cores, name, 1e-3, inputs, &operation);
    agree_at(exact, name, 2e-6, inputs, &operation);
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
            agree_in_fp8(&name, &inputs, |k, x| {
                k.linear_fp8(&x[0], &weight_on(x[0].device()), Some(&x[1]), activation)
            });
            agree_in_fp8(&name, &inputs, |k, x| k.linear_fp8(&x[0], &weight_on(x[0].device()), None, activation));
        }
        agree_in_fp8("linear in 8-bit floats of some tokens and outputs", &inputs, |k, x| {
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

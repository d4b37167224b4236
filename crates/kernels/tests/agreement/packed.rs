//! The values of packed matrices, which are those of the definition bit for bit in every dtype.

use std::{cell::RefCell, ops::Range};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
use retouch_kernels::{Activation, Fp8, Kernels, Packed, Part, Portable, portable};

use crate::{Place, devices, emulated, linear::moved, random::random};

/// Where the definition is not all that there is. The emulated GPUs differ in nothing that concerns this.
fn places() -> Vec<Place> {
    devices().into_iter().filter(|(_, device, _)| !device.is_cpu()).chain(emulated().into_iter().take(1)).collect()
}

/// Any bytes: they stand for numbers of every magnitude, for infinities and for what is no number.
fn bytes(count: usize) -> Vec<u8> {
    let values = random(count.div_ceil(2)).to_vec1::<f32>().unwrap();
    let mut bytes: Vec<u8> = values.into_iter().flat_map(|x| (x.to_bits() as u16).to_le_bytes()).collect();
    bytes.truncate(count);
    bytes
}

/// Rows of any bytes after rows of nothing but zeros, ones, and numbers near the largest.
fn blocks(kind: GgmlDType, rows: usize, columns: usize) -> QTensor {
    let row = columns / kind.block_size() * kind.type_size();
    let mut bytes = bytes(rows * row);
    for (row, byte) in bytes.chunks_mut(row).zip([0x00, 0xff, 0x7b]) {
        row.fill(byte);
    }
    QTensor::new(QStorage::from_data(bytes.into(), &Device::Cpu, kind).unwrap(), (rows, columns)).unwrap()
}

/// One part's rows on any device.
type OnDevice = Box<dyn Fn(&Device) -> Part>;

fn of_blocks(kind: GgmlDType, rows: usize, columns: usize) -> OnDevice {
    let blocks = blocks(kind, rows, columns);
    Box::new(move |device| Part::blocks(moved(&blocks, device)).unwrap())
}

fn of_codes(format: Fp8, scale: f32, rows: usize, columns: usize) -> OnDevice {
    // All there are first.
    let codes = (0..=255).chain(bytes(rows * columns)).take(rows * columns).collect::<Vec<u8>>();
    let codes = Tensor::from_vec(codes, (rows, columns), &Device::Cpu).unwrap();
    Box::new(move |device| Part::Fp8 { codes: codes.to_device(device).unwrap(), format, scale })
}

/// Among them values that f16 does not reach, and some that it holds in fewer bits.
fn of_numbers(dtype: DType, rows: usize, columns: usize) -> OnDevice {
    let values = (random((rows, columns)) * 6.0).unwrap().exp().unwrap();
    let values = (values * random((rows, columns))).unwrap().to_dtype(dtype).unwrap();
    Box::new(move |device| Part::Dense(values.to_device(device).unwrap()))
}

/// Bits in f32, which holds all of every dtype; the same for all that is no number.
fn bits(x: &Tensor) -> Vec<u32> {
    let values = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    let bits = |x: f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
    values.to_vec1::<f32>().unwrap().into_iter().map(bits).collect()
}

/// Some rows of a matrix of these parts.
fn check(name: &str, parts: &[OnDevice], rows: Range<usize>) {
    let packed = |device: &Device| {
        let parts = parts.iter().map(|part| part(device)).collect();
        Packed::stack(parts).unwrap().narrow(rows.clone()).unwrap()
    };
    for (place, device, kernels) in places() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let expected = packed(&Device::Cpu).dequantise(dtype).unwrap();
            let found = kernels.dequantise(&packed(&device), dtype).unwrap();
            assert_eq!((found.shape(), found.dtype()), (expected.shape(), dtype), "{name}");
            let pairs = bits(&found).into_iter().zip(bits(&expected));
            let wrong: Vec<_> = pairs.enumerate().filter(|(_, (found, expected))| found != expected).collect();
            assert_eq!(wrong, [], "rows {rows:?} of {name} in {dtype:?} on {place}");
        }
    }
}

#[test]
fn blocks_stand_for_the_same_values_everywhere() {
    use GgmlDType::*;
    for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        // A launch's last threads have nothing to do; more than one launch's block.
        for (rows, blocks) in [(7, 1), (17, 3), (9, 10)] {
            let columns = blocks * kind.block_size();
            let parts = [of_blocks(kind, rows, columns)];
            for some in [0..rows, 3..rows, 1..6, rows - 1..rows] {
                check(&format!("{kind:?} {rows}x{columns}"), &parts, some);
            }
        }
    }
}

#[test]
fn codes_and_numbers_become_the_same_values_everywhere() {
    for columns in [1, 37, 64, 1000] {
        for (name, part) in [
            ("E4m3", of_codes(Fp8::E4m3, 0.03, 9, columns)),
            ("large E4m3", of_codes(Fp8::E4m3, 3e37, 9, columns)),
            ("E5m2", of_codes(Fp8::E5m2, 0.03, 9, columns)),
            ("small E5m2", of_codes(Fp8::E5m2, 1e-35, 9, columns)),
            ("F32", of_numbers(DType::F32, 9, columns)),
            ("BF16", of_numbers(DType::BF16, 9, columns)),
            ("F16", of_numbers(DType::F16, 9, columns)),
        ] {
            let parts = [part];
            for some in [0..9, 3..9, 2..7] {
                check(&format!("{name} 9x{columns}"), &parts, some);
            }
        }
    }
}

#[test]
fn parts_of_any_forms_are_one_matrix() {
    use GgmlDType::*;
    let dense = |columns| {
        vec![
            of_numbers(DType::F16, 4, columns),
            of_codes(Fp8::E4m3, 0.7, 3, columns),
            of_numbers(DType::F32, 2, columns),
            of_codes(Fp8::E5m2, 2.0, 5, columns),
            of_numbers(DType::BF16, 2, columns),
        ]
    };
    let mut forms = vec![of_blocks(Q8_0, 5, 256), of_blocks(Q6K, 3, 256), of_blocks(Q4_1, 4, 256)];
    forms.extend(dense(256));
    forms.push(of_blocks(Q3K, 2, 256));
    for some in [0..30, 4..6, 7..29, 11..13, 6..7] {
        check("parts of every form", &forms, some);
    }
    // Whose rows begin anywhere.
    let forms = dense(37);
    for some in [0..16, 3..5, 1..15, 6..7] {
        check("parts of 37 columns", &forms, some);
    }
}

#[test]
fn runs_of_rows_are_one_layer() {
    let columns = 64;
    let blocks = QTensor::quantize(&random((30, columns)), GgmlDType::Q4_0).unwrap();
    let half = random((11, columns)).to_dtype(DType::F16).unwrap();
    let packed = Packed::stack(vec![Part::blocks(blocks).unwrap(), Part::Dense(half)]).unwrap();
    let (x, bias) = (random((2, 3, columns)), random(41));
    let whole = Portable.linear_packed(&x, &packed, Some(&bias), Activation::Gelu).unwrap();
    for (values, expected) in [(1, vec![1; 41]), (13 * columns + 5, vec![13, 13, 13, 2]), (41 * columns, vec![41])] {
        let runs = RefCell::new(Vec::new());
        let joined = portable::in_runs(&x, &packed, Some(&bias), values, |x, weight, bias| {
            runs.borrow_mut().push(weight.rows());
            Portable.linear_packed(x, weight, bias, Activation::Gelu)
        });
        assert_eq!(runs.into_inner(), expected);
        // Sums of 64 products of about 1, in another order.
        let difference = (joined.unwrap() - &whole).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() <= 64.0 * f32::EPSILON, "runs of {values} values");
    }
}

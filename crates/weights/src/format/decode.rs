//! From a file's bytes to tensors.

use candle_core::{
    DType, Device, Result, Tensor, bail,
    quantized::{QStorage, QTensor},
};
use rayon::prelude::*;
use retouch_kernels::{Part, upload};

use super::Encoding;

/// The tensor of `shape` in `bytes`, times `scale`, in `dtype` on `device`.
///
/// # Errors
/// An encoding that is not read, and bytes that do not fit the shape.
pub fn decode(
    encoding: &Encoding,
    bytes: &[u8],
    shape: &[usize],
    scale: f32,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let stored = match encoding {
        Encoding::F64 => DType::F64,
        Encoding::F32 => DType::F32,
        Encoding::F16 => DType::F16,
        Encoding::Bf16 => DType::BF16,
        Encoding::Fp8(_) | Encoding::Blocks(_) | Encoding::Other(_) => {
            let columns = shape.last().copied().unwrap_or(1);
            let rows = shape.iter().product::<usize>() / columns.max(1);
            return part(encoding, bytes, (rows, columns), scale, device)?.dequantise(dtype)?.reshape(shape);
        }
    };
    if scale != 1.0 {
        let values = Tensor::from_raw_buffer(bytes, stored, shape, &Device::Cpu)?.to_dtype(DType::F32)?;
        return (values * f64::from(scale))?.to_dtype(dtype)?.to_device(device);
    }
    if stored == dtype {
        // Straight from the mapped file to where it is used.
        return upload(bytes, dtype, shape, device);
    }
    if (stored, dtype) == (DType::BF16, DType::F32) && device.is_cpu() {
        return Tensor::from_vec(bf16_to_f32(bytes), shape, device);
    }
    // Whichever order moves fewer bytes to the device.
    if dtype.size_in_bytes() < stored.size_in_bytes() {
        Tensor::from_raw_buffer(bytes, stored, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    } else {
        upload(bytes, stored, shape, device)?.to_dtype(dtype)
    }
}

/// Rows of a matrix as they are in `bytes`, on `device`; `scale` is that of 8-bit floats.
///
/// # Errors
/// As [`decode`].
pub fn part(
    encoding: &Encoding,
    bytes: &[u8],
    (rows, columns): (usize, usize),
    scale: f32,
    device: &Device,
) -> Result<Part> {
    let shape = (rows, columns);
    if encoding.bytes(&[rows, columns]) != Some(bytes.len()) {
        bail!("{} bytes are no {rows} rows of {columns} values in {encoding}", bytes.len())
    }
    match encoding {
        Encoding::Blocks(_) if scale != 1.0 => bail!("blocks of {encoding} have scales of their own"),
        Encoding::Blocks(kind) => {
            let load = |bytes: &[u8]| QStorage::from_data(bytes.into(), device, *kind);
            let storage = if bytes.as_ptr().addr().is_multiple_of(align_of::<u32>()) {
                load(bytes)?
            } else {
                // candle takes aligned bytes only, which a file need not have.
                let mut words = vec![0_u32; bytes.len().div_ceil(4)];
                // SAFETY: any bits are bytes; words are aligned to bytes, so that all of them are in the middle.
                let (_, copy, _) = unsafe { words.align_to_mut::<u8>() };
                copy[..bytes.len()].copy_from_slice(bytes);
                load(&copy[..bytes.len()])?
            };
            Part::blocks(QTensor::new(storage, shape)?)
        }
        Encoding::Fp8(format) => {
            Ok(Part::Fp8 { codes: upload(bytes, DType::U8, &[rows, columns], device)?, format: *format, scale })
        }
        Encoding::F16 | Encoding::Bf16 => {
            let dtype = if *encoding == Encoding::F16 { DType::F16 } else { DType::BF16 };
            Ok(Part::Dense(decode(encoding, bytes, &[rows, columns], scale, dtype, device)?))
        }
        other => bail!("{other} is no form of packed values"),
    }
}

/// Widens little-endian bf16 values: how a CPU mostly loads, hence on all cores and without candle's copy between.
fn bf16_to_f32(bytes: &[u8]) -> Vec<f32> {
    // A bf16 is the upper half of an f32.
    let widen = |half: &[u8]| f32::from_le_bytes([0, 0, half[0], half[1]]);
    bytes.par_chunks_exact(2).with_min_len(1 << 16).map(widen).collect()
}

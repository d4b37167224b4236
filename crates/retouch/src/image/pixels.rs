//! Between 8-bit pixels and tensors.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::Result;

/// The pixels as `[1, 3, height, width]` f32 in `[-1, 1]`: `2 * (value / 255) - 1`.
pub fn to_tensor(image: &RgbImage, device: &Device) -> Result<Tensor> {
    let level: [f32; 256] = std::array::from_fn(|v| 2.0 * (v as f32 / 255.0) - 1.0);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let plane = |channel: usize| image.iter().skip(channel).step_by(3).map(|&v| level[usize::from(v)]);
    let planes: Vec<f32> = plane(0).chain(plane(1)).chain(plane(2)).collect();
    Ok(Tensor::from_vec(planes, (1, 3, height, width), device)?)
}

/// Decoded pixels in `[-1, 1]`, of any dtype and shape, as f32 in `[0, 1]`.
///
/// The arithmetic happens in the dtype that the decoder gave, as diffusers' `VaeImageProcessor.denormalize` does it.
pub fn to_unit(decoded: &Tensor) -> Result<Tensor> {
    Ok(decoded.affine(0.5, 0.5)?.clamp(0f32, 1f32)?.to_dtype(DType::F32)?)
}

/// The picture of a `[1, 3, height, width]` or `[3, height, width]` tensor in `[0, 1]`: `255 * value`, halves to even
/// (diffusers' `numpy_to_pil`).
///
/// Errors: another shape, and values that are not numbers, which a model in f16 can overflow to.
pub fn from_tensor(unit: &Tensor) -> Result<RgbImage> {
    let unit = if unit.rank() == 4 { unit.squeeze(0)? } else { unit.clone() };
    let (channels, height, width) = unit.dims3()?;
    if channels != 3 {
        return Err(candle_core::Error::msg(format!("a picture has 3 channels, this tensor has {channels}")).into());
    }
    let planes: Vec<f32> = unit.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    if planes.iter().any(|v| v.is_nan()) {
        let reason = "the model gave values that are not numbers; use the dtype bf16 or f32";
        return Err(candle_core::Error::msg(reason).into());
    }
    let (r, rest) = planes.split_at(height * width);
    let (g, b) = rest.split_at(height * width);
    let byte = |v: f32| (v * 255.0).round_ties_even() as u8;
    let bytes = r.iter().zip(g).zip(b).flat_map(|((&r, &g), &b)| [byte(r), byte(g), byte(b)]).collect();
    RgbImage::from_raw(width as u32, height as u32, bytes)
        .ok_or_else(|| candle_core::Error::msg(format!("{width}x{height} is not the size of a picture")).into())
}

/// SHA-256 over the RGB bytes in reading order, in lower-case hex. Equal for files of equal pixels, whatever their
/// format or metadata.
pub fn sha256(image: &RgbImage) -> String {
    Sha256::digest(image.as_raw()).iter().map(|byte| format!("{byte:02x}")).collect()
}

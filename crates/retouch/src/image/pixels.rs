//! Between 8-bit pixels and tensors.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use retouch_kernels::clamp;
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
    Ok(clamp(&decoded.affine(0.5, 0.5)?, 0.0, 1.0)?.to_dtype(DType::F32)?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_survive_the_way_through_a_tensor() -> Result<()> {
        let image = RgbImage::from_fn(16, 48, |x, y| image::Rgb([(x * 16) as u8, (y * 5) as u8, (x * y) as u8]));
        let tensor = to_tensor(&image, &Device::Cpu)?;
        assert_eq!(tensor.dims(), [1, 3, 48, 16]);
        assert_eq!(from_tensor(&to_unit(&tensor)?)?, image);
        Ok(())
    }

    #[test]
    fn levels_round_halves_to_even_and_stay_in_range() -> Result<()> {
        let values = [0.5 / 255.0, 1.5 / 255.0, 2.5 / 255.0, 1.0, 0.0, 254.6 / 255.0].map(|v: f32| v * 2.0 - 1.0);
        let tensor = Tensor::new(&values, &Device::Cpu)?.reshape((1, 3, 1, 2))?;
        let unit = to_unit(&tensor)?;
        let image = from_tensor(&unit)?;
        let expected = unit.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|v| (v * 255.0).round_ties_even() as u8);
        let planes: Vec<u8> = (0..3).flat_map(|c| [image.get_pixel(0, 0)[c], image.get_pixel(1, 0)[c]]).collect();
        assert_eq!(planes, expected.collect::<Vec<_>>());
        let wild = Tensor::new(&[-7f32, 9.0, f32::INFINITY], &Device::Cpu)?.reshape((1, 3, 1, 1))?;
        assert_eq!(from_tensor(&to_unit(&wild)?)?.get_pixel(0, 0).0, [0, 255, 255]);
        Ok(())
    }

    #[test]
    fn values_that_are_not_numbers_are_refused() -> Result<()> {
        let tensor = Tensor::full(f32::NAN, (1, 3, 2, 2), &Device::Cpu)?;
        assert!(from_tensor(&to_unit(&tensor)?).is_err());
        assert!(from_tensor(&Tensor::zeros((1, 4, 2, 2), DType::F32, &Device::Cpu)?).is_err());
        Ok(())
    }

    #[test]
    fn the_hash_is_of_the_pixels() {
        let hash = sha256(&RgbImage::from_raw(1, 1, b"abc".to_vec()).unwrap_or_default());
        // FIPS 180-2, appendix B.1.
        assert_eq!(hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

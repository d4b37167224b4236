//! Resizing as the reference implementation resizes: Pillow's LANCZOS filter on 8-bit pixels, bit for bit.
//!
//! Source of the arithmetic: Pillow 13, `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`,
//! `ImagingResampleInner`; before 13 the horizontal pass always came first). Other Lanczos implementations, the `image`
//! crate's among them, differ by a level or two, which the model's VAE turns into different latents.

use std::{borrow::Cow, f64::consts::PI};

use image::RgbImage;
use rayon::prelude::*;

const CHANNELS: usize = 3;
/// Fractional bits of a fixed-point weight: 32 less 8 for the pixel and 2 for the sum's overshoot.
const PRECISION: u32 = 22;
/// Reach of the filter in source pixels, before it is widened for scaling down.
const SUPPORT: f64 = 3.0;

/// `image` scaled to `width` x `height`, neither of which may be zero. The aspect is not kept.
pub fn resize(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    // Each pass rounds to 8 bits, so the order shows. Pillow starts with the height where that shrinks by more than
    // twice the pixels that the width shrinks by.
    let lost = |from: u32, to: u32| i64::from(from) - i64::from(to);
    let lost_height = lost(image.height(), height);
    if lost_height > 0 && lost_height > 2 * lost(image.width(), width) {
        scale_rows(&scale_columns(image, height), width).into_owned()
    } else {
        scale_columns(&scale_rows(image, width), height).into_owned()
    }
}

/// The source pixels that make up one output pixel: the first of them, and a fixed-point weight for each.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// The taps of every output pixel along an axis.
fn taps(from: u32, to: u32) -> Vec<Taps> {
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let reach = SUPPORT * stretch;
    let of_pixel = |x: u32| {
        let center = (f64::from(x) + 0.5) * scale;
        // Conversions truncate towards zero and saturate, as C's `(int)` and the clamp after it do.
        let first = (center - reach + 0.5) as usize;
        let end = ((center + reach + 0.5) as usize).min(from as usize);
        let weights: Vec<f64> = (first..end).map(|i| lanczos((i as f64 - center + 0.5) * (1.0 / stretch))).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |w: f64| {
            let scaled = w / sum * f64::from(1 << PRECISION);
            // Half away from zero.
            if scaled < 0.0 { (scaled - 0.5) as i32 } else { (scaled + 0.5) as i32 }
        };
        Taps { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..to).into_par_iter().map(of_pixel).collect()
}

fn lanczos(x: f64) -> f64 {
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let x = x * PI;
    x.sin() / x
}

fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION - 1);

// A pass is skipped where its size stays, which is exact: the filter is 1 at 0 and 0 at the other integers.

fn scale_rows(image: &RgbImage, width: u32) -> Cow<'_, RgbImage> {
    if image.width() == width {
        return Cow::Borrowed(image);
    }
    let taps = taps(image.width(), width);
    let mut out = RgbImage::new(width, image.height());
    let in_row = image.width() as usize * CHANNELS;
    let rows = image.par_chunks_exact(in_row).zip(out.par_chunks_exact_mut(width as usize * CHANNELS));
    rows.for_each(|(source, target)| {
        for (pixel, Taps { first, weights }) in target.chunks_exact_mut(CHANNELS).zip(&taps) {
            let mut sums = [HALF; CHANNELS];
            for (source, weight) in source[first * CHANNELS..].chunks_exact(CHANNELS).zip(weights) {
                for (sum, &value) in sums.iter_mut().zip(source) {
                    *sum += i32::from(value) * weight;
                }
            }
            pixel.copy_from_slice(&sums.map(to_u8));
        }
    });
    Cow::Owned(out)
}

fn scale_columns(image: &RgbImage, height: u32) -> Cow<'_, RgbImage> {
    if image.height() == height {
        return Cow::Borrowed(image);
    }
    let taps = taps(image.height(), height);
    let mut out = RgbImage::new(image.width(), height);
    let row = image.width() as usize * CHANNELS;
    out.par_chunks_exact_mut(row).zip(&taps).for_each(|(target, Taps { first, weights })| {
        let mut sums = vec![HALF; row];
        for (source, weight) in image.as_raw()[first * row..].chunks_exact(row).zip(weights) {
            for (sum, &value) in sums.iter_mut().zip(source) {
                *sum += i32::from(value) * weight;
            }
        }
        for (value, sum) in target.iter_mut().zip(sums) {
            *value = to_u8(sum);
        }
    });
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::{SafeTensors, tensor::TensorView};

    use super::*;

    fn picture(tensor: &TensorView<'_>) -> RgbImage {
        let &[height, width, 3] = tensor.shape() else { panic!("{:?} is no picture", tensor.shape()) };
        RgbImage::from_raw(width as u32, height as u32, tensor.data().to_vec()).unwrap()
    }

    /// Against Pillow's own results, see `scripts/reference/small_lanczos.py`.
    #[test]
    fn resizing_has_pillows_bits() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/small/lanczos.safetensors");
        let bytes = fs::read(path).unwrap();
        let fixtures = SafeTensors::deserialize(&bytes).unwrap();
        let mut cases = 0;
        for (name, source) in fixtures.iter().filter_map(|(key, t)| Some((key.strip_suffix(".in")?, t))) {
            let expected = picture(&fixtures.tensor(&format!("{name}.out")).unwrap());
            let found = resize(&picture(&source), expected.width(), expected.height());
            assert!(found == expected, "{name}");
            cases += 1;
        }
        assert!(cases > 20, "only {cases} cases");
    }
}

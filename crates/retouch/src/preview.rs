//! What latents look like, without the VAE.
//!
//! A linear map from the channels of a latent pixel to its mean colour is nearly right and costs nothing. It is learned
//! from the pictures that pass through the VAE anyway, so that it fits whatever VAE the model has.

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use crate::{Result, image::resize};

/// How much earlier pictures count beside a new one.
const MEMORY: f64 = 0.8;
/// Share of the mean variance that is added to each channel's own: a picture of few colours leaves channels open, which
/// then stay at nothing.
const RIDGE: f64 = 1e-3;

/// The map, as the sums of a least-squares fit.
#[derive(Default)]
pub(crate) struct Projection {
    /// `[n, n]` sums of products of the channels, a constant 1 after them; `n` is channels + 1.
    gram: Vec<f64>,
    /// `[n, 3]` sums of products of the channels and the colours.
    moments: Vec<f64>,
    n: usize,
}

impl Projection {
    /// Takes `latents` `[1, channels, height, width]` and the picture that they stand for into account.
    pub fn learn(&mut self, latents: &Tensor, picture: &RgbImage) -> Result<()> {
        let (channels, height, width) = latents.squeeze(0)?.dims3()?;
        let n = channels + 1;
        if self.n != n {
            *self = Self { gram: vec![0.0; n * n], moments: vec![0.0; 3 * n], n };
        }
        self.gram.iter_mut().chain(&mut self.moments).for_each(|sum| *sum *= MEMORY);
        let values = on_host(latents)?;
        let colours = resize(picture, width as u32, height as u32);
        let weight = 1.0 / (height * width) as f64;
        for (i, colour) in colours.pixels().enumerate() {
            let x = |c: usize| if c < channels { f64::from(values[c * height * width + i]) } else { 1.0 };
            for a in 0..n {
                let xa = weight * x(a);
                for b in 0..n {
                    self.gram[a * n + b] += xa * x(b);
                }
                for (moment, &value) in self.moments[3 * a..3 * a + 3].iter_mut().zip(&colour.0) {
                    *moment += xa * f64::from(value);
                }
            }
        }
        Ok(())
    }

    /// A picture of one pixel for each of the `latents` `[1, channels, height, width]`; none before anything was learned.
    pub fn picture(&self, latents: &Tensor) -> Result<Option<RgbImage>> {
        let (channels, height, width) = latents.squeeze(0)?.dims3()?;
        let Some(map) = self.solve().filter(|_| self.n == channels + 1) else { return Ok(None) };
        let values = on_host(latents)?;
        Ok(Some(RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let i = y as usize * width + x as usize;
            image::Rgb(std::array::from_fn(|colour| {
                let sum: f64 =
                    (0..channels).map(|c| map[3 * c + colour] * f64::from(values[c * height * width + i])).sum();
                (sum + map[3 * channels + colour]).round().clamp(0.0, 255.0) as u8
            }))
        })))
    }

    /// The `[n, 3]` map of least squares, by Cholesky's decomposition.
    fn solve(&self) -> Option<Vec<f64>> {
        let n = self.n;
        if n == 0 {
            return None;
        }
        let mut l = self.gram.clone();
        let variance: f64 = (0..n - 1).map(|c| l[c * n + c]).sum::<f64>() / (n - 1) as f64;
        // The constant is not held back, only kept away from a division by nothing.
        (0..n).for_each(|c| l[c * n + c] += if c < n - 1 { RIDGE * variance } else { 1e-9 });
        for a in 0..n {
            for b in 0..=a {
                let dot: f64 = (0..b).map(|k| l[a * n + k] * l[b * n + k]).sum();
                let rest = l[a * n + b] - dot;
                l[a * n + b] = if a == b { Some(rest).filter(|&rest| rest > 0.0)?.sqrt() } else { rest / l[b * n + b] };
            }
        }
        let mut x = self.moments.clone();
        for colour in 0..3 {
            for a in 0..n {
                let dot: f64 = (0..a).map(|k| l[a * n + k] * x[3 * k + colour]).sum();
                x[3 * a + colour] = (x[3 * a + colour] - dot) / l[a * n + a];
            }
            for a in (0..n).rev() {
                let dot: f64 = (a + 1..n).map(|k| l[k * n + a] * x[3 * k + colour]).sum();
                x[3 * a + colour] = (x[3 * a + colour] - dot) / l[a * n + a];
            }
        }
        Some(x)
    }
}

fn on_host(latents: &Tensor) -> Result<Vec<f32>> {
    Ok(latents.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Latents of 4 channels whose colours are a linear map of the first three.
    fn sample(phase: f32) -> (Tensor, RgbImage) {
        let (height, width) = (12, 10);
        let value = |c: usize, y: usize, x: usize| (phase + (c * 7 + y * 3 + x * (c + 1)) as f32 * 0.7).sin();
        let values: Vec<f32> =
            (0..4 * height * width).map(|i| value(i / (height * width), i / width % height, i % width)).collect();
        let picture = RgbImage::from_fn(width as u32, height as u32, |x, y| {
            let v = |c| value(c, y as usize, x as usize);
            image::Rgb([100.0 + 60.0 * v(0), 120.0 - 40.0 * v(1) + 20.0 * v(0), 90.0 + 50.0 * v(2)].map(|v| v as u8))
        });
        (Tensor::from_vec(values, (1, 4, height, width), &Device::Cpu).unwrap(), picture)
    }

    #[test]
    fn a_linear_map_is_found_from_pictures() {
        let mut projection = Projection::default();
        for phase in [0.0, 1.0, 2.5] {
            let (latents, picture) = sample(phase);
            projection.learn(&latents, &picture).unwrap();
        }
        let (latents, picture) = sample(4.0);
        let found = projection.picture(&latents).unwrap().unwrap();
        let worst = found.iter().zip(picture.iter()).map(|(a, b)| a.abs_diff(*b)).max();
        // One level of rounding, and what the ridge holds back of an amplitude of 80.
        assert!(worst <= Some(2), "{worst:?}");
    }

    #[test]
    fn nothing_is_shown_before_anything_was_learned() {
        assert!(Projection::default().picture(&sample(0.0).0).unwrap().is_none());
    }

    #[test]
    fn a_picture_of_one_colour_is_learned_as_well() {
        let latents = Tensor::full(0.5f32, (1, 16, 4, 4), &Device::Cpu).unwrap();
        let mut projection = Projection::default();
        projection.learn(&latents, &RgbImage::from_pixel(32, 32, image::Rgb([10, 200, 30]))).unwrap();
        let found = projection.picture(&latents).unwrap().unwrap();
        assert!(found.pixels().all(|pixel| pixel.0.iter().zip([10, 200, 30]).all(|(a, b)| a.abs_diff(b) <= 1)));
    }
}

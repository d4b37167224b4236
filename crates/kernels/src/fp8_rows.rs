//! Matrices of 8-bit floats whose products are computed as they are, without widening them first.

use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::Fp8;

/// Rows in 8-bit floats of 4 bits of exponent, each with a scale: an element is its code's value times its row's scale. Cheap
/// to clone.
#[derive(Debug, Clone)]
pub struct Fp8Rows {
    /// `[..., columns]` in u8.
    pub codes: Tensor,
    /// `[...]` in f32.
    pub scales: Tensor,
}

impl Fp8Rows {
    pub const FORMAT: Fp8 = Fp8::E4m3;

    /// The definition of [`crate::Kernels::quantise_rows`], computed on the CPU for any device.
    pub fn quantise(x: &Tensor) -> Result<Self> {
        let (columns, device) = (x.dim(D::Minus1)?, x.device());
        let values: Vec<f32> = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let mut codes = vec![0u8; values.len()];
        let rows = codes.par_chunks_mut(columns.max(1)).zip(values.par_chunks(columns.max(1)));
        let scales: Vec<f32> = rows.map(|(codes, row)| quantise_row(row, codes)).collect();
        let shape = &x.dims()[..x.rank() - 1];
        Ok(Self {
            codes: Tensor::from_vec(codes, x.shape(), device)?,
            scales: Tensor::from_vec(scales, shape, device)?,
        })
    }

    /// Rows of other matrices of the same number of columns, one after the other.
    pub fn stack(parts: &[Self]) -> Result<Self> {
        if let [one] = parts {
            return Ok(one.clone());
        }
        let join = |of: fn(&Self) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0);
        Ok(Self { codes: join(|part| &part.codes)?, scales: join(|part| &part.scales)? })
    }

    /// Some of a matrix's rows, without a copy.
    pub fn narrow(&self, rows: Range<usize>) -> Result<Self> {
        let narrow = |x: &Tensor| x.narrow(0, rows.start, rows.len());
        Ok(Self { codes: narrow(&self.codes)?, scales: narrow(&self.scales)? })
    }

    /// What the codes stand for without the scales, in `dtype`, which holds them exactly.
    pub fn unscaled(&self, dtype: DType) -> Result<Tensor> {
        Self::FORMAT.values(&self.codes, 1.0, dtype)
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.elem_count() + 4 * self.scales.elem_count()
    }
}

/// Writes a row's codes; its scale brings the largest magnitude to the largest 8-bit float. A row whose scale would leave the
/// normal numbers is as good as zero, and has the scale 1.
fn quantise_row(row: &[f32], codes: &mut [u8]) -> f32 {
    let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / Fp8Rows::FORMAT.largest();
    let scale = if scale >= f32::MIN_POSITIVE { scale } else { 1.0 };
    codes.iter_mut().zip(row).for_each(|(code, x)| *code = Fp8Rows::FORMAT.code(x / scale));
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_scaled_to_the_largest_float_and_rounded_to_even() -> Result<()> {
        // Of the first row 448 is the largest: the codes are those of the values themselves.
        let rows = [
            [448f32, -1.0625, 0.0, 464.0 / 448.0],
            [0.0, -0.0, 0.0, 0.0],
            [1.0, f32::NAN, -0.5, 0.25],
            [f32::INFINITY, 1.0, 0.0, -1.0],
            [1e-45, 0.0, -1e-45, 0.0],
        ];
        let Fp8Rows { codes, scales } = Fp8Rows::quantise(&Tensor::new(&rows, &Device::Cpu)?)?;
        let codes = codes.to_vec2::<u8>()?;
        // -1.0625 lies between 1 (even) and 1.125; 1.0357 is nearer to 1.
        assert_eq!(codes[0], [0x7e, 0xb8, 0x00, 0x38]);
        assert_eq!(codes[1], [0x00, 0x80, 0x00, 0x00]);
        // A NaN stays one and leaves its neighbours alone; 0.5 and 0.25 times 448 have the exponents 7 and 6.
        assert_eq!(codes[2], [0x7e, 0x7f, 0xf6, 0x6e]);
        // Infinity over infinity: what is computed from it is no number either.
        assert_eq!(codes[3], [0x7f, 0x00, 0x00, 0x80]);
        assert_eq!(codes[4], [0x00, 0x00, 0x80, 0x00]);
        assert_eq!(scales.to_vec1::<f32>()?, [1.0, 1.0, 1.0 / 448.0, f32::INFINITY, 1.0]);
        Ok(())
    }

    #[test]
    fn rows_of_several_matrices_are_one() -> Result<()> {
        let x = crate::random::random((7, 20));
        let whole = Fp8Rows::quantise(&x)?;
        let joined = Fp8Rows::stack(&[whole.narrow(0..3)?, whole.narrow(3..7)?])?;
        assert_eq!(joined.codes.to_vec2::<u8>()?, whole.codes.to_vec2::<u8>()?);
        assert_eq!(joined.scales.to_vec1::<f32>()?, whole.scales.to_vec1::<f32>()?);
        assert_eq!(whole.bytes(), 7 * 24);
        // Three bits after the leading one: half a unit of 1/8 over at least 1.
        let error = (whole.unscaled(DType::F32)?.broadcast_mul(&whole.scales.unsqueeze(1)?)? - &x)?.abs()?;
        // Below the smallest normal number the unit is 2^-9 of the scale.
        let bound = ((x.abs()? / 16.0)? + whole.scales.unsqueeze(1)?.broadcast_as(x.shape())? / 1024.0)?;
        assert_eq!(error.gt(&(bound * 1.000_001)?)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?, 0.0);
        Ok(())
    }
}

//! The two 8-bit floats that weights are kept in: what each of the 256 codes stands for.

use candle_core::{DType, Device, Result, Tensor};
use half::f16;
use rayon::prelude::*;

/// Sign, exponent, mantissa.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8 {
    /// 4 bits of exponent, 3 of mantissa, no infinities: up to 448 (safetensors' `F8_E4M3`, PyTorch's `float8_e4m3fn`).
    E4m3,
    /// 5 bits of exponent, 2 of mantissa: the upper half of an f16 (`F8_E5M2`).
    E5m2,
}

impl Fp8 {
    /// Source: Micikevicius et al., FP8 Formats for Deep Learning, table 1. <https://arxiv.org/abs/2209.05433>
    pub fn value(self, code: u8) -> f32 {
        match self {
            Self::E5m2 => f16::from_bits(u16::from(code) << 8).to_f32(),
            Self::E4m3 if code & 0x7f == 0x7f => f32::NAN,
            Self::E4m3 => {
                let (exponent, eighths) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
                // Below the smallest exponent there is no leading one.
                let magnitude =
                    if exponent == 0 { eighths * 2f32.powi(-6) } else { (1.0 + eighths) * 2f32.powi(exponent - 7) };
                if code & 0x80 == 0 { magnitude } else { -magnitude }
            }
        }
    }

    /// The largest value.
    pub fn largest(self) -> f32 {
        self.value(self.last())
    }

    /// The code of the largest value; those above it, up to 0x7f, stand for infinity and what is not a number.
    fn last(self) -> u8 {
        match self {
            Self::E4m3 => 0x7e,
            Self::E5m2 => 0x7b,
        }
    }

    /// The codes nearest to `values`, each divided by `scale`: of two equally near ones the even one. What is beyond the largest
    /// value becomes that.
    pub fn codes(self, values: &[f32], scale: f32) -> Vec<u8> {
        values.par_iter().with_min_len(1 << 14).map(|value| self.code(value / scale)).collect()
    }

    /// The code nearest to `value`, as [`Self::codes`] says.
    pub fn code(self, value: f32) -> u8 {
        let (mantissa, bias): (u32, i32) = match self {
            Self::E4m3 => (3, 7),
            Self::E5m2 => (2, 15),
        };
        if value.is_nan() {
            return 0x7f;
        }
        let magnitude = value.abs().to_bits();
        let smallest_normal = ((128 - bias) as u32) << 23;
        let code = if magnitude < smallest_normal {
            // Added to a number whose neighbours are the smallest code's value away, it is rounded to a multiple of that.
            let coarse = smallest_normal + ((23 - mantissa) << 23);
            (f32::from_bits(coarse) + value.abs()).to_bits() - coarse
        } else {
            let cut = 23 - mantissa;
            let to_even = magnitude + (1 << (cut - 1)) - 1 + (magnitude >> cut & 1);
            (to_even >> cut) - (((127 - bias) as u32) << mantissa)
        };
        // At most the largest, which is below 0x7f.
        code.min(u32::from(self.last())) as u8 | if value.is_sign_negative() { 0x80 } else { 0 }
    }

    /// The values of all codes, each times `scale`.
    pub fn table(self, scale: f32) -> [f32; 256] {
        std::array::from_fn(|code| self.value(code as u8) * scale)
    }

    /// The values of `codes` (u8, of any shape and device), each times `scale`, rounded to `dtype`.
    pub fn values(self, codes: &Tensor, scale: f32, dtype: DType) -> Result<Tensor> {
        let table = Tensor::new(&self.table(scale), &Device::Cpu)?.to_dtype(dtype)?.to_device(codes.device())?;
        // candle takes the largest number of an index's dtype for none at all: 255 of a u8.
        table.index_select(&codes.flatten_all()?.to_dtype(DType::U32)?, 0)?.reshape(codes.shape())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_stand_for_the_values_of_the_paper() {
        // Its table 1: largest, smallest normal, smallest.
        for (format, largest, normal, smallest) in
            [(Fp8::E4m3, (0x7e, 448.0), (0x08, -6), -9), (Fp8::E5m2, (0x7b, 57344.0), (0x04, -14), -16)]
        {
            assert_eq!(format.value(largest.0), largest.1);
            assert_eq!(format.value(normal.0), 2f32.powi(normal.1));
            assert_eq!(format.value(0x81), -(2f32.powi(smallest)));
            assert_eq!((format.value(0), format.value(0x7f).is_nan()), (0.0, true));
        }
        assert_eq!((Fp8::E4m3.value(0x38), Fp8::E4m3.value(0xc1), Fp8::E5m2.value(0x3d)), (1.0, -2.25, 1.25));
        assert_eq!(Fp8::E4m3.table(3.0)[0x38], 3.0);
    }

    #[test]
    fn every_code_of_a_tensor_becomes_its_value() -> Result<()> {
        let codes = Tensor::from_vec((0..=255).collect::<Vec<u8>>(), (4, 64), &Device::Cpu)?;
        for format in [Fp8::E4m3, Fp8::E5m2] {
            let values = format.values(&codes, 3.0, DType::F32)?;
            assert_eq!(values.dims(), [4, 64]);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&values.flatten_all()?.to_vec1::<f32>()?), bits(&format.table(3.0)));
        }
        Ok(())
    }

    #[test]
    fn values_become_the_nearest_codes() {
        for format in [Fp8::E4m3, Fp8::E5m2] {
            let codes: Vec<u8> = (0..=255).filter(|&code| format.value(code).is_finite()).collect();
            let values: Vec<f32> = codes.iter().map(|&code| 3.0 * format.value(code)).collect();
            assert_eq!(format.codes(&values, 3.0), codes);
            for pair in codes.windows(2).filter(|pair| pair[1] <= format.last()) {
                let [low, high] = [pair[0], pair[1]].map(|code| format.value(code));
                let middle = (low + high) / 2.0;
                let even = if pair[0] % 2 == 0 { pair[0] } else { pair[1] };
                let nearest = format.codes(&[middle.next_down(), middle, middle.next_up(), -middle], 1.0);
                assert_eq!(nearest, [pair[0], even, pair[1], even | 0x80], "{format:?} {pair:?}");
            }
            let extremes = format.codes(&[1e9, f32::NEG_INFINITY, f32::NAN], 1.0);
            assert_eq!(extremes, [format.last(), format.last() | 0x80, 0x7f]);
        }
        assert_eq!((Fp8::E4m3.largest(), Fp8::E5m2.largest()), (448.0, 57344.0));
    }
}

//! The two 8-bit floats that weights are kept in: what each of the 256 codes stands for.

use half::f16;

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

    /// The values of all codes, each times `scale`.
    pub fn table(self, scale: f32) -> [f32; 256] {
        std::array::from_fn(|code| self.value(code as u8) * scale)
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
}

//! Functions of one f32 without branches or calls, and reductions in lanes, which compilers turn into vector
//! instructions; [`vectorised`] has that done for the machine's best instruction set.

/// Runs `f` compiled for the best of SSE2, AVX2, AVX-512 or NEON that the processor has.
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Partial results that a reduction keeps: two vectors of AVX-512, four of AVX2.
pub const LANES: usize = 32;

/// `e^x` within a few units in the last place, for `x` limited to where it is a normal number; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // e^x = 2^whole e^part, part in [-ln(2)/2, ln(2)/2]. Adding and subtracting 1.5 * 2^23 rounds to the nearest whole
    // number; ln(2) in two parts, the first of few bits, keeps `part` exact (Cody and Waite, 1980).
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.0);
    let whole = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let part = (x - whole * LN_2_HIGH) - whole * LN_2_LOW;
    // The Taylor series; its next term is below 6e-9.
    let series = [1.0, 1.0, 1.0 / 2.0, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];
    let part = series.iter().rev().fold(0.0, |sum, factor| sum * part + factor);
    // SAFETY: a whole number in [-126, 127], or NaN, for which any integer will do: `part` is NaN then. The checked
    // conversion has branches that keep the loop from being vectorised.
    let whole: i32 = if whole.is_nan() { 0 } else { unsafe { whole.to_int_unchecked() } };
    part * f32::from_bits(((whole + 127) as u32) << 23)
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x/2 (1 + tanh(z))` with `z = sqrt(2/pi) (x + 0.044715 x^3)`, which is `x / (1 + e^(-2z))`.
///
/// Source: `torch.nn.functional.gelu(approximate="tanh")`.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    const TWICE_ROOT: f32 = std::f32::consts::SQRT_2 * std::f32::consts::FRAC_2_SQRT_PI; // 2 sqrt(2/pi)
    x / (1.0 + exp(-TWICE_ROOT * (x + 0.044_715 * x * x * x)))
}

/// The sum of `f` of each element.
#[inline(always)]
pub fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let mut rest = 0.0;
    for &x in chunks.remainder() {
        rest += f(x);
    }
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// The largest element, of NaN and a number the number.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, larger);
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    lanes.iter().copied().fold(rest, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `found` relative to the size of `x` and of the exact value, over [-200, 200].
    fn worst(found: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let mut x = -200f32;
        let mut worst = 0f64;
        while x < 200.0 {
            let (found, exact) = (f64::from(found(x)), exact(f64::from(x)));
            worst = worst.max((found - exact).abs() / (f64::from(x.abs()) + 1e-30));
            x += 0.003;
        }
        worst
    }

    #[test]
    fn silu_and_gelu_are_exact_to_rounding_everywhere() {
        assert!(worst(silu, |x| x / (1.0 + (-x).exp())) < 2e-7);
        let root = (2.0 / std::f64::consts::PI).sqrt();
        assert!(worst(gelu, |x| x / 2.0 * (1.0 + (root * (x + 0.044_715 * x * x * x)).tanh())) < 3e-7);
        assert_eq!((silu(0.0), silu(1e30), gelu(0.0)), (0.0, 1e30, 0.0));
        assert!(silu(f32::NAN).is_nan() && gelu(f32::NAN).is_nan());
        assert!(silu(-1e30).abs() < 1e-6);
    }

    #[test]
    fn exp_is_within_a_few_units_in_the_last_place() {
        let mut x = -87f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() < 1e-6 * exact, "{x}");
            x += 0.001;
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 2e-38 && exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn reductions_take_every_element_once() {
        for len in [1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum(&x, |x| 2.0 * x), (len * (len - 1)) as f32);
            assert_eq!(max(&x), (len - 1) as f32);
        }
    }
}

//! Standard normal noise with the bits of `torch.randn` on the CPU generator.
//!
//! PyTorch draws from the Mersenne twister mt19937 and turns uniforms into normals in groups of 16 (Box-Muller). Its
//! vector path (CPUs with AVX2) evaluates logarithm, sine and cosine by the Cephes polynomials with fused
//! multiply-adds; written out here with explicit `mul_add`, it gives the same bits on every machine.
//!
//! Source: PyTorch, `aten/src/ATen/core/MT19937RNGEngine.h`, `native/cpu/DistributionTemplates.h`
//! (`normal_fill_AVX2`), `native/cpu/avx_mathfun.h`.

// The constants are those of the reference, digit for digit.
#![allow(clippy::excessive_precision, clippy::approx_constant)]

/// PyTorch's CPU generator after `manual_seed`.
pub struct TorchGenerator {
    state: [u32; N],
    next: usize,
}

const N: usize = 624;
const M: usize = 397;
const GROUP: usize = 16;

impl TorchGenerator {
    /// The high 32 bits of the seed are ignored, as in PyTorch.
    pub fn new(seed: u64) -> Self {
        let mut state = [0u32; N];
        state[0] = seed as u32;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    /// `n` standard normal values, as `torch.randn(n, generator=...)` in f32.
    ///
    /// PyTorch draws fewer than 16 values by another algorithm, which no latent is small enough to need; here they are
    /// the first of 16.
    pub fn normal(&mut self, n: usize) -> Vec<f32> {
        let mut values: Vec<f32> = (0..n.max(GROUP)).map(|_| self.uniform()).collect();
        let whole = values.len() - values.len() % GROUP;
        values[..whole].chunks_exact_mut(GROUP).for_each(box_muller);
        if whole < values.len() {
            // A last group from 16 new draws replaces the end.
            let start = values.len() - GROUP;
            let tail = &mut values[start..];
            tail.iter_mut().for_each(|value| *value = self.uniform());
            box_muller(tail);
        }
        values.truncate(n);
        values
    }

    /// 24 random bits in [0, 1).
    fn uniform(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / (1 << 24) as f32)
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let mix = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ mix;
        }
        self.next = 0;
    }
}

/// Turns 16 uniforms into 16 normals: radius from the first eight, angle from the last eight.
fn box_muller(group: &mut [f32]) {
    let (first, second) = group.split_at_mut(GROUP / 2);
    for (u1, u2) in first.iter_mut().zip(second) {
        let radius = (-2.0 * ln(1.0 - *u1)).sqrt();
        let (sin, cos) = sin_cos(2.0 * std::f32::consts::PI * *u2);
        // Adding zero turns -0 into +0, as the reference's multiply-add with mean 0 does.
        *u1 = radius * cos + 0.0;
        *u2 = radius * sin + 0.0;
    }
}

/// Cephes `logf`, for positive normal numbers.
fn ln(x: f32) -> f32 {
    let x = x.max(f32::MIN_POSITIVE);
    let bits = x.to_bits();
    let mut exponent = ((bits >> 23) as i32 - 0x7f) as f32 + 1.0;
    let mantissa = f32::from_bits((bits & !0x7f80_0000) | 0x3f00_0000); // in [0.5, 1)
    let mut x = mantissa - 1.0;
    if mantissa < 0.707106781186547524 {
        exponent -= 1.0;
        x += mantissa;
    }
    let z = x * x;
    let mut y = 7.0376836292E-2f32;
    for c in [
        -1.1514610310E-1,
        1.1676998740E-1,
        -1.2420140846E-1,
        1.4249322787E-1,
        -1.6668057665E-1,
        2.0000714765E-1,
        -2.4999993993E-1,
        3.3333331174E-1,
    ] {
        y = y.mul_add(x, c);
    }
    y *= x;
    y = y.mul_add(z, exponent * -2.12194440e-4);
    y = (-z).mul_add(0.5, y);
    exponent.mul_add(0.693359375, x + y)
}

/// Cephes `sinf` and `cosf`, for angles from 0 up.
fn sin_cos(x: f32) -> (f32, f32) {
    let octant = ((x * 1.27323954473516) as i32 + 1) & !1;
    let y = octant as f32;
    let x = y.mul_add(-0.78515625, x);
    let x = y.mul_add(-2.4187564849853515625e-4, x);
    let x = y.mul_add(-3.77489497744594108e-8, x);
    let z = x * x;

    let mut c = 2.443315711809948E-5f32.mul_add(z, -1.388731625493765E-3);
    c = c.mul_add(z, 4.166664568298827E-2);
    c = (c * z).mul_add(z, -(z * 0.5)) + 1.0;

    let mut s = (-1.9515295891E-4f32).mul_add(z, 8.3321608736E-3);
    s = s.mul_add(z, -1.6666654611E-1);
    s = (s * z).mul_add(x, x);

    let (sin, cos) = if octant & 2 == 0 { (s, c) } else { (c, s) };
    (if octant & 4 != 0 { -sin } else { sin }, if !(octant - 2) & 4 != 0 { -cos } else { cos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_twister_draws_the_published_sequence() {
        // The 10000th output of mt19937 with its default seed, as the C++ standard requires it.
        let mut generator = TorchGenerator::new(5489);
        let last = (0..10_000).map(|_| generator.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }

    #[test]
    fn the_high_half_of_a_seed_is_ignored() {
        assert_eq!(TorchGenerator::new((1 << 40) + 7).normal(32), TorchGenerator::new(7).normal(32));
    }
}

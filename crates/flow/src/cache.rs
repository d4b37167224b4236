//! Steps that are not computed, because the one before says enough.

use candle_core::{DType, Result, Tensor};

/// Skips all blocks but the first in steps in which the first does nearly what it did before.
///
/// What the first double block adds to the output's tokens tells, at a fiftieth of the cost, how far all blocks together
/// would differ from the last step that was computed. Where that is less than the threshold, what the other blocks
/// added then is added again. Lossy: the result is another one than without it.
///
/// Of one image and one prompt; the steps must come in order.
///
/// Source of the idea: the first-block cache of ParaAttention, <https://github.com/chengzeyi/ParaAttention>.
#[derive(Debug, Default)]
pub struct StepCache {
    /// `None` computes every step.
    threshold: Option<f64>,
    last: Option<Computed>,
    reused: usize,
}

/// Of the last step that was computed, both `[1, output tokens, hidden]`.
#[derive(Debug)]
struct Computed {
    /// What the first block added.
    first: Tensor,
    /// What all others added.
    rest: Tensor,
}

impl StepCache {
    /// `threshold` is the mean difference of what the first block adds, over its mean magnitude, below which a step is
    /// not computed: 0.05 is careful, 0.2 bold. `None` computes all.
    pub fn new(threshold: Option<f64>) -> Self {
        Self { threshold, ..Self::default() }
    }

    /// Whether it computes all steps.
    pub(crate) fn is_off(&self) -> bool {
        self.threshold.is_none()
    }

    /// How many steps were not computed.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// The tokens after all blocks, from those before and after the first; `rest` computes them.
    pub(crate) fn tokens(
        &mut self,
        before: &Tensor,
        after: &Tensor,
        rest: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(threshold) = self.threshold else { return rest() };
        let first = (after - before)?;
        if let Some(last) = &self.last
            && difference(&first, &last.first)? < threshold
        {
            self.reused += 1;
            return after + &last.rest;
        }
        let tokens = rest()?;
        self.last = Some(Computed { first, rest: (&tokens - after)? });
        Ok(tokens)
    }
}

/// `mean |x - y| / mean |y|`.
fn difference(x: &Tensor, y: &Tensor) -> Result<f64> {
    let mean = |x: Tensor| x.to_dtype(DType::F32)?.abs()?.mean_all()?.to_scalar::<f32>();
    Ok(f64::from(mean((x - y)?)?) / f64::from(mean(y.clone())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tokens(value: f32) -> Tensor {
        Tensor::full(value, (1, 2, 3), &Device::Cpu).unwrap()
    }

    fn value(x: &Tensor) -> f32 {
        x.mean_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_step_like_the_last_computed_one_is_not_computed() {
        let mut cache = StepCache::new(Some(0.1));
        let mut step = |first: f32| cache.tokens(&tokens(1.0), &tokens(1.0 + first), || Ok(tokens(10.0))).unwrap();
        assert_eq!(value(&step(2.0)), 10.0);
        // 5 % more from the first block: its own tokens, and what the others added to 3.
        assert!((value(&step(2.1)) - 10.1).abs() < 1e-5);
        // Within 10 % of the last step, and not of the last computed one.
        assert_eq!(value(&step(2.25)), 10.0);
        assert_eq!(cache.reused(), 1);
    }

    #[test]
    fn without_a_threshold_every_step_is_computed() {
        let mut cache = StepCache::new(None);
        for _ in 0..3 {
            assert_eq!(value(&cache.tokens(&tokens(1.0), &tokens(2.0), || Ok(tokens(5.0))).unwrap()), 5.0);
        }
        assert_eq!(cache.reused(), 0);
    }
}

//! LoRAs beside a matrix that cannot take them in: their products are added to the layer's output.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};
use retouch_kernels::{Activation, Kernels};

use super::delta::{Delta, Piece};

/// What is added to a linear layer's output `[..., out]`, from its input `[..., in]`.
#[derive(Debug, Clone)]
pub struct Added {
    /// All low-rank changes as one: `up [out, ranks]`, which is zero outside of each one's rows, and `down [ranks, in]`.
    low_rank: Option<(Tensor, Tensor)>,
    others: Vec<Other>,
    out: usize,
}

/// A change of another form.
#[derive(Debug, Clone)]
struct Other {
    delta: Delta,
    /// The rows of the delta that this layer has.
    from: Range<usize>,
    /// Where the first of them goes.
    to: usize,
}

impl Added {
    /// For a layer of `out` outputs that computes in `dtype`; `None` where nothing is added.
    pub fn new(pieces: Vec<Piece>, out: usize, dtype: DType) -> Result<Option<Self>> {
        let (mut ups, mut downs, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for Piece { rows, delta } in pieces {
            match delta.to_dtype(dtype)? {
                Delta::LowRank { up, down } => {
                    ups.push(up.pad_with_zeros(0, rows.start, out - rows.end)?);
                    downs.push(down);
                }
                delta => others.push(Other { delta, from: 0..rows.len(), to: rows.start }),
            }
        }
        let joined = || Ok::<_, candle_core::Error>((Tensor::cat(&ups, 1)?.contiguous()?, Tensor::cat(&downs, 0)?));
        let low_rank = if ups.is_empty() { None } else { Some(joined()?) };
        Ok((low_rank.is_some() || !others.is_empty()).then_some(Self { low_rank, others, out }))
    }

    /// Adds to `y` `[..., out]` what `x` `[..., in]` gives.
    pub fn add_to(&self, mut y: Tensor, x: &Tensor, kernels: &dyn Kernels) -> Result<Tensor> {
        let times = |x: &Tensor, matrix: &Tensor| kernels.linear(x, matrix, None, Activation::None);
        if let Some((up, down)) = &self.low_rank {
            y = (y + times(&times(x, down)?, up)?)?;
        }
        for Other { delta, from, to } in &self.others {
            let part = delta.forward(x)?.narrow(D::Minus1, from.start, from.len())?;
            y = (y + part.pad_with_zeros(D::Minus1, *to, self.out - to - from.len())?)?;
        }
        Ok(y)
    }

    /// Bytes of its tensors.
    #[cfg(test)]
    pub fn bytes(&self) -> u64 {
        let mut tensors: Vec<&Tensor> = self.low_rank.iter().flat_map(|(up, down)| [up, down]).collect();
        for Other { delta, .. } in &self.others {
            match delta {
                Delta::LowRank { up: a, down: b } | Delta::Kronecker { left: a, right: b } => tensors.extend([a, b]),
                Delta::Full(values) => tensors.push(values),
            }
        }
        tensors.iter().map(|tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64).sum()
    }

    /// For the layer that computes a range of the outputs alone.
    pub fn outputs(&self, range: &Range<usize>) -> Result<Self> {
        let narrow =
            |(up, down): &(Tensor, Tensor)| up.narrow(0, range.start, range.len()).map(|up| (up, down.clone()));
        let cut = |other: &Other| {
            let (start, end) = (other.to.max(range.start), (other.to + other.from.len()).min(range.end));
            let first = other.from.start + start.saturating_sub(other.to);
            let from = first..first + end.saturating_sub(start);
            (start < end).then(|| Other { delta: other.delta.clone(), from, to: start - range.start })
        };
        Ok(Self {
            low_rank: self.low_rank.as_ref().map(narrow).transpose()?,
            others: self.others.iter().filter_map(cut).collect(),
            out: range.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use retouch_kernels::for_device;
    use retouch_sampler::TorchGenerator;

    use super::*;

    #[test]
    fn a_range_of_the_outputs_is_that_range_of_all() -> Result<()> {
        let mut numbers = TorchGenerator::new(0);
        let mut random = |rows: usize, columns: usize| {
            Tensor::from_vec(numbers.normal(rows * columns), (rows, columns), &Device::Cpu)
        };
        let pieces = vec![
            Piece { rows: 2..6, delta: Delta::LowRank { up: random(4, 2)?, down: random(2, 6)? } },
            Piece { rows: 0..4, delta: Delta::Kronecker { left: random(2, 3)?, right: random(2, 2)? } },
            Piece { rows: 5..8, delta: Delta::Full(random(3, 6)?) },
        ];
        let Some(added) = Added::new(pieces, 8, DType::F32)? else { panic!("nothing is added") };
        let (x, zero) = (random(5, 6)?, Tensor::zeros((5, 8), DType::F32, &Device::Cpu)?);
        let kernels = for_device(&Device::Cpu);
        let all = added.add_to(zero.clone(), &x, kernels)?;
        for range in [0..8, 0..3, 1..2, 3..7, 6..8] {
            let part = zero.narrow(1, range.start, range.len())?;
            let found = added.outputs(&range)?.add_to(part, &x, kernels)?;
            let difference = (found - all.narrow(1, range.start, range.len())?)?.abs()?.max_all()?;
            // The same products in another grouping: a few roundings of numbers below 30.
            assert!(difference.to_scalar::<f32>()? < 1e-5, "{range:?}");
        }
        // A range of a range.
        let twice = added.outputs(&(1..7))?.outputs(&(2..5))?.add_to(zero.narrow(1, 0, 3)?, &x, kernels)?;
        assert!((twice - all.narrow(1, 3, 3)?)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
        Ok(())
    }
}

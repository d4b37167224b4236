//! What a library of the GPU's maker may have something faster for, and how its results are held against ours.
//!
//! Little is taken on trust: of the first result of every plan that a library makes, some rows are compared with our own, and the
//! library is not asked again where they differ. That shows a wrong description of a task and a kernel that is wrong throughout.

use candle_core::{DType, Result, Tensor};

/// An operation with all that a plan for it depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    Attention(Attention),
    Convolution(Convolution),
}

/// `softmax(scale * q k^T) v`; strides in elements, of batch, token and head, whose elements are neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attention {
    pub dtype: DType,
    pub batch: usize,
    pub heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
    /// Of queries, keys, values and the result.
    pub strides: [[i64; 3]; 4],
    /// The bits of an f32.
    pub scale: u32,
}

/// A convolution of `[batch, channels, height, width]` with `[outputs, channels, kernel, kernel]`, all contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Convolution {
    pub dtype: DType,
    pub batch: usize,
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub outputs: usize,
    pub kernel: usize,
    pub stride: usize,
    /// Zeros above and below.
    pub rows: [usize; 2],
    /// Zeros to the left and to the right.
    pub columns: [usize; 2],
}

impl Convolution {
    /// Height and width of the result.
    pub fn out_size(&self) -> [usize; 2] {
        [(self.height, self.rows), (self.width, self.columns)]
            .map(|(size, [before, after])| (size + before + after - self.kernel) / self.stride + 1)
    }
}

impl Task {
    /// Floating-point operations.
    pub fn work(&self) -> f64 {
        let product = |sizes: &[usize]| sizes.iter().map(|&size| size as f64).product::<f64>();
        match self {
            Self::Attention(t) => 4.0 * product(&[t.batch, t.heads, t.queries, t.keys, t.head_dim]),
            Self::Convolution(t) => {
                let [height, width] = t.out_size();
                2.0 * product(&[t.batch, t.outputs, height, width, t.channels, t.kernel, t.kernel])
            }
        }
    }

    /// Of operands and result.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Attention(t) => t.dtype,
            Self::Convolution(t) => t.dtype,
        }
    }

    /// The most that two correct results may be apart, as a share of their size: 16 roundings of a narrow dtype (results are
    /// rounded once or twice, and so are the weights of attention, so that one or two are to be expected), and of f32, in
    /// which thousands of products are added up in any order, 1024. It is also less than products of inputs rounded to TF32 differ.
    fn tolerance(&self) -> f32 {
        match self.dtype() {
            DType::BF16 => 1.0 / 16.0,
            DType::F16 => 1.0 / 128.0,
            _ => 1.0 / 16384.0,
        }
    }

    /// Of the sums of squares of differences, and of ours, one for each part of a result.
    fn judged(&self, differences: &Tensor, ours: &Tensor) -> Result<Verdict> {
        let number = |x: Tensor| x.to_scalar::<f32>();
        if !number(ours.sum_all()?)?.is_finite() {
            return Ok(Verdict::Unknown);
        }
        let worst = (differences / (ours + 1e-30)?)?;
        // A sum, unlike a maximum, shows every NaN.
        let apart = if number(worst.sum_all()?)?.is_finite() { number(worst.max_all()?)?.sqrt() } else { f32::NAN };
        Ok(if apart <= self.tolerance() { Verdict::Agrees } else { Verdict::Differs(apart) })
    }
}

/// Whether a plan's results have been compared with ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Unproven,
    Proven,
}

/// What a comparison showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    Agrees,
    /// By this share of their size; NaN where one of the results is.
    Differs(f32),
    /// Ours is not finite.
    Unknown,
}

/// Compares rows of attention, `[batch, tokens, heads * head_dim]`, head by head.
pub fn judge_attention(task: &Attention, found: &Tensor, ours: &Tensor) -> Result<Verdict> {
    let by_head = |x: &Tensor| {
        let (batch, tokens, _) = x.dims3()?;
        x.to_dtype(DType::F32)?.reshape((batch, tokens, task.heads, task.head_dim))?.sqr()?.sum((1, 3))
    };
    let [found, wide] = [found, ours].map(|x| x.to_dtype(DType::F32));
    let difference = (found? - wide?)?;
    Task::Attention(*task).judged(&by_head(&difference)?, &by_head(ours)?)
}

/// Compares rows of a convolution, `[batch, outputs, rows, width]`: the differences of each channel with its own size and that of all, since one
/// channel may be nothing but roundings.
pub fn judge_convolution(task: &Convolution, found: &Tensor, ours: &Tensor) -> Result<Verdict> {
    let [found, ours] = [found, ours].map(|x| x.to_dtype(DType::F32));
    let (found, ours) = (found?, ours?);
    let by_channel = (found - &ours)?.sqr()?.sum((0, 2, 3))?;
    let own = ours.sqr()?.sum((0, 2, 3))?;
    let mean = (own.sum_all()? / task.outputs as f64)?;
    Task::Convolution(*task).judged(&by_channel, &own.broadcast_add(&mean)?)
}

//! The autoencoder over bands of an image's rows, for images whose activations do not fit in memory.
//!
//! Each layer goes over the image band by band before the next one begins. A band of a convolution's output needs a
//! row or two of its input more than its own, and group norm needs the mean and variance of the whole image, which are
//! gathered from all bands before the first is normalised. So there is nothing to blend: the result is that of the whole
//! image, up to the rounding of sums in another order. What is in memory at once are one or two whole activations
//! (wherever `home` is) and a band of the others.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use retouch_kernels::Moments;

use crate::{conv::Conv2d, norm::GroupNorm};

/// How encoder and decoder go over an image.
#[derive(Debug, Clone, Default)]
pub enum Tiling {
    /// At once: the fastest, with the most memory.
    #[default]
    Whole,
    Bands {
        /// What a band may take of the larger of a layer's input and output.
        bytes: usize,
        /// Where whole activations are kept: the device that computes, or the CPU to which bands then come and go.
        home: Device,
    },
}

/// A band has at least this many rows of a layer's output: fewer are mostly the neighbours' rows.
pub const MIN_ROWS: usize = 8;

impl Tiling {
    /// `conv` of `x`, normalised before if there is a norm.
    pub(crate) fn layer(&self, x: &Tensor, norm: Option<&GroupNorm>, conv: &Conv2d) -> Result<Tensor> {
        let Self::Bands { bytes, home } = self else {
            return match norm {
                Some(norm) => conv.forward(&norm.forward_silu(x)?),
                None => conv.forward(x),
            };
        };
        let input = Input::new(x, norm, *bytes)?;
        let (b, _, height, width) = x.dims4()?;
        let (height, width) = (conv.window().out_size(height), conv.window().out_size(width));
        let y = Tensor::zeros((b, conv.outputs(), height, width), x.dtype(), home)?;
        for rows in bands(x, &y, *bytes)? {
            let (part, before) = input.rows(rows.clone(), conv)?;
            write(&y, &conv.forward(&part)?.narrow(2, before, rows.len())?, rows.start)?;
        }
        Ok(y)
    }

    /// The end of a residual block: `conv` of `x`, normalised before, plus `residual` through its shortcut. The output
    /// has the shape of `x`, and takes its place where there are bands.
    pub(crate) fn finish(
        &self,
        x: Tensor,
        norm: &GroupNorm,
        conv: &Conv2d,
        residual: Tensor,
        shortcut: Option<&Conv2d>,
    ) -> Result<Tensor> {
        let through = |residual: Tensor| match shortcut {
            Some(shortcut) => shortcut.forward(&residual),
            None => Ok(residual),
        };
        let Self::Bands { bytes, .. } = self else {
            let normed = norm.forward_silu(&x)?;
            drop(x);
            return conv.forward_plus(&normed, &through(residual)?);
        };
        let input = Input::new(&x, Some(norm), *bytes)?;
        let bands = bands(&residual, &x, *bytes)?;
        let mut ahead = None;
        for (i, rows) in bands.iter().enumerate() {
            let (part, before) = match ahead.take() {
                Some(read) => read,
                None => input.rows(rows.clone(), conv)?,
            };
            // Before this band takes the place of a row that the next one needs.
            if let Some(next) = bands.get(i + 1) {
                ahead = Some(input.rows(next.clone(), conv)?);
            }
            let (met, _) = conv.window().reach(rows.clone(), x.dim(2)?);
            let residual = through(read(&residual, met, conv.device())?)?;
            write(&x, &conv.forward_plus(&part, &residual)?.narrow(2, before, rows.len())?, rows.start)?;
        }
        Ok(x)
    }

    /// `x` to where whole activations are kept.
    pub(crate) fn at_home(&self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::Whole => Ok(x),
            Self::Bands { home, .. } => x.to_device(home),
        }
    }
}

/// A whole activation, with the moments by which its bands are normalised.
struct Input<'a> {
    x: &'a Tensor,
    norm: Option<(&'a GroupNorm, Moments)>,
}

impl<'a> Input<'a> {
    fn new(x: &'a Tensor, norm: Option<&'a GroupNorm>, bytes: usize) -> Result<Self> {
        let norm = match norm {
            Some(norm) => Some((norm, moments(x, norm, bytes)?)),
            None => None,
        };
        Ok(Self { x, norm })
    }

    /// What `conv` needs for the output's `rows`, and how many rows of its output come before them.
    fn rows(&self, rows: Range<usize>, conv: &Conv2d) -> Result<(Tensor, usize)> {
        let (met, before) = conv.window().reach(rows, self.x.dim(2)?);
        let device = conv.device();
        let part = match &self.norm {
            // What is normalised is a copy.
            Some((norm, moments)) if self.x.device().same_device(device) => {
                norm.forward_silu_by(&self.x.narrow(2, met.start, met.len())?, moments)?
            }
            Some((norm, moments)) => norm.forward_silu_by(&read(self.x, met, device)?, moments)?,
            None => read(self.x, met, device)?,
        };
        Ok((part, before))
    }
}

/// Mean and variance of all of `x`, where it lies.
fn moments(x: &Tensor, norm: &GroupNorm, bytes: usize) -> Result<Moments> {
    let kernels = retouch_kernels::for_device(x.device());
    let of = |rows: Range<usize>| kernels.group_moments(&x.narrow(2, rows.start, rows.len())?, norm.groups());
    let mut bands = bands(x, x, bytes)?.into_iter();
    let first = of(bands.next().unwrap_or_default())?;
    bands.try_fold(first, |sum, rows| Ok(sum.and(&of(rows)?)))
}

/// The rows of `y` in runs for which neither they nor what they are made of in `x` take more than `bytes`.
fn bands(x: &Tensor, y: &Tensor, bytes: usize) -> Result<Vec<Range<usize>>> {
    let height = y.dim(2)?;
    let larger = x.elem_count().max(y.elem_count()) * y.dtype().size_in_bytes();
    let rows = (bytes / (larger / height.max(1)).max(1)).max(MIN_ROWS);
    Ok((0..height).step_by(rows).map(|start| start..height.min(start + rows)).collect())
}

/// A copy of rows, on the device that computes.
fn read(x: &Tensor, rows: Range<usize>, device: &Device) -> Result<Tensor> {
    x.narrow(2, rows.start, rows.len())?.force_contiguous()?.to_device(device)
}

/// Puts rows into the activation `y`, wherever that lies.
fn write(y: &Tensor, rows: &Tensor, first: usize) -> Result<()> {
    y.slice_set(&rows.to_device(y.device())?.contiguous()?, 2, first)
}

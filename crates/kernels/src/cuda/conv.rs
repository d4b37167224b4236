//! The convolution: by a library, which gathers no windows, or in bands of rows: candle's writes the window of every output pixel
//! to memory first, 4.8 GB for a layer of the decoder at 1024x1024.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::{
    Gpu,
    tasks::{Convolution, Standing, Task, Verdict, judge_convolution},
    wide,
};
use crate::{Window, portable};

/// Bytes that the windows of a band may take.
const WINDOW_BYTES: usize = 512 << 20;

/// Bytes of input and output that a library is given at once: it may need as many again, to keep them in another order.
const WHOLE_BYTES: usize = 512 << 20;
/// The same for a band, which is copied before and after.
const BAND_BYTES: usize = 256 << 20;

pub fn conv2d(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    residual: Option<&Tensor>,
    window: Window,
) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (out_height, out_width) = (window.out_size(height), window.out_size(width));
    if takes(x, weight, bias, residual, window)
        && let Some(y) = by_library(gpu, x, weight, bias, residual, window)?
    {
        return Ok(y);
    }
    let row_bytes = batch * channels * window.kernel().pow(2) * out_width * x.dtype().size_in_bytes();
    let band = (WINDOW_BYTES / row_bytes.max(1)).max(2);
    if band >= out_height {
        return portable::conv2d(x, weight, bias, residual, window);
    }
    let part = |rows: Range<usize>| part(x, weight, window, rows).map(Some);
    let y = in_bands(x, weight, bias, residual, window, band, part)?;
    y.map_or_else(|| portable::conv2d(x, weight, bias, residual, window), Ok)
}

/// Whether all shapes and dtypes fit; those that do not, the definition says something about.
fn takes(x: &Tensor, weight: &Tensor, bias: &Tensor, residual: Option<&Tensor>, window: Window) -> bool {
    let (&[batch, channels, height, width], &[outputs, inputs, down, across]) = (x.dims(), weight.dims()) else {
        return false;
    };
    let y = [batch, outputs, window.out_size(height), window.out_size(width)];
    wide(x.dtype()).is_some()
        && [weight, bias].iter().chain(&residual).all(|other| other.dtype() == x.dtype())
        && inputs == channels
        && [down, across] == [window.kernel(); 2]
        && bias.dims() == [outputs]
        && residual.is_none_or(|residual| residual.dims() == y)
        && !y.contains(&0)
        && (window != Window::Halving || height % 2 == 0 && width % 2 == 0)
}

/// At once, or in bands if that takes too much memory; none if there is no plan for it, or if a result is not ours.
fn by_library(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    residual: Option<&Tensor>,
    window: Window,
) -> Result<Option<Tensor>> {
    let out_height = window.out_size(x.dim(2)?);
    // Doubled rows are as wide as the output's.
    let inputs = if window == Window::Doubling { 4 * x.elem_count() } else { x.elem_count() };
    let outputs = x.dim(0)? * weight.dim(0)? * out_height * window.out_size(x.dim(3)?);
    let bytes = (inputs + outputs) * x.dtype().size_in_bytes();
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let part = |rows: Range<usize>| part_by_library(gpu, &x, &weight, window, rows);
    if bytes <= WHOLE_BYTES {
        let Some(y) = part(0..out_height)? else { return Ok(None) };
        let y = y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        return Ok(Some(if let Some(residual) = residual { (y + residual)? } else { y }));
    }
    // All about as high as each other: a low one at the end would need a plan that may not be worth it.
    let count = out_height.div_ceil((BAND_BYTES / (bytes / out_height).max(1)).max(2));
    let band = out_height.div_ceil(count).next_multiple_of(2);
    in_bands(&x, &weight, bias, residual, window, band, part)
}

/// `band` rows of the output at a time, rounded down to an even number; none if `part`, which is the convolution alone, has none.
fn in_bands(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    residual: Option<&Tensor>,
    window: Window,
    band: usize,
    part: impl Fn(Range<usize>) -> Result<Option<Tensor>>,
) -> Result<Option<Tensor>> {
    let (batch, _, height, width) = x.dims4()?;
    let (out_height, out_width) = (window.out_size(height), window.out_size(width));
    let mut y = None;
    for first in (0..out_height).step_by(band & !1) {
        let count = (band & !1).min(out_height - first);
        let rows = |x: &Tensor| x.narrow(2, first, count);
        let Some(part) = part(first..first + count)? else { return Ok(None) };
        let part = part.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        let part = if let Some(residual) = residual { (part + rows(residual)?)? } else { part };
        let y = match &y {
            Some(y) => y,
            None => y.insert(Tensor::zeros((batch, weight.dim(0)?, out_height, out_width), x.dtype(), x.device())?),
        };
        y.slice_set(&part.contiguous()?, 2, first)?;
    }
    Ok(y)
}

/// Some rows of the convolution alone, the first of which is even.
fn part(x: &Tensor, weight: &Tensor, window: Window, rows: Range<usize>) -> Result<Tensor> {
    let [before, after] = zeros(window);
    let x = input(x, window, rows)?.pad_with_zeros(3, before, after)?;
    x.conv2d(weight, 0, stride(window), 1, 1)
}

/// [`part`] by a library, from a contiguous image and weights.
fn part_by_library(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Tensor,
    window: Window,
    rows: Range<usize>,
) -> Result<Option<Tensor>> {
    let (batch, channels, height, width) = x.dims4()?;
    let (outputs, _, kernel, _) = weight.dims4()?;
    let factor = if window == Window::Doubling { 2 } else { 1 };
    let whole = rows == (0..window.out_size(height));
    let (step, zeros) = (stride(window), zeros(window));
    let task = Convolution {
        dtype: x.dtype(),
        batch,
        channels,
        // Of a band's input all rows are there, those of zeros too.
        height: if whole { factor * height } else { (rows.len() - 1) * step + kernel },
        width: factor * width,
        outputs,
        kernel,
        stride: step,
        rows: if whole { zeros } else { [0, 0] },
        columns: zeros,
    };
    let planned = Task::Convolution(task);
    let Some(standing) = gpu.planned(&planned) else { return Ok(None) };
    let source = match window {
        Window::Doubling if whole => x.upsample_nearest2d(2 * height, 2 * width)?,
        _ if whole => x.clone(),
        _ => input(x, window, rows.clone())?.contiguous()?,
    };
    let [out_height, out_width] = task.out_size();
    let y = gpu.uninitialised((batch, outputs, out_height, out_width).into(), x.dtype(), x.device())?;
    if !gpu.run(&planned, &[&source, weight], &y)? {
        return Ok(None);
    }
    if standing == Standing::Unproven {
        drop(source);
        let edge = rows.len().min(2);
        let middle = (rows.len() / 2) & !1;
        for some in [0..edge, middle..rows.len().min(middle + edge), (rows.len() - edge) & !1..rows.len()] {
            let ours = part(x, weight, window, rows.start + some.start..rows.start + some.end)?;
            let verdict = judge_convolution(&task, &y.narrow(2, some.start, some.len())?, &ours)?;
            gpu.judge(&planned, verdict);
            if let Verdict::Differs(_) = verdict {
                return Ok(None);
            }
        }
    }
    Ok(Some(y))
}

/// Pixels from one window to the next.
fn stride(window: Window) -> usize {
    if window == Window::Halving { 2 } else { 1 }
}

/// Zeros before and after each column, and each row.
fn zeros(window: Window) -> [usize; 2] {
    match window {
        Window::Point => [0, 0],
        Window::Same | Window::Doubling => [1, 1],
        Window::Halving => [0, 1],
    }
}

/// What the windows of some of the output's rows see, doubled if they see that, with zeros for rows beyond the image; the first of
/// the rows is even.
fn input(x: &Tensor, window: Window, rows: Range<usize>) -> Result<Tensor> {
    let height = x.dim(2)?;
    // The rows from `first` to before `end`, and zeros for those beyond the image.
    let padded = |x: &Tensor, first: isize, end: isize| {
        let height = x.dim(2)? as isize;
        let (inner, inner_end) = (first.max(0), end.min(height));
        let rows = x.narrow(2, inner as usize, (inner_end - inner) as usize)?;
        rows.pad_with_zeros(2, (inner - first) as usize, (end - inner_end) as usize)
    };
    let (start, end) = (rows.start as isize, rows.end as isize);
    match window {
        Window::Point => x.narrow(2, rows.start, rows.len())?.contiguous(),
        Window::Same => padded(x, start - 1, end + 1),
        Window::Halving => padded(x, 2 * start, 2 * end + 1),
        Window::Doubling => {
            // The input's rows that are met, doubled; the first of them may be met by its second copy alone.
            let from = (rows.start / 2).saturating_sub(1);
            let to = rows.end.div_ceil(2).saturating_add(1).min(height);
            let met = x.narrow(2, from, to - from)?;
            let doubled = met.contiguous()?.upsample_nearest2d(2 * (to - from), 2 * x.dim(3)?)?;
            let shift = 2 * from as isize;
            padded(&doubled, start - 1 - shift, end + 1 - shift)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{Launch, Operands, Params, Product};
    use crate::random::random;
    use candle_core::{DType, Device, Shape, bail, quantized::QTensor};

    /// A GPU with nothing but a library, which computes convolutions.
    #[derive(Debug)]
    struct Library;

    impl Gpu for Library {
        fn address(&self, _: &Tensor) -> Result<u64> {
            bail!("nothing is launched")
        }

        fn blocks(&self, _: &QTensor) -> Result<u64> {
            bail!("nothing is launched")
        }

        fn uninitialised(&self, shape: Shape, dtype: DType, device: &Device) -> Result<Tensor> {
            Tensor::full(f32::NAN, shape, device)?.to_dtype(dtype)?.force_contiguous()
        }

        fn shared_memory(&self) -> usize {
            0
        }

        fn launch<P: Params>(&self, _: &Launch<'_>, _: &P) -> Result<()> {
            bail!("nothing is launched")
        }

        fn multiply(&self, _: Product, _: Operands<'_>) -> Result<bool> {
            Ok(false)
        }

        fn planned(&self, _: &Task) -> Option<Standing> {
            Some(Standing::Unproven)
        }

        fn run(&self, task: &Task, operands: &[&Tensor], y: &Tensor) -> Result<bool> {
            let (Task::Convolution(task), [x, weight]) = (task, operands) else { return Ok(false) };
            let padded = x.pad_with_zeros(2, task.rows[0], task.rows[1])?;
            let padded = padded.pad_with_zeros(3, task.columns[0], task.columns[1])?;
            assert_eq!(x.dims(), [task.batch, task.channels, task.height, task.width]);
            y.slice_set(&padded.conv2d(weight, 0, task.stride, 1, 1)?, 0, 0)?;
            Ok(true)
        }

        fn judge(&self, task: &Task, verdict: Verdict) {
            assert_eq!(verdict, Verdict::Agrees, "{task:?}");
        }
    }

    #[test]
    fn bands_join_to_the_whole() -> Result<()> {
        for window in [Window::Point, Window::Same, Window::Halving, Window::Doubling] {
            for height in [2, 4, 10, 12] {
                let side = window.kernel();
                let (x, weight) = (random((2, 3, height, 6)), random((4, 3, side, side)));
                let bias = random(4);
                let residual = random((2, 4, window.out_size(height), window.out_size(6)));
                let whole = portable::conv2d(&x, &weight, &bias, Some(&residual), window)?;
                for band in [2, 3, 4, 8] {
                    let part = |rows: Range<usize>| part(&x, &weight, window, rows).map(Some);
                    let found = in_bands(&x, &weight, &bias, Some(&residual), window, band, part)?;
                    let by_library = |rows: Range<usize>| part_by_library(&Library, &x, &weight, window, rows);
                    let by_library = in_bands(&x, &weight, &bias, Some(&residual), window, band, by_library)?;
                    for found in [found, by_library] {
                        let difference = (found.unwrap() - &whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
                        // The same products, perhaps added up in another order: 27 of them, each about 1.
                        assert!(difference < 2e-5, "{window:?} of height {height} in bands of {band}: {difference}");
                    }
                }
            }
        }
        Ok(())
    }
}

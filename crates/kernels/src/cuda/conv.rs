//! The convolution in bands of rows: candle's writes the window of every output pixel to memory first, 4.8 GB for a layer
//! of the decoder at 1024x1024.

use candle_core::{Result, Tensor};

use crate::{Window, portable};

/// Bytes that the windows of a band may take.
const WINDOW_BYTES: usize = 512 << 20;

pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, residual: Option<&Tensor>, window: Window) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (out_height, out_width) = (window.out_size(height), window.out_size(width));
    let row_bytes = batch * channels * window.kernel().pow(2) * out_width * x.dtype().size_in_bytes();
    let band = (WINDOW_BYTES / row_bytes.max(1)).max(2);
    if band >= out_height {
        return portable::conv2d(x, weight, bias, residual, window);
    }
    in_bands(x, weight, bias, residual, window, band)
}

/// `band` rows of the output at a time, rounded down to an even number.
fn in_bands(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    residual: Option<&Tensor>,
    window: Window,
    band: usize,
) -> Result<Tensor> {
    let (batch, _, height, width) = x.dims4()?;
    let (out_height, out_width) = (window.out_size(height), window.out_size(width));
    let y = Tensor::zeros((batch, weight.dim(0)?, out_height, out_width), x.dtype(), x.device())?;
    for first in (0..out_height).step_by(band & !1) {
        let count = (band & !1).min(out_height - first);
        let rows = |x: &Tensor| x.narrow(2, first, count);
        let part = part(x, weight, window, first, count)?.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        let part = if let Some(residual) = residual { (part + rows(residual)?)? } else { part };
        y.slice_set(&part.contiguous()?, 2, first)?;
    }
    Ok(y)
}

/// Rows `first..first + count` of the convolution alone; `first` is even.
fn part(x: &Tensor, weight: &Tensor, window: Window, first: usize, count: usize) -> Result<Tensor> {
    let height = x.dim(2)?;
    // The rows from `first` to before `end`, and zeros for those beyond the image.
    let padded = |x: &Tensor, first: isize, end: isize| {
        let height = x.dim(2)? as isize;
        let (inner, inner_end) = (first.max(0), end.min(height));
        let rows = x.narrow(2, inner as usize, (inner_end - inner) as usize)?;
        rows.pad_with_zeros(2, (inner - first) as usize, (end - inner_end) as usize)
    };
    let (start, end) = (first as isize, (first + count) as isize);
    match window {
        Window::Point => x.narrow(2, first, count)?.contiguous()?.conv2d(weight, 0, 1, 1, 1),
        Window::Same => padded(x, start - 1, end + 1)?.pad_with_zeros(3, 1, 1)?.conv2d(weight, 0, 1, 1, 1),
        Window::Halving => padded(x, 2 * start, 2 * end + 1)?.pad_with_zeros(3, 0, 1)?.conv2d(weight, 0, 2, 1, 1),
        Window::Doubling => {
            // The input's rows that are met, doubled; the first of them may be met by its second copy alone.
            let from = (first / 2).saturating_sub(1);
            let to = (first + count).div_ceil(2).saturating_add(1).min(height);
            let rows = x.narrow(2, from, to - from)?;
            let doubled = rows.contiguous()?.upsample_nearest2d(2 * (to - from), 2 * x.dim(3)?)?;
            let shift = 2 * from as isize;
            padded(&doubled, start - 1 - shift, end + 1 - shift)?.pad_with_zeros(3, 1, 1)?.conv2d(weight, 0, 1, 1, 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

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
                    let found = in_bands(&x, &weight, &bias, Some(&residual), window, band)?;
                    let difference = (found - &whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    // The same products, perhaps added up in another order: 27 of them, each about 1.
                    assert!(difference < 2e-5, "{window:?} of height {height} in bands of {band}: {difference}");
                }
            }
        }
        Ok(())
    }
}

//! Head split, query and key norm, rotary embedding and joining of streams, in one pass.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    buffer::zeros,
    matrix::Destination,
    simd::{sum, vectorised},
    view::{Rows, View, narrowed, vector},
};
use crate::{Rotation, Stream, portable::EPSILON};

pub fn heads(streams: &[Stream<'_>], rotation: &Rotation) -> Result<Tensor> {
    let Some(one) = streams.first() else { bail!("no streams to take heads from") };
    let (batch, _, width) = one.qkv.dims3()?;
    let head_dim = one.query_scale.elem_count();
    let tokens: usize = streams.iter().map(|stream| stream.qkv.dim(1)).sum::<Result<usize>>()?;
    let (rotation_rows, pairs) = rotation.cos.dims2()?;
    if head_dim != 2 * pairs || width % (3 * head_dim) != 0 || rotation_rows < tokens {
        bail!("{tokens} tokens of {width} channels in heads of {head_dim}, with angles of {:?}", rotation.cos.shape())
    }
    let (cos, sin) = (View::of(&rotation.cos), View::of(&rotation.sin));
    let (cos, sin) = (cos.floats()?, sin.floats()?);
    let mut y = zeros(batch * tokens * width);
    let destination = Destination::new(&mut y);
    let mut first = 0;
    for stream in streams {
        let (b, count, w) = stream.qkv.dims3()?;
        if (b, w) != (batch, width) {
            bail!("streams of {:?} and {:?} do not join", one.qkv.shape(), stream.qkv.shape())
        }
        let scales =
            [vector(stream.query_scale, head_dim, "a query norm")?, vector(stream.key_scale, head_dim, "a key norm")?];
        let rows = Rows::of(stream.qkv)?;
        let view = View::of(&rows.tensor);
        let data = view.floats()?;
        (0..rows.count).into_par_iter().with_min_len(8).for_each(|row| {
            let (b, token) = (row / count, first + row % count);
            let x = &data[row * rows.stride..][..width];
            // SAFETY: row `token` of image `b` of `y`; every pair of both is met once over all streams.
            let y = unsafe { std::slice::from_raw_parts_mut(destination.at((b * tokens + token) * width), width) };
            let (cos, sin) = (&cos[token * pairs..][..pairs], &sin[token * pairs..][..pairs]);
            vectorised(|| {
                let inner = width / 3;
                for (part, scale) in scales.iter().enumerate() {
                    let (x, y) = (&x[part * inner..][..inner], &mut y[part * inner..][..inner]);
                    for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
                        head(x, scale, cos, sin, y);
                    }
                }
                y[2 * inner..].copy_from_slice(&x[2 * inner..]);
            });
        });
        first += count;
    }
    narrowed(y, (batch, tokens, 3, width / (3 * head_dim), head_dim), one.qkv.dtype())
}

/// One query or key: normalised, scaled, turned.
#[inline(always)]
fn head(x: &[f32], scale: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
    let mean_square = sum(x, |x| x * x) / x.len() as f32;
    let inverse = 1.0 / (mean_square + EPSILON as f32).sqrt();
    let pairs = x.chunks_exact(2).zip(scale.chunks_exact(2)).zip(cos.iter().zip(sin));
    for (y, ((x, scale), (&cos, &sin))) in y.chunks_exact_mut(2).zip(pairs) {
        let (a, b) = (x[0] * inverse * scale[0], x[1] * inverse * scale[1]);
        y[0] = a * cos - b * sin;
        y[1] = a * sin + b * cos;
    }
}

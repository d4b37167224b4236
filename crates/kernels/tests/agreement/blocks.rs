//! What is between a block's matrices: norms, gates, heads.

use candle_core::{D, Tensor};
use retouch_kernels::{Rotation, Stream};

use crate::{agree, random::random};

/// How far a layer norm in f32 may be off: its mean by a few roundings of a row's largest magnitude, which the division by the
/// row's deviation makes so much larger.
fn norm_tolerance(x: &Tensor) -> f64 {
    let mut conditioning = 0f64;
    for row in x.flatten_to(D::Minus2).unwrap().to_vec2::<f32>().unwrap() {
        let count = row.len() as f64;
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        let largest = row.iter().fold(0f64, |largest, &x| largest.max(f64::from(x).abs()));
        conditioning = conditioning.max(largest / (variance + 1e-6).sqrt());
    }
    10.0 * 2f64.powi(-24) * (1.0 + conditioning)
}

#[test]
fn modulated_norm_and_gated_residual() {
    for (tokens, hidden) in [(1, 2), (5, 37), (33, 192), (9, 3072)] {
        // A mean far from 0 shows a variance that loses its precision.
        let inputs = [
            (random((2, tokens, hidden)) + 3.0).unwrap(),
            random((2, tokens, hidden)),
            random((1, hidden)),
            random((1, hidden)),
        ];
        let name = format!("{tokens}x{hidden}");
        let tolerance = norm_tolerance(&inputs[0]);
        agree(&format!("modulated norm {name}"), tolerance, &inputs, |k, x| k.modulated_norm(&x[0], &x[2], &x[3]));
        agree(&format!("gated residual {name}"), 1e-6, &inputs, |k, x| k.gated_residual(&x[0], &x[1], &x[2]));
        agree(&format!("gated GELU {name}"), 1e-6, &inputs, |k, x| k.gated_gelu(&x[1], &x[0]));
        agree(&format!("views {name}"), norm_tolerance(&inputs[1]), &inputs, |k, x| {
            let view = |i: usize| x[i].narrow(1, tokens / 2, tokens - tokens / 2);
            k.gated_residual(&view(0)?, &k.modulated_norm(&view(1)?, &x[2], &x[3])?, &x[2])
        });
    }
}

#[test]
fn heads() {
    for (text, image, heads, head_dim, beside) in
        [(1, 1, 1, 2, 10), (3, 5, 2, 6, 10), (7, 20, 3, 32, 10), (2, 9, 2, 128, 24), (4, 3, 5, 64, 8)]
    {
        let (width, tokens) = (3 * heads * head_dim, text + image);
        let inputs = [
            random((2, text, width)),
            // Wider than the projection, as in a single block.
            random((2, image, width + beside)),
            random(head_dim),
            random(head_dim),
        ];
        let angles = random((tokens, head_dim / 2));
        agree(&format!("heads {tokens}x{heads}x{head_dim}"), 2e-6, &inputs, |k, x| {
            let device = x[0].device();
            let rotation = Rotation { cos: angles.cos()?.to_device(device)?, sin: angles.sin()?.to_device(device)? };
            let image = x[1].narrow(2, 0, width)?;
            let streams = [
                Stream { qkv: &x[0], query_scale: &x[2], key_scale: &x[3] },
                Stream { qkv: &image, query_scale: &x[3], key_scale: &x[2] },
            ];
            k.heads(&streams, &rotation)
        });
    }
}

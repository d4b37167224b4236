//! Attention.

use candle_core::{DType, Device, Tensor};
use retouch_kernels::{Kernels, Portable};

use crate::{agree, devices, everywhere, random::random};

#[test]
fn attention() {
    // Below, at and above the tiles' sizes (128 queries; 512 keys on the CPU, 32 and 64 on CUDA), and none a multiple of them.
    for (queries, keys, heads, head_dim) in [
        (1, 1, 1, 2),
        (5, 3, 2, 8),
        (130, 515, 2, 32),
        (129, 33, 2, 64),
        (40, 191, 2, 64),
        (130, 136, 2, 64),
        (128, 512, 1, 128),
        (150, 97, 2, 128),
        (300, 1100, 3, 16),
        (64, 70, 1, 512),
    ] {
        let hidden = heads * head_dim;
        let scale = (head_dim as f64).powf(-0.5);
        let inputs = [
            (random((2, queries, heads, head_dim)) * 3.0).unwrap(),
            random((2, keys, heads, head_dim)),
            random((2, keys, heads, head_dim)),
            random((1, heads, queries, keys)),
            random((2, queries, hidden + 5)),
        ];
        let name = format!("attention {queries}x{keys}x{heads}x{head_dim}");
        agree(&name, 5e-6, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], None, scale));
        agree(&format!("{name} with bias"), 5e-6, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], Some(&x[3]), scale));
        // The same for all heads, and no later keys for the first half of the queries.
        let mask = Tensor::from_vec(
            (0..queries * keys)
                .map(|i| if i % keys > i / keys && i / keys < queries / 2 { f64::NEG_INFINITY } else { 0.5 })
                .collect(),
            (1, 1, queries, keys),
            &Device::Cpu,
        );
        let mask = mask.unwrap();
        agree(&format!("{name} with a mask"), 5e-6, &inputs, |k, x| {
            let mask = mask.to_dtype(x[0].dtype())?.to_device(x[0].device())?;
            k.attention(&x[0], &x[1], &x[2], Some(&mask), scale)
        });
        agree(&format!("{name} beside GELU"), 5e-6, &inputs, |k, x| {
            k.attention_beside_gelu(&x[0], &x[1], &x[2], scale, &x[4].narrow(2, 5, hidden)?)
        });
    }
}

#[test]
fn attention_takes_parts_of_a_packed_projection() {
    for head_dim in [16, 64, 128] {
        let inputs = [random((2, 40, 3, 2, head_dim)), random((2, 20, 3 * 2 * head_dim + 64))];
        let scale = (head_dim as f64).powf(-0.5);
        agree("packed attention", 5e-6, &inputs, |k, x| {
            let part = |i: usize| x[0].narrow(2, i, 1)?.squeeze(2);
            k.attention(&part(0)?.narrow(1, 10, 20)?, &part(1)?, &part(2)?, None, scale)
        });
        agree("packed attention beside GELU", 5e-6, &inputs, |k, x| {
            let part = |i: usize| x[0].narrow(2, i, 1)?.squeeze(2);
            let inner = x[1].narrow(2, 6 * head_dim, 64)?;
            k.attention_beside_gelu(&part(0)?.narrow(1, 10, 20)?, &part(1)?, &part(2)?, scale, &inner)
        });
    }
}

#[test]
fn attention_takes_a_bias_as_it_lies() {
    let (tokens, heads, head_dim) = (70, 2, 64);
    let part = || random((2, tokens, heads, head_dim));
    let inputs = [part(), part(), part(), random((1, heads, tokens + 4, tokens + 5))];
    // From pairs of neighbours that begin at a multiple of their size, and from others; in rows and in columns.
    for (row, column) in [(0, 0), (3, 4), (4, 5)] {
        for turned in [false, true] {
            agree(&format!("bias from {row}, {column}, turned {turned}"), 5e-6, &inputs, |k, x| {
                let bias = x[3].narrow(2, row, tokens)?.narrow(3, column, tokens)?;
                let bias = if turned { bias.transpose(2, 3)? } else { bias };
                k.attention(&x[0], &x[1], &x[2], Some(&bias), 0.125)
            });
        }
    }
}

#[test]
fn attention_sees_what_the_mask_leaves_and_nothing_else() {
    // Of every other query whole tiles of the first keys are hidden, of the others such of the last.
    let (queries, keys, heads, head_dim) = (150, 600, 2, 64);
    let hidden = |query: usize, key: usize| if query.is_multiple_of(2) { key < 4 * query } else { key > 4 * query };
    let mask = |hidden: &dyn Fn(usize, usize) -> bool| {
        let mask = (0..queries * keys).map(|i| if hidden(i / keys, i % keys) { f32::NEG_INFINITY } else { 0.0 });
        Tensor::from_vec(mask.collect(), (1, 1, queries, keys), &Device::Cpu).unwrap()
    };
    let inputs = [
        random((2, queries, heads, head_dim)),
        random((2, keys, heads, head_dim)),
        random((2, keys, heads, head_dim)),
        mask(&hidden),
    ];
    agree("masked attention", 5e-6, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], Some(&x[3]), 0.125));
    // A query that sees no key has no result, and no others lose theirs.
    const BLIND: usize = 131;
    let mask = mask(&|query, key| query == BLIND || hidden(query, key));
    for (place, device, kernels) in everywhere() {
        for dtype in [DType::F32, DType::BF16] {
            let on = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(&device).unwrap();
            let y = kernels.attention(&on(&inputs[0]), &on(&inputs[1]), &on(&inputs[2]), Some(&on(&mask)), 0.125);
            let y = y.unwrap().to_dtype(DType::F32).unwrap().to_vec3::<f32>().unwrap();
            for (query, y) in y.iter().flat_map(|image| image.iter().enumerate()) {
                assert!(y.iter().all(|y| y.is_nan() == (query == BLIND)), "query {query} on {place} in {dtype:?}");
            }
        }
    }
}

#[test]
fn attention_survives_scores_that_grow_from_tile_to_tile() {
    // Scores of up to +-1000: without the running maximum their exponentials are infinite. They are rounded to 6e-5, in
    // several steps, and the exponentials with them.
    let keys = 1300;
    let ramp = Tensor::arange(0f32, keys as f32, &Device::Cpu).unwrap().reshape((1, keys, 1, 1)).unwrap();
    let k = ((ramp - 650.0).unwrap() / 650.0).unwrap().broadcast_as((1, keys, 1, 32)).unwrap().contiguous().unwrap();
    let inputs = [(random((1, 9, 1, 32)) * 60.0).unwrap(), k, random((1, keys, 1, 32))];
    agree("attention", 5e-4, &inputs, |k, x| k.attention(&x[0], &x[1], &x[2], None, 1.0));
}

#[test]
fn attention_over_more_scores_than_32_bits_count() {
    let (tokens, heads) = (9500, 24);
    assert!(heads * tokens * tokens > 1 << 31);
    for (place, device, kernels) in devices() {
        // The CPU's test has narrow heads, which make as many scores of less work.
        let (head_dim, dtype, tolerance) =
            if device.is_cpu() { (8, DType::F32, 5e-6) } else { (128, DType::BF16, 2.0 / 256.0) };
        let inputs = [0; 3].map(|_| random((1, tokens, heads, head_dim)).to_dtype(dtype).unwrap());
        let [q, k, v] = [0, 1, 2].map(|i| inputs[i].to_device(&device).unwrap());
        let scale = (head_dim as f64).powf(-0.5);
        let found = kernels.attention(&q, &k, &v, None, scale).unwrap();
        let wide = inputs.map(|x| x.to_dtype(DType::F64).unwrap());
        for query in [0, 4750, tokens - 1] {
            let expected = Portable.attention(&wide[0].narrow(1, query, 1).unwrap(), &wide[1], &wide[2], None, scale);
            let expected = expected.unwrap();
            let found =
                found.narrow(1, query, 1).unwrap().to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
            let largest = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            let difference = largest((found - &expected).unwrap()) / largest(expected);
            // Not `>`: what is no number is wrong.
            assert!(difference <= tolerance, "query {query} on {place}: {difference:e}");
        }
    }
}

//! The VAE's: group norms and convolutions, of whole images and of rows.

use candle_core::{DType, Tensor};
use retouch_kernels::{Kernels, Window};

use crate::{agree, agree_at, agree_in, devices, emulated, random::random};

#[test]
fn group_norm() {
    // The last two are more than a chunk of the CUDA kernel.
    for (channels, groups, height, width) in
        [(4, 2, 3, 5), (8, 8, 1, 1), (6, 1, 16, 16), (32, 4, 7, 9), (4, 2, 70, 72), (2, 1, 67, 71)]
    {
        // A mean far from 0, which a sum of squares in f32 would not survive.
        let inputs = [(random((2, channels, height, width)) + 30.).unwrap(), random(channels), random(channels)];
        for silu in [false, true] {
            let name = format!("group norm {channels} in {groups}, {height}x{width}, SiLU {silu}");
            agree(&name, 2e-5, &inputs, |k, x| k.group_norm(&x[0], &x[1], &x[2], groups, 1e-6, silu));
            if height == 1 {
                continue;
            }
            // The rows of an image in two parts, each by the moments of both.
            agree(&format!("{name}, in parts"), 2e-5, &inputs, |k, x| {
                let (upper, lower) = (x[0].narrow(2, 0, height / 2)?, x[0].narrow(2, height / 2, height.div_ceil(2))?);
                let moments = k.group_moments(&upper, groups)?.and(&k.group_moments(&lower, groups)?);
                let part = |part: &Tensor| k.group_norm_by(part, &moments, &x[1], &x[2], 1e-6, silu);
                Tensor::cat(&[part(&upper)?, part(&lower)?], 2)
            });
        }
    }
}

#[test]
fn rows_of_a_convolution_equal_those_of_the_whole() {
    for window in [Window::Point, Window::Same, Window::Halving, Window::Doubling] {
        let (height, width) = (14, 6);
        let side = window.kernel();
        let inputs = [random((1, 3, height, width)), random((2, 3, side, side)), random(2)];
        for (first, last) in [(0, 0), (0, 3), (1, 1), (2, 4), (3, 6), (5, 6), (0, 6)] {
            agree_at(devices(), &format!("{window:?} {first}..={last}"), 3e-6, &inputs, |k, x| {
                let all = k.conv2d(&x[0], &x[1], &x[2], None, window)?;
                // Only the definition computes in f64: it takes the whole, the device under test the rows alone.
                if x[0].dtype() == DType::F64 {
                    return all.narrow(2, first, last + 1 - first);
                }
                let (rows, before) = window.reach(first..last + 1, height);
                let part = x[0].narrow(2, rows.start, rows.len())?.contiguous()?;
                k.conv2d(&part, &x[1], &x[2], None, window)?.narrow(2, before, last + 1 - first)
            });
        }
    }
}

#[test]
fn conv2d() {
    for window in [Window::Point, Window::Same, Window::Halving, Window::Doubling] {
        for (batch, input, height, width) in [
            (1, 1, 2, 2),
            (2, 3, 4, 6),
            (1, 7, 34, 62),
            (1, 2, 2, 700),
            (1, 2, 700, 2),
            (1, 2, 4, 3000),
            (2, 64, 34, 70),
        ] {
            let (output, side) = (5, window.kernel());
            let scale = ((input * side * side) as f64).powf(-0.5);
            let inputs = [
                random((batch, input, height, width)),
                (random((output, input, side, side)) * scale).unwrap(),
                random(output),
                random((batch, output, window.out_size(height), window.out_size(width))),
            ];
            let name = format!("{window:?} over {batch}x{input}x{height}x{width}");
            let alone = |k: &dyn Kernels, x: &[Tensor]| k.conv2d(&x[0], &x[1], &x[2], None, window);
            let with_residual = |k: &dyn Kernels, x: &[Tensor]| k.conv2d(&x[0], &x[1], &x[2], Some(&x[3]), window);
            // Where products, bias and residual are added one after the other, each sum is rounded, and may be larger than the last.
            let tolerance = [3e-6, 4.0];
            let all = [DType::F32, DType::BF16, DType::F16];
            agree_in(&all, devices(), &name, tolerance, &inputs, alone);
            agree_in(&all, devices(), &name, tolerance, &inputs, with_residual);
            // candle multiplies no bf16 on the CPU.
            let some = [DType::F32, DType::F16];
            agree_in(&some, emulated(), &name, tolerance, &inputs, alone);
            agree_in(&some, emulated(), &name, tolerance, &inputs, with_residual);
        }
    }
}

//! A library beside our kernels (cuDNN) is used where its results agree with theirs, and only there.

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{DType, Result, Tensor};
#[cfg(feature = "cuda")]
use retouch_kernels::cuda::Use;
use retouch_kernels::{Kernels, Window, cuda::Verdict};

#[cfg(feature = "cuda")]
use crate::devices;
use crate::{emulator, random::random};

#[cfg(feature = "cuda")]
#[test]
fn cudnn_agrees_with_our_kernels_where_it_is_found() {
    let inputs = inputs_of_two();
    for (_, device, _) in devices() {
        let Device::Cuda(gpu) = &device else { continue };
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_device(&device).unwrap()).collect();
        for operation in two_operations() {
            operation(retouch_kernels::cuda::with_cudnn(gpu, Use::Always), &inputs).unwrap();
        }
        let status = retouch_kernels::cuda::cudnn_status(gpu, Use::Always);
        // Not `println`, which is shown of failed tests only.
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("cuDNN: {status}\n"));
        assert!(!status.contains("any more"), "{status}");
    }
}

type Operation = fn(&dyn Kernels, &[Tensor]) -> Result<Tensor>;

/// Attention over parts of a packed projection beside GELU, and a convolution, in f16.
fn two_operations() -> [Operation; 2] {
    [
        |k, x| {
            let part = |i: usize| x[0].narrow(2, i, 1)?.squeeze(2);
            k.attention_beside_gelu(&part(0)?.narrow(1, 30, 97)?, &part(1)?, &part(2)?, 0.125, &x[1])
        },
        |k, x| k.conv2d(&x[2], &x[3], &x[4], None, Window::Same),
    ]
}

/// For [`two_operations`].
fn inputs_of_two() -> Vec<Tensor> {
    let inputs =
        [random((1, 150, 3, 3, 128)), random((1, 97, 56)), random((1, 24, 19, 33)), random((7, 24, 3, 3)), random(7)];
    inputs.iter().map(|x| x.to_dtype(DType::F16).unwrap()).collect()
}

fn bits(x: &Tensor) -> Vec<u16> {
    x.flatten_all().unwrap().to_vec1::<half::f16>().unwrap().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_library_is_used_once_its_results_agree_with_ours() {
    let Some((_, gpu)) = emulator::gpus().first() else { return };
    let x = inputs_of_two();
    let gpu = gpu.0.with_planner(None);
    for (i, operation) in two_operations().iter().enumerate() {
        let first = operation(&gpu, &x).unwrap();
        let (ran, verdicts) = gpu.0.planned();
        // Rows at the beginning, in the middle and at the end.
        assert_eq!((ran.len(), &verdicts[3 * i..]), (2 * i + 1, &[Verdict::Agrees; 3][..]));
        let launched = gpu.0.log().len();
        let second = operation(&gpu, &x).unwrap();
        let (ran, verdicts) = gpu.0.planned();
        assert_eq!((ran.len(), verdicts.len()), (2 * i + 2, 3 * i + 3), "compared once");
        let again = gpu.0.log().split_off(launched);
        assert_eq!(again, if i == 0 { vec!["gelu_rows_f16"] } else { vec![] }, "nothing but GELU is ours");
        assert_eq!(bits(&first), bits(&second));
    }
}

#[test]
fn a_library_that_is_wrong_anywhere_is_not_used() {
    let Some((_, ours)) = emulator::gpus().first() else { return };
    let x = inputs_of_two();
    // A head that is exchanged with its neighbour, or a channel; one channel or column too large; nothing written; no numbers.
    let distortions: [fn(&Tensor) -> Result<Tensor>; 4] = [
        |y| if y.rank() == 3 { y.roll(128, 2) } else { y.roll(1, 1) },
        |y| {
            let (axis, size) = if y.rank() == 3 { (2, 128) } else { (1, 1) };
            Tensor::cat(&[(y.narrow(axis, 0, size)? * 1.25)?, y.narrow(axis, size, y.dim(axis)? - size)?], axis)
        },
        |y| y.zeros_like(),
        |y| y * f64::NAN,
    ];
    for (i, distortion) in distortions.into_iter().enumerate() {
        for operation in two_operations() {
            let gpu = ours.0.with_planner(Some(distortion));
            let expected = bits(&operation(ours, &x).unwrap());
            assert_eq!(bits(&operation(&gpu, &x).unwrap()), expected, "distortion {i}");
            let (ran, verdicts) = gpu.0.planned();
            assert!(matches!(verdicts.last(), Some(Verdict::Differs(_))), "distortion {i}: {verdicts:?}");
            assert_eq!(bits(&operation(&gpu, &x).unwrap()), expected, "distortion {i}");
            assert_eq!(gpu.0.planned().0.len(), ran.len(), "it is not asked again");
        }
    }
}

#[test]
fn what_is_no_number_proves_nothing_about_a_library() {
    let Some((_, gpu)) = emulator::gpus().first() else { return };
    let gpu = gpu.0.with_planner(None);
    let mut x = inputs_of_two();
    for x in &mut x {
        *x = (&*x * f64::NAN).unwrap();
    }
    for operation in two_operations() {
        operation(&gpu, &x).unwrap();
    }
    assert_eq!(gpu.0.planned().1, [Verdict::Unknown; 6]);
}

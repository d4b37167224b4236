//! cuDNN 9, where it is installed: attention of the FlashAttention-3 class on Hopper and its successors, for which it has kernels
//! that use their asynchronous matrix products, and convolutions that gather no windows in memory.
//!
//! The library is optional. It is looked for when the first task comes that is worth it; where it is missing, too old or refuses,
//! our own kernels compute, and where a result of its differs from ours, it is not used again.
//!
//! A task becomes an operation (`graph`), cuDNN's heuristics recommend engines for that, and the first that will do becomes a
//! plan (`plan`), kept for the next task like it (`ledger`).

mod descriptor;
mod graph;
mod ledger;
mod library;
mod numbers;
mod plan;

#[cfg(test)]
mod deviceless;
#[cfg(feature = "cuda")]
mod gpu;

#[cfg(feature = "cuda")]
pub use gpu::Cudnn;

use super::tasks::Task;

/// When cuDNN is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    Never,
    /// For tasks that it is expected to compute faster, if a plan's making is counted too.
    WhereFaster,
    /// For all that it can compute, as checks and benches need it.
    Always,
}

/// Floating-point operations from which on attention is worth a plan: that of FLUX.1 over 8,600 tokens, as an image of a megapixel
/// has with a reference.
///
/// cuDNN compiles the kernels of a plan, which takes 0.86 s (`scripts/cudnn-check.sh`). A plan is for the blocks of one kind, some
/// 500 or 1,000 calls in 28 steps. At 350 and 600 TFLOP/s, what FlashAttention-3's paper lets expect of its predecessor (35 % of an
/// H100's rate) and of itself (up to 75 %), the first image has then gained what both plans have cost, and all others have it for nothing.
const ATTENTION: f64 = 9e11;

/// The same for convolutions, whose kernels are compiled already; also what a small model alone does not load the library for.
const CONVOLUTION: f64 = (1u64 << 32) as f64;

/// Whether cuDNN is expected to be faster than what is here, on GPUs of a compute capability. It is decided by the task alone, so that
/// the same edit is computed the same way each time.
///
/// Of convolutions that holds for every GPU: ours gather the windows of all pixels first. Of attention it holds for 9.0 to 11.x:
/// their tensor cores are only fast with instructions that our kernel, made for 8.0, does not have; 12.x has not got them either.
/// Attention of some of the tokens alone is that of a step's last block, too rare for a plan, and of larger heads that of the VAE.
fn expected_faster(task: &Task, (major, _): (i32, i32)) -> bool {
    match task {
        Task::Convolution(_) => task.work() >= CONVOLUTION,
        Task::Attention(attention) => {
            let of_a_block = attention.queries == attention.keys && attention.head_dim <= 128;
            (9..12).contains(&major) && of_a_block && task.work() >= ATTENTION
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tasks::{Attention, Convolution},
        *,
    };
    use candle_core::DType;

    #[test]
    fn it_is_asked_for_what_it_is_expected_to_do_faster() {
        let attention = |[queries, keys]: [usize; 2], heads: usize, head_dim: usize| {
            let row = (heads * head_dim) as i64;
            let strides = [[keys as i64 * row, row, head_dim as i64]; 4];
            let (dtype, batch, scale) = (DType::BF16, 1, 0);
            Task::Attention(Attention { dtype, batch, heads, queries, keys, head_dim, strides, scale })
        };
        // FLUX.1 at 1024x1024 with a reference: on a Hopper or Blackwell of a data centre.
        let flux = attention([8704; 2], 24, 128);
        let asked = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)].map(|capability| expected_faster(&flux, capability));
        assert_eq!(asked, [false, false, true, true, false]);
        for too_little in
            [attention([2560; 2], 24, 128), attention([4096, 8704], 24, 128), attention([16384; 2], 1, 512)]
        {
            assert!(!expected_faster(&too_little, (9, 0)), "{too_little:?}");
        }
        let convolution = |channels: usize, side: usize| {
            let (dtype, batch, kernel, stride) = (DType::BF16, 1, 3, 1);
            let (outputs, height, width) = (channels, side, side);
            let (rows, columns) = ([1, 1], [1, 1]);
            Task::Convolution(Convolution {
                dtype,
                batch,
                channels,
                height,
                width,
                outputs,
                kernel,
                stride,
                rows,
                columns,
            })
        };
        assert!(expected_faster(&convolution(128, 1024), (8, 0)) && !expected_faster(&convolution(32, 128), (9, 0)));
    }
}

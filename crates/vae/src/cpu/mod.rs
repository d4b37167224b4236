//! The two operations in which the autoencoder spends its time, for f32 on the CPU, where candle's own take several
//! times as long: convolutions (by tiles, with bias and residual added in the same pass) and group normalisation
//! (fused with the SiLU that follows it).

mod conv;
mod norm;

pub use conv::conv2d;
pub use norm::group_norm;

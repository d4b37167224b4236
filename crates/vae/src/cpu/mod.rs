//! The two operations in which the autoencoder spends its time, for f32 on the CPU, where candle's own take several
//! times as long: convolutions (by tiles, with bias and residual added in the same pass) and group normalisation
//! (fused with the SiLU that follows it).
//!
//! Both give the same bits on every x86 machine and for any number of threads: the vector width changes how many
//! elements are computed at once, never the order of additions within one.

mod conv;
mod norm;

pub use conv::conv2d;
pub use norm::group_norm;

//! What both encoders share.

use candle_core::{DType, Module, Result, Tensor, bail};

/// The ids of each text, read to the host and checked: candle's CUDA kernel does not check them.
pub fn checked_ids(ids: &Tensor, vocabulary: usize) -> Result<Vec<Vec<u32>>> {
    let ids = ids.to_dtype(DType::U32)?.to_vec2::<u32>()?;
    if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= vocabulary) {
        bail!(
            "token {id} is outside the text encoder's vocabulary of {vocabulary}; \
             its tokenizer must be that of the same model"
        )
    }
    Ok(ids)
}

/// Applies a normalisation whose parameters are f32, whatever the dtype of `x`; returns that of `x`.
///
/// The reference takes mean and variance in f32; candle's own in half precision rounds them on the CPU.
pub fn normalise(norm: &impl Module, x: &Tensor) -> Result<Tensor> {
    norm.forward(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype())
}

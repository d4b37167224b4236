//! Tasks as cuDNN's operations on tensors.

use candle_core::DType;

use super::{
    super::tasks::{Attention, Convolution, Task},
    descriptor::{Address, ConvolutionMode, DataType, Descriptor},
    library::Library,
    numbers::*,
};

/// Bytes of which every tensor's address and strides are a multiple, as attention needs it; what is not so aligned is not
/// cuDNN's to compute.
pub const ALIGNMENT: u64 = 16;

/// A task's operation. Its tensors' numbers count from 1: queries, keys, values, result and scale; image, weights and result.
pub fn operation(library: &'static Library, task: &Task) -> Result<Descriptor, String> {
    match task {
        Task::Attention(task) => attention(library, task),
        Task::Convolution(task) => convolution(library, task),
    }
}

/// The memory of an operation's tensors, in the order of their numbers, and of the engine that computes it.
pub fn memory(library: &'static Library, tensors: &[Address], workspace: Address) -> Result<Descriptor, String> {
    let numbers: Vec<i64> = (1..=tensors.len() as i64).collect();
    Descriptor::new(library, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
        .with(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &numbers)?
        .with(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, tensors)?
        .with(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[workspace])?
        .finished()
}

/// Accumulated in f32; cuDNN names axes batch, head, token, channel in this order, and strides say how they lie.
fn attention(library: &'static Library, task: &Attention) -> Result<Descriptor, String> {
    let Attention { dtype, batch, heads, queries, keys, head_dim, strides, .. } = *task;
    let operand = |number: i64, tokens: usize| {
        let sizes = [batch, heads, tokens, head_dim].map(|size| size as i64);
        let [of_batch, of_token, of_head] = strides[number as usize - 1];
        tensor(library, number, dtype, &sizes, &[of_batch, of_head, of_token, 1])?.finished()
    };
    let scale = tensor(library, 5, DType::F32, &[1; 4], &[1; 4])?;
    let scale = scale.with(CUDNN_ATTR_TENSOR_IS_BY_VALUE, &[true])?.finished()?;
    Descriptor::new(library, CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR)?
        .made_of(CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, operand(1, queries)?)?
        .made_of(CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC, operand(2, keys)?)?
        .made_of(CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC, operand(3, keys)?)?
        .made_of(CUDNN_ATTR_OPERATION_SDPA_FWD_ODESC, operand(4, queries)?)?
        .made_of(CUDNN_ATTR_OPERATION_SDPA_FWD_SCALEDESC, scale)?
        .finished()
}

fn convolution(library: &'static Library, task: &Convolution) -> Result<Descriptor, String> {
    let packed = |number: i64, sizes: [usize; 4]| {
        let [a, b, c, d] = sizes.map(|size| size as i64);
        tensor(library, number, task.dtype, &[a, b, c, d], &[b * c * d, c * d, d, 1])?.finished()
    };
    let side = |before_or_after: usize| [task.rows, task.columns].map(|zeros| zeros[before_or_after] as i64);
    let [height, width] = task.out_size();
    let how = Descriptor::new(library, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
        .with(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, &[DataType(CUDNN_DATA_FLOAT)])?
        .with(CUDNN_ATTR_CONVOLUTION_CONV_MODE, &[ConvolutionMode(CUDNN_CROSS_CORRELATION)])?
        .with(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2i64])?
        .with(CUDNN_ATTR_CONVOLUTION_DILATIONS, &[1i64; 2])?
        .with(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, &[task.stride as i64; 2])?
        .with(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &side(0))?
        .with(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &side(1))?
        .finished()?;
    let Convolution { batch, channels, outputs, kernel, .. } = *task;
    Descriptor::new(library, CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR)?
        .made_of(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, how)?
        .made_of(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, packed(1, [batch, channels, task.height, task.width])?)?
        .made_of(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, packed(2, [outputs, channels, kernel, kernel])?)?
        .made_of(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, packed(3, [batch, outputs, height, width])?)?
        .with(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, &[1f32])?
        .with(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, &[0f32])?
        .finished()
}

/// A tensor that is not finished yet.
fn tensor(
    library: &'static Library,
    number: i64,
    dtype: DType,
    sizes: &[i64],
    strides: &[i64],
) -> Result<Descriptor, String> {
    let dtype = match dtype {
        DType::F32 => CUDNN_DATA_FLOAT,
        DType::F16 => CUDNN_DATA_HALF,
        DType::BF16 => CUDNN_DATA_BFLOAT16,
        other => return Err(format!("{other:?} is not asked of it")),
    };
    Descriptor::new(library, CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
        .with(CUDNN_ATTR_TENSOR_UNIQUE_ID, &[number])?
        .with(CUDNN_ATTR_TENSOR_DATA_TYPE, &[DataType(dtype)])?
        .with(CUDNN_ATTR_TENSOR_DIMENSIONS, sizes)?
        .with(CUDNN_ATTR_TENSOR_STRIDES, strides)?
        .with(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[ALIGNMENT as i64])
}

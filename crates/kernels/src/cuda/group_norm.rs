//! Group normalisation: kernels/group_norm.cu.

use candle_core::{DType, Result, Tensor};

use super::{Gpu, Launch, MOST_BLOCKS, Params, wide};
use crate::Moments;

#[repr(C)]
#[derive(Default)]
struct GroupNorm {
    x: u64,
    weight: u64,
    bias: u64,
    means: u64,
    squares: u64,
    y: u64,
    image_stride: i64,
    channel_stride: i64,
    channels: i64,
    plane: i64,
    group: i64,
    chunk: i64,
    chunks: i64,
    measured: i64,
    part: i64,
    parts: i64,
    wide: i64,
    silu: i64,
    epsilon: f64,
}

// SAFETY: group_norm.cu, `struct GroupNorm`.
unsafe impl Params for GroupNorm {}

/// Elements of a chunk, at least: enough that a block's sums cost little beside its reads. A multiple of every load.
const CHUNK: usize = 8192;
/// Chunks of a group, at most: a thread of a block for each when they are put together.
const CHUNKS: usize = 256;

pub fn group_norm(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    let Some(images) = Images::of(gpu, x, groups)? else { return Ok(None) };
    let Some(vectors) = images.vectors(weight, bias)? else { return Ok(None) };
    let sums = images.measure(gpu)?;
    let measured = Measured { sums: &sums, values: images.group, part: images.chunk, parts: images.chunks };
    images.apply(gpu, measured, &vectors, epsilon, silu).map(Some)
}

pub fn group_moments(gpu: &impl Gpu, x: &Tensor, groups: usize) -> Result<Option<Moments>> {
    let Some(images) = Images::of(gpu, x, groups)? else { return Ok(None) };
    let sums = images.measure(gpu)?.to_vec3::<f32>()?; // [means and squares, groups of all images, chunks]
    let [means, squares] = &sums[..] else { return Ok(None) };
    let chunks = (0..images.chunks).map(|i| {
        let count = images.chunk.min(images.group - i * images.chunk) as f64;
        let groups = means.iter().zip(squares).map(|(means, squares)| (means[i].into(), f64::from(squares[i]) / count));
        Moments { count, groups: groups.collect() }
    });
    Ok(chunks.reduce(|sum, chunk| sum.and(&chunk)))
}

pub fn group_norm_by(
    gpu: &impl Gpu,
    x: &Tensor,
    moments: &Moments,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    let batch = x.dim(0)?.max(1);
    if !moments.groups.len().is_multiple_of(batch) {
        return Ok(None);
    }
    let Some(images) = Images::of(gpu, x, moments.groups.len() / batch)? else { return Ok(None) };
    let Some(vectors) = images.vectors(weight, bias)? else { return Ok(None) };
    // As if each group were one value, whose mean and squared difference these are.
    let (means, variances): (Vec<f32>, Vec<f32>) = moments.groups.iter().map(|&(m, v)| (m as f32, v as f32)).unzip();
    let sums = Tensor::from_vec([means, variances].concat(), (2, moments.groups.len(), 1), x.device())?;
    let measured = Measured { sums: &sums, values: 1, part: 1, parts: 1 };
    images.apply(gpu, measured, &vectors, epsilon, silu).map(Some)
}

/// Images as the kernels see them.
struct Images {
    /// `[batch, channels, height, width]`, each channel's elements neighbours.
    x: Tensor,
    address: u64,
    image_stride: usize,
    channel_stride: usize,
    channels: usize,
    /// Elements of a channel.
    plane: usize,
    /// Groups of all images.
    groups: usize,
    /// Elements of a group.
    group: usize,
    /// Elements of a group that a block takes.
    chunk: usize,
    /// Chunks of a group.
    chunks: usize,
}

/// What was measured of each group of channels: of `parts` parts that have `part` of its `values` values each, the last one fewer.
struct Measured<'a> {
    /// Means, then sums of squared differences from them: `[2, groups of all images, parts]` in f32.
    sums: &'a Tensor,
    values: usize,
    part: usize,
    parts: usize,
}

impl Images {
    /// None if the kernels do not take them. Rows of larger images are taken where they are.
    fn of(gpu: &impl Gpu, x: &Tensor, groups: usize) -> Result<Option<Self>> {
        let (batch, channels, height, width) = x.dims4()?;
        if wide(x.dtype()).is_none() || groups == 0 || channels % groups != 0 || x.elem_count() == 0 {
            return Ok(None);
        }
        let (plane, all_groups) = (height * width, batch * groups);
        let group = channels / groups * plane;
        let chunk = CHUNK * group.div_ceil(CHUNK * CHUNKS);
        let chunks = group.div_ceil(chunk);
        if group >= 1 << 31 || all_groups * chunks > MOST_BLOCKS {
            return Ok(None);
        }
        let neighbours = (width == 1 || x.stride()[3] == 1) && (height == 1 || x.stride()[2] == width);
        let x = if neighbours { x.clone() } else { x.contiguous()? };
        let stride = |axis: usize| if x.dims()[axis] > 1 { x.stride()[axis] } else { 0 };
        let (address, image_stride, channel_stride) = (gpu.address(&x)?, stride(0), stride(1));
        let groups = all_groups;
        Ok(Some(Self { x, address, image_stride, channel_stride, channels, plane, groups, group, chunk, chunks }))
    }

    /// A scale and a shift per channel; none if they do not fit.
    fn vectors(&self, weight: &Tensor, bias: &Tensor) -> Result<Option<[Tensor; 2]>> {
        let fits = |vector: &&Tensor| vector.dtype() == self.x.dtype() && vector.dims() == [self.channels];
        if ![weight, bias].iter().all(fits) {
            return Ok(None);
        }
        Ok(Some([weight.contiguous()?, bias.contiguous()?]))
    }

    /// What [`Measured::sums`] are of the chunks.
    fn measure(&self, gpu: &impl Gpu) -> Result<Tensor> {
        let sums = gpu.uninitialised((2, self.groups, self.chunks).into(), DType::F32, self.x.device())?;
        let params = self.params(gpu, &sums)?;
        self.launch(gpu, "group_norm_measure", &[&self.x], &sums, params)?;
        Ok(sums)
    }

    fn apply(
        &self,
        gpu: &impl Gpu,
        measured: Measured<'_>,
        [weight, bias]: &[Tensor; 2],
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        let y = gpu.uninitialised(self.x.shape().clone(), self.x.dtype(), self.x.device())?;
        let params = GroupNorm {
            weight: gpu.address(weight)?,
            bias: gpu.address(bias)?,
            y: gpu.address(&y)?,
            measured: measured.values as i64,
            part: measured.part as i64,
            parts: measured.parts as i64,
            silu: silu.into(),
            epsilon,
            ..self.params(gpu, measured.sums)?
        };
        self.launch(gpu, "group_norm_apply", &[&self.x, weight, bias, measured.sums], &y, params)?;
        Ok(y)
    }

    /// What both kernels take.
    fn params(&self, gpu: &impl Gpu, sums: &Tensor) -> Result<GroupNorm> {
        let means = gpu.address(sums)?;
        Ok(GroupNorm {
            x: self.address,
            means,
            squares: means + (sums.elem_count() / 2 * size_of::<f32>()) as u64,
            image_stride: self.image_stride as i64,
            channel_stride: self.channel_stride as i64,
            channels: self.channels as i64,
            plane: self.plane as i64,
            group: self.group as i64,
            chunk: self.chunk as i64,
            chunks: self.chunks as i64,
            ..GroupNorm::default()
        })
    }

    fn launch(&self, gpu: &impl Gpu, kernel: &str, reads: &[&Tensor], write: &Tensor, params: GroupNorm) -> Result<()> {
        let dtype = self.x.dtype();
        let whole = |count: usize| wide(dtype).is_some_and(|wide| count.is_multiple_of(wide));
        let wide = [self.plane, self.image_stride, self.channel_stride].into_iter().all(whole)
            && (params.x | params.y).is_multiple_of(16);
        let blocks = [self.groups * self.chunks, 1, 1];
        let launch = Launch {
            file: "group_norm",
            kernel,
            dtype,
            blocks,
            threads: 256,
            shared_memory: 0,
            reads,
            packed: None,
            writes: &[write],
        };
        gpu.launch(&launch, &GroupNorm { wide: wide.into(), ..params })
    }
}

//! Where the time of an edit goes, operation by operation.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use candle_core::{D, DType, Device, Result, Tensor};

use crate::{Activation, Fp8Rows, Kernels, Moments, Packed, Rotation, Stream, Window, for_device};

/// What is told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Linear,
    Attention,
    Convolution,
    ModulatedNorm,
    Heads,
    GatedResidual,
    GatedGelu,
    GroupNorm,
}

impl Display for Operation {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Linear => "linear",
            Self::Attention => "attention",
            Self::Convolution => "convolution",
            Self::ModulatedNorm => "modulated norm",
            Self::Heads => "heads",
            Self::GatedResidual => "gated residual",
            Self::GatedGelu => "gated GELU",
            Self::GroupNorm => "group norm",
        })
    }
}

/// All calls of an operation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Total {
    pub calls: u64,
    pub time: Duration,
    /// Floating-point operations of matrix products (a multiplication and an addition count as two); none of elementwise work.
    pub flops: f64,
    /// What must at least be read and written: inputs and outputs, each once.
    pub bytes: f64,
}

/// A device's kernels with a clock around each.
///
/// It waits for the device after every operation, so that a GPU is never ahead of the program: the whole takes longer than
/// without a profile, the single operations do not.
#[derive(Debug)]
pub struct Profiled {
    inner: &'static dyn Kernels,
    device: Device,
    totals: Mutex<BTreeMap<Operation, Total>>,
}

impl Profiled {
    /// Kept for good, as all kernels are: one for an engine.
    pub fn for_device(device: &Device) -> &'static Self {
        Box::leak(Box::new(Self {
            inner: for_device(device),
            device: device.clone(),
            totals: Mutex::new(BTreeMap::new()),
        }))
    }

    /// What was done since the last call.
    pub fn take(&self) -> BTreeMap<Operation, Total> {
        std::mem::take(&mut *self.totals())
    }

    /// The fastest that this device multiplies matrices in `dtype`, in floating-point operations per second: the best of
    /// several runs of linear layers of FLUX.1's width; with `fp8` also of those in 8-bit floats.
    pub fn peak_flops(&self, dtype: DType, fp8: bool) -> Result<f64> {
        const WIDTH: usize = 3072;
        // A GPU needs long ones to be at its best, and several in a row, since to start one and to wait for it takes time as
        // well; the CPU's cores would be at them for seconds.
        let (rows, in_a_row) = if self.device.is_cpu() { (1024, 1) } else { (8192, 8) };
        // Of zeros there is less to switch, and a GPU's clock is higher.
        let random = |rows| Tensor::randn(0f32, 1f32, (rows, WIDTH), &self.device)?.to_dtype(dtype);
        let (x, weight) = (random(rows)?, random(WIDTH)?);
        let rounded = if fp8 { Some(self.inner.quantise_rows(&weight)?) } else { None };
        let mut best = f64::INFINITY;
        let mut measure = |run: &dyn Fn() -> Result<Tensor>| -> Result<()> {
            self.device.synchronize()?;
            let start = Instant::now();
            for _ in 0..in_a_row {
                run()?;
            }
            self.device.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64() / f64::from(in_a_row));
            Ok(())
        };
        for _ in 0..5 {
            measure(&|| self.inner.linear(&x, &weight, None, Activation::None))?;
            if let Some(weight) = &rounded {
                measure(&|| self.inner.linear_fp8(&x, weight, None, Activation::None))?;
            }
        }
        Ok(2.0 * (rows * WIDTH * WIDTH) as f64 / best)
    }

    fn totals(&self) -> MutexGuard<'_, BTreeMap<Operation, Total>> {
        // Sums stay sums, whatever happened to who held them.
        self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(
        &self,
        operation: Operation,
        flops: f64,
        inputs: &[&Tensor],
        run: impl FnOnce(&dyn Kernels) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let output = self.clock_reading(operation, flops, inputs, run)?;
        self.totals().entry(operation).or_default().bytes += bytes(&output);
        Ok(output)
    }

    /// An operation that writes next to nothing.
    fn clock_reading<T>(
        &self,
        operation: Operation,
        flops: f64,
        inputs: &[&Tensor],
        run: impl FnOnce(&dyn Kernels) -> Result<T>,
    ) -> Result<T> {
        self.device.synchronize()?;
        let start = Instant::now();
        let output = run(self.inner)?;
        self.device.synchronize()?;
        let time = start.elapsed();
        let mut totals = self.totals();
        let total = totals.entry(operation).or_default();
        total.calls += 1;
        total.time += time;
        total.flops += flops;
        total.bytes += inputs.iter().copied().map(bytes).sum::<f64>();
        Ok(output)
    }
}

fn bytes(x: &Tensor) -> f64 {
    (x.elem_count() * x.dtype().size_in_bytes()) as f64
}

/// Of both products of attention.
fn attention_flops(q: &Tensor, k: &Tensor) -> Result<f64> {
    Ok(4.0 * q.elem_count() as f64 * k.dim(1)? as f64)
}

impl Kernels for Profiled {
    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        let flops = 2.0 * x.elem_count() as f64 * weight.dim(0)? as f64;
        self.clock(Operation::Linear, flops, &[x, weight], |k| k.linear(x, weight, bias, activation))
    }

    fn linear_packed(
        &self,
        x: &Tensor,
        weight: &Packed,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        let flops = 2.0 * x.elem_count() as f64 * weight.rows() as f64;
        let run = |k: &dyn Kernels| k.linear_packed(x, weight, bias, activation);
        let output = self.clock(Operation::Linear, flops, &[x], run)?;
        self.totals().entry(Operation::Linear).or_default().bytes += weight.bytes() as f64;
        Ok(output)
    }

    fn dequantise(&self, weight: &Packed, dtype: DType) -> Result<Tensor> {
        self.inner.dequantise(weight, dtype)
    }

    fn quantise_rows(&self, x: &Tensor) -> Result<Fp8Rows> {
        self.inner.quantise_rows(x)
    }

    fn linear_fp8(
        &self,
        x: &Tensor,
        weight: &Fp8Rows,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        let flops = 2.0 * x.elem_count() as f64 * weight.codes.dim(0)? as f64;
        let inputs = [x, &weight.codes, &weight.scales];
        self.clock(Operation::Linear, flops, &inputs, |k| k.linear_fp8(x, weight, bias, activation))
    }

    fn modulated_norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        self.clock(Operation::ModulatedNorm, 0.0, &[x], |k| k.modulated_norm(x, shift, scale))
    }

    fn gated_residual(&self, x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
        self.clock(Operation::GatedResidual, 0.0, &[x, y], |k| k.gated_residual(x, y, gate))
    }

    fn heads(&self, streams: &[Stream<'_>], rotation: &Rotation) -> Result<Tensor> {
        let inputs: Vec<_> = streams.iter().map(|stream| stream.qkv).collect();
        self.clock(Operation::Heads, 0.0, &inputs, |k| k.heads(streams, rotation))
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        let flops = attention_flops(q, k)?;
        self.clock(Operation::Attention, flops, &[q, k, v], |inner| inner.attention(q, k, v, bias, scale))
    }

    fn attention_beside_gelu(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, inner: &Tensor) -> Result<Tensor> {
        let flops = attention_flops(q, k)?;
        let run = |kernels: &dyn Kernels| kernels.attention_beside_gelu(q, k, v, scale, inner);
        self.clock(Operation::Attention, flops, &[q, k, v, inner], run)
    }

    fn gated_gelu(&self, gate: &Tensor, value: &Tensor) -> Result<Tensor> {
        self.clock(Operation::GatedGelu, 0.0, &[gate, value], |k| k.gated_gelu(gate, value))
    }

    fn group_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        self.clock(Operation::GroupNorm, 0.0, &[x], |k| k.group_norm(x, weight, bias, groups, epsilon, silu))
    }

    fn group_moments(&self, x: &Tensor, groups: usize) -> Result<Moments> {
        self.clock_reading(Operation::GroupNorm, 0.0, &[x], |k| k.group_moments(x, groups))
    }

    fn group_norm_by(
        &self,
        x: &Tensor,
        moments: &Moments,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        let run = |k: &dyn Kernels| k.group_norm_by(x, moments, weight, bias, epsilon, silu);
        self.clock(Operation::GroupNorm, 0.0, &[x], run)
    }

    fn conv2d(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        residual: Option<&Tensor>,
        window: Window,
    ) -> Result<Tensor> {
        let (out, _, _, _) = weight.dims4()?;
        let outputs = x.dim(0)? * out * window.out_size(x.dim(2)?) * window.out_size(x.dim(D::Minus1)?);
        let flops = 2.0 * outputs as f64 * (weight.elem_count() / out) as f64;
        let run = |k: &dyn Kernels| k.conv2d(x, weight, bias, residual, window);
        self.clock(Operation::Convolution, flops, &[x, weight], run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted_and_computed() -> Result<()> {
        let profiled = Profiled::for_device(&Device::Cpu);
        let x = Tensor::ones((1, 5, 8), DType::F32, &Device::Cpu)?;
        let weight = Tensor::ones((16, 8), DType::F32, &Device::Cpu)?;
        let y = profiled.linear(&x, &weight, None, Activation::None)?;
        assert_eq!(y.to_vec3::<f32>()?, vec![vec![vec![8f32; 16]; 5]]);
        let q = y.reshape((1, 5, 2, 8))?;
        profiled.attention(&q, &q, &q, None, 1.0)?;
        profiled.attention(&q.narrow(1, 0, 2)?, &q, &q, None, 1.0)?;
        let totals = profiled.take();
        let linear = totals[&Operation::Linear];
        assert_eq!((linear.calls, linear.flops), (1, f64::from(2 * 5 * 8 * 16)));
        assert_eq!(linear.bytes, f64::from(4 * (5 * 8 + 8 * 16 + 5 * 16)));
        let attention = totals[&Operation::Attention];
        assert_eq!((attention.calls, attention.flops), (2, f64::from(2 * 2 * (5 + 2) * 5 * 16)));
        assert!(profiled.take().is_empty());
        Ok(())
    }

    #[test]
    fn a_norm_in_bands_is_counted_with_what_finds_its_moments() -> Result<()> {
        let profiled = Profiled::for_device(&Device::Cpu);
        let x = Tensor::ones((1, 4, 2, 3), DType::F32, &Device::Cpu)?;
        let weight = Tensor::ones(4, DType::F32, &Device::Cpu)?;
        let moments = profiled.group_moments(&x, 2)?;
        profiled.group_norm_by(&x, &moments, &weight, &weight, 1e-6, true)?;
        let total = profiled.take()[&Operation::GroupNorm];
        assert_eq!((total.calls, total.bytes), (2, f64::from(4 * 24 * 3)));
        Ok(())
    }

    #[test]
    fn a_convolution_counts_the_weights_of_each_output() -> Result<()> {
        let profiled = Profiled::for_device(&Device::Cpu);
        let x = Tensor::ones((1, 3, 4, 6), DType::F32, &Device::Cpu)?;
        let weight = Tensor::ones((5, 3, 3, 3), DType::F32, &Device::Cpu)?;
        let bias = Tensor::zeros(5, DType::F32, &Device::Cpu)?;
        profiled.conv2d(&x, &weight, &bias, None, Window::Doubling)?;
        assert_eq!(profiled.take()[&Operation::Convolution].flops, f64::from(2 * (8 * 12 * 5) * (3 * 9)));
        Ok(())
    }
}

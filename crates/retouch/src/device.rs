//! Where and in which precision to compute.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device};

use crate::{Error, Result};

/// The device asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// CUDA if this build has it and a GPU answers, else Metal likewise, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The CUDA device of that number.
    Cuda(usize),
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            _ => s
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("`{s}` is no device; use auto, cpu, cuda, cuda:N or metal")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device; says which one it is.
    pub(crate) fn open(self) -> Result<(Device, DeviceChoice)> {
        let failed = |reason: String| Error::Device { device: self.to_string(), reason };
        match self {
            Self::Auto => [Self::Cuda(0), Self::Metal]
                .iter()
                .find_map(|choice| choice.open().ok())
                .map_or_else(|| Self::Cpu.open(), Ok),
            Self::Cpu => Ok((Device::Cpu, self)),
            #[cfg(feature = "cuda")]
            Self::Cuda(n) => retouch_kernels::cuda::open(n).map(|device| (device, self)).map_err(failed),
            #[cfg(not(feature = "cuda"))]
            Self::Cuda(_) => {
                Err(failed("this build has no CUDA support; build with `--features cuda`, or use --device cpu".into()))
            }
            Self::Metal if !candle_core::utils::metal_is_available() => Err(failed(
                "this build has no Metal support; build with `--features metal`, or use --device cpu".into(),
            )),
            Self::Metal => Device::new_metal(0).map(|device| (device, self)).map_err(|e| failed(e.to_string())),
        }
    }
}

/// What is computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
    F16,
    /// bf16, and 8-bit floats in the products of the transformer's blocks: e4m3, each row of weights and of activations with a
    /// scale, added up in f32.
    Fp8,
}

impl Precision {
    /// bf16 on a GPU, f32 on the CPU.
    pub(crate) fn default_for(device: &Device) -> Self {
        if device.is_cpu() { Self::F32 } else { Self::Bf16 }
    }

    /// The dtype of activations, and of weights where there is nothing else.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 | Self::Fp8 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "fp8" => Ok(Self::Fp8),
            _ => Err(format!("`{s}` is no dtype; use f32, bf16, f16 or fp8")),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
        })
    }
}

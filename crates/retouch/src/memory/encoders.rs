//! Where the text encoders compute, and which place is the faster one.

use std::{fmt, str::FromStr};

use super::{Budget, ModelMemory, Work};

/// Where the text encoders are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoders {
    /// On the device of all other parts.
    Device,
    /// On the CPU, in f32; what they make goes to the device.
    Cpu,
}

impl FromStr for Encoders {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "device" => Ok(Self::Device),
            "cpu" => Ok(Self::Cpu),
            _ => Err(format!("`{s}` is no place for text encoders; use device or cpu")),
        }
    }
}

impl fmt::Display for Encoders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Cpu => "cpu",
        })
    }
}

/// What differs by where the text encoders are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ByPlace<T> {
    pub on_device: T,
    pub on_cpu: T,
}

impl<T> ByPlace<T> {
    pub fn at(&self, place: Encoders) -> &T {
        match place {
            Encoders::Device => &self.on_device,
            Encoders::Cpu => &self.on_cpu,
        }
    }
}

/// Floating-point operations of T5 in a second of a core: two of its layers over 512 tokens, 395 billion of them, take two
/// cores 2.3 s (benches/results/2026-11-23-cpu-blocks.md).
const CORE: f64 = 85e9;

/// Bytes in a second from mapped files to a GPU: of files that stay in the system's memory, half of what a PCIe 4 slot can do;
/// of others, what a good disk does.
const FROM_MEMORY: f64 = 10e9;
const FROM_DISK: f64 = 2e9;

impl ModelMemory {
    /// Whether the CPU encodes the texts of an edit sooner than the device has read the encoders and, after them, the transformer.
    ///
    /// T5-XXL takes 4.7 TFLOP for 512 tokens, 7 s of 8 cores. The 27 GB of both in 16 bits are read in 3 s where the host's memory
    /// holds the files, and in 13 s where it does not.
    pub(super) fn encodes_sooner_on_cpu(&self, work: &Work, budget: &Budget) -> bool {
        let (t5, text) = (&self.t5, self.text.at(Encoders::Device));
        let layer = t5.d_model * (4 * t5.num_heads * t5.d_kv + 3 * t5.d_ff);
        let operations = 2.0 * (layer * t5.num_layers * work.text_tokens * work.prompts) as f64;
        let bytes = text.clip + text.t5.with(usize::MAX) + self.transformer.with(usize::MAX);
        let rate = if bytes <= budget.host { FROM_MEMORY } else { FROM_DISK };
        operations / (CORE * budget.cores as f64) < bytes as f64 / rate
    }
}

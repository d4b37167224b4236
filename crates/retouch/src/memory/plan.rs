//! What of a model is in memory when.

use std::fmt;

use candle_core::Device;
use retouch_flow::Saving;
use retouch_vae::Tiling;

use super::{Bands, Budget, DeviceKind, Encoders, Transfer};
use crate::Stage;

/// How many layers of a part stay in memory; the others are read again at each pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    pub layers: usize,
    pub of: usize,
}

impl Resident {
    /// As the parts take it: none where all stay.
    pub(crate) fn limit(self) -> Option<usize> {
        (self.layers < self.of).then_some(self.layers)
    }
}

/// How the VAE goes over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pixels {
    Whole,
    Bands(Bands),
}

impl Pixels {
    pub(crate) fn tiling(self, device: &Device) -> Tiling {
        match self {
            Self::Whole => Tiling::Whole,
            Self::Bands(Bands { bytes, on_host }) => {
                Tiling::Bands { bytes, home: if on_host { Device::Cpu } else { device.clone() } }
            }
        }
    }
}

/// One stage of an edit in numbers, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    pub stage: Stage,
    /// Whose memory it is.
    pub device: DeviceKind,
    /// Parameters that stay for the whole stage.
    pub resident: u64,
    /// The most of all together.
    pub peak: u64,
    /// What is read at each pass: for each prompt, and in each step.
    pub read_per_pass: u64,
}

/// What stays in memory in each stage, and what that takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    pub budget: Budget,
    pub encoders: Encoders,
    /// Of T5.
    pub text: Resident,
    pub transformer: Resident,
    /// The transformer's other blocks on their way to a GPU that has memory of its own.
    pub transfer: Option<Transfer>,
    /// Tokens that the transformer's MLPs take at a time; all if none is said.
    pub mlp_tokens: Option<usize>,
    /// `None` without a reference image.
    pub encode: Option<Pixels>,
    pub decode: Pixels,
    /// Whether all parts stay in memory after their stage; of T5 the blocks that are resident in its stage.
    pub keep_loaded: bool,
    /// In the order of the edit.
    pub stages: Vec<StagePlan>,
}

impl MemoryPlan {
    /// The most of all stages, of the memory of the device that computes.
    pub fn peak(&self) -> u64 {
        let there = self.stages.iter().filter(|stage| stage.device == self.budget.kind);
        there.map(|stage| stage.peak).max().unwrap_or(0)
    }

    pub(crate) fn saving(&self) -> Saving {
        Saving {
            resident_blocks: self.transformer.limit(),
            blocks_on_host: self.transfer.is_some_and(|transfer| transfer.pinned),
            mlp_tokens: self.mlp_tokens,
        }
    }
}

impl fmt::Display for MemoryPlan {
    /// One line: what is done to save memory, and what that takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = |what: &str, resident: Resident| match resident.limit() {
            None => format!("{what} resident"),
            Some(layers) => format!("{what} with {layers} of {} blocks resident", resident.of),
        };
        let text = match self.encoders {
            Encoders::Device => "text encoder",
            Encoders::Cpu => "text encoder on the CPU in f32",
        };
        let mut parts = vec![layers(text, self.text), layers("transformer", self.transformer)];
        parts.extend(self.transfer.map(|transfer| format!("the others from {}", transfer.origin())));
        parts.extend(self.mlp_tokens.map(|tokens| format!("MLPs {tokens} tokens at a time")));
        let pixels = |pixels: Pixels| match pixels {
            Pixels::Whole => "whole",
            Pixels::Bands(Bands { on_host: false, .. }) => "in bands",
            Pixels::Bands(Bands { on_host: true, .. }) => "in bands kept on the host",
        };
        parts.extend(self.encode.map(|encode| format!("image read {}", pixels(encode))));
        parts.push(format!("pixels made {}", pixels(self.decode)));
        let stages = if self.keep_loaded { "all parts" } else { "a stage at a time" };
        let available = match (self.budget.device, self.budget.is_limit) {
            (u64::MAX, _) => String::new(),
            (bytes, true) => format!(" of {} allowed", Gigabytes(bytes)),
            (bytes, false) => format!(" of {} free", Gigabytes(bytes)),
        };
        let (peak, kind) = (Gigabytes(self.peak()), self.budget.kind);
        write!(f, "{stages}: {}; about {peak}{available} on {kind}", parts.join(", "))
    }
}

/// A number of bytes as people read it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gigabytes(pub u64);

impl fmt::Display for Gigabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes < 1_000_000_000 => write!(f, "{:.0} MB", bytes as f64 / 1e6),
            bytes => write!(f, "{:.1} GB", bytes as f64 / 1e9),
        }
    }
}

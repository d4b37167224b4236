//! What blocks that do not stay on a GPU cost: their way over the bus at each step, and whether it hides behind the computation.

use std::fmt;

use super::{ModelMemory, Work, plan::Gigabytes};

/// What a PCIe 4 slot of 16 lanes moves in a second, from pinned memory: 24 to 26 GB on most machines.
pub const BUS: u64 = 25_000_000_000;

/// The blocks that come to a GPU at each pass of the transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Of all of them together.
    pub bytes: u64,
    /// Whether they stay in pinned memory of the host; else they are read from their files.
    pub pinned: bool,
    /// Of a pass through all blocks, those that stay among them.
    pub flops: u64,
    /// A GPU that computes no more in a second has each block before it needs it, at [`BUS`].
    pub hidden_below: u64,
}

impl Transfer {
    /// Of the blocks from number `resident` on; `host` is what memory of the host is free. None if all stay.
    pub(super) fn of(model: &ModelMemory, work: &Work, resident: usize, host: u64) -> Option<Self> {
        let blocks = &model.transformer.layers;
        let sent = blocks.get(resident..).unwrap_or_default();
        let largest = *sent.iter().max()?;
        let (bytes, flops) = (sent.iter().sum(), work.block_flops(model));
        // A block is on its way while the one before it computes.
        let hidden_below = (u128::from(flops) * u128::from(BUS) / u128::from(largest.max(1))) as u64;
        // Pinned memory is nobody else's as long as the edit takes: a quarter is left to others. Where nobody says what
        // is free, nothing is pinned.
        let pinned = host != u64::MAX && bytes <= host / 4 * 3;
        Some(Self { bytes, pinned, flops: flops * blocks.len() as u64, hidden_below })
    }

    /// Of a pass, at [`BUS`].
    pub fn seconds(&self) -> f64 {
        self.bytes as f64 / BUS as f64
    }

    /// Where the blocks come from.
    pub(super) fn origin(&self) -> &'static str {
        if self.pinned { "pinned memory of the host" } else { "their files" }
    }
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, origin, seconds) = (Gigabytes(self.bytes), self.origin(), self.seconds());
        let rate = if self.pinned { "" } else { ", where the disk or the system's cache of it keeps up" };
        let (bus, teraflops) = (Gigabytes(BUS), self.hidden_below as f64 / 1e12);
        write!(
            f,
            "a pass: {bytes} from {origin}, {seconds:.2} s at {bus}/s (PCIe 4 x16, assumed){rate}; hidden behind the \
             computation on a GPU of up to {teraflops:.0} TFLOP/s"
        )
    }
}

#[cfg(test)]
mod tests {
    use retouch_weights::LoraBytes;

    use super::*;
    use crate::{KeepLoaded, ModelSource, Precision, memory::ByPlace};

    fn transfer(storage: &str, side: usize, resident: usize, host: u64) -> Option<Transfer> {
        let source = ModelSource { base: Some("black-forest-labs/FLUX.1-Kontext-dev".into()), ..Default::default() };
        let (model, _) = ModelMemory::find(&source, Some(storage.parse().unwrap()), Precision::Bf16).unwrap();
        let work = Work {
            output: (side, side),
            reference: Some((side, side)),
            images: 1,
            prompts: 1,
            text_tokens: 512,
            steps: 28,
            step_cache: false,
            text_loras: ByPlace::default(),
            transformer_loras: LoraBytes::default(),
            keep_loaded: KeepLoaded::No,
            encoders: None,
        };
        Transfer::of(&model, &work, resident, host)
    }

    #[test]
    fn a_step_is_the_work_that_was_counted_by_hand() {
        // 8704 tokens: 112.4 TFLOP of linear layers without the modulation's and the ends', 53.1 of attention.
        let flops = transfer("bf16", 1024, 1, u64::MAX).unwrap().flops as f64;
        assert!((flops / 165.4e12 - 1.0).abs() < 0.001, "{flops:e}");
    }

    #[test]
    fn a_transfer_hides_where_a_block_computes_for_longer_than_the_next_is_on_its_way() {
        // Of single blocks alone: 113 million weights of two bytes in 9.1 ms, beside 2.90 TFLOP.
        let single = transfer("bf16", 1024, 20, u64::MAX).unwrap();
        assert!((single.hidden_below as f64 / 320e12 - 1.0).abs() < 0.01, "{single:?}");
        // Double blocks have twice the weights for the same work; 8 bits are half of 16.
        let double = transfer("bf16", 1024, 1, u64::MAX).unwrap();
        assert!((double.hidden_below as f64 / 160e12 - 1.0).abs() < 0.01, "{double:?}");
        let eight = transfer("fp8", 1024, 1, u64::MAX).unwrap();
        assert!((eight.hidden_below as f64 / 320e12 - 1.0).abs() < 0.01, "{eight:?}");
        assert!(transfer("bf16", 512, 1, u64::MAX).unwrap().hidden_below < double.hidden_below / 3);
        assert_eq!(transfer("bf16", 1024, 57, u64::MAX), None);
    }

    #[test]
    fn blocks_are_pinned_where_a_quarter_of_the_host_stays_free() {
        let bytes = transfer("q8_0", 1024, 30, u64::MAX).unwrap().bytes;
        assert!(!transfer("q8_0", 1024, 30, bytes).unwrap().pinned);
        assert!(transfer("q8_0", 1024, 30, bytes / 3 * 4 + 8).unwrap().pinned);
        let sentence = transfer("q8_0", 1024, 30, 0).unwrap().to_string();
        assert!(sentence.contains("from their files") && sentence.contains("keeps up"), "{sentence}");
    }
}

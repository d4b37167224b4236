//! What can be told of a LoRA file without a model.

use std::collections::{BTreeMap, BTreeSet};

use super::file::{Factor, LoraFile, Stored};

/// A LoRA file in a few words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraDescription {
    /// `LoRA`, `LoKr`, `differences`, or several of them.
    pub kinds: BTreeSet<&'static str>,
    /// Whose names the file uses.
    pub naming: &'static str,
    /// The ranks of its matrices, if they have one.
    pub ranks: BTreeSet<usize>,
    /// How many parameters of each component it changes.
    pub targets: BTreeMap<&'static str, usize>,
    /// Tensors whose names mean nothing for FLUX.1.
    pub unknown: usize,
    /// The model that it says or seems to be made for, if that is not FLUX.1.
    pub made_for: Option<String>,
}

impl LoraFile {
    pub fn describe(&self) -> LoraDescription {
        let (mut kinds, mut ranks, mut targets) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        let rank = |name: &str| self.store().shape(name).and_then(|shape| shape.first()).copied();
        for change in self.all_changes() {
            *targets.entry(change.target.component.folder()).or_default() += 1;
            kinds.insert(match &change.delta {
                Stored::LowRank { down, .. } => {
                    ranks.extend(rank(down));
                    "LoRA"
                }
                Stored::Kronecker { left, right } => {
                    for factor in [left, right] {
                        if let Factor::Product(_, b) = factor {
                            ranks.extend(rank(b));
                        }
                    }
                    "LoKr"
                }
                Stored::Full(_) => "differences",
            });
        }
        LoraDescription {
            kinds,
            naming: self.naming(),
            ranks,
            targets,
            unknown: self.unknown().len(),
            made_for: self.made_for(),
        }
    }

    fn naming(&self) -> &'static str {
        let has = |piece: &str| self.store().names().any(|name| name.contains(piece));
        if has("lora_unet_") || has("lora_te") || has("lora_transformer_") {
            "kohya"
        } else if has("lycoris_") {
            "LyCORIS"
        } else if has(".processor.") {
            "XLabs"
        } else if has("double_blocks.") || has("single_blocks.") {
            "Black Forest Labs"
        } else if self.all_changes().is_empty() {
            "unknown"
        } else {
            "diffusers"
        }
    }
}

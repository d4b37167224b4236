//! What to write weights in, and which of them.

use std::{fmt, str::FromStr};

use candle_core::quantized::GgmlDType;
use retouch_kernels::Fp8;

use crate::{Component, Encoding};

/// The type that the large matrices are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Blocks of GGUF.
    Blocks(GgmlDType),
    /// 8-bit floats of 4 bits of exponent as they are, what most programs call fp8.
    Fp8,
    /// The same, each matrix with a scale, as ComfyUI has it: nearer to the original.
    Fp8Scaled,
    Bf16,
    F16,
}

/// All targets by name.
const TARGETS: [(&str, Target); 14] = [
    ("q8_0", Target::Blocks(GgmlDType::Q8_0)),
    ("q6_k", Target::Blocks(GgmlDType::Q6K)),
    ("q5_k", Target::Blocks(GgmlDType::Q5K)),
    ("q5_1", Target::Blocks(GgmlDType::Q5_1)),
    ("q5_0", Target::Blocks(GgmlDType::Q5_0)),
    ("q4_k", Target::Blocks(GgmlDType::Q4K)),
    ("q4_1", Target::Blocks(GgmlDType::Q4_1)),
    ("q4_0", Target::Blocks(GgmlDType::Q4_0)),
    ("q3_k", Target::Blocks(GgmlDType::Q3K)),
    ("q2_k", Target::Blocks(GgmlDType::Q2K)),
    ("fp8", Target::Fp8),
    ("fp8_scaled", Target::Fp8Scaled),
    ("bf16", Target::Bf16),
    ("f16", Target::F16),
];

impl Target {
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Blocks(kind) => Encoding::Blocks(kind),
            Self::Fp8 | Self::Fp8Scaled => Encoding::Fp8(Fp8::E4m3),
            Self::Bf16 => Encoding::Bf16,
            Self::F16 => Encoding::F16,
        }
    }

    /// Its number in `general.file_type`: llama.cpp's `LLAMA_FTYPE_MOSTLY_…`, of mixtures the plain one.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F16 | Self::Fp8 | Self::Fp8Scaled => 1,
            Self::Bf16 => 32,
            Self::Blocks(kind) => match kind {
                GgmlDType::Q4_0 => 2,
                GgmlDType::Q4_1 => 3,
                GgmlDType::Q8_0 => 7,
                GgmlDType::Q5_0 => 8,
                GgmlDType::Q5_1 => 9,
                GgmlDType::Q2K => 10,
                GgmlDType::Q3K => 11,
                GgmlDType::Q4K => 14,
                GgmlDType::Q5K => 16,
                GgmlDType::Q6K => 18,
                _ => 1024, // not told by the file
            },
        }
    }

    /// The encoding of a matrix whose rows have `columns` values: where they are no whole blocks of 256, a type of blocks of 32
    /// with as many bits or more, and where they are none of these either, f16. llama.cpp falls back to the same types.
    pub(super) fn encoding_for(self, columns: usize) -> Encoding {
        let Self::Blocks(kind) = self else { return self.encoding() };
        let small = match kind {
            GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
            GgmlDType::Q4K => GgmlDType::Q5_0,
            GgmlDType::Q5K => GgmlDType::Q5_1,
            GgmlDType::Q6K => GgmlDType::Q8_0,
            other => other,
        };
        let fits = |kind: &GgmlDType| columns.is_multiple_of(kind.block_size());
        [kind, small].into_iter().find(fits).map_or(Encoding::F16, Encoding::Blocks)
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = TARGETS.iter().find(|(name, _)| *name == text).map(|(_, target)| *target);
        found.ok_or_else(|| {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            format!("`{text}` is no type of weights; use {}", names.join(", "))
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(TARGETS.iter().find(|(_, target)| target == self).map_or("", |(name, _)| name))
    }
}

/// Whether a parameter is one of the large matrices, which alone are worth fewer bits.
///
/// Kept as they are, as by the tools that ComfyUI's GGUF files come from: norms and biases, and the layers through which all
/// of the information goes once (a hundredth of the transformer). <https://github.com/city96/ComfyUI-GGUF/tree/main/tools>
pub(super) fn is_large(component: Component, name: &str, shape: &[usize]) -> bool {
    const KEPT: [&str; 6] = ["img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."];
    let kept = match component {
        Component::Transformer => KEPT.iter().any(|prefix| name.starts_with(prefix)),
        Component::T5 => name.contains("relative_attention_bias"),
        Component::Vae | Component::Clip => true,
    };
    shape.len() == 2 && !kept
}

/// Whether a matrix is worth fewer bits in memory: modulation layers are gone before the first step, and rows that are no
/// blocks would stay in 16 bits.
pub(crate) fn is_worthwhile(component: Component, name: &str, (rows, columns): (usize, usize)) -> bool {
    is_large(component, name, &[rows, columns]) && !name.ends_with(".lin.weight") && columns.is_multiple_of(32)
}

/// Whether `pattern` is somewhere in `name`; a `*` in it stands for anything.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let mut rest = name;
    pattern.split('*').all(|part| match rest.split_once(part) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_names() {
        for (name, target) in TARGETS {
            assert_eq!((name.parse(), target.to_string().as_str()), (Ok(target), name));
        }
        assert!("q9".parse::<Target>().unwrap_err().contains("`q9` is no type of weights; use q8_0, q6_k,"));
    }

    #[test]
    fn rows_that_are_no_whole_blocks_take_a_type_that_fits() {
        let q4k = Target::Blocks(GgmlDType::Q4K);
        assert_eq!(q4k.encoding_for(512), Encoding::Blocks(GgmlDType::Q4K));
        assert_eq!(q4k.encoding_for(64), Encoding::Blocks(GgmlDType::Q5_0));
        assert_eq!(q4k.encoding_for(40), Encoding::F16);
        assert_eq!(Target::Fp8.encoding_for(3), Encoding::Fp8(Fp8::E4m3));
    }

    #[test]
    fn patterns_are_found_anywhere() {
        let name = "double_blocks.7.img_mlp.0.weight";
        assert!(
            ["img_mlp", "double_blocks.7.", "blocks.*.img_mlp", "*weight", "mlp.0", ""]
                .iter()
                .all(|p| matches(p, name))
        );
        assert!(!["txt", "img_mlp.*double", "blocks.8"].iter().any(|p| matches(p, name)));
    }
}

//! The VAE's parameters. The code uses diffusers' names; Black Forest Labs' `ae.safetensors` has its own.

use super::{Naming, Recipe};

/// A file in the names of the original latent-diffusion autoencoder, which BFL's `ae.safetensors` keeps.
///
/// It numbers the decoder's levels from the finest, and keeps the middle attention's matrices as 1x1 convolutions.
/// <https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/autoencoder.py>
pub struct Bfl {
    /// Resolution levels of the decoder.
    pub levels: usize,
}

impl Naming for Bfl {
    fn recipe(&self, name: &str) -> Recipe {
        let parts: Vec<&str> = name.split('.').collect();
        let reversed = |level: &str| level.parse().ok().and_then(|l: usize| self.levels.checked_sub(l.checked_add(1)?));
        let renamed = match parts.as_slice() {
            ["encoder", "down_blocks", level, rest @ ..] => block(&format!("encoder.down.{level}"), rest),
            ["decoder", "up_blocks", level, rest @ ..] => match reversed(level) {
                Some(level) => block(&format!("decoder.up.{level}"), rest),
                None => None,
            },
            [side, "mid_block", "resnets", index, rest @ ..] => {
                let number = match *index {
                    "0" => "1",
                    _ => "2",
                };
                resnet(&format!("{side}.mid.block_{number}"), rest)
            }
            [side, "mid_block", "attentions", "0", "group_norm", leaf] => {
                Some(format!("{side}.mid.attn_1.norm.{leaf}"))
            }
            [side, "mid_block", "attentions", "0", matrix @ .., leaf] => {
                let matrix = match matrix {
                    ["to_q"] => "q",
                    ["to_k"] => "k",
                    ["to_v"] => "v",
                    ["to_out", "0"] => "proj_out",
                    _ => return Recipe::Same(name.to_string()),
                };
                return Recipe::Reshaped(format!("{side}.mid.attn_1.{matrix}.{leaf}"));
            }
            [side, "conv_norm_out", leaf] => Some(format!("{side}.norm_out.{leaf}")),
            _ => None,
        };
        Recipe::Same(renamed.unwrap_or_else(|| name.to_string()))
    }
}

/// What lies inside a level: residual blocks and the change of resolution.
fn block(level: &str, rest: &[&str]) -> Option<String> {
    match rest {
        ["resnets", index, rest @ ..] => resnet(&format!("{level}.block.{index}"), rest),
        ["downsamplers", "0", "conv", leaf] => Some(format!("{level}.downsample.conv.{leaf}")),
        ["upsamplers", "0", "conv", leaf] => Some(format!("{level}.upsample.conv.{leaf}")),
        _ => None,
    }
}

fn resnet(block: &str, rest: &[&str]) -> Option<String> {
    match rest {
        ["conv_shortcut", leaf] => Some(format!("{block}.nin_shortcut.{leaf}")),
        [layer, leaf] => Some(format!("{block}.{layer}.{leaf}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_decoders_levels_are_numbered_in_reverse() {
        let bfl = Bfl { levels: 4 };
        let same = |name: &str| Recipe::Same(name.into());
        assert_eq!(bfl.recipe("decoder.up_blocks.0.resnets.2.conv1.weight"), same("decoder.up.3.block.2.conv1.weight"));
        assert_eq!(
            bfl.recipe("decoder.up_blocks.3.resnets.0.conv_shortcut.bias"),
            same("decoder.up.0.block.0.nin_shortcut.bias")
        );
        assert_eq!(
            bfl.recipe("encoder.down_blocks.1.downsamplers.0.conv.bias"),
            same("encoder.down.1.downsample.conv.bias")
        );
    }

    #[test]
    fn the_middle_is_found() {
        let bfl = Bfl { levels: 4 };
        assert_eq!(
            bfl.recipe("decoder.mid_block.attentions.0.to_out.0.weight"),
            Recipe::Reshaped("decoder.mid.attn_1.proj_out.weight".into())
        );
        assert_eq!(
            bfl.recipe("encoder.mid_block.resnets.1.norm2.weight"),
            Recipe::Same("encoder.mid.block_2.norm2.weight".into())
        );
        assert_eq!(
            bfl.recipe("encoder.mid_block.attentions.0.group_norm.bias"),
            Recipe::Same("encoder.mid.attn_1.norm.bias".into())
        );
    }

    #[test]
    fn a_level_that_does_not_exist_stays_as_it_is() {
        let name = "decoder.up_blocks.9.resnets.0.conv1.weight";
        assert_eq!(Bfl { levels: 4 }.recipe(name), Recipe::Same(name.into()));
    }
}

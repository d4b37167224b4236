//! The FLUX transformer's parameters. The code uses Black Forest Labs' own names, so their files need no renaming.
//!
//! <https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/layers.py>

use super::{Naming, Recipe};

/// The names of all parameters of a transformer.
pub fn parameters(double_blocks: usize, single_blocks: usize) -> Vec<String> {
    let mut linears: Vec<String> = [
        "time_in.in_layer",
        "time_in.out_layer",
        "vector_in.in_layer",
        "vector_in.out_layer",
        "guidance_in.in_layer",
        "guidance_in.out_layer",
        "img_in",
        "txt_in",
        "final_layer.adaLN_modulation.1",
        "final_layer.linear",
    ]
    .map(str::to_string)
    .to_vec();
    let mut norms = Vec::new();
    for (block, stream) in (0..double_blocks).flat_map(|block| [(block, "img"), (block, "txt")]) {
        let stream = format!("double_blocks.{block}.{stream}");
        linears.extend(["mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2"].map(|part| format!("{stream}_{part}")));
        norms.push(format!("{stream}_attn.norm"));
    }
    for block in 0..single_blocks {
        linears.extend(["modulation.lin", "linear1", "linear2"].map(|part| format!("single_blocks.{block}.{part}")));
        norms.push(format!("single_blocks.{block}.norm"));
    }
    let of_linears = linears.iter().flat_map(|linear| ["weight", "bias"].map(|leaf| format!("{linear}.{leaf}")));
    let of_norms = norms.iter().flat_map(|norm| ["query_norm", "key_norm"].map(|part| format!("{norm}.{part}.scale")));
    of_linears.chain(of_norms).collect()
}

/// A file in diffusers' names, which keeps q, k and v (and a single block's MLP) apart.
///
/// The map is that of diffusers' `convert_flux_transformer_checkpoint_to_diffusers`, backwards.
/// <https://github.com/huggingface/diffusers/blob/main/src/diffusers/loaders/single_file_utils.py>
pub struct Diffusers;

impl Naming for Diffusers {
    fn recipe(&self, name: &str) -> Recipe {
        let Some((module, leaf)) = name.rsplit_once('.') else {
            return Recipe::Same(name.to_string());
        };
        // BFL calls the weight of a norm its scale.
        let leaf = if leaf == "scale" { "weight" } else { leaf };
        let block = |prefix: &str| module.strip_prefix(prefix).and_then(|rest| rest.split_once('.'));
        if let Some((index, part)) = block("double_blocks.") {
            rows(&format!("transformer_blocks.{index}."), double_block(part), leaf, name)
        } else if let Some((index, part)) = block("single_blocks.") {
            rows(&format!("single_transformer_blocks.{index}."), single_block(part), leaf, name)
        } else if module == "final_layer.adaLN_modulation.1" {
            // diffusers keeps (scale, shift), BFL (shift, scale).
            Recipe::SwappedHalves(format!("norm_out.linear.{leaf}"))
        } else {
            rows("", outside_blocks(module), leaf, name)
        }
    }
}

/// `modules` is empty for a name that this model does not have; it then stays as it is, and is found missing.
fn rows(prefix: &str, modules: &[&str], leaf: &str, name: &str) -> Recipe {
    let full = |module: &&str| format!("{prefix}{module}.{leaf}");
    match modules {
        [] => Recipe::Same(name.to_string()),
        [one] => Recipe::Same(full(one)),
        several => Recipe::Rows(several.iter().map(full).collect()),
    }
}

fn outside_blocks(module: &str) -> &'static [&'static str] {
    match module {
        "img_in" => &["x_embedder"],
        "txt_in" => &["context_embedder"],
        "time_in.in_layer" => &["time_text_embed.timestep_embedder.linear_1"],
        "time_in.out_layer" => &["time_text_embed.timestep_embedder.linear_2"],
        "vector_in.in_layer" => &["time_text_embed.text_embedder.linear_1"],
        "vector_in.out_layer" => &["time_text_embed.text_embedder.linear_2"],
        "guidance_in.in_layer" => &["time_text_embed.guidance_embedder.linear_1"],
        "guidance_in.out_layer" => &["time_text_embed.guidance_embedder.linear_2"],
        "final_layer.linear" => &["proj_out"],
        _ => &[],
    }
}

fn double_block(part: &str) -> &'static [&'static str] {
    match part {
        "img_mod.lin" => &["norm1.linear"],
        "txt_mod.lin" => &["norm1_context.linear"],
        "img_attn.qkv" => &["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv" => &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_attn.norm.query_norm" => &["attn.norm_q"],
        "img_attn.norm.key_norm" => &["attn.norm_k"],
        "txt_attn.norm.query_norm" => &["attn.norm_added_q"],
        "txt_attn.norm.key_norm" => &["attn.norm_added_k"],
        "img_attn.proj" => &["attn.to_out.0"],
        "txt_attn.proj" => &["attn.to_add_out"],
        "img_mlp.0" => &["ff.net.0.proj"],
        "img_mlp.2" => &["ff.net.2"],
        "txt_mlp.0" => &["ff_context.net.0.proj"],
        "txt_mlp.2" => &["ff_context.net.2"],
        _ => &[],
    }
}

fn single_block(part: &str) -> &'static [&'static str] {
    match part {
        "modulation.lin" => &["norm.linear"],
        "linear1" => &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        "linear2" => &["proj_out"],
        "norm.query_norm" => &["attn.norm_q"],
        "norm.key_norm" => &["attn.norm_k"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_matrices_are_stacked_from_diffusers_parts() {
        assert_eq!(
            Diffusers.recipe("single_blocks.37.linear1.bias"),
            Recipe::Rows(
                ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
                    .map(|m| format!("single_transformer_blocks.37.{m}.bias"))
                    .to_vec()
            )
        );
    }

    #[test]
    fn norms_and_the_final_modulation_are_found() {
        assert_eq!(
            Diffusers.recipe("double_blocks.3.txt_attn.norm.key_norm.scale"),
            Recipe::Same("transformer_blocks.3.attn.norm_added_k.weight".into())
        );
        assert_eq!(
            Diffusers.recipe("final_layer.adaLN_modulation.1.weight"),
            Recipe::SwappedHalves("norm_out.linear.weight".into())
        );
    }
}

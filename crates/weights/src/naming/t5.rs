//! The T5 encoder's parameters. The code uses transformers' names.

use super::{Naming, Recipe};

/// A file that holds the encoder behind `prefix`, and the token embedding under one or both of T5's two names for it.
pub struct T5 {
    pub prefix: String,
    /// The embedding's name in the file, after the prefix.
    pub embedding: &'static str,
}

/// The names of the token embedding: the encoder's own one is tied to the shared one, and files keep either or both.
pub const EMBEDDINGS: [&str; 2] = ["shared.weight", "encoder.embed_tokens.weight"];

/// The names of all parameters of an encoder.
pub fn parameters(blocks: usize) -> Vec<String> {
    let attention = ["q", "k", "v", "o"].map(|part| format!("layer.0.SelfAttention.{part}"));
    let feed_forward = ["wi_0", "wi_1", "wo"].map(|part| format!("layer.1.DenseReluDense.{part}"));
    let norms = ["layer.0.layer_norm", "layer.1.layer_norm"].map(str::to_string);
    let block: Vec<String> = attention.into_iter().chain(feed_forward).chain(norms).collect();
    let first = [
        "shared.weight",
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ];
    let blocks = (0..blocks).flat_map(|i| block.iter().map(move |part| format!("encoder.block.{i}.{part}.weight")));
    first.into_iter().map(str::to_string).chain(blocks).collect()
}

impl Naming for T5 {
    fn recipe(&self, name: &str) -> Recipe {
        let name = if EMBEDDINGS.contains(&name) { self.embedding } else { name };
        Recipe::Same(format!("{}{name}", self.prefix))
    }
}

/// A file in llama.cpp's names, as GGUF files of the encoder have them.
///
/// <https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py>
pub struct LlamaCpp;

impl Naming for LlamaCpp {
    fn recipe(&self, name: &str) -> Recipe {
        Recipe::Same(llama_cpp(name).unwrap_or_else(|| name.to_string()))
    }
}

/// `None` for a name that the encoder does not have; it then stays as it is, and is found missing.
fn llama_cpp(name: &str) -> Option<String> {
    if EMBEDDINGS.contains(&name) {
        return Some("token_embd.weight".to_string());
    }
    if name == "encoder.final_layer_norm.weight" {
        return Some("enc.output_norm.weight".to_string());
    }
    let (block, part) = name.strip_prefix("encoder.block.")?.split_once('.')?;
    let part = match part.strip_suffix(".weight")? {
        "layer.0.SelfAttention.q" => "attn_q",
        "layer.0.SelfAttention.k" => "attn_k",
        "layer.0.SelfAttention.v" => "attn_v",
        "layer.0.SelfAttention.o" => "attn_o",
        "layer.0.SelfAttention.relative_attention_bias" => "attn_rel_b",
        "layer.0.layer_norm" => "attn_norm",
        "layer.1.DenseReluDense.wi_0" => "ffn_gate",
        "layer.1.DenseReluDense.wi_1" => "ffn_up",
        "layer.1.DenseReluDense.wo" => "ffn_down",
        "layer.1.layer_norm" => "ffn_norm",
        _ => return None,
    };
    Some(format!("enc.blk.{block}.{part}.weight"))
}

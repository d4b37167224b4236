//! Which files of a repository an edit needs.

use std::collections::BTreeSet;

use crate::{Component, Folder, Result, Store, model_index::MODEL_INDEX};

/// All that a tokenizer may consist of; a repository has some of them.
const TOKENIZER_FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
];
const TOKENIZERS: [&str; 2] = ["tokenizer", "tokenizer_2"];

/// The configs, tokenizers and weight indices among the repository's files.
pub fn small_files(there: &BTreeSet<String>, components: &[Component]) -> Vec<String> {
    let mut wanted = vec![MODEL_INDEX.to_string(), "retouch.json".into(), "scheduler/scheduler_config.json".into()];
    for component in Component::ALL {
        wanted.push(format!("{}/config.json", component.folder()));
        let [whole, index] = weight_names(component);
        if components.contains(&component) && !there.contains(&whole) {
            wanted.push(index);
        }
    }
    wanted.retain(|file| there.contains(file));
    wanted.extend(TOKENIZERS.iter().flat_map(|name| tokenizer_files(&format!("{name}/"), there)));
    wanted
}

/// The tokenizer files in the folder `prefix`.
pub fn tokenizer_files(prefix: &str, there: &BTreeSet<String>) -> Vec<String> {
    let files = TOKENIZER_FILES.iter().map(|file| format!("{prefix}{file}"));
    files.filter(|file| there.contains(file)).collect()
}

/// The components' weights: whole, or the shards that the (already downloaded) index in `model` names.
pub fn weight_files(model: &Folder, there: &BTreeSet<String>, components: &[Component]) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for &component in components {
        let [whole, index] = weight_names(component);
        if there.contains(&whole) || !there.contains(&index) {
            files.push(whole);
        } else {
            let shards = Store::shards(&model.sub(component.folder()), component.stem())?;
            files.extend(shards.iter().map(|shard| format!("{}/{shard}", component.folder())));
        }
    }
    Ok(files)
}

/// A file that the model folder lacks, if it lacks one.
pub fn missing_from(model: &Folder, components: &[Component]) -> Option<String> {
    let small = [MODEL_INDEX, "scheduler/scheduler_config.json"];
    if let Some(file) = small.iter().find(|file| !model.has(file)) {
        return Some(file.to_string());
    }
    for component in Component::ALL {
        let folder = model.sub(component.folder());
        let [whole, index] = weight_names(component);
        if !folder.has("config.json") {
            return Some(format!("{}/config.json", component.folder()));
        }
        if !components.contains(&component) || model.has(&whole) {
            continue;
        }
        if !model.has(&index) {
            return Some(whole);
        }
        let shards = Store::shards(&folder, component.stem()).unwrap_or_default();
        match shards.iter().find(|shard| !folder.has(shard)) {
            Some(shard) => return Some(format!("{}/{shard}", component.folder())),
            None if shards.is_empty() => return Some(index),
            None => {}
        }
    }
    TOKENIZERS.iter().find_map(|name| missing_tokenizer(&model.sub(name)).map(|file| format!("{name}/{file}")))
}

/// A file that a tokenizer's folder lacks, if it lacks one.
pub fn missing_tokenizer(folder: &Folder) -> Option<String> {
    if folder.has("tokenizer.json") || folder.has("spiece.model") {
        return None;
    }
    ["vocab.json", "merges.txt"].iter().find(|file| !folder.has(file)).map(|file| file.to_string())
}

fn weight_names(component: Component) -> [String; 2] {
    let base = format!("{}/{}.safetensors", component.folder(), component.stem());
    [base.clone(), format!("{base}.index.json")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_single_files_and_other_precisions_are_left_out() {
        let there = [
            "README.md",
            "teaser.png",
            "flux1-kontext-dev.safetensors",
            "ae.safetensors",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "text_encoder/model.fp16.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "tokenizer_2/spiece.model",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        ];
        let there: BTreeSet<String> = there.iter().map(|file| file.to_string()).collect();
        let mut small = small_files(&there, &Component::ALL);
        small.sort();
        assert_eq!(
            small,
            [
                "model_index.json",
                "scheduler/scheduler_config.json",
                "text_encoder/config.json",
                "tokenizer/merges.txt",
                "tokenizer/vocab.json",
                "tokenizer_2/spiece.model",
                "transformer/config.json",
                "transformer/diffusion_pytorch_model.safetensors.index.json",
            ]
        );
    }
}

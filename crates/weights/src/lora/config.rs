//! What PEFT notes beside a LoRA's matrices: how strongly each of them acts.
//!
//! diffusers keeps it in the file's metadata, each name behind that of the component; PEFT in `adapter_config.json`
//! beside the file. Source: PEFT, `LoraConfig`; diffusers, `loaders/lora_base.py`, `LORA_ADAPTER_METADATA_KEY`.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::ModelFile;

const METADATA_KEY: &str = "lora_adapter_metadata";
const FILE: &str = "adapter_config.json";

/// The configurations in a file: of all of its modules, or of those of each component.
#[derive(Debug, Default)]
pub struct Configs {
    /// With the prefix that a module's name has, empty for all modules.
    by_prefix: Vec<(String, Config)>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    r: Option<f64>,
    /// LoKr calls it `alpha`.
    #[serde(alias = "alpha")]
    lora_alpha: Option<f64>,
    rank_pattern: Option<BTreeMap<String, f64>>,
    alpha_pattern: Option<BTreeMap<String, f64>>,
    use_rslora: bool,
    use_dora: bool,
    peft_type: Option<String>,
}

impl Configs {
    /// From a file's metadata, else from beside it. Errors are sentences without the file's name.
    pub fn find(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self, String> {
        let by_prefix = match metadata.get(METADATA_KEY) {
            Some(json) => of_metadata(json).map_err(|e| format!("its metadata `{METADATA_KEY}` is damaged: {e}"))?,
            None => of_neighbour(path)?.into_iter().map(|config| (String::new(), config)).collect(),
        };
        for (_, config) in &by_prefix {
            config.check()?;
        }
        Ok(Self { by_prefix })
    }

    /// The scale that a module of that name is meant to act with, if this says so; `rank` is what its matrices show.
    pub fn scale(&self, module: &str, rank: Option<usize>) -> Option<f64> {
        let module = module.strip_prefix("base_model.model.").unwrap_or(module);
        let fitting = self.by_prefix.iter().find_map(|(prefix, config)| Some((module.strip_prefix(prefix)?, config)));
        let (module, config) = fitting?;
        let alpha = pattern(&config.alpha_pattern, module).or(config.lora_alpha)?;
        let rank = rank.map(|rank| rank as f64).or(pattern(&config.rank_pattern, module)).or(config.r)?;
        Some(alpha / if config.use_rslora { rank.sqrt() } else { rank })
    }
}

impl Config {
    fn check(&self) -> Result<(), String> {
        if self.use_dora {
            return Err("it is a DoRA (`use_dora`), which is not supported; give a LoRA or a LoKr".to_string());
        }
        if let Some(kind) = self.peft_type.as_deref().filter(|kind| !["LORA", "LOKR"].contains(kind)) {
            return Err(format!("it is a PEFT adapter of the type {kind}; supported are LORA and LOKR"));
        }
        let patterns = [&self.rank_pattern, &self.alpha_pattern].into_iter().flatten().flat_map(|map| map.keys());
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        for name in patterns {
            if !name.strip_prefix('^').unwrap_or(name).chars().all(is_plain) {
                return Err(format!(
                    "its rank_pattern or alpha_pattern has the expression `{name}`; only names are read"
                ));
            }
        }
        let numbers = [&self.rank_pattern, &self.alpha_pattern].into_iter().flatten().flat_map(|map| map.values());
        if numbers.chain(&self.r).chain(&self.lora_alpha).any(|n| !n.is_finite()) {
            return Err("a rank or an alpha of its configuration is not a number".to_string());
        }
        Ok(())
    }
}

/// The value for a module: names are whole (after `^`), or ends of names from a dot on.
fn pattern(values: &Option<BTreeMap<String, f64>>, module: &str) -> Option<f64> {
    let fits = |name: &str| match name.strip_prefix('^') {
        Some(whole) => module == whole,
        None => module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    };
    values.as_ref()?.iter().find(|(name, _)| fits(name)).map(|(_, &value)| value)
}

fn of_metadata(json: &str) -> serde_json::Result<Vec<(String, Config)>> {
    let all: Map<String, Value> = serde_json::from_str(json)?;
    let mut by_component: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for (key, value) in all {
        // Without a component before it, for all.
        let (prefix, name) = key.split_once('.').map_or(("", key.as_str()), |(component, name)| (component, name));
        by_component.entry(prefix.to_string()).or_default().insert(name.to_string(), value);
    }
    let config = |(component, values): (String, Map<String, Value>)| {
        let prefix = if component.is_empty() { component } else { format!("{component}.") };
        Ok((prefix, serde_json::from_value(Value::Object(values))?))
    };
    // Longer prefixes first: the empty one fits all.
    by_component.into_iter().rev().map(config).collect()
}

fn of_neighbour(path: &Path) -> Result<Option<Config>, String> {
    let file = path.with_file_name(FILE);
    // The same folder can hold other LoRAs: PEFT's own name is what its configuration belongs to.
    let is_pefts = path.file_stem().is_some_and(|stem| stem == "adapter_model");
    let read = |file| ModelFile::open(file).and_then(|file| file.json()).map_err(|e| e.to_string());
    (is_pefts && file.is_file()).then(|| read(file)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configs(json: &str) -> Result<Configs, String> {
        let metadata = BTreeMap::from([(METADATA_KEY.to_string(), json.to_string())]);
        Configs::find(Path::new("lora.safetensors"), &metadata)
    }

    #[test]
    fn patterns_win_over_the_common_alpha() {
        let json = r#"{"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": false,
            "transformer.alpha_pattern": {"attn.to_q": 2, "^proj_out": 12}, "transformer.rank_pattern": {"proj_out": 3}}"#;
        let configs = configs(json).unwrap();
        let scale = |module, rank| configs.scale(module, rank);
        assert_eq!(scale("transformer.transformer_blocks.0.attn.to_k", Some(4)), Some(2.0));
        assert_eq!(scale("transformer.transformer_blocks.0.attn.to_q", Some(4)), Some(0.5));
        assert_eq!(scale("transformer.proj_out", None), Some(4.0));
        // Whole names are only those, and ends of names begin at a dot.
        assert_eq!(scale("transformer.single_transformer_blocks.0.proj_out", Some(4)), Some(2.0));
        assert_eq!(scale("transformer.single_transformer_blocks.0.xattn.to_q", Some(4)), Some(2.0));
        assert_eq!(scale("text_encoder.text_model.encoder.layers.0.mlp.fc1", Some(4)), None);
    }

    #[test]
    fn rank_stabilised_scales_divide_by_the_root() {
        let configs = configs(r#"{"transformer.lora_alpha": 6, "transformer.use_rslora": true}"#).unwrap();
        assert_eq!(configs.scale("transformer.proj_out", Some(9)), Some(2.0));
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        for (json, words) in [
            (r#"{"transformer.use_dora": true}"#, "DoRA"),
            (r#"{"transformer.peft_type": "LOHA"}"#, "LOHA"),
            (r#"{"transformer.alpha_pattern": {".*to_q": 2}}"#, ".*to_q"),
            (r#"{"transformer.r": "four"}"#, "damaged"),
            ("[", "damaged"),
        ] {
            let refused = configs(json).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
    }
}

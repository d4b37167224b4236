//! `--lora`: as text, in JSON, and stored in images.

use std::{path::Path, str::FromStr};

use retouch::{Lora, Parameters, StoredLora};
use serde::{Deserialize, Deserializer};

use crate::{
    console::Console,
    failure::{Failure, Result},
    files::display,
    settings,
};

/// [`Lora`] as text: the file, and its scale after a colon.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraArg(pub Lora);

impl FromStr for LoraArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        // A name can have colons of its own: only a number after the last one is a scale.
        let scaled = text.rsplit_once(':').and_then(|(file, scale)| Some((file, scale.parse::<f64>().ok()?)));
        let (file, scale) = scaled.unwrap_or((text, 1.0));
        if file.is_empty() {
            return Err(
                "give a file, and after it a scale if it should not be 1, e.g. style.safetensors:0.8".to_string()
            );
        }
        Ok(Self(Lora { file: file.into(), scale }))
    }
}

/// In JSON they are a text, or a list of them.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Vec<LoraArg>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Loras {
        One(String),
        Several(Vec<String>),
    }
    let texts = match Option::<Loras>::deserialize(deserializer) {
        Ok(None) => return Ok(None),
        Ok(Some(Loras::One(text))) => vec![text],
        Ok(Some(Loras::Several(texts))) => texts,
        Err(_) => {
            return Err(serde::de::Error::custom("lora is a text like `style.safetensors:0.8`, or a list of them"));
        }
    };
    texts.iter().map(|text| settings::from_text(text)).collect::<std::result::Result<_, _>>().map(Some)
}

/// Refuses to repeat an edit whose LoRAs are no longer where they were, and notes those that are no longer what they were.
pub fn check_stored(from: &Path, stored: &Parameters, console: &Console) -> Result<()> {
    if let Some(gone) = stored.loras.iter().find(|lora| !Lora::from(*lora).file.is_file()) {
        return Err(Failure::Failed(format!(
            "{}: the LoRA that it was made with ({}) is no longer there; give all of its LoRAs where they are now: {}",
            display(from),
            gone.file,
            stored.loras.iter().map(flag).collect::<Vec<_>>().join(" "),
        )));
    }
    for lora in &stored.loras {
        if !lora.is_unchanged()? {
            let (file, from) = (&lora.file, display(from));
            console.note(&format!("note: {file} is not the LoRA that {from} was made with: results differ"));
        }
    }
    Ok(())
}

fn flag(lora: &StoredLora) -> String {
    let path = Path::new(&lora.file);
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    format!("--lora {name}:{}", lora.scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::SettingsArgs;

    fn settings(json: &str) -> SettingsArgs {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_lora_has_a_file_and_a_scale() {
        let lora = |text: &str| text.parse::<LoraArg>().map(|LoraArg(lora)| (lora.file, lora.scale)).unwrap();
        assert_eq!(lora("a.safetensors"), ("a.safetensors".into(), 1.0));
        assert_eq!(lora("a.safetensors:0.8"), ("a.safetensors".into(), 0.8));
        assert_eq!(lora("dir/a:b:-2"), ("dir/a:b".into(), -2.0));
        assert_eq!(lora(r"C:\a.safetensors"), (r"C:\a.safetensors".into(), 1.0));
        assert!("".parse::<LoraArg>().is_err() && ":1".parse::<LoraArg>().is_err());
        for (json, count) in [("{}", 0), (r#"{"lora": "a:0.5"}"#, 1), (r#"{"lora": ["a", "b:2"]}"#, 2)] {
            assert_eq!(settings(json).request(String::new()).unwrap().loras.len(), count, "{json}");
        }
        // A list of none takes away those of the flags.
        let flags = settings(r#"{"lora": "a", "lora_partial": true}"#);
        assert_eq!(settings("{}").or(&flags).lora.map(|loras| loras.len()), Some(1));
        assert_eq!(settings(r#"{"lora": []}"#).or(&flags).lora.map(|loras| loras.len()), Some(0));
        for json in [r#"{"lora": "a:NaN"}"#, r#"{"lora": "a:inf"}"#, r#"{"lora": "a:1000"}"#] {
            assert!(matches!(settings(json).request(String::new()), Err(Failure::Usage(_))), "{json}");
        }
        assert!(serde_json::from_str::<SettingsArgs>(r#"{"lora": 3}"#).is_err());
    }
}

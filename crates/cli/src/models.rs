//! `retouch models`: the models that are known, and those that are here.

use indicatif::DecimalBytes;
use retouch::{
    models::{KnownModel, NANO_KONTEXT, NANO_KONTEXT_ID, known, registry},
    weights::hub::{CachedModel, HubOptions, cached_models},
};
use serde::Serialize;

use crate::{
    args::ModelsArgs,
    console::Console,
    failure::{Failure, Result},
};

pub fn run(args: &ModelsArgs, console: &Console) -> Result<()> {
    let rows = rows(&cached_models(&HubOptions::from_env()));
    let text = if args.json {
        let lines: std::result::Result<Vec<_>, _> = rows.iter().map(serde_json::to_string).collect();
        lines.map_err(|e| Failure::Failed(e.to_string()))?.join("\n") + "\n"
    } else {
        table(&rows)
    };
    console.write(text.as_bytes())
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    about: String,
    state: State,
    /// On disk, or to be downloaded.
    bytes: u64,
    license: String,
    license_url: String,
    /// Whether the licence must be accepted on the hub before the download.
    gated: bool,
    commercial_use: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Embedded,
    Downloaded,
    /// Some files are missing; the next use fetches them.
    Incomplete,
    NotDownloaded,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Downloaded => "downloaded",
            Self::Incomplete => "incomplete",
            Self::NotDownloaded => "not here",
        }
    }
}

/// The known models in the registry's order, then what else is downloaded.
fn rows(cached: &[CachedModel]) -> Vec<Row> {
    let of_known = |model: &KnownModel| {
        let here = cached.iter().find(|cached| cached.id.eq_ignore_ascii_case(&model.id));
        let (state, bytes) = match here {
            _ if model.id == NANO_KONTEXT_ID => {
                (State::Embedded, NANO_KONTEXT.iter().map(|(_, bytes)| bytes.len() as u64).sum())
            }
            Some(here) => state(here),
            None => (State::NotDownloaded, model.download_bytes),
        };
        Row {
            id: model.id.clone(),
            about: model.about.clone(),
            state,
            bytes,
            license: model.license.clone(),
            license_url: model.license_url.clone(),
            gated: model.gated,
            commercial_use: Some(model.commercial_use),
            folder: here.map(|here| here.folder.display().to_string()),
        }
    };
    let others = cached.iter().filter(|cached| known(&cached.id).is_none()).map(|cached| {
        let (state, bytes) = state(cached);
        Row {
            id: cached.id.clone(),
            about: String::new(),
            state,
            bytes,
            license: "see its page".to_string(),
            license_url: format!("https://huggingface.co/{}", cached.id),
            gated: false,
            commercial_use: None,
            folder: Some(cached.folder.display().to_string()),
        }
    });
    registry().iter().map(of_known).chain(others).collect()
}

fn state(cached: &CachedModel) -> (State, u64) {
    (if cached.missing.is_none() { State::Downloaded } else { State::Incomplete }, cached.bytes)
}

fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.id.chars().count()).max().unwrap_or_default();
    let line = |row: &Row| {
        let terms = match (row.commercial_use, row.gated) {
            (Some(false), true) => ", not for commercial use, to be accepted before the download",
            (Some(false), false) => ", not for commercial use",
            (_, true) => ", to be accepted before the download",
            _ => "",
        };
        let size = DecimalBytes(row.bytes).to_string();
        let Row { id, state, license, license_url, about, .. } = row;
        let about = if about.is_empty() { String::new() } else { format!("\n  {about}") };
        format!("{id:width$}  {:10}  {size:>9}  {license}{terms}{about}\n  {license_url}\n", state.name())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use retouch::weights::Pipeline;

    use super::*;

    fn cached(id: &str, missing: Option<&str>) -> CachedModel {
        CachedModel {
            id: id.to_string(),
            folder: "cache".into(),
            pipeline: Pipeline::FluxKontext,
            bytes: 12_300_000_000,
            missing: missing.map(str::to_string),
        }
    }

    #[test]
    fn known_models_come_first_and_say_whether_they_are_here() {
        let downloaded = [cached("black-forest-labs/FLUX.1-Kontext-dev", None), cached("me/mine", Some("vae"))];
        let rows = rows(&downloaded);
        assert_eq!((rows[0].id.as_str(), rows[0].state), (NANO_KONTEXT_ID, State::Embedded));
        let state = |id: &str| rows.iter().find(|row| row.id == id).map(|row| row.state);
        assert_eq!(state("black-forest-labs/FLUX.1-Kontext-dev"), Some(State::Downloaded));
        assert_eq!(state("me/mine"), Some(State::Incomplete));
        assert_eq!(rows.len(), registry().len() + 1);
        let table = table(&rows);
        assert!(table.contains("12.30 GB") && table.contains(&registry()[0].license), "{table}");
    }
}

//! `retouch info`: what an image was made by, or what a model holds.

use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

use indicatif::DecimalBytes;
use retouch::{
    Error, Parameters,
    image::{is_image, read_parameters},
    models::{NANO_KONTEXT, NANO_KONTEXT_ID},
    weights::{Description, FileDescription, Folder, LoraDescription, Pipeline, describe, describe_model},
};
use serde_json::{Value, json};

use crate::{
    args::InfoArgs,
    console::{Console, printable},
    failure::{Failure, Result},
    files::{self, display},
};

pub fn run(args: &InfoArgs, console: &Console) -> Result<()> {
    let path = args.file.as_path();
    let text = if files::is_stdio(path) || looks_like_image(path)? {
        let bytes = files::read(path)?;
        let stored = read_parameters(&bytes, &display(path))?;
        if args.json { line(&stored)? } else { image_text(path, stored.as_ref()) }
    } else {
        let description = describe_model_at(path)?;
        if args.json { line(&description_json(&description))? } else { description_text(&description) }
    };
    console.write(printable(&text).as_bytes())
}

/// Looks at the beginning alone: weight files are large.
fn looks_like_image(path: &Path) -> Result<bool> {
    let failed = |source| Error::Io { file: display(path), source };
    if path.is_dir() || is_embedded(path) {
        return Ok(false);
    }
    let mut beginning = Vec::new();
    File::open(path).and_then(|file| file.take(16).read_to_end(&mut beginning)).map_err(failed)?;
    // The length that begins a safetensors file can look like BMP's two letters.
    let is_safetensors = beginning.get(8) == Some(&b'{');
    Ok(is_image(&beginning) && !is_safetensors)
}

fn line(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map(|json| json + "\n").map_err(|e| Failure::Failed(e.to_string()))
}

fn image_text(path: &Path, stored: Option<&Parameters>) -> String {
    let Some(made) = stored else {
        return format!("{}: an image without parameters of retouch\n", display(path));
    };
    let size = |(width, height): (usize, usize)| format!("{width}x{height}");
    let mut rows = vec![
        ("prompt", Some(made.prompt.clone())),
        ("negative prompt", made.negative_prompt.clone()),
        ("true cfg", made.negative_prompt.as_ref().map(|_| made.true_cfg.to_string())),
        ("model", Some(made.model.clone())),
    ];
    rows.extend(made.single_files.iter().map(|(option, file)| (option.trim_start_matches('-'), Some(file.clone()))));
    rows.extend(made.loras.iter().map(|lora| ("lora", Some(format!("{} at {}", lora.file, lora.scale)))));
    rows.extend([
        ("seed", Some(made.seed.to_string())),
        ("image of batch", made.batch.map(|(image, images)| format!("{} of {images}", image + 1))),
        ("steps", Some(made.steps.to_string())),
        ("guidance", made.guidance.map(|guidance| guidance.to_string())),
        ("prompt limit", Some(format!("{} tokens", made.max_sequence_length))),
        ("size", Some(size((made.width, made.height)))),
        ("source", made.source_name.clone()),
        ("source seen at", made.reference.map(size)),
        ("quantised", made.quantize.clone()),
        ("computed", Some(format!("on {} in {}", made.device, made.dtype))),
        ("text encoders", made.encoders.as_ref().map(|place| format!("on {place}"))),
        ("by", Some(format!("retouch {}", made.version))),
    ]);
    rows.retain(|(_, value)| value.is_some());
    rows.into_iter().map(|(name, value)| format!("{name:16}{}\n", value.unwrap_or_default())).collect()
}

/// `nano-kontext` is the model inside this program, unless a file has that name.
fn is_embedded(path: &Path) -> bool {
    path.as_os_str() == NANO_KONTEXT_ID && !path.exists()
}

/// Describes weights without reading them.
fn describe_model_at(path: &Path) -> Result<Description> {
    let described = if is_embedded(path) {
        describe_model(&Folder::embedded(NANO_KONTEXT_ID, NANO_KONTEXT)).map(Description::Model)
    } else {
        describe(path)
    };
    Ok(described.map_err(Error::from)?)
}

fn description_json(description: &Description) -> Value {
    let file = |format: &str, file: &FileDescription| {
        let FileDescription { file, kind, tensors, parameters, bytes, dtypes, metadata, lora } = file;
        let mut json = json!({
            "format": format, "file": file, "kind": kind, "tensors": tensors, "parameters": parameters, "bytes": bytes,
            "dtypes": dtypes, "metadata": metadata,
        });
        if let Some(lora) = lora {
            json["lora"] = json!({
                "kinds": lora.kinds, "naming": lora.naming, "ranks": lora.ranks, "targets": lora.targets,
                "unknown_tensors": lora.unknown, "made_for": lora.made_for,
            });
        }
        json
    };
    match description {
        Description::Safetensors(weights) => file("safetensors", weights),
        Description::Gguf(weights) => file("gguf", weights),
        Description::Model(model) => {
            let parts = model.components.iter().map(|(part, weights)| (part.folder(), file("safetensors", weights)));
            json!({
                "format": "model folder",
                "folder": model.folder,
                "pipeline": pipeline_name(model.pipeline),
                "components": parts.collect::<BTreeMap<_, _>>(),
            })
        }
    }
}

fn description_text(description: &Description) -> String {
    match description {
        Description::Safetensors(weights) => file_text("safetensors", weights),
        Description::Gguf(weights) => file_text("GGUF", weights),
        Description::Model(model) => {
            let mut text = format!("{}: {}\n", model.folder.display(), pipeline_name(model.pipeline));
            let mut bytes = 0;
            for (part, weights) in &model.components {
                text += &format!("{:16}{}\n", part.folder(), weights_text(weights));
                bytes += weights.bytes;
            }
            text + &format!("{:16}{}\n", "together", DecimalBytes(bytes))
        }
    }
}

fn pipeline_name(pipeline: Pipeline) -> &'static str {
    match pipeline {
        Pipeline::FluxKontext => "FLUX.1 Kontext, edits images",
        Pipeline::Flux => "FLUX.1, makes images from words",
    }
}

fn file_text(format: &str, weights: &FileDescription) -> String {
    let mut text = format!("{}: {} in {format}\n{}\n", weights.file, weights.kind, weights_text(weights));
    if let Some(lora) = &weights.lora {
        text += &lora_text(lora);
    }
    for (key, value) in &weights.metadata {
        text += &format!("{key}: {}\n", shortened(value));
    }
    text
}

fn weights_text(weights: &FileDescription) -> String {
    let dtypes: Vec<_> = weights.dtypes.iter().map(|(dtype, count)| format!("{count} in {dtype}")).collect();
    let parameters = match weights.parameters {
        n if n >= 1_000_000_000 => format!("{:.2} billion", n as f64 / 1e9),
        n if n >= 1_000_000 => format!("{:.2} million", n as f64 / 1e6),
        n => n.to_string(),
    };
    let FileDescription { tensors, bytes, .. } = weights;
    format!("{tensors} tensors ({}), {parameters} parameters, {}", dtypes.join(", "), DecimalBytes(*bytes))
}

fn lora_text(lora: &LoraDescription) -> String {
    let LoraDescription { kinds, naming, ranks, targets, unknown, made_for } = lora;
    let joined = |items: Vec<String>| if items.is_empty() { "none".to_string() } else { items.join(", ") };
    let mut text = format!("kind: {}\n", joined(kinds.iter().map(|kind| kind.to_string()).collect()));
    text += &format!("names: {naming}\n");
    if !ranks.is_empty() {
        text += &format!("rank: {}\n", joined(ranks.iter().map(usize::to_string).collect()));
    }
    let targets = targets.iter().map(|(component, count)| format!("{count} in {component}"));
    text += &format!("changes: {}\n", joined(targets.collect()));
    if *unknown > 0 {
        text += &format!("tensors with no meaning for FLUX.1: {unknown}\n");
    }
    if let Some(model) = made_for {
        text += &format!("made for: {model}\n");
    }
    text
}

/// Writers put whole training logs into metadata.
fn shortened(value: &str) -> String {
    const MOST: usize = 200;
    let start: String = value.chars().take(MOST).collect();
    if start.len() < value.len() { format!("{start} ({} characters)", value.chars().count()) } else { start }
}

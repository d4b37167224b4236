//! `retouch info`: what an image was made by, or what a model holds.

use std::{fs::File, io::Read, path::Path};

use retouch::{
    Error, Parameters,
    image::{is_image, read_parameters},
};

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
        if args.json { json(&stored)? } else { image_text(path, stored.as_ref()) }
    } else {
        model_text(path, args.json)?
    };
    console.write(text.as_bytes())
}

/// Looks at the beginning alone: weight files are large.
fn looks_like_image(path: &Path) -> Result<bool> {
    let failed = |source| Error::Io { file: display(path), source };
    if path.is_dir() {
        return Ok(false);
    }
    let mut beginning = Vec::new();
    File::open(path).and_then(|file| file.take(16).read_to_end(&mut beginning)).map_err(failed)?;
    // The length that begins a safetensors file can look like BMP's two letters.
    let is_safetensors = beginning.get(8) == Some(&b'{');
    Ok(is_image(&beginning) && !is_safetensors)
}

fn json(value: &impl serde::Serialize) -> Result<String> {
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
        ("seed", Some(made.seed.to_string())),
        ("image of batch", made.batch.map(|(image, images)| format!("{} of {images}", image + 1))),
        ("steps", Some(made.steps.to_string())),
        ("guidance", Some(made.guidance.to_string())),
        ("size", Some(size((made.width, made.height)))),
        ("source", made.source_name.clone()),
        ("source seen at", made.reference.map(size)),
        ("computed", Some(format!("on {} in {}", made.device, made.dtype))),
        ("by", Some(format!("retouch {}", made.version))),
    ];
    rows.retain(|(_, value)| value.is_some());
    rows.into_iter().map(|(name, value)| format!("{name:16}{}\n", printable(&value.unwrap_or_default()))).collect()
}

fn model_text(path: &Path, json: bool) -> Result<String> {
    let _ = json;
    Err(Failure::Failed(format!("{}: todo", path.display())))
}

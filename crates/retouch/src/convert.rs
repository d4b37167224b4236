//! Weights in fewer bits, as a file of their own.

use std::{ops::ControlFlow, path::Path};

use retouch_weights::{
    Component, WeightsError,
    convert::{Conversion, FileFormat, Target},
};

use crate::{
    Error, Result,
    image::{check_writable, write_whole},
};

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Converted {
    pub component: Component,
    pub bytes: usize,
}

/// Writes the transformer, or else the T5 encoder, that `input` holds to the file `output`, a GGUF or safetensors file by its
/// extension, with its large matrices as `target`.
///
/// Matrices whose names match one of the patterns `keep` stay as they are: a pattern is found anywhere in a name, `*` in it is
/// anything. `progress` hears how many of how many bytes are written. Memory does not grow with the files, and `output` is there
/// whole or not at all.
pub fn convert(
    input: &Path,
    output: &Path,
    target: Target,
    keep: &[String],
    overwrite: bool,
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Converted> {
    let extension = output.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    let format = match extension.as_deref() {
        Some("gguf") => FileFormat::Gguf,
        Some("safetensors") => FileFormat::Safetensors,
        _ => {
            return Err(Error::BadRequest(format!(
                "{}: the format is told by the name; let it end in .gguf or .safetensors",
                output.display()
            )));
        }
    };
    check_writable(output, overwrite)?;
    let conversion = Conversion::plan(input, format, target, keep)?;
    let bytes = conversion.bytes()?;
    write_whole(output, overwrite, |out| {
        conversion.write(out, &mut |done| progress(done, bytes)).map_err(|error| match error {
            WeightsError::Io { source, .. } => Error::Io { file: output.display().to_string(), source },
            other => other.into(),
        })
    })?;
    Ok(Converted { component: conversion.component(), bytes })
}

//! Lists the files of `nano-kontext/` for the crate to embed.

use std::{
    env, fs,
    io::Result,
    path::{Path, PathBuf},
};

const MODEL: &str = "nano-kontext";

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed={MODEL}");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join(MODEL);
    let mut files = Vec::new();
    list(&root, String::new(), &mut files)?;
    files.sort();
    // By way of `env!`, which the compiler tracks: a build folder that is moved with its sources stays right.
    let entries: String = files
        .iter()
        .map(|name| {
            let path = format!("/{MODEL}/{name}");
            format!("    ({name:?}, include_bytes!(concat!(env!(\"CARGO_MANIFEST_DIR\"), {path:?})).as_slice()),\n")
        })
        .collect();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("nano_kontext.rs"), format!("&[\n{entries}]\n"))
}

/// The paths, with slashes, of all files below `folder` but the model card and its picture.
fn list(folder: &Path, prefix: String, files: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            list(&entry.path(), format!("{prefix}{name}/"), files)?;
        } else if !name.ends_with(".md") && !name.ends_with(".png") && !name.starts_with('.') {
            files.push(format!("{prefix}{name}"));
        }
    }
    Ok(())
}

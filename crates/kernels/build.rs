//! With the feature `cuda`: compiles the kernels in src/cuda/kernels, one image per file.
//!
//! Each image holds machine code for [`GENERATIONS`] and, for GPUs newer than those, PTX that their driver compiles. It does
//! not depend on CUDA_COMPUTE_CAP, which is what candle's own kernels are compiled for.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Compute capabilities: A100, RTX 30, RTX 40, H100. What is between them runs the code of the one below.
const GENERATIONS: [u32; 4] = [80, 86, 89, 90];

const SOURCES: &str = "src/cuda/kernels";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(outer_scales)");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed={SOURCES}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo has set no OUT_DIR")?);
    let nvcc = nvcc();
    let toolkit = toolkit(&nvcc)?;
    println!("cargo::rustc-env=RETOUCH_CUDA_TOOLKIT={toolkit}");
    // cublasLt takes scales for the rows of both factors since 12.9.
    let (major, minor) = toolkit.split_once('.').unwrap_or((toolkit.as_str(), "0"));
    if (major.parse::<u32>()?, minor.parse::<u32>()?) >= (12, 9) {
        println!("cargo::rustc-cfg=outer_scales");
    }
    let mut sources =
        fs::read_dir(SOURCES)?.map(|file| Ok(file?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    let mut images = String::new();
    for source in &sources {
        let name = source.file_stem().and_then(|name| name.to_str()).ok_or("a kernel's file name is not UTF-8")?;
        let image = out.join(name).with_extension("fatbin");
        compile(&nvcc, source, &image)?;
        images += &format!("({name:?}, include_bytes!({image:?}).as_slice()),\n");
    }
    fs::write(out.join("images.rs"), format!("&[\n{images}]\n"))?;
    Ok(())
}

/// As candle's build finds it: `NVCC`, else the toolkit's, else the one in `PATH`.
fn nvcc() -> PathBuf {
    let of_toolkit =
        |variable| Some(PathBuf::from(env::var_os(variable)?).join("bin/nvcc")).filter(|nvcc| nvcc.exists());
    env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(|| of_toolkit("CUDA_HOME"))
        .or_else(|| of_toolkit("CUDA_PATH"))
        .unwrap_or_else(|| "nvcc".into())
}

/// The toolkit's version, such as 13.0.
fn toolkit(nvcc: &Path) -> Result<String, Box<dyn Error>> {
    let output = Command::new(nvcc).arg("--version").output().map_err(|e| not_run(nvcc, &e))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    Ok(version.ok_or_else(|| format!("{} does not say its version but: {text}", nvcc.display()))?.to_string())
}

fn compile(nvcc: &Path, source: &Path, image: &Path) -> Result<(), Box<dyn Error>> {
    let mut command = Command::new(nvcc);
    // Compressed to a quarter; the driver unpacks what it loads.
    command.args(["-std=c++17", "-O3", "-fatbin", "-Xfatbin", "-compress-all"]);
    for generation in GENERATIONS {
        command.args(["-gencode", &format!("arch=compute_{generation},code=sm_{generation}")]);
    }
    if let Some(newest) = GENERATIONS.last() {
        command.args(["-gencode", &format!("arch=compute_{newest},code=compute_{newest}")]);
    }
    let output = command.arg("-o").arg(image).arg(source).output().map_err(|e| not_run(nvcc, &e))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", source.display(), String::from_utf8_lossy(&output.stderr)).into())
}

fn not_run(nvcc: &Path, error: &std::io::Error) -> String {
    format!("{}: {error}; the feature `cuda` needs a CUDA toolkit (scripts/cuda-home.sh makes one)", nvcc.display())
}

//! What reading a transformer takes at its peak, of every format, beside what of it stays; and what copying a file takes.
//!
//! `cargo bench --bench loading` in some minutes; Linux only. The transformer has FLUX.1's width, 2 + 6 blocks and random
//! values: 3.3 GB in bf16, 6.4 GB in f32, 14 GB on disk for the time (`TMPDIR` says where). Every format is read in a process
//! of its own. Its own memory (`RssAnon`) is looked at every millisecond; the system's peak (`VmHWM`) counts mapped pages of the
//! file as well, which are given back after each tensor and are the system's to take at any time.

#[path = "support/random.rs"]
mod random;

use std::{
    fs,
    ops::ControlFlow,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use candle_core::{DType, Device};
use retouch::{
    Target, convert,
    weights::{Component, ModelFile, Store, Weights},
};
use retouch_flow::{FluxConfig, FluxTransformer};

/// The file, in what it is computed, and what it becomes in memory.
const READS: [(&str, &str, &str); 12] = [
    ("f32.safetensors", "f32", ""),
    ("bf16.safetensors", "f32", ""),
    ("bf16.safetensors", "bf16", ""),
    ("f16.safetensors", "f32", ""),
    ("fp8.safetensors", "f32", ""),
    ("fp8_scaled.safetensors", "f32", ""),
    ("q8_0.gguf", "f32", ""),
    ("q4_k.gguf", "f32", ""),
    ("q4_0.gguf", "bf16", ""),
    ("bf16.safetensors", "f32", "q8_0"),
    ("bf16.safetensors", "f32", "q4_k"),
    ("f32.safetensors", "f32", "fp8_scaled"),
];

/// The file that is copied in the end.
const COPIED: &str = "bf16.safetensors";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--read", file, dtype, target] => return read(Path::new(file), dtype, target),
        ["--copy", file, out] => return copy(Path::new(file), Path::new(out)),
        _ => {}
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    random::write_f32(&path("f32.safetensors"), &random::flux(&config()));
    let one = |arguments: &[&str]| {
        let ran = Command::new(std::env::current_exe().unwrap()).args(arguments).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap().trim().to_string()
    };
    println!(
        "| file | computed in | in memory as | stays MB | own peak MB | / stays | with mapped pages MB | / stays |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (at, (name, dtype, target)) in READS.into_iter().enumerate() {
        make(folder.path(), name);
        println!("| {name} | {dtype} | {target} | {} |", one(&["--read", path(name).to_str().unwrap(), dtype, target]));
        if name != COPIED && READS[at + 1..].iter().all(|(later, ..)| *later != name) {
            fs::remove_file(path(name)).unwrap();
        }
    }
    println!("\n| copied | MB | own peak MB | with mapped pages MB |\n|---|---|---|---|");
    let [from, to] = [COPIED, "copy.safetensors"].map(|name| path(name).display().to_string());
    println!("| bf16 to bf16 | {} |", one(&["--copy", &from, &to]));
}

fn config() -> FluxConfig {
    FluxConfig { num_layers: 2, num_single_layers: 6, ..FluxConfig::dev() }
}

/// Converts the first file where this one is not there yet.
fn make(folder: &Path, name: &str) {
    let path = folder.join(name);
    if path.exists() {
        return;
    }
    let target: Target = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    convert_to(&folder.join("f32.safetensors"), &path, target);
}

fn convert_to(from: &Path, to: &Path, target: Target) {
    convert(from, to, target, &[], false, |_, _| ControlFlow::Continue(())).unwrap();
}

/// Prints a row of the first table.
fn read(file: &Path, dtype: &str, target: &str) {
    let dtype = if dtype == "f32" { DType::F32 } else { DType::BF16 };
    let store = Store::open(vec![ModelFile::open(file).unwrap()]).unwrap();
    let weights = Component::Transformer.in_store(store, dtype, &Device::Cpu).unwrap();
    let weights = match target.parse() {
        Ok(target) => weights.quantised(Component::Transformer, target),
        Err(_) => weights,
    };
    let load = |weights: &Weights| FluxTransformer::load(weights, &config());
    let stays: u64 = weights.count(load).unwrap().values().sum();
    let ([own, mapped], _transformer) = peaks(|| load(&weights).unwrap());
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let share = |bytes: u64| bytes as f64 / stays as f64;
    println!("{:.0} | {:.0} | {:.2} | {:.0} | {:.2}", mb(stays), mb(own), share(own), mb(mapped), share(mapped));
}

/// Prints a row of the second table.
fn copy(from: &Path, to: &Path) {
    let ([own, mapped], ()) = peaks(|| convert_to(from, to, Target::Bf16));
    let written = fs::metadata(to).unwrap().len();
    println!("{:.0} | {:.0} | {:.0}", written as f64 / 1e6, own as f64 / 1e6, mapped as f64 / 1e6);
}

/// The most that `f` takes beside what was there: without mapped pages of files, and with them.
fn peaks<T>(f: impl FnOnce() -> T) -> ([u64; 2], T) {
    let before = [status("RssAnon:"), status("VmRSS:")];
    fs::write("/proc/self/clear_refs", "5").unwrap(); // the system's peak counts anew, see proc_pid_clear_refs(5)
    let (own, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                own.fetch_max(status("RssAnon:"), Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let result = f();
        done.store(true, Relaxed);
        result
    });
    let peaks = [own.load(Relaxed), status("VmHWM:")];
    ([peaks[0].saturating_sub(before[0]), peaks[1].saturating_sub(before[1])], result)
}

/// A line of proc_pid_status(5) in bytes.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

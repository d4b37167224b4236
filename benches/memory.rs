//! How near the memory planner's predictions are: the peak of each stage of an edit on the CPU as planned, beside the peak
//! of the process (`VmHWM`, less what it had before the model was opened).
//!
//! `cargo bench --bench memory [-- nano] [wide] [lora] [merged] [vae]`; Linux only. `nano` is the embedded model at several
//! sizes, `wide` a transformer of FLUX.1's width with 2 + 4 blocks and random weights (2.5 GB on disk for the time), `lora` the
//! same with a LoRA of rank 256 beside all of its blocks' matrices, `merged` the same again, computed in bf16, which has it
//! merged, `vae` FLUX.1's VAE with random weights. Every edit is a process of its own, run once without a limit, and with
//! limits below that until the planner refuses.

#[path = "support/random.rs"]
mod random;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use retouch::{
    Control, EditRequest, Engine, EngineOptions, Event, Lora, MemoryPlan, ModelSource, NoProgress, OutputSize,
    Precision, ReferenceSize, Seeds, Stage, image::RgbImage, memory::Pixels, models::NANO_KONTEXT,
};
use retouch_flow::FluxConfig;
use serde::{Deserialize, Serialize};

const MODELS: [(&str, &[usize]); 5] =
    [("nano", &[256, 512, 1024]), ("wide", &[256, 512]), ("lora", &[256]), ("merged", &[256]), ("vae", &[512, 1024])];

/// In a model's folder.
const LORA: &str = "lora.safetensors";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [flag, model, side, limit] = arguments.as_slice()
        && flag == "--one"
    {
        return one(model, side.parse().unwrap(), limit.parse().ok());
    }
    println!("| model | size | stage | how | predicted MB | measured MB | predicted / measured |");
    println!("|---|---|---|---|---|---|---|");
    for (name, sides) in MODELS {
        if arguments.is_empty() || arguments.iter().any(|argument| argument == name) {
            let folder = tempfile::tempdir().unwrap();
            let model = folder.path().join(name);
            make(name, &model);
            for &side in sides {
                strategies(name, &model, side);
            }
        }
    }
}

/// An edit in a process of its own, without a limit and then with lower and lower ones.
fn strategies(name: &str, model: &Path, side: usize) {
    let mut limit = None;
    for _ in 0..3 {
        let program = std::env::current_exe().unwrap();
        let place = if name == "nano" { "nano-kontext".to_string() } else { model.display().to_string() };
        let text = limit.map_or("none".to_string(), |limit: u64| limit.to_string());
        let ran = Command::new(program).args(["--one", &place, &side.to_string(), &text]).output().unwrap();
        if !ran.status.success() {
            return; // refused: there is no plan for less
        }
        let measured: Measured = serde_json::from_slice(&ran.stdout).unwrap();
        for StageResult { stage, how, predicted, measured } in &measured.stages {
            let (p, m) = (*predicted as f64 / 1e6, *measured as f64 / 1e6);
            println!("| {name} | {side} | {stage} | {how} | {p:.0} | {m:.0} | {:.2} |", p / m);
        }
        // As much below as makes another plan likely.
        limit = Some(measured.peak * 7 / 10);
    }
}

#[derive(Serialize, Deserialize)]
struct Measured {
    peak: u64,
    stages: Vec<StageResult>,
}

#[derive(Serialize, Deserialize)]
struct StageResult {
    stage: String,
    how: String,
    predicted: u64,
    measured: u64,
}

/// Measures one edit and prints it as JSON.
fn one(model: &str, side: usize, limit: Option<u64>) {
    // The embedded model's pages are the program's.
    let touched: usize = NANO_KONTEXT.iter().flat_map(|(_, bytes)| bytes.iter()).map(|&byte| usize::from(byte)).sum();
    let image = RgbImage::from_fn(side as u32, side as u32, |x, y| image::Rgb([x as u8, y as u8, touched as u8]));
    let request = EditRequest {
        prompt: "make the circle blue".into(),
        image: Some(image),
        steps: Some(1),
        size: OutputSize::Exact { width: side, height: side },
        reference_size: ReferenceSize::Exact { width: side, height: side },
        seeds: Seeds::Each(vec![1]),
        loras: Some(Path::new(model).join(LORA))
            .filter(|file| file.exists())
            .map(|file| Lora { file, scale: 1.0 })
            .into_iter()
            .collect(),
        ..Default::default()
    };
    let precision = model.ends_with("merged").then_some(Precision::Bf16);
    let source = ModelSource { base: Some(model.to_string()), ..Default::default() };
    let before = status("VmRSS:");
    let options = EngineOptions { vram_limit: limit, precision, ..Default::default() };
    let mut engine = Engine::open(&source, options, &mut NoProgress).unwrap();
    let mut plan: Option<MemoryPlan> = None;
    let mut peaks: Vec<(Stage, u64)> = Vec::new();
    let mut running = None;
    let mut note = |event: Event<'_>| {
        match event {
            Event::Planned { memory } => plan = Some(memory.clone()),
            Event::Loading { stage, .. } => {
                peaks.extend(running.replace(stage).map(|stage| (stage, status("VmHWM:"))));
                // From here on the peak counts anew, see proc_pid_clear_refs(5).
                fs::write("/proc/self/clear_refs", "5").unwrap();
            }
            _ => {}
        }
        Control::Continue
    };
    if let Err(refusal) = engine.edit(&request, &mut note) {
        eprintln!("{refusal}");
        std::process::exit(1);
    }
    peaks.extend(running.map(|stage| (stage, status("VmHWM:"))));
    let plan = plan.unwrap();
    let stages = plan.stages.iter().zip(&peaks).map(|(planned, (stage, peak))| {
        assert_eq!(planned.stage, *stage);
        StageResult {
            stage: format!("{stage:?}"),
            how: how(&plan, *stage),
            predicted: planned.peak,
            measured: peak.saturating_sub(before),
        }
    });
    let measured = Measured { peak: plan.peak(), stages: stages.collect() };
    println!("{}", serde_json::to_string(&measured).unwrap());
}

fn how(plan: &MemoryPlan, stage: Stage) -> String {
    let resident = |layers: usize, of: usize| format!("{layers} of {of} blocks stay");
    let pixels = |pixels: Pixels| match pixels {
        Pixels::Whole => "whole".to_string(),
        Pixels::Bands(bands) => format!("bands of {} MiB", bands.bytes >> 20),
    };
    match stage {
        Stage::TextEncoders => resident(plan.text.layers, plan.text.of),
        Stage::Transformer => {
            let mlp = plan.mlp_tokens.map_or(String::new(), |tokens| format!(", MLP {tokens} tokens"));
            resident(plan.transformer.layers, plan.transformer.of) + &mlp
        }
        Stage::VaeEncoder => pixels(plan.encode.unwrap()),
        Stage::VaeDecoder => pixels(plan.decode),
    }
}

/// A line of proc_pid_status(5) in bytes.
fn status(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// The embedded model as a folder, with another transformer or VAE.
fn make(name: &str, model: &Path) {
    if name == "nano" {
        return;
    }
    for (file, bytes) in NANO_KONTEXT {
        let path = model.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    let weights = |part: &str| -> PathBuf { model.join(part).join("diffusion_pytorch_model.safetensors") };
    if name == "vae" {
        random::write(&weights("vae"), &random::vae());
        let config = serde_json::json!({
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": vec!["DownEncoderBlock2D"; 4],
            "up_block_types": vec!["UpDecoderBlock2D"; 4],
            "layers_per_block": 2, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
            "use_quant_conv": false, "use_post_quant_conv": false,
        });
        fs::write(model.join("vae/config.json"), config.to_string()).unwrap();
        return;
    }
    let config = FluxConfig {
        num_layers: 2,
        num_single_layers: 4,
        joint_attention_dim: 128,
        pooled_projection_dim: 128,
        ..FluxConfig::dev()
    };
    random::write(&weights("transformer"), &random::flux(&config));
    if name != "wide" {
        random::write(&model.join(LORA), &random::lora(&config, 256));
    }
    let json = serde_json::json!({
        "in_channels": config.in_channels, "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers, "attention_head_dim": config.attention_head_dim,
        "num_attention_heads": config.num_attention_heads, "joint_attention_dim": config.joint_attention_dim,
        "pooled_projection_dim": config.pooled_projection_dim, "guidance_embeds": true,
    });
    fs::write(model.join("transformer/config.json"), json.to_string()).unwrap();
}

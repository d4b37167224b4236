//! What the step cache saves and what it costs, beside the plainer way to save: fewer steps.
//!
//! `cargo bench --bench step_cache` edits scenes with nano-kontext in 28 steps, then with the cache at several thresholds,
//! then in as many steps as those computed. Each result is compared with that of all 28 steps. A table is printed; the
//! times are those of the steps alone.

use std::error::Error;

use image::RgbImage;
use retouch::{EditRequest, Engine, EngineOptions, ModelSource, NoProgress, Seeds, Silent};

const STEPS: usize = 28;
const THRESHOLDS: [f64; 5] = [0.02, 0.05, 0.1, 0.2, 0.4];
const PROMPTS: [&str; 6] = [
    "make the circle blue",
    "remove the circle",
    "make the background green",
    "turn the circle into a star",
    "make it black and white",
    "invert the colors",
];

/// All edits of a setting.
struct Made {
    images: Vec<RgbImage>,
    seconds: f64,
    /// Passes through the transformer of an edit, on average.
    passes: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images/scene.png");
    let scene = retouch::image::read_image(&std::fs::read(path)?, path)?;
    let options = EngineOptions { keep_loaded: true.into(), ..Default::default() };
    let mut engine = Engine::open(&ModelSource::default(), options, &mut NoProgress)?;
    let mut edit = |steps: usize, cache: Option<f64>| -> Result<Made, Box<dyn Error>> {
        let mut made = Made { images: Vec::new(), seconds: 0.0, passes: 0.0 };
        for (seed, prompt) in (1..).zip(PROMPTS) {
            let request = EditRequest {
                prompt: prompt.into(),
                image: Some(scene.clone()),
                steps: Some(steps),
                cache,
                seeds: Seeds::Each(vec![seed]),
                ..Default::default()
            };
            let result = engine.edit(&request, &mut Silent)?;
            made.seconds += result.timings.steps_seconds;
            for image in result.images {
                made.passes += (steps - image.reused_passes) as f64 / PROMPTS.len() as f64;
                made.images.push(image.pixels);
            }
        }
        Ok(made)
    };
    edit(STEPS, None)?; // loads the model and warms the caches
    let all = edit(STEPS, None)?;
    println!("| setting | passes per edit | speed | PSNR, median | least |\n|---|---|---|---|---|");
    let row = |setting: String, made: &Made| {
        let mut psnr: Vec<_> = made.images.iter().zip(&all.images).map(|(a, b)| psnr(a, b)).collect();
        psnr.sort_by(f64::total_cmp);
        let (speed, median) = (all.seconds / made.seconds, (psnr[2] + psnr[3]) / 2.0);
        println!("| {setting} | {:.1} | {speed:.2}x | {median:.1} dB | {:.1} dB |", made.passes, psnr[0]);
    };
    for threshold in THRESHOLDS {
        let cached = edit(STEPS, Some(threshold))?;
        row(format!("`--cache {threshold}`"), &cached);
        let steps = (cached.passes.round() as usize).clamp(1, STEPS);
        row(format!("`--steps {steps}`"), &edit(steps, None)?);
    }
    Ok(())
}

/// Of 8-bit pictures, in decibels; 99 for equal ones.
fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares: f64 = a.as_raw().iter().zip(b.as_raw()).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    let mean = squares / a.as_raw().len() as f64;
    (10.0 * (255.0f64.powi(2) / mean.max(1e-9)).log10()).min(99.0)
}

//! The library as a program uses it that follows an edit: images one by one, and a stop at every point.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use image::RgbImage;
use retouch::{
    Control, EditRequest, Encoders, Engine, EngineOptions, Error, Event, KeepLoaded, ModelSource, NoProgress, Observer,
    Precision, ReferenceSize, Seeds, Silent, Stage,
};

fn tiny() -> Engine {
    tiny_with(EngineOptions::default())
}

fn tiny_with(options: EngineOptions) -> Engine {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-kontext");
    let source = ModelSource { base: Some(model.display().to_string()), ..Default::default() };
    Engine::open(&source, options, &mut NoProgress).unwrap()
}

fn request(seeds: &[u64]) -> EditRequest {
    EditRequest {
        prompt: "bluer".into(),
        image: Some(RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8 * 4, y as u8 * 5, 99]))),
        steps: Some(2),
        reference_size: ReferenceSize::Keep,
        seeds: Seeds::Each(seeds.to_vec()),
        ..Default::default()
    }
}

#[test]
fn images_come_one_by_one_as_they_are_decoded() {
    let (mut engine, request) = (tiny(), request(&[1, 2, 3]));
    let all = engine.edit(&request, &mut Silent).unwrap().images;
    let mut decoded = 0;
    let mut count = |event: Event<'_>| {
        decoded += usize::from(matches!(event, Event::Computing { stage: Stage::VaeDecoder }));
        Control::Continue
    };
    let mut seeds = Vec::new();
    let made = engine.edit_each(&request, &mut count, |image, timings| {
        assert_eq!(image.pixels, all[seeds.len()].pixels);
        assert!(timings.decode_seconds > 0.0);
        seeds.push(image.parameters.seed);
        if seeds.len() == 2 { Control::Cancel } else { Control::Continue }
    });
    assert!(matches!(made, Err(Error::Cancelled)));
    assert_eq!(seeds, [1, 2]);
    // The third was not begun.
    assert_eq!(decoded, 2);
}

#[test]
fn every_event_can_end_an_edit() {
    let (mut engine, request) = (tiny(), request(&[1, 2]));
    let mut events = 0;
    let mut count = |_: Event<'_>| {
        events += 1;
        Control::Continue
    };
    engine.edit(&request, &mut count).unwrap();
    // Memory planned, four stages loaded and begun, two steps of two images, and the second image decoded.
    assert_eq!(events, 1 + 4 + 4 + 4 + 1);
    for last in 1..=events {
        let mut seen = 0;
        let mut stop = |_: Event<'_>| {
            seen += 1;
            if seen == last { Control::Cancel } else { Control::Continue }
        };
        assert!(matches!(engine.edit(&request, &mut stop), Err(Error::Cancelled)), "event {last}");
        assert_eq!(seen, last);
    }
}

/// Sets its flag when a stage is about to be read, as a signal may while it is.
struct FlagAt(Stage, Arc<AtomicBool>);

impl Observer for FlagAt {
    fn on(&mut self, event: Event<'_>) -> Control {
        match event {
            Event::Loading { stage, .. } if stage == self.0 => self.1.store(true, Ordering::Relaxed),
            Event::Computing { stage } => assert_ne!(stage, self.0, "it was read to the end"),
            _ => {}
        }
        Control::Continue
    }

    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(self.1.clone())
    }
}

#[test]
fn reading_weights_can_be_ended() {
    for stage in [Stage::TextEncoders, Stage::VaeEncoder, Stage::Transformer, Stage::VaeDecoder] {
        let edited = tiny().edit(&request(&[1]), &mut FlagAt(stage, Arc::default()));
        assert!(matches!(edited, Err(Error::Cancelled)), "{stage:?}");
    }
}

/// Each limit is just below what the plan before takes.
#[test]
fn every_plan_makes_the_same_picture_down_to_a_limit_that_is_refused() {
    let (mut limit, mut plans) = (None, Vec::new());
    let mut first = None;
    let refusal = loop {
        let mut plan = None;
        let mut note = |event: Event<'_>| {
            if let Event::Planned { memory } = event {
                plan = Some(memory.clone());
            }
            Control::Continue
        };
        let mut engine = tiny_with(EngineOptions { vram_limit: limit, ..Default::default() });
        // Few tokens of text, so that the transformer takes the most.
        let request = EditRequest { max_sequence_length: Some(32), ..request(&[1]) };
        let made = match engine.edit(&request, &mut note) {
            Ok(made) => made.images[0].pixels.clone(),
            Err(refusal) => break refusal,
        };
        // Nothing but the order of sums may differ: a level of 255 at most.
        let picture = first.get_or_insert(made.clone());
        assert!(picture.iter().zip(made.iter()).all(|(a, b)| a.abs_diff(*b) <= 1));
        let plan = plan.unwrap();
        limit = Some(plan.peak() - 1);
        plans.push(plan);
    };
    assert!(plans[0].transformer.layers == plans[0].transformer.of && plans[0].text.layers == plans[0].text.of);
    assert!(plans.iter().any(|plan| plan.transformer.layers < plan.transformer.of), "{plans:?}");
    assert!(matches!(&refusal, Error::Memory(sentence) if sentence.contains("--vram-limit")), "{refusal}");
}

#[test]
fn a_model_that_is_kept_is_planned_as_a_whole() {
    let mut engine =
        tiny_with(EngineOptions { vram_limit: Some(1 << 32), keep_loaded: true.into(), ..Default::default() });
    assert!(engine.edit(&request(&[1]), &mut Silent).is_ok());
    let mut engine =
        tiny_with(EngineOptions { vram_limit: Some(1 << 20), keep_loaded: true.into(), ..Default::default() });
    let refused = engine.edit(&request(&[1]), &mut Silent).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refused.contains("leave out --keep-loaded"), "{refused}");
}

#[test]
fn text_encoders_on_the_cpu_compute_in_f32_and_hand_over_in_the_dtype_of_the_rest() {
    let traced = |encoders, precision| {
        let options = EngineOptions { encoders, precision: Some(precision), ..Default::default() };
        let (made, trace) = tiny_with(options).edit_traced(&request(&[1]), &mut Silent).unwrap();
        let mut tensors = trace.tensors().unwrap();
        let mut values = |name: &str| tensors.remove(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let made = made.images.into_iter().next().unwrap();
        (values("t5_embeds"), values("clip_pooled"), made)
    };
    let (on_device, pooled, picture) = traced(Some(Encoders::Device), Precision::F32);
    let (on_cpu, also_pooled, same_picture) = traced(Some(Encoders::Cpu), Precision::F32);
    assert!(on_cpu == on_device && also_pooled == pooled && same_picture.pixels == picture.pixels);
    assert_eq!(picture.parameters.encoders, None);
    assert_eq!(same_picture.parameters.encoders.as_deref(), Some("cpu"));

    let rounded = |values: &[f32]| values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect::<Vec<_>>();
    let (on_cpu, also_pooled, _) = traced(Some(Encoders::Cpu), Precision::Bf16);
    assert!(on_cpu == rounded(&on_device) && also_pooled == rounded(&pooled), "once, from what f32 makes");
    let (in_bf16, ..) = traced(None, Precision::Bf16);
    assert!(in_bf16 != on_cpu, "computed in bf16 they are further off");
}

#[test]
fn a_kept_t5_reads_the_blocks_for_which_there_is_no_room() {
    // Each limit below what the plan before takes, until T5's blocks do not all stay.
    let mut limit = None;
    loop {
        let options = EngineOptions { vram_limit: limit, keep_loaded: KeepLoaded::Yes, ..Default::default() };
        let mut engine = tiny_with(options);
        let mut plan = None;
        let mut read = Vec::new();
        let mut note = |event: Event<'_>| {
            match event {
                Event::Planned { memory } => plan = Some(memory.clone()),
                Event::Loading { stage, .. } => read.push(stage),
                _ => {}
            }
            Control::Continue
        };
        let request = EditRequest { max_sequence_length: Some(32), ..request(&[1]) };
        let first = engine.edit(&request, &mut note).unwrap().images.remove(0).pixels;
        let again = engine.edit(&request, &mut note).unwrap().images.remove(0).pixels;
        let plan = plan.unwrap();
        assert!(plan.keep_loaded && plan.transformer.layers == plan.transformer.of);
        assert_eq!(first, again);
        assert_eq!(read.iter().filter(|stage| **stage == Stage::TextEncoders).count(), 1, "{read:?}");
        if plan.text.layers < plan.text.of {
            return;
        }
        limit = Some(plan.peak() - 1);
    }
}

/// What an edit reads and computes, in order.
fn stages(engine: &mut Engine, request: &EditRequest) -> (RgbImage, Vec<Stage>) {
    let mut computed = Vec::new();
    let mut note = |event: Event<'_>| {
        if let Event::Computing { stage } = event {
            computed.push(stage);
        }
        Control::Continue
    };
    let made = engine.edit(request, &mut note).unwrap().images.remove(0).pixels;
    (made, computed)
}

#[test]
fn a_model_is_kept_where_it_fits_and_edits_go_on_where_it_does_not() {
    let keep = |vram_limit| {
        tiny_with(EngineOptions { vram_limit, keep_loaded: KeepLoaded::WhereItFits, ..Default::default() })
    };
    let plan = |engine: &mut Engine| {
        let mut kept = false;
        let mut note = |event: Event<'_>| {
            if let Event::Planned { memory } = event {
                kept = memory.keep_loaded;
            }
            Control::Continue
        };
        let made = engine.edit(&request(&[1]), &mut note).unwrap().images.remove(0).pixels;
        (kept, made)
    };
    let (kept, whole) = plan(&mut keep(None));
    assert!(kept);
    // Between what the largest stage takes and what all parts take together.
    let limit = (0..).map(|i| (32 << 20) - (i << 18)).find(|&limit| {
        let options = EngineOptions { vram_limit: Some(limit), keep_loaded: KeepLoaded::Yes, ..Default::default() };
        tiny_with(options).edit(&request(&[1]), &mut Silent).is_err()
    });
    assert_eq!(plan(&mut keep(limit)), (false, whole));
}

#[test]
fn prompts_and_source_images_that_come_again_are_not_encoded_again() {
    use Stage::*;
    let mut engine = tiny_with(EngineOptions { reuse: true, ..Default::default() });
    let (first, all) = stages(&mut engine, &request(&[1]));
    assert_eq!(all, [TextEncoders, VaeEncoder, Transformer, VaeDecoder]);
    let (again, fewer) = stages(&mut engine, &request(&[1]));
    assert_eq!((again, fewer), (first, vec![Transformer, VaeDecoder]));
    let other = EditRequest { prompt: "redder".into(), ..request(&[1]) };
    assert_eq!(stages(&mut engine, &other).1, [TextEncoders, Transformer, VaeDecoder]);
    let mut other = request(&[1]);
    other.image = other.image.map(|image| image::imageops::flip_horizontal(&image));
    assert_eq!(stages(&mut engine, &other).1, [VaeEncoder, Transformer, VaeDecoder]);
}

#[test]
fn previews_come_close_to_the_result() {
    let mut engine =
        Engine::open(&ModelSource::default(), EngineOptions { previews: true, ..Default::default() }, &mut NoProgress)
            .unwrap();
    let scene = std::fs::read("tests/fixtures/images/scene.png").unwrap();
    let request = EditRequest {
        prompt: "make the circle blue".into(),
        image: Some(retouch::image::read_image(&scene, "scene.png").unwrap()),
        ..Default::default()
    };
    let mut last = None;
    let mut keep = |event: Event<'_>| {
        if let Event::Step { preview, .. } = event {
            last = preview().unwrap();
        }
        Control::Continue
    };
    let made = engine.edit(&request, &mut keep).unwrap().images.remove(0).pixels;
    let last = last.unwrap();
    assert_eq!((last.width(), last.height()), (made.width() / 8, made.height() / 8));
    let small = retouch::image::resize(&made, last.width(), last.height());
    let error: f64 =
        small.iter().zip(last.iter()).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / small.len() as f64;
    // Of 255 levels: the source, or a picture of one colour, is further away.
    assert!(error < 12.0, "{error}");
}

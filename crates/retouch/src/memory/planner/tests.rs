use retouch_weights::LoraBytes;

use super::*;
use crate::{ModelSource, Precision, memory::ByPlace};

const GB: u64 = 1_000_000_000;

fn model(storage: &str) -> ModelMemory {
    let source = ModelSource { base: Some("black-forest-labs/FLUX.1-Kontext-dev".into()), ..Default::default() };
    // Not what a user may have downloaded: types and shapes alone.
    ModelMemory::find(&source, Some(storage.parse().unwrap()), Precision::Bf16).unwrap().0
}

fn work(side: usize) -> Work {
    Work {
        output: (side, side),
        reference: Some((side, side)),
        images: 1,
        prompts: 1,
        text_tokens: 512,
        steps: 28,
        step_cache: false,
        text_loras: ByPlace::default(),
        transformer_loras: LoraBytes::default(),
        keep_loaded: KeepLoaded::No,
        encoders: None,
    }
}

fn budget(device: u64) -> Budget {
    Budget { kind: DeviceKind::Cuda, device, host: 64 * GB, is_limit: true, cores: 16 }
}

fn plan(storage: &str, side: usize, gigabytes: u64) -> MemoryPlan {
    let plan = MemoryPlan::fastest(&model(storage), &work(side), budget(gigabytes * GB)).unwrap();
    assert!(plan.peak() <= gigabytes * GB, "{plan}");
    plan
}

#[test]
fn parameters_are_those_of_the_published_model() {
    let model = model("bf16");
    // 11.90 billion less the modulation's 3.25 billion; two bytes each.
    let transformer = model.transformer.with(usize::MAX) as f64;
    assert!((transformer / 17.3e9 - 1.0).abs() < 0.005, "{transformer}");
    assert_eq!(model.transformer.layers.len(), 57);
    assert_eq!(model.text.on_device.t5.layers.len(), 24);
    let t5 = model.text.on_device.t5.with(usize::MAX) as f64;
    assert!((t5 / 9.52e9 - 1.0).abs() < 0.005, "{t5}");
    // 34.3 and 49.5 million in f32, of which the million of the attention stay in 16 bits.
    assert!((model.vae_encoder as f64 / 137.1e6 - 1.0).abs() < 0.02, "{}", model.vae_encoder);
    assert!((model.vae_decoder as f64 / 198.2e6 - 1.0).abs() < 0.02, "{}", model.vae_decoder);
}

#[test]
fn the_common_cards_get_the_fastest_that_fits_them() {
    let transformer = |storage, gigabytes| plan(storage, 1024, gigabytes).transformer.limit();
    assert_eq!(transformer("bf16", 24), None, "all of 16 bits on 24 GB");
    assert_eq!(transformer("q8_0", 16), None, "8 bits on 16 GB");
    assert!(transformer("bf16", 16).is_some_and(|layers| layers > 30), "most of 16 bits on 16 GB");
    assert_eq!(transformer("q8_0", 12), None, "8 bits on 12 GB");
    assert_eq!(transformer("q4_k", 8), None, "4 bits on 8 GB");
    assert!(transformer("q8_0", 8).is_some_and(|layers| layers >= 20), "8 bits on 8 GB, some of it read");
    for storage in ["q4_k", "q8_0", "bf16"] {
        let plan = plan(storage, 1024, 6);
        assert!(storage == "q4_k" || plan.transformer.limit().is_some(), "{plan}");
    }
}

#[test]
fn what_is_read_at_a_step_is_what_does_not_stay() {
    let (all, some) = (plan("bf16", 1024, 24), plan("bf16", 1024, 12));
    assert_eq!(all.stages[2].read_per_pass, 0);
    let blocks: u64 = model("bf16").transformer.layers.iter().sum();
    let StagePlan { resident, read_per_pass, .. } = some.stages[2];
    assert_eq!(resident + read_per_pass, blocks + model("bf16").transformer.fixed);
    assert_eq!(some.transfer.map(|transfer| transfer.bytes), Some(read_per_pass));
    assert_eq!(all.transfer, None);
}

#[test]
fn less_memory_never_makes_a_plan_that_takes_more() {
    for storage in ["bf16", "q8_0", "q4_0"] {
        let (model, mut peak) = (model(storage), u64::MAX);
        for tenths in (30..=300).rev() {
            let Ok(plan) = MemoryPlan::fastest(&model, &work(1024), budget(tenths * GB / 10)) else {
                break;
            };
            assert!(plan.peak() <= (tenths * GB / 10).min(peak), "{tenths}: {plan}");
            peak = plan.peak();
        }
        assert!(peak < 6 * GB, "{storage} needs {peak}");
    }
}

#[test]
fn large_images_are_made_in_bands_and_in_the_end_on_the_host() {
    assert_eq!(plan("q8_0", 1024, 24).decode, Pixels::Whole);
    assert!(matches!(plan("q8_0", 2048, 8).decode, Pixels::Bands(Bands { on_host: false, .. })));
    let small = Budget { kind: DeviceKind::Cuda, device: 3 * GB, host: 64 * GB, is_limit: true, cores: 16 };
    let model = model("q4_0");
    let work = work(2048);
    let planner = Planner { model: &model, work: &work, budget: small, carried: 0, kept: 0 };
    let (pixels, stage) = planner.pixels(Way::Decode, (2048, 2048), 64 * GB).unwrap();
    assert!(matches!(pixels, Pixels::Bands(Bands { on_host: true, .. })));
    assert!(stage.peak <= 3 * GB);
    // A full host does not take them.
    assert!(planner.pixels(Way::Decode, (2048, 2048), GB).is_err());
}

#[test]
fn loras_take_room_beside_their_part() {
    let (model, free) = (model("q8_0"), budget(24 * GB));
    let peaks = |text_loras, transformer_loras, device| {
        let text_loras = ByPlace { on_device: text_loras, on_cpu: text_loras };
        let work = Work { text_loras, transformer_loras, ..work(1024) };
        let plan = MemoryPlan::fastest(&model, &work, Budget { device, ..free }).unwrap();
        (plan.stages.iter().map(|stage| stage.peak).collect::<Vec<_>>(), plan)
    };
    let (none, added) = (LoraBytes::default(), LoraBytes { resident: GB, merging: 0 });
    let plain = peaks(none, none, free.device).0;
    let [text, encode, steps, decode] = plain[..] else { panic!("{plain:?}") };
    assert_eq!(peaks(none, added, free.device).0, [text, encode, steps + GB, decode]);
    assert_eq!(peaks(added, none, free.device).0, [text + GB, encode, steps, decode]);
    // Merged while the layers are read, when nothing is computed yet.
    let merged = LoraBytes { resident: 0, merging: GB / 1000 };
    assert_eq!(peaks(none, merged, free.device).0, plain);
    // Layers that are read at each step merge beside the computation, and make room for what LoRAs take.
    let (_, tight) = peaks(none, none, 8 * GB);
    let (_, with) = peaks(none, added, 8 * GB);
    assert!(with.transformer.layers < tight.transformer.layers && with.peak() <= 8 * GB, "{with}");
}

#[test]
fn what_does_not_fit_is_refused_with_what_was_needed_and_what_helps() {
    let refused = |work: Work, budget| match MemoryPlan::fastest(&model("bf16"), &work, budget) {
        Err(Error::Memory(sentence)) => sentence,
        other => panic!("{other:?}"),
    };
    let sentence = refused(work(1024), budget(GB));
    assert!(sentence.contains("--vram-limit allows 1.0 GB; raise it"), "{sentence}");
    let free = Budget { is_limit: false, ..budget(3 * GB) };
    let sentence = refused(work(2048), free);
    assert!(sentence.contains("3.0 GB are free") && sentence.contains("--width"), "{sentence}");
    let kept = Work { keep_loaded: KeepLoaded::Yes, ..work(1024) };
    let sentence = refused(kept, budget(16 * GB));
    assert!(sentence.contains("leave out --keep-loaded"), "{sentence}");
    let on_cpu = Work { encoders: Some(Encoders::Cpu), ..work(1024) };
    let sentence = refused(on_cpu, Budget { host: GB, ..budget(24 * GB) });
    assert!(sentence.contains("1.0 GB are free; use text encoders in fewer bits, or --encoders device"), "{sentence}");
}

#[test]
fn a_whole_model_is_kept_where_there_is_room() {
    let work = Work { keep_loaded: KeepLoaded::Yes, ..work(1024) };
    let plan = MemoryPlan::fastest(&model("bf16"), &work, budget(48 * GB)).unwrap();
    assert!(plan.keep_loaded && plan.transformer.limit().is_none() && plan.peak() > 27 * GB, "{plan}");
    assert_eq!((plan.encoders, plan.text.limit()), (Encoders::Device, None));
}

#[test]
fn a_kept_transformer_has_blocks_of_t5_beside_it_and_then_the_encoders_on_the_cpu() {
    let kept = |gigabytes: f64| {
        let work = Work { keep_loaded: KeepLoaded::Yes, ..work(1024) };
        let budget = budget((gigabytes * 1e9) as u64);
        let plan = MemoryPlan::fastest(&model("bf16"), &work, budget).unwrap();
        assert!(plan.keep_loaded && plan.transformer.limit().is_none() && plan.peak() <= budget.device, "{plan}");
        plan
    };
    let on_device = kept(24.0);
    assert_eq!(on_device.encoders, Encoders::Device);
    assert!(on_device.text.limit().is_some_and(|layers| layers >= 6), "{on_device}");
    assert_eq!((on_device.mlp_tokens, on_device.decode), (None, Pixels::Whole), "no stage makes room for blocks of T5");
    let read = on_device.stages[0].read_per_pass;
    assert!(read > 0 && read < 7 * GB, "a part of T5's 9.5 GB for each prompt: {read}");
    let on_cpu = kept(19.0);
    assert_eq!((on_cpu.encoders, on_cpu.text.limit()), (Encoders::Cpu, None));
    assert_eq!(on_cpu.stages[0].device, DeviceKind::Cpu);
}

#[test]
fn where_it_fits_the_cpu_encodes_if_that_is_sooner_than_reading_all_parts_again() {
    let work = Work { keep_loaded: KeepLoaded::WhereItFits, ..work(1024) };
    let kept = |host, cores| {
        let budget = Budget { host: host * GB, cores, ..budget(19 * GB) };
        MemoryPlan::fastest(&model("bf16"), &work, budget).unwrap().keep_loaded
    };
    // 27 GB of files that stay in memory, or do not; 5 s of 16 cores, 40 s of 2.
    assert_eq!([kept(64, 16), kept(16, 16), kept(16, 2)], [false, true, false]);
    let asked = Work { encoders: Some(Encoders::Cpu), ..work };
    assert!(MemoryPlan::fastest(&model("bf16"), &asked, budget(19 * GB)).unwrap().keep_loaded);
}

#[test]
fn encoders_are_on_the_cpu_where_asked_for_or_where_not_even_a_few_layers_fit() {
    let (model, asked) = (model("bf16"), Work { encoders: Some(Encoders::Cpu), ..work(1024) });
    let plan = MemoryPlan::fastest(&model, &asked, budget(24 * GB)).unwrap();
    let StagePlan { device, resident, peak, .. } = plan.stages[0];
    assert_eq!((plan.encoders, device, plan.text.limit()), (Encoders::Cpu, DeviceKind::Cpu, None));
    // In bf16 as their files have them, whatever the arithmetic; the norms and CLIP's embeddings in f32.
    assert!((9_700 * GB / 1000..10 * GB).contains(&resident) && peak < resident + GB, "{resident} {peak}");
    assert_eq!(plan.peak(), plan.stages[2].peak);
    // A host without room for them reads layers for each prompt.
    let small = Budget { host: 5 * GB, ..budget(24 * GB) };
    let plan = MemoryPlan::fastest(&model, &asked, small).unwrap();
    assert!(plan.text.limit().is_some() && plan.stages[0].peak <= 5 * GB, "{plan}");

    let small = |encoders, megabytes| {
        MemoryPlan::fastest(&model, &Work { encoders, ..work(256) }, budget(megabytes * GB / 1000))
    };
    let refused = (1000..3000).rev().find(|&megabytes| small(Some(Encoders::Device), megabytes).is_err()).unwrap();
    let plan = small(None, refused).unwrap();
    assert!(plan.encoders == Encoders::Cpu && plan.peak() <= refused * GB / 1000, "{plan}");
    assert_eq!(small(None, refused + 1).unwrap().encoders, Encoders::Device);
}

#[test]
fn on_a_cpu_the_encoders_take_its_memory_wherever_they_are() {
    let cpu = Budget { kind: DeviceKind::Cpu, ..budget(64 * GB) };
    let text = |encoders| {
        let work = Work { encoders, ..work(512) };
        MemoryPlan::fastest(&model("q8_0"), &work, cpu).unwrap().stages.remove(0)
    };
    assert_eq!(text(None), text(Some(Encoders::Device)));
    let on_cpu = text(Some(Encoders::Cpu));
    assert!(on_cpu.peak > text(None).peak, "f32 takes more than bf16");
    let asked = Work { encoders: Some(Encoders::Cpu), ..work(512) };
    assert!(MemoryPlan::fastest(&model("q8_0"), &asked, Budget { device: GB, ..cpu }).is_err());
}

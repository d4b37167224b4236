//! The command line as a user meets it: the real binary with a tiny random model.

mod support;

use std::fs;

use serde_json::Value;
use support::{Place, copy_folder, fixtures, photo, tiny};

/// The parameters stored in a file.
fn info(place: &Place, name: &str) -> Value {
    serde_json::from_str(place.run(&["info", name, "--json"]).lines()[0]).unwrap()
}

#[test]
fn results_are_printed_and_numbered_rather_than_overwritten() {
    let place = Place::new();
    assert_eq!(place.tiny(&["edit", "photo.png", "bluer"]).lines(), ["photo-edited.png"]);
    let first = place.bytes("photo-edited.png");
    assert_eq!(place.tiny(&["edit", "photo.png", "bluer", "-q"]).lines(), ["photo-edited-2.png"]);
    assert_eq!(place.bytes("photo-edited.png"), first);
    assert_eq!(place.pixels("photo-edited.png").dimensions(), (64, 48));
    assert_eq!(place.tiny(&["edit", "photo.png", "bluer", "--force"]).lines(), ["photo-edited.png"]);
    assert_ne!(place.bytes("photo-edited.png"), first);
    assert_eq!(place.names(), ["photo-edited-2.png", "photo-edited.png", "photo.png"]);
}

#[test]
fn a_given_name_is_overwritten_only_by_force() {
    let place = Place::new();
    let edit = |more: &[&str]| place.tiny(&[&["edit", "photo.png", "bluer", "-o", "out.jpg"], more].concat());
    assert_eq!(edit(&[]).lines(), ["out.jpg"]);
    let first = place.bytes("out.jpg");
    assert!(edit(&[]).sentence(1).contains("out.jpg"));
    assert_eq!(place.bytes("out.jpg"), first);
    assert_eq!(edit(&["--force", "--quality", "30"]).lines(), ["out.jpg"]);
    assert!(place.bytes("out.jpg").len() < first.len());
}

#[test]
fn several_seeds_make_several_files() {
    let place = Place::new();
    let listed = place.tiny(&["edit", "photo.png", "bluer", "--seed", "5,6", "--seed", "9", "-o", "out.webp"]);
    assert_eq!(listed.lines(), ["out-1.webp", "out-2.webp", "out-3.webp"]);
    let counted = place.tiny(&["edit", "photo.png", "bluer", "--seed", "5", "-n", "2"]);
    assert_eq!(counted.lines(), ["photo-edited-1.png", "photo-edited-2.png"]);
    assert_eq!(place.pixels("out-2.webp"), place.pixels("photo-edited-2.png"));
    assert_ne!(place.pixels("out-1.webp"), place.pixels("out-2.webp"));
    assert_eq!(info(&place, "out-3.webp")["seed"], 9);
}

#[test]
fn a_loaded_model_makes_the_same_images() {
    let place = Place::new();
    let edit = |more: &[&str]| {
        let args = [&["edit", "photo.png", "bluer", "--seed", "5,6"], more].concat();
        place.tiny(&args).lines().into_iter().map(|name| place.pixels(name)).collect::<Vec<_>>()
    };
    assert_eq!(edit(&[]), edit(&["--keep-loaded"]));
    let one = place.tiny(&["edit", "photo.png", "bluer", "--keep-loaded"]);
    assert!(one.sentence(2).contains("--keep-loaded"));
}

#[test]
fn a_profile_has_a_row_for_each_stage_and_operation() {
    let place = Place::new();
    let ran = place.tiny(&["edit", "photo.png", "bluer", "--profile"]);
    assert_eq!(ran.lines(), ["photo-edited.png"]);
    for row in ["text", "reference image", "steps", "pixels", "linear", "attention", "convolution", "floor:"] {
        assert!(ran.stderr.lines().any(|line| line.trim_start().starts_with(row)), "{row}: {}", ran.stderr);
    }
}

#[test]
fn the_step_cache_saves_passes_and_is_repeated() {
    let place = Place::new();
    let edit = |more: &[&str]| {
        let args = [&["edit", "photo.png", "bluer", "--seed", "5", "-v", "-f", "-o", "out.png"], more];
        let ran = place.tiny(&args.concat());
        (place.pixels("out.png"), ran.stderr.clone())
    };
    let (computed, _) = edit(&[]);
    // So small that no two steps are that near.
    assert_eq!(computed, edit(&["--cache", "1e-9"]).0);
    let (cached, notes) = edit(&["--cache", "1"]);
    assert!(notes.contains("saved by the step cache: 1"), "{notes}");
    assert_ne!(computed, cached);
    assert_eq!(info(&place, "out.png")["cache"], 1.0);
    place.tiny(&["edit", "--from", "out.png", "-o", "again.png"]);
    assert_eq!(place.pixels("again.png"), cached);
    assert!(place.tiny(&["edit", "photo.png", "bluer", "--cache", "-1"]).sentence(2).contains("cache is -1"));
}

#[test]
fn json_has_a_line_for_each_image() {
    let place = Place::new();
    let ran = place.tiny(&["edit", "photo.png", "bluer", "--seed", "7", "-n", "2", "--json"]);
    let lines: Vec<Value> = ran.lines().into_iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, seed) in lines.iter().zip([7, 8]) {
        assert_eq!((&line["seed"], &line["width"], &line["height"]), (&seed.into(), &64.into(), &48.into()));
        assert!(place.path(line["path"].as_str().unwrap()).is_file());
        let seconds = |name: &str| line["timings"][name].as_f64().unwrap();
        assert!(seconds("steps_seconds") > 0.0);
        // With the stages before it, and no longer than with the steps after it.
        let before = seconds("text_seconds") + seconds("reference_seconds") + seconds("load_seconds");
        let first = seconds("first_step_seconds");
        assert!(before < first && first <= before + seconds("steps_seconds"), "{line}");
        assert!(line["model"].as_str().unwrap().ends_with("tiny-kontext"));
    }
}

#[test]
fn standard_input_and_output_carry_images() {
    let place = Place::new();
    let tiny = tiny();
    let args = |rest: &[&'static str]| {
        ["edit", "-", "bluer", "--seed", "1"]
            .iter()
            .chain(rest)
            .copied()
            .map(String::from)
            .chain(tiny.clone())
            .collect::<Vec<_>>()
    };
    let run = |args: Vec<String>| {
        place.run_with_input(&args.iter().map(String::as_str).collect::<Vec<_>>(), &place.bytes("photo.png"))
    };
    let piped = run(args(&["-o", "-"]));
    assert_eq!(piped.code, Some(0), "{}", piped.stderr);
    assert_eq!(run(args(&[])).lines(), ["image-edited.png"]);
    assert_eq!(image::load_from_memory(&piped.stdout).unwrap().into_rgb8(), place.pixels("image-edited.png"));
    let jpeg = run(args(&["-o", "-", "--format", "jpeg"]));
    assert!(jpeg.stdout.starts_with(&[0xff, 0xd8, 0xff]));
    assert!(run(args(&["-o", "-", "--json"])).sentence(2).contains("standard output"));
    assert!(run(args(&["-o", "-", "-n", "2"])).sentence(2).contains("standard output"));
}

#[test]
fn an_edit_repeats_from_its_own_file() {
    let place = Place::new();
    for name in ["a.png", "a.jpg", "a.webp"] {
        let edit = ["edit", "photo.png", "make the sky \u{1f525}", "-o", name, "--seed", "11", "--guidance", "3"];
        place.tiny(&edit).lines();
        let again = format!("again-{name}");
        // The model, steps and sizes are stored as well.
        assert_eq!(place.run(&["edit", "--from", name, "-o", &again]).lines(), [again.as_str()]);
        assert_eq!(place.bytes(&again), place.bytes(name), "{name}");
    }
}

#[test]
fn a_repeated_edit_takes_other_flags_and_other_sources() {
    let place = Place::new();
    place.tiny(&["edit", "photo.png", "bluer", "-o", "a.png", "--seed", "1"]).lines();
    place.tiny(&["edit", "photo.png", "bluer", "-o", "b.png", "--seed", "2"]).lines();
    place.run(&["edit", "--from", "a.png", "--seed", "2", "-o", "c.png"]).lines();
    assert_eq!(place.bytes("c.png"), place.bytes("b.png"));
    place.run(&["edit", "--from", "a.png", "photo.png", "redder", "-o", "d.png"]).lines();
    assert_eq!(info(&place, "d.png")["prompt"], "redder");
    let other = place.run(&["edit", "--from", "a.png", "b.png", "-o", "e.png"]);
    assert_eq!(other.lines(), ["e.png"]);
    assert!(other.stderr.contains("not the image"), "{}", other.stderr);
}

/// As FLUX.1 [schnell] is.
#[test]
fn a_model_without_guidance_has_none_to_give_or_to_store() {
    let place = Place::new();
    copy_folder(&fixtures().join("tiny-kontext"), &place.path("model"));
    let config = place.path("model/transformer/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"guidance_embeds\": true", "\"guidance_embeds\": false")).unwrap();
    let edit = |more: &[&str]| {
        let size = ["--model", "model", "--steps", "1", "--reference-size", "keep"];
        place.run(&[&["edit", "photo.png", "bluer"], &size[..], more].concat())
    };
    assert!(edit(&["--guidance", "3"]).sentence(2).contains("guidance"));
    assert_eq!(edit(&["-o", "a.png"]).lines(), ["a.png"]);
    assert_eq!(info(&place, "a.png")["guidance"], Value::Null);
    assert!(!place.run(&["info", "a.png"]).text().contains("guidance"));
    place.run(&["edit", "--from", "a.png", "-o", "b.png"]).lines();
    assert_eq!(place.bytes("b.png"), place.bytes("a.png"));
    // The guidance that another model was given is none of this one's, unless it is asked for again.
    place.tiny(&["edit", "photo.png", "bluer", "-o", "c.png", "--guidance", "3"]).lines();
    place.run(&["edit", "--from", "c.png", "--model", "model", "-o", "d.png"]).lines();
    assert_eq!(info(&place, "d.png")["guidance"], Value::Null);
    let asked = place.run(&["edit", "--from", "c.png", "--model", "model", "--guidance", "3"]);
    assert!(asked.sentence(2).contains("guidance"));
}

#[test]
fn another_source_keeps_sizes_that_were_given_and_makes_its_own_of_the_rest() {
    let place = Place::new();
    let model = fixtures().join("tiny-kontext").display().to_string();
    let edit = |output: &str, size: &[&str]| {
        let args = ["edit", "photo.png", "bluer", "--model", &model, "--steps", "1", "-o", output];
        place.run(&[&args[..], size].concat()).lines();
    };
    edit("kept.png", &["--reference-size", "keep"]);
    edit("given.png", &["--reference-size", "32x32", "--width", "48", "--height", "16"]);
    image::RgbImage::new(80, 32).save(place.path("other.png")).unwrap();
    let sizes = |from: &str, source: &str| {
        place.run(&["edit", "--from", from, source, "-o", "again.png", "--force"]).lines();
        let stored = info(&place, "again.png");
        (place.pixels("again.png").dimensions(), stored["reference"].to_string())
    };
    assert_eq!(sizes("kept.png", "photo.png"), ((64, 48), "[64,48]".to_string()));
    assert_eq!(sizes("kept.png", "other.png"), ((80, 32), "[80,32]".to_string()));
    assert_eq!(sizes("given.png", "other.png"), ((48, 16), "[32,32]".to_string()));
}

/// What is stored of a model on disk is enough to find it from elsewhere, and does not tell who the user is.
#[test]
fn an_edit_repeats_from_another_folder() {
    let place = Place::new();
    copy_folder(&fixtures().join("tiny-kontext"), &place.path("jane/model"));
    fs::copy(fixtures().join("comfy/clip_l.safetensors"), place.path("jane/clip.safetensors")).unwrap();
    fs::create_dir(place.path("else")).unwrap();
    let run = |folder: &str, args: &[&str]| {
        let mut command = place.command(support::BINARY);
        let ran = command.current_dir(place.path(folder)).env("HOME", place.path("jane")).args(args).output().unwrap();
        support::Ran::from(ran)
    };
    let files = ["--model", "model", "--clip", "../jane/clip.safetensors"];
    let rest = ["--steps", "1", "--reference-size", "keep", "-o", "../a.png"];
    run("jane", &[&["edit", "../photo.png", "bluer"], &files[..], &rest].concat()).lines();
    let stored = info(&place, "a.png");
    assert_eq!(
        (&stored["model"], &stored["single_files"]["--clip"]),
        (&"~/model".into(), &"~/clip.safetensors".into())
    );
    run("else", &["edit", "--from", "../a.png", "-o", "../b.png"]).lines();
    assert_eq!(place.bytes("b.png"), place.bytes("a.png"));
    let text = place.run(&["info", "a.png"]);
    assert!(text.text().contains("~/clip.safetensors") && text.text().contains("512 tokens"), "{}", text.text());
    assert!(!text.text().contains("jane"));
    fs::rename(place.path("jane/clip.safetensors"), place.path("jane/other.safetensors")).unwrap();
    assert!(run("else", &["edit", "--from", "../a.png"]).sentence(1).contains("clip.safetensors"));
    let given = ["edit", "--from", "../a.png", "--clip", "../jane/other.safetensors", "-o", "../c.png"];
    run("else", &given).lines();
    assert_eq!(place.pixels("c.png"), place.pixels("a.png"));
}

#[test]
fn a_source_that_moved_or_changed_must_be_given() {
    let place = Place::new();
    place.tiny(&["edit", "photo.png", "bluer", "-o", "a.png"]).lines();
    fs::rename(place.path("photo.png"), place.path("moved.png")).unwrap();
    assert!(place.run(&["edit", "--from", "a.png"]).sentence(1).contains("photo.png"));
    let found = place.run(&["edit", "--from", "a.png", "moved.png", "-o", "b.png"]);
    assert_eq!(found.lines(), ["b.png"]);
    assert_eq!(place.pixels("b.png"), place.pixels("a.png"));
    fs::copy(place.path("a.png"), place.path("photo.png")).unwrap();
    assert!(place.run(&["edit", "--from", "a.png"]).sentence(1).contains("photo.png"));
    assert!(place.run(&["edit", "--from", "moved.png"]).sentence(1).contains("moved.png"));
}

#[test]
fn parameters_are_stored_unless_unwanted() {
    let place = Place::new();
    for name in ["a.png", "a.jpg", "a.webp"] {
        place.tiny(&["edit", "photo.png", "bluer", "-o", name, "--seed", "4"]).lines();
        let stored = info(&place, name);
        assert_eq!((&stored["prompt"], &stored["seed"]), (&"bluer".into(), &4.into()), "{name}");
        assert_eq!((&stored["steps"], &stored["source_name"]), (&2.into(), &"photo.png".into()), "{name}");
        let text = place.run(&["info", name]);
        assert!(text.text().contains("bluer") && text.text().contains("64x48"), "{}", text.text());
        let bare = format!("bare-{name}");
        place.tiny(&["edit", "photo.png", "bluer", "-o", &bare, "--no-metadata"]).lines();
        assert_eq!(info(&place, &bare), Value::Null, "{name}");
        let bytes = place.bytes(&bare);
        assert!(!bytes.windows(5).any(|part| part == b"bluer"), "{name}");
    }
}

#[test]
fn words_alone_make_an_image() {
    let place = Place::new();
    let model = fixtures().join("tiny-kontext").display().to_string();
    let size = ["--model", &model, "--steps", "1", "--width", "48", "--height", "32", "--seed", "3"];
    assert_eq!(place.run(&[&["generate", "stars"], &size[..]].concat()).lines(), ["generated.png"]);
    assert_eq!(place.pixels("generated.png").dimensions(), (48, 32));
    assert_eq!(place.run(&["edit", "--from", "generated.png"]).lines(), ["generated-2.png"]);
    assert_eq!(place.pixels("generated-2.png"), place.pixels("generated.png"));
    let refused = place.run(&[&["generate", "stars", "--reference-size", "keep"], &size[..]].concat());
    assert!(refused.sentence(2).contains("reference size"));
}

#[test]
fn a_batch_does_what_it_can() {
    let place = Place::new();
    place.write(
        "jobs.jsonl",
        concat!(
            r#"{"image": "photo.png", "prompt": "bluer", "seed": [1, 2]}"#,
            "\n\n",
            r#"{"image": "missing.png", "prompt": "bluer"}"#,
            "\n",
            r#"{"image": "photo.png", "prompt": "redder", "output": "red.webp", "num_images": 1, "steps": 1}"#,
            "\n"
        ),
    );
    let ran = place.tiny(&["edit", "--batch", "jobs.jsonl", "--keep-loaded", "-v", "-n", "3"]);
    assert_eq!(ran.code, Some(1));
    assert!(!cfg!(target_os = "linux") || ran.stderr.contains("peak memory"), "{}", ran.stderr);
    assert_eq!(ran.text().lines().collect::<Vec<_>>(), ["photo-edited-1.png", "photo-edited-2.png", "red.webp"]);
    assert!(ran.stderr.contains("error: jobs.jsonl line 3: missing.png: "), "{}", ran.stderr);
    assert_eq!(info(&place, "red.webp")["steps"], 1);
    place.tiny(&["edit", "photo.png", "bluer", "--seed", "2", "-o", "two.png"]).lines();
    assert_eq!(place.bytes("two.png"), place.bytes("photo-edited-2.png"));
}

#[test]
fn intermediates_are_written_where_asked() {
    let place = Place::new();
    place.tiny(&["edit", "photo.png", "bluer", "--dump", "all.safetensors"]).lines();
    let bytes = place.bytes("all.safetensors");
    let dump = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let names = ["clip_ids", "t5_ids", "clip_pooled", "t5_embeds", "ref_latents", "noise", "sigmas", "velocity.0"];
    for name in names.iter().chain(&["velocity.1", "latents", "image"]) {
        assert!(dump.tensor(name).is_ok(), "{name} is missing");
    }
    assert_eq!(dump.tensor("image").unwrap().shape(), [3, 48, 64]);
    assert_eq!(dump.tensor("ref_latents").unwrap().shape(), [1, 16, 6, 8]);
}

#[test]
fn how_much_is_said_can_be_chosen() {
    let place = Place::new();
    let say = |flags: &[&str]| {
        let ran = place.tiny(&[&["edit", "photo.png", "bluer", "--seed", "77"], flags].concat());
        ran.lines();
        ran.stderr
    };
    assert_eq!(say(&["-q"]), "");
    // No bars where nobody watches.
    let usual = say(&[]);
    assert!(usual.contains("seed 77") && !usual.contains('\r') && !usual.contains('\x1b'), "{usual:?}");
    let verbose = say(&["-v"]);
    assert!(verbose.contains("steps") && verbose.contains("cpu in f32"), "{verbose}");
    assert!(!cfg!(target_os = "linux") || verbose.contains("peak memory"), "{verbose}");
    assert!(verbose.contains("memory: a stage at a time: text encoder resident"), "{verbose}");
    assert!(!verbose.contains("DEBUG"), "{verbose}");
    let inside = say(&["-vv"]);
    for word in ["FLUX transformer opened", "sigmas=[1.0, ", "latents=[1, 16, 6, 8]", "device=cpu", "dtype=f32"] {
        assert!(inside.contains(word), "`{word}` is not in {inside}");
    }
}

#[test]
fn plans_are_made_for_models_that_are_here_and_for_known_ones_that_are_not() {
    let place = Place::new();
    let known = ["plan", "--model", "black-forest-labs/FLUX.1-Kontext-dev", "--device", "cuda"];
    let plan = |rest: &[&str]| place.run(&[&known[..], rest].concat());
    let table = plan(&["--vram-limit", "24G"]);
    assert_eq!(table.lines().len(), 7);
    assert!(table.text().contains("1024x1024 from 1024x1024, 28 steps, bf16 on cuda"), "{}", table.text());
    assert!(table.text().contains("transformer             17.2"), "{}", table.text());
    let small = plan(&["--vram-limit", "8G", "--type", "q8_0", "--json"]);
    let small: Value = serde_json::from_str(small.lines()[0]).unwrap();
    assert!(small["peak"].as_u64().unwrap() <= 8_000_000_000 && small["stages"][2]["read_per_pass"] != 0, "{small}");
    assert_eq!(small["transfer"]["bytes"], small["stages"][2]["read_per_pass"]);
    let some = plan(&["--vram-limit", "8G", "--type", "q8_0"]);
    assert!(some.text().contains("hidden behind the computation on a GPU of up to"), "{}", some.text());
    let on_cpu = plan(&["--vram-limit", "24G", "--encoders", "cpu"]);
    assert!(
        on_cpu.text().contains("text encoders (cpu)") && on_cpu.text().contains("on the CPU in f32"),
        "{}",
        on_cpu.text()
    );
    let sentence = plan(&["--vram-limit", "1G"]);
    assert!(sentence.sentence(1).contains("at least"), "{}", sentence.stderr);
    let tiny = place.run(&["plan", "--model", &tiny()[1], "--width", "64", "--height", "64"]);
    assert!(tiny.text().contains("64x64 from 64x64") && tiny.text().contains("f32 on cpu"), "{}", tiny.stderr);
    assert!(place.run(&["plan"]).lines()[0].contains("512x512"));
    assert!(place.run(&["plan", "--model", "someone/else"]).sentence(2).contains("retouch models"));
    let nowhere = if cfg!(feature = "metal") { "cuda" } else { "metal" };
    assert!(place.run(&["plan", "--device", nowhere]).sentence(2).contains("--vram-limit"));
}

#[test]
fn known_models_are_listed() {
    let place = Place::new();
    let ran = place.run(&["models"]);
    assert!(ran.lines()[0].starts_with("nano-kontext"), "{}", ran.text());
    assert!(ran.text().contains("black-forest-labs/FLUX.1-Kontext-dev"));
    let models = place.run(&["models", "--json"]);
    let first: Value = serde_json::from_str(models.lines()[0]).unwrap();
    assert_eq!((&first["id"], &first["state"]), (&"nano-kontext".into(), &"embedded".into()));
}

#[test]
fn help_version_and_completions_are_there() {
    let place = Place::new();
    assert!(place.run(&["--version"]).text().contains(env!("CARGO_PKG_VERSION")));
    let help = place.run(&["edit", "--help"]);
    for flag in ["--seed", "--reference-size", "--true-cfg", "--dump", "--keep-loaded", "--no-metadata", "--batch"] {
        assert!(help.text().contains(flag), "{flag}");
    }
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        assert!(place.run(&["completions", shell]).text().contains("reference-size"), "{shell}");
    }
}

#[test]
fn the_readme_names_every_flag() {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let help = Place::new().run(&["edit", "--help"]);
    let flags = help.text().lines().filter_map(|line| line.trim().split(' ').find(|word| word.starts_with("--")));
    let flags: Vec<_> =
        flags.filter(|flag| !["--help", "--version", "--quiet", "--verbose..."].contains(flag)).collect();
    assert!(flags.len() > 25, "{flags:?}");
    for flag in flags {
        assert!(readme.contains(flag), "{flag} is not in the README");
    }
}

/// In the middle of the steps: a signal as Ctrl-C sends it, and one as a system that shuts down does.
#[cfg(target_os = "linux")]
#[test]
fn an_interrupted_edit_stops_at_once_and_leaves_nothing() {
    for (signal, number) in [("-INT", 2), ("-TERM", 15)] {
        interrupt(signal, number);
    }
}

#[cfg(target_os = "linux")]
fn interrupt(signal: &str, number: u32) {
    use std::{
        process::Command,
        thread::sleep,
        time::{Duration, Instant},
    };

    let place = Place::new();
    let model = fixtures().join("tiny-kontext").display().to_string();
    let size = ["--steps", "1000", "--width", "512", "--height", "512", "--reference-size", "keep"];
    let child = place.start(&[&["edit", "photo.png", "bluer", "--model", &model], &size[..]].concat());
    let catches_signals = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & (1 << (number - 1)) != 0
    };
    let started = Instant::now();
    while !catches_signals() && started.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(20));
    }
    // Into the steps.
    sleep(Duration::from_millis(1500));
    let interrupted = Instant::now();
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    let ran = support::Ran::from(child.wait_with_output().unwrap());
    assert_eq!(ran.sentence(128 + number as i32), "interrupted");
    assert!(interrupted.elapsed() < Duration::from_secs(20), "{:?}", interrupted.elapsed());
    assert_eq!(place.names(), ["photo.png"]);
    assert_eq!(place.pixels("photo.png"), photo());
}

#[test]
fn models_and_weight_files_are_described() {
    let place = Place::new();
    let tiny = fixtures().join("tiny-kontext");
    let model = place.run(&["info", tiny.to_str().unwrap()]);
    assert!(model.lines()[0].contains("FLUX.1 Kontext"), "{}", model.text());
    assert_eq!(model.lines().len(), 6);
    let file = tiny.join("flux1-kontext-dev.safetensors").display().to_string();
    assert!(place.run(&["info", &file]).lines()[0].ends_with("FLUX transformer in safetensors"));
    let json = place.run(&["info", &file, "--json"]);
    let described: Value = serde_json::from_str(json.lines()[0]).unwrap();
    assert!(described["parameters"].as_u64().unwrap() > 500_000, "{described}");
    assert!(place.run(&["info", "nano-kontext"]).lines()[0].starts_with("nano-kontext"));
    assert!(place.run(&["info", "photo.png"]).lines()[0].contains("without parameters"));
}

//! Bad input of every kind: one sentence that names what is wrong, exit code 1 or 2, nothing written.

mod support;

use std::fs;

use serde_json::Value;
use support::{Place, copy_folder, fixtures, tiny};

/// Fails with `code` and a sentence that has `words` in it, and leaves no file behind.
fn refuses(place: &Place, code: i32, words: &[&str], args: &[&str]) {
    let before = place.names();
    let ran = place.run(args);
    let sentence = ran.sentence(code);
    for word in words {
        assert!(sentence.contains(word), "`{word}` is not in: {sentence}");
    }
    assert_eq!(place.names(), before);
}

/// The same for an edit of `photo.png` with the tiny model.
fn refuses_edit(place: &Place, code: i32, words: &[&str], flags: &[&str]) {
    let tiny = tiny();
    let model: Vec<&str> = tiny[..2].iter().map(String::as_str).collect();
    refuses(place, code, words, &[&["edit", "photo.png", "bluer"], flags, &model[..]].concat());
}

fn expected(list: &str) -> Vec<Value> {
    let bytes = fs::read(fixtures().join("images/expected.json")).unwrap();
    let lists: Value = serde_json::from_slice(&bytes).unwrap();
    lists[list].as_array().unwrap().clone()
}

#[test]
fn broken_images_are_refused() {
    let place = Place::new();
    for file in expected("invalid") {
        let name = file["file"].as_str().unwrap();
        let path = fixtures().join("images").join(name).display().to_string();
        refuses(&place, 1, &[name], &["edit", &path, "bluer"]);
    }
    refuses(&place, 1, &["no-such.png"], &["edit", "no-such.png", "bluer"]);
    fs::create_dir(place.path("folder")).unwrap();
    refuses(&place, 1, &["folder"], &["edit", "folder", "bluer"]);
    assert!(place.run_with_input(&["edit", "-", "bluer"], b"hello").sentence(1).contains("standard input"));
}

/// 50,000x50,000 pixels would take 7.5 GB.
#[cfg(target_os = "linux")]
#[test]
fn a_huge_header_takes_no_memory() {
    let place = Place::new();
    let huge = fixtures().join("images/huge_header.png").display().to_string();
    let script = format!("ulimit -v 4000000; exec '{}' edit '{huge}' bluer", support::BINARY);
    let ran = support::Ran::from(place.command("sh").args(["-c", &script]).output().unwrap());
    let sentence = ran.sentence(1);
    assert!(sentence.contains("50000x50000") && sentence.contains("megapixels"), "{sentence}");
}

#[test]
fn odd_images_work() {
    let place = Place::new();
    let images = expected("valid");
    let jobs = images.iter().map(|image| {
        let path = fixtures().join("images").join(image["file"].as_str().unwrap());
        serde_json::json!({ "image": path, "prompt": "bluer", "steps": 1 }).to_string() + "\n"
    });
    place.write("jobs.jsonl", jobs.collect::<String>());
    let ran = place.tiny(&["edit", "--batch", "jobs.jsonl", "--keep-loaded"]);
    // Only the single pixel is too small.
    let errors: Vec<_> = ran.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert!(errors.len() == 1 && errors[0].contains("1x1"), "{errors:?}");
    assert_eq!(ran.text().lines().count(), images.len() - 1);
}

#[test]
fn an_image_of_one_pixel_is_too_small() {
    let place = Place::new();
    let path = fixtures().join("images/one_pixel.png").display().to_string();
    let nano = place.run(&["edit", &path, "bluer"]);
    assert!(nano.sentence(2).contains("1x1"), "{}", nano.stderr);
}

#[test]
fn impossible_numbers_are_usage_errors() {
    let place = Place::new();
    for (words, flags) in [
        (["0x48"], &["--width", "0", "--height", "48"]),
        (["17x48"], &["--width", "17", "--height", "48"]),
        (["100000x100000"], &["--width", "100000", "--height", "100000"]),
    ] {
        refuses_edit(&place, 2, &words, flags);
    }
    for (words, flags) in [
        (["steps is 0"], ["--steps", "0"]),
        (["steps is 1001"], ["--steps", "1001"]),
        (["guidance is NaN"], ["--guidance", "NaN"]),
        (["guidance is -1"], ["--guidance", "-1"]),
        (["guidance is inf"], ["--guidance", "inf"]),
        (["num-images is 0"], ["--num-images", "0"]),
        (["width and height"], ["--width", "64"]),
        (["true-cfg"], ["--true-cfg", "2"]),
        (["negative prompt"], ["--negative-prompt", "red"]),
        (["reference size 17x16"], ["--reference-size", "17x16"]),
        (["aspect ratio"], ["--aspect-ratio", "1000:1"]),
        (["quality"], ["--quality", "90"]),
        (["99984x99984"], ["--reference-size", "99984x99984"]),
    ] {
        refuses_edit(&place, 2, &words, &flags);
    }
}

#[test]
fn what_clap_refuses_is_a_usage_error_too() {
    let place = Place::new();
    for flags in [["--steps", "many"], ["--seed", "-1"], ["--device", "tpu"], ["--dtype", "f8"], ["--format", "gif"]] {
        refuses(&place, 2, &flags, &[&["edit", "photo.png", "bluer"], &flags[..]].concat());
    }
    refuses(&place, 2, &["<PROMPT>", "--help"], &["edit", "photo.png"]);
    // A misspelt word gets clap's advice.
    let misspelt = place.run(&["edit", "photo.png", "bluer", "--sed", "1"]);
    assert!(misspelt.code == Some(2) && misspelt.stderr.contains("'--seed'"), "{}", misspelt.stderr);
    assert_eq!(place.names(), ["photo.png"]);
}

#[test]
fn endless_prompts_are_refused() {
    let place = Place::new();
    let long = "bluer ".repeat(20_000);
    refuses(&place, 2, &["prompt", "120000 bytes"], &["edit", "photo.png", &long]);
    let job = serde_json::json!({ "image": "photo.png", "prompt": "x".repeat(1 << 20) });
    place.write("jobs.jsonl", job.to_string());
    refuses(&place, 2, &["jobs.jsonl line 1", "1048576 bytes"], &["edit", "--batch", "jobs.jsonl"]);
}

#[test]
fn a_bad_line_is_found_before_the_first_edit() {
    let place = Place::new();
    for (line, words) in [
        ("{", "column 1"),
        (r#"{"prompt": "redder", "colour": 3}"#, "colour"),
        (r#"{"prompt": "redder", "steps": 0}"#, "steps is 0"),
        (r#"{"prompt": "redder", "num_images": 3, "seed": [1, 2]}"#, "2 seeds for 3 images"),
    ] {
        place.write("jobs.jsonl", format!("{{\"image\": \"photo.png\", \"prompt\": \"bluer\"}}\n\n{line}\n"));
        // Reading this model would be the next failure.
        let args = ["edit", "--batch", "jobs.jsonl", "--model", "./none"];
        refuses(&place, 2, &["jobs.jsonl line 3: ", words], &args);
    }
}

#[test]
fn places_that_cannot_be_written_are_found_before_the_work() {
    let place = Place::new();
    place.write("file", "");
    // A model that does not exist: reading it would be the next failure.
    let edit = |words: &[&str], code: i32, output: &str| {
        refuses(&place, code, words, &["edit", "photo.png", "bluer", "--model", "./none", "-o", output]);
    };
    edit(&["missing/out.png"], 1, "missing/out.png");
    edit(&["file/out.png"], 1, "file/out.png");
    edit(&["out.gif", ".png"], 2, "out.gif");
    edit(&["file"], 1, "file");
    if cfg!(target_os = "linux") {
        edit(&["/proc/out.png"], 1, "/proc/out.png");
    }
    refuses_edit(&place, 1, &["no/dump"], &["--dump", "no/dump.safetensors"]);
}

#[test]
fn intermediates_need_a_file_of_their_own() {
    let place = Place::new();
    refuses_edit(&place, 2, &["--dump", "file"], &["--dump", "-"]);
    refuses_edit(&place, 2, &["./out.png", "--dump"], &["--dump", "./out.png", "-o", "out.png"]);
    refuses_edit(&place, 2, &["out-2.png", "--dump"], &["--dump", "out-2.png", "-o", "out.png", "-n", "3"]);
    refuses_edit(&place, 2, &["photo-edited.png", "--dump"], &["--dump", "photo-edited.png"]);
}

/// Nobody reads this pipe: to open it would wait for ever.
#[cfg(unix)]
#[test]
fn a_named_pipe_is_no_output() {
    let place = Place::new();
    let pipe = place.path("pipe.png");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::os::unix::fs::symlink(&pipe, place.path("link.png")).unwrap();
    for flags in [&["-o", "pipe.png"][..], &["-o", "link.png", "--force"], &["--dump", "pipe.png"]] {
        refuses_edit(&place, 1, &[flags[1], "neither a file"], flags);
    }
    let piped = place.tiny(&["edit", "photo.png", "bluer", "-q", "-o", "/dev/stdout"]);
    assert!(piped.code == Some(0) && piped.stdout.starts_with(b"\x89PNG"), "{}", piped.stderr);
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    let folder = place.path("shut");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o555)).unwrap();
    // The superuser may write anyway.
    if fs::write(folder.join("probe"), "").is_err() {
        refuses_edit(&place, 1, &["shut/out.png"], &["-o", "shut/out.png"]);
    }
}

/// A disk that is full.
#[cfg(target_os = "linux")]
#[test]
fn a_result_that_does_not_fit_is_an_error() {
    let place = Place::new();
    let ran = place.tiny(&["edit", "photo.png", "bluer", "-q", "-o", "/dev/full"]);
    assert!(ran.sentence(1).contains("/dev/full"), "{}", ran.stderr);
}

/// A copy of the tiny model with something wrong.
fn spoiled(place: &Place, spoil: impl FnOnce(&std::path::Path)) {
    let model = place.path("model");
    copy_folder(&fixtures().join("tiny-kontext"), &model);
    spoil(&model);
}

fn refuses_model(words: &[&str], spoil: impl FnOnce(&std::path::Path)) {
    let place = Place::new();
    spoiled(&place, spoil);
    let size = ["--steps", "1", "--reference-size", "keep"];
    refuses(&place, 1, words, &[&["edit", "photo.png", "bluer", "--model", "model"], &size[..]].concat());
}

const SHARD: &str = "diffusion_pytorch_model-00002-of-00003.safetensors";

#[test]
fn models_that_are_not_there_are_refused() {
    let place = Place::new();
    refuses(&place, 1, &["./none"], &["edit", "photo.png", "bluer", "--model", "./none"]);
    refuses(
        &place,
        1,
        &["someone/model", "HF_HUB_OFFLINE"],
        &["edit", "photo.png", "bluer", "--model", "someone/model"],
    );
    refuses(&place, 1, &["."], &["edit", "photo.png", "bluer", "--model", "."]);
    refuses(
        &place,
        1,
        &["none.safetensors"],
        &["edit", "photo.png", "bluer", "--vae", "none.safetensors", "--model", "nano-kontext"],
    );
}

#[test]
fn missing_and_truncated_weights_are_refused() {
    refuses_model(&[SHARD, "index"], |model| fs::remove_file(model.join("transformer").join(SHARD)).unwrap());
    refuses_model(&["vae", "safetensors"], |model| {
        fs::remove_file(model.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    });
    refuses_model(&["config.json"], |model| fs::remove_file(model.join("text_encoder/config.json")).unwrap());
    for part in ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"] {
        refuses_model(&[part], |model| {
            let bytes = fs::read(model.join(part)).unwrap();
            fs::write(model.join(part), &bytes[..bytes.len() / 2]).unwrap();
        });
        refuses_model(&[part], |model| {
            // A header that is longer than the file.
            let mut bytes = fs::read(model.join(part)).unwrap();
            bytes[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
            fs::write(model.join(part), bytes).unwrap();
        });
        refuses_model(&[part], |model| fs::write(model.join(part), "").unwrap());
    }
}

#[test]
fn weights_of_another_shape_are_refused_with_both_shapes() {
    let part = "text_encoder/model.safetensors";
    refuses_model(&[part, "token_embedding", "[", "expected"], |model| {
        // The same bytes, said to be of the transposed shape.
        let bytes = fs::read(model.join(part)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let tensors = header.as_object_mut().unwrap();
        let name = tensors.keys().find(|name| name.contains("token_embedding")).unwrap().clone();
        tensors[&name]["shape"].as_array_mut().unwrap().reverse();
        let header = header.to_string();
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.extend(&bytes[8 + length..]);
        fs::write(model.join(part), out).unwrap();
    });
}

#[test]
fn other_architectures_are_refused_by_name() {
    refuses_model(&["model_index.json", "StableDiffusion3Pipeline"], |model| {
        let index = fs::read_to_string(model.join("model_index.json")).unwrap();
        fs::write(model.join("model_index.json"), index.replace("FluxKontextPipeline", "StableDiffusion3Pipeline"))
            .unwrap();
    });
    refuses_model(&["model_index.json"], |model| fs::write(model.join("model_index.json"), "{").unwrap());
}

#[test]
fn single_files_of_the_wrong_kind_are_refused() {
    let place = Place::new();
    let tiny = tiny();
    let file = |name: &str| fixtures().join("tiny-kontext").join(name).display().to_string();
    let vae = file("ae.safetensors");
    let edit = |flag: &str, value: &str, words: &[&str]| {
        let args = ["edit", "photo.png", "bluer", flag, value];
        refuses(&place, 1, words, &args.iter().copied().chain(tiny.iter().map(String::as_str)).collect::<Vec<_>>());
    };
    edit("--transformer", &vae, &["ae.safetensors", "--vae"]);
    place.write("model.gguf", b"GGUF\x03\0\0\0");
    edit("--transformer", "model.gguf", &["model.gguf", "GGUF"]);
    place.write("notes.safetensors", b"hello");
    edit("--clip", "notes.safetensors", &["notes.safetensors"]);
    refuses(
        &place,
        2,
        &["--vae"],
        &["edit", "photo.png", "bluer", "--transformer", &file("flux1-kontext-dev.safetensors")],
    );
}

#[test]
fn info_about_nothing_is_refused() {
    let place = Place::new();
    place.write("notes.txt", "hello");
    refuses(&place, 1, &["none.png"], &["info", "none.png"]);
    refuses(&place, 1, &["notes.txt"], &["info", "notes.txt"]);
    refuses(&place, 1, &["photo.png"], &["edit", "--from", "photo.png"]);
}

//! LoRAs through the real program: stored and repeated, in a batch, refused, described.

mod support;

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use support::{Place, fixtures, tiny};

type Tensors = HashMap<String, Tensor>;

fn load(path: impl AsRef<Path>) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn file(name: &str) -> std::path::PathBuf {
    fixtures().join("lora").join(name)
}

fn path(name: &str) -> String {
    file(name).display().to_string()
}

#[test]
fn an_edit_stores_its_loras_and_repeats_with_them() {
    let place = Place::new();
    fs::copy(file("kohya.safetensors"), place.path("style.safetensors")).unwrap();
    let common = format!("{}:-0.5", path("common.safetensors"));
    let flags = ["--lora", "style.safetensors:0.75", "--lora", &common];
    place.tiny(&["edit", "photo.png", "bluer", "-o", "plain.png", "--seed", "1"]).lines();
    place.tiny(&[&["edit", "photo.png", "bluer", "-o", "a.png", "--seed", "1"], &flags[..]].concat()).lines();
    assert_ne!(place.pixels("a.png"), place.pixels("plain.png"));
    let said = place.run(&["info", "a.png"]).lines().join("\n");
    assert!(said.contains("style.safetensors at 0.75") && said.contains("common.safetensors at -0.5"), "{said}");
    place.run(&["edit", "--from", "a.png", "-o", "again.png"]).lines();
    assert_eq!(place.bytes("again.png"), place.bytes("a.png"));
    // A file of the same name is another LoRA: said, and used.
    let style = place.bytes("style.safetensors");
    place.write("style.safetensors", fs::read(file("fal.safetensors")).unwrap());
    let other = place.run(&["edit", "--from", "a.png", "-o", "other.png"]);
    assert!(other.stderr.contains("style.safetensors is not the LoRA that a.png was made with"), "{}", other.stderr);
    assert_ne!(place.pixels("other.png"), place.pixels("a.png"));
    place.write("style.safetensors", style);
    assert!(!place.run(&["edit", "--from", "a.png", "-o", "same.png"]).stderr.contains("is not the LoRA"));
    // One that is given takes the place of those that are stored; at 0 it does nothing.
    place.run(&["edit", "--from", "a.png", "-o", "off.png", "--lora", "style.safetensors:0"]).lines();
    assert_eq!(place.pixels("off.png"), place.pixels("plain.png"));
    fs::rename(place.path("style.safetensors"), place.path("moved.safetensors")).unwrap();
    let gone = place.run(&["edit", "--from", "a.png", "-o", "late.png"]);
    let sentence = gone.sentence(1);
    assert!(sentence.contains("no longer there") && sentence.contains("--lora style.safetensors:0.75"), "{sentence}");
    let moved = ["edit", "--from", "a.png", "-o", "late.png", "--lora", "moved.safetensors:0.75", "--lora", &common];
    place.run(&moved).lines();
    assert_eq!(place.pixels("late.png"), place.pixels("a.png"));
}

#[test]
fn lines_of_a_batch_have_their_own_loras() {
    let place = Place::new();
    let (fal, xlabs) = (path("fal.safetensors"), path("xlabs.safetensors"));
    let line = |output: &str, lora: serde_json::Value| {
        serde_json::json!({"image": "photo.png", "prompt": "bluer", "seed": 1, "output": output, "lora": lora})
            .to_string()
    };
    let lines = [
        line("a.png", format!("{fal}:0.5").into()),
        line("b.png", vec![fal.clone(), format!("{xlabs}:2")].into()),
        line("none.png", Vec::<String>::new().into()),
        r#"{"image": "photo.png", "prompt": "bluer", "seed": 1, "output": "flag.png"}"#.to_string(),
    ];
    place.write("jobs.jsonl", lines.join("\n"));
    place.tiny(&["edit", "--batch", "jobs.jsonl", "--keep-loaded", "--lora", &xlabs]).lines();
    let two = ["--lora", &fal, "--lora", &format!("{xlabs}:2")].map(String::from);
    for (name, flags) in [
        ("a.png", vec!["--lora".to_string(), format!("{fal}:0.5")]),
        ("b.png", two.to_vec()),
        ("none.png", vec![]),
        ("flag.png", vec!["--lora".to_string(), xlabs.clone()]),
    ] {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let args = [&["edit", "photo.png", "bluer", "--seed", "1", "-o", "alone.png", "--force"], &flags[..]].concat();
        place.tiny(&args).lines();
        assert_eq!(place.pixels(name), place.pixels("alone.png"), "{name}");
    }
}

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

#[test]
fn loras_that_do_not_fit_are_refused_with_what_they_are() {
    let place = Place::new();
    let model = tiny();
    let names = |list: &[&str]| -> Tensors {
        let pair = |name: &str| {
            [(format!("{name}.lora_A.weight"), tensor(&[2, 64])), (format!("{name}.lora_B.weight"), tensor(&[64, 2]))]
        };
        list.iter().flat_map(|name| pair(name)).collect()
    };
    let one = |entries: &[(&str, &[usize])]| -> Tensors {
        entries.iter().map(|(name, shape)| (name.to_string(), tensor(shape))).collect()
    };
    let proj = "double_blocks.0.img_attn.proj";
    let key = |ending: &str| format!("{proj}.{ending}");
    for (name, tensors, words) in [
        (
            "flux2",
            names(&["single_transformer_blocks.0.attn.to_qkv_mlp_proj", proj]),
            vec!["2 of its 4", "FLUX.2", "--lora-partial"],
        ),
        ("sdxl", names(&["lora_unet_input_blocks_4_1_proj_in"]), vec!["2 of its 2", "Stable Diffusion"]),
        ("deep", names(&["double_blocks.7.img_attn.proj", proj]), vec!["double_blocks.7", "no place"]),
        (
            "wide",
            one(&[(&key("lora_A.weight"), &[4, 3072]), (&key("lora_B.weight"), &[3072, 4])]),
            vec!["[3072, 4]", "[64, 64]"],
        ),
        ("ranks", one(&[(&key("lora_A.weight"), &[4, 64]), (&key("lora_B.weight"), &[64, 5])]), vec!["do not fit"]),
        ("rank0", one(&[(&key("lora_A.weight"), &[0, 64]), (&key("lora_B.weight"), &[64, 0])]), vec!["do not fit"]),
        ("axes", one(&[(&key("lora_A.weight"), &[4]), (&key("lora_B.weight"), &[])]), vec!["do not fit"]),
        ("half", one(&[(&key("lora_A.weight"), &[4, 64])]), vec![proj, "only", "complete"]),
        ("alpha", one(&[(&key("alpha"), &[])]), vec!["only"]),
        (
            "alphas",
            one(&[(&key("lora_A.weight"), &[4, 64]), (&key("lora_B.weight"), &[64, 4]), (&key("alpha"), &[2])]),
            vec!["not one number"],
        ),
        ("lokr", one(&[(&key("lokr_w1"), &[4, 4]), (&key("lokr_w2"), &[16, 15])]), vec!["do not fit"]),
        ("bias", one(&[(&key("diff_b"), &[65])]), vec!["do not fit"]),
        ("dora", one(&[(&key("dora_scale"), &[64, 1]), (&key("lora_A.weight"), &[4, 64])]), vec!["DoRA"]),
        ("magnitude", one(&[(&key("lora_magnitude_vector"), &[64])]), vec!["DoRA"]),
        ("loha", one(&[(&key("hada_w1_a"), &[64, 4])]), vec!["LoHa"]),
        (
            "twice",
            {
                let mut both = names(&[proj]);
                both.extend(names(&["lora_unet_double_blocks_0_img_attn_proj"]));
                both
            },
            vec!["both change double_blocks.0.img_attn.proj.weight"],
        ),
        ("vae", load(fixtures().join("tiny-kontext/ae.safetensors")), vec!["VAE", "not a LoRA", "--vae"]),
    ] {
        candle_core::safetensors::save(&tensors, place.path(name)).unwrap();
        let ran = place.run(&["edit", "photo.png", "bluer", &model[0], &model[1], "--lora", name]);
        let sentence = ran.sentence(1);
        for word in words {
            assert!(sentence.contains(word), "`{word}` is not in: {sentence}");
        }
        assert!(sentence.contains(name), "{sentence}");
    }
    let missing = place.tiny(&["edit", "photo.png", "bluer", "--lora", "nowhere.safetensors:0.5"]);
    assert!(missing.sentence(1).starts_with("nowhere.safetensors: "));
    let nothing = place.tiny(&["edit", "photo.png", "bluer", "--lora-partial"]);
    assert!(nothing.sentence(2).contains("--lora-partial"));
    let scale = place.tiny(&["edit", "photo.png", "bluer", "--lora", "flux2:1000"]);
    assert!(scale.sentence(2).contains("1000"));
    // For the tiny model's sizes, and not for those of the embedded one.
    let other = place.run(&["edit", "photo.png", "bluer", "--lora", &path("xlabs.safetensors")]);
    assert!(other.sentence(1).contains("xlabs.safetensors"));
    // What fits acts, where that is asked for; where nothing fits that does not help.
    let fal = load(file("fal.safetensors"));
    let mut more = fal.clone();
    more.insert("something.else".to_string(), tensor(&[1]));
    candle_core::safetensors::save(&more, place.path("more")).unwrap();
    assert!(place.tiny(&["edit", "photo.png", "bluer", "--lora", "more"]).sentence(1).contains("`something.else`"));
    let seed = ["edit", "photo.png", "bluer", "--seed", "1"];
    place.tiny(&[&seed[..], &["-o", "partial.png", "--lora", "more", "--lora-partial"]].concat()).lines();
    place.tiny(&[&seed[..], &["-o", "whole.png", "--lora", &path("fal.safetensors")]].concat()).lines();
    assert_eq!(place.pixels("partial.png"), place.pixels("whole.png"));
    place.run(&["edit", "--from", "partial.png", "-o", "again.png"]).lines();
    assert_eq!(place.bytes("again.png"), place.bytes("partial.png"));
    assert!(
        place
            .tiny(&["edit", "photo.png", "bluer", "--lora", "sdxl", "--lora-partial"])
            .sentence(1)
            .contains("2 of its 2")
    );
}

#[test]
fn a_lora_file_is_described() {
    let place = Place::new();
    let said = |name: &str| place.run(&["info", &path(name)]).lines().join("\n");
    let kohya = said("kohya.safetensors");
    for words in ["kind: LoRA", "names: kohya", "rank: 2", "3 in text_encoder", "15 in transformer"] {
        assert!(kohya.contains(words), "`{words}` is not in: {kohya}");
    }
    assert!(said("lokr.safetensors").contains("kind: LoKr"));
    assert!(said("xlabs.safetensors").contains("names: XLabs"));
    assert!(said("fal.safetensors").contains("names: Black Forest Labs"));
    let json = place.run(&["info", &path("common.safetensors"), "--json"]);
    let json: serde_json::Value = serde_json::from_str(json.lines()[0]).unwrap();
    assert_eq!(json["lora"]["naming"], "diffusers");
    assert_eq!(json["lora"]["ranks"], serde_json::json!([2, 3]));
    assert_eq!(json["lora"]["targets"]["transformer"], 3);
}

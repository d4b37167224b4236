use clap::{CommandFactory, error::ErrorKind};

use super::*;

fn refused(line: &str) -> ErrorKind {
    Cli::try_parse_from(line.split(' ')).unwrap_err().kind()
}

fn accepted(line: &str) -> Cli {
    Cli::try_parse_from(line.split(' ')).unwrap()
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn documented_forms_are_accepted() {
    for line in [
        "retouch edit photo.jpg bluer",
        "retouch edit - bluer -o -",
        "retouch edit photo.jpg bluer --seed 1,2 --seed 3 --steps 8 --guidance 2.5 --width 512 --height 512",
        "retouch edit photo.jpg bluer --size diffusers --reference-size keep --negative-prompt red --true-cfg 2",
        "retouch edit photo.jpg bluer --aspect-ratio 16:9 --reference-size 640x480 --device cuda:1 --dtype bf16",
        "retouch edit photo.jpg bluer --precision fp8",
        "retouch edit --from edited.png",
        "retouch edit --from edited.png photo.jpg redder",
        "retouch edit --batch jobs.jsonl --keep-loaded --encoders device -q",
        "retouch edit photo.jpg bluer --lora a.safetensors:0.8 --lora b.safetensors --lora-partial",
        "retouch generate stars --num-images 3 --format webp -vv",
        "retouch info edited.png",
        "retouch convert in.safetensors -o out.gguf --type q4_k --keep txt --keep linear*2 -f",
        "retouch models --json",
        "retouch plan -m owner/name --type q8_0 --width 1024 --height 768 --vram-limit 8G --device cuda",
        "retouch plan --reference-size none --true-cfg --keep-loaded --encoders cpu --json",
        "retouch serve -m owner/name --device cuda:0,cuda:1 --port 0 --state jobs --keep 7d --max-upload 8MiB",
        "retouch serve --host 0.0.0.0 --api-key secret-key --api-key-file keys --cors https://a.example --allow-url-inputs",
        "retouch completions zsh",
    ] {
        accepted(line);
    }
}

#[test]
fn incomplete_and_contradictory_forms_are_refused() {
    use ErrorKind::*;
    for (line, kind) in [
        ("retouch edit photo.jpg", MissingRequiredArgument),
        ("retouch generate", MissingRequiredArgument),
        ("retouch edit photo.jpg bluer --batch jobs.jsonl", ArgumentConflict),
        ("retouch edit --from a.png --batch jobs.jsonl", ArgumentConflict),
        ("retouch edit --batch jobs.jsonl -o out.png", ArgumentConflict),
        ("retouch edit photo.jpg bluer -q -v", ArgumentConflict),
        ("retouch edit photo.jpg bluer --format gif", ValueValidation),
        ("retouch edit photo.jpg bluer --device tpu", ValueValidation),
        ("retouch edit photo.jpg bluer --precision f8", ValueValidation),
        ("retouch edit photo.jpg bluer --aspect-ratio 16", ValueValidation),
        ("retouch edit photo.jpg bluer --reference-size small", ValueValidation),
        ("retouch edit photo.jpg bluer --seed x", ValueValidation),
        ("retouch convert in.safetensors --type q8_0", MissingRequiredArgument),
        ("retouch convert in.safetensors -o out.gguf", MissingRequiredArgument),
        ("retouch convert in.safetensors -o out.gguf --type q9", ValueValidation),
        ("retouch edit photo.jpg bluer --vram-limit 8", ValueValidation),
        ("retouch edit photo.jpg bluer --encoders gpu", ValueValidation),
        ("retouch plan --type q9", ValueValidation),
        ("retouch serve --keep 24", ValueValidation),
        ("retouch serve --max-queue 0", ValueValidation),
        ("retouch serve --host here", ValueValidation),
        ("retouch plan --width 0", ValueValidation),
        ("retouch plan --reference-size 1024", ValueValidation),
        ("retouch edit photo.jpg bluer --no-such-flag", UnknownArgument),
        ("retouch erase photo.jpg", InvalidSubcommand),
    ] {
        assert_eq!(refused(line), kind, "{line}");
    }
}

#[test]
fn amounts_of_memory_have_units() {
    let bytes = |text: &str| text.parse::<Bytes>().map(|Bytes(bytes)| bytes);
    assert_eq!(bytes("8G"), Ok(8_000_000_000));
    assert_eq!(bytes("7.5 GiB"), Ok(7_500 * (1 << 30) / 1000));
    assert_eq!(bytes("900mb"), Ok(900_000_000));
    for text in ["", "8", "G", "-8G", "1.2.3G", "8T", "8 G B"] {
        assert!(bytes(text).is_err(), "{text}");
    }
}

#[test]
fn a_stored_model_yields_to_flags() {
    let args = |line: &str| match accepted(line).command {
        Command::Edit(args) => args.common.model,
        _ => unreachable!(),
    };
    let stored = ModelSource { base: Some("stored".into()), clip: Some("old".into()), ..Default::default() };
    let model = |line: &str| args(line).source(stored.clone());
    let kept = model("retouch edit --from a.png --vae new");
    assert_eq!((kept.base.as_deref(), kept.clip, kept.vae), (Some("stored"), stored.clip.clone(), Some("new".into())));
    let other = model("retouch edit --from a.png -m other");
    assert_eq!((other.base.as_deref(), other.clip), (Some("other"), None));
    let files = model("retouch edit --from a.png --transformer f --vae v --clip c --t5 t");
    assert_eq!((files.base, files.clip), (None, Some("c".into())));
}

#[test]
fn mistakes_are_one_sentence_and_misspelt_words_are_left_to_clap() {
    let said = |line: &str| sentence(&Cli::try_parse_from(line.split(' ')).unwrap_err());
    for (line, words) in [
        ("retouch edit photo.jpg", "not provided: <PROMPT>"),
        ("retouch edit photo.jpg bluer --seed x", "'x' for '--seed <N>'"),
        ("retouch edit photo.jpg bluer -q -v", "cannot be used with"),
        ("retouch edit --batch jobs.jsonl -o out.png", "cannot be used with"),
        ("retouch edit photo.jpg bluer --steps", "'--steps <N>'"),
        ("retouch completions csh", "possible values: bash"),
    ] {
        let sentence = said(line).unwrap();
        assert!(sentence.contains(words) && !sentence.contains('\n') && !sentence.contains("error:"), "{sentence}");
    }
    for line in ["retouch edit photo.jpg bluer --no-such-flag", "retouch erase photo.jpg", "retouch edit --help"] {
        assert_eq!(said(line), None, "{line}");
    }
}

#![no_main]

use std::{fs, panic, path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use retouch_fuzz::{bounded, fixture, scratch, unless_refused};
use retouch_text_encoder::{ClipTokenizer, T5Tokenizer, TokenIds, tokenizer::Result};
use retouch_weights::Folder;

const CLIP: [&str; 3] = ["vocab.json", "merges.txt", "tokenizer_config.json"];

/// Folders in which one file is the input and the others, if any, are the fixtures'.
struct Folders {
    /// The one file that is written.
    input: PathBuf,
    clip: Vec<PathBuf>,
    t5: Vec<PathBuf>,
}

static FOLDERS: LazyLock<Folders> = LazyLock::new(|| {
    // Panics of the tokenizers' crate are caught where it is called; libfuzzer's hook would abort before that. Those that are
    // not caught still end the fuzzer.
    panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let input = scratch().join("input");
    fs::write(&input, b"").unwrap();
    let folder = |name: &str, file: &str, beside: &[&str]| {
        let folder = scratch().join(name);
        fs::create_dir(&folder).unwrap();
        for other in beside.iter().filter(|other| **other != file) {
            fs::copy(fixture("tiny-kontext/tokenizer").join(other), folder.join(other)).unwrap();
        }
        fs::hard_link(&input, folder.join(file)).unwrap();
        folder
    };
    let mut clip: Vec<PathBuf> = CLIP.iter().map(|file| folder(&format!("clip {file}"), file, &CLIP)).collect();
    clip.push(folder("clip", "tokenizer.json", &[]));
    let t5 = ["tokenizer.json", "spiece.model"].map(|file| folder(&format!("t5 {file}"), file, &[])).into();
    Folders { input, clip, t5 }
});

fuzz_target!(|input: &[u8]| {
    let folders = &*FOLDERS;
    fs::write(&folders.input, input).unwrap();
    // The regular expressions take some megabytes, whatever the vocabulary.
    bounded(input, 64, 16 << 20, || {
        for folder in folders.clip.iter().map(Folder::on_disk) {
            check(ClipTokenizer::open(&folder).and_then(|tokenizer| tokenizer.encode(PROMPT, LENGTH)));
        }
        for folder in folders.t5.iter().map(Folder::on_disk) {
            check(T5Tokenizer::open(&folder).and_then(|tokenizer| tokenizer.encode(PROMPT, LENGTH)));
        }
    });
});

const PROMPT: &str = "Make the circle BLUE, 2x  larger \u{e9} \u{ff21} \u{2581} \u{1f3d6}\u{fe0f} <extra_id_1>";
const LENGTH: usize = 77;

fn check(encoded: Result<TokenIds>) {
    if let Some(encoded) = unless_refused(encoded) {
        assert_eq!(encoded.ids.len(), LENGTH);
    }
}

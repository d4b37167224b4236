//! Token ids equal those of the reference implementation's tokenizers.

use std::{error::Error, fs, path::PathBuf};

use retouch_text_encoder::{ClipTokenizer, T5Tokenizer};
use retouch_weights::Folder;
use serde::Deserialize;
use tempfile::TempDir;

type Outcome = Result<(), Box<dyn Error>>;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");

fn model(folder: &str) -> PathBuf {
    PathBuf::from(FIXTURES).join("tiny-kontext").join(folder)
}

/// A folder with these files of the tiny model's `folder`.
fn copy_of(folder: &str, files: &[&str]) -> Result<TempDir, Box<dyn Error>> {
    let copy = tempfile::tempdir()?;
    for file in files {
        fs::copy(model(folder).join(file), copy.path().join(file))?;
    }
    Ok(copy)
}

#[derive(Deserialize)]
struct OddString {
    text: String,
    clip_ids: Vec<u32>,
    t5_ids: Vec<u32>,
    /// False where a special token is written in the text, which SentencePiece itself knows nothing of.
    spiece_agrees: bool,
}

fn odd_strings() -> Result<Vec<OddString>, Box<dyn Error>> {
    let strings: Vec<OddString> = serde_json::from_slice(&fs::read(format!("{FIXTURES}/small/tokens.json"))?)?;
    assert!(strings.len() > 10 && strings.iter().any(|odd| !odd.spiece_agrees));
    Ok(strings)
}

#[test]
fn clip_ids_from_vocabulary_and_merges_equal_the_references() -> Outcome {
    let tokenizer = ClipTokenizer::open(&Folder::on_disk(model("tokenizer")))?;
    for odd in odd_strings()? {
        assert_eq!(tokenizer.encode(&odd.text, odd.clip_ids.len())?.ids, odd.clip_ids, "{:?}", odd.text);
    }
    Ok(())
}

#[test]
fn t5_ids_from_tokenizer_json_equal_the_references() -> Outcome {
    let tokenizer = T5Tokenizer::open(&Folder::on_disk(copy_of("tokenizer_2", &["tokenizer.json"])?.path()))?;
    for odd in odd_strings()? {
        assert_eq!(tokenizer.encode(&odd.text, odd.t5_ids.len())?.ids, odd.t5_ids, "{:?}", odd.text);
    }
    Ok(())
}

#[test]
fn t5_ids_from_spiece_model_equal_the_references() -> Outcome {
    let tokenizer = T5Tokenizer::open(&Folder::on_disk(copy_of("tokenizer_2", &["spiece.model"])?.path()))?;
    for odd in odd_strings()? {
        assert_eq!(tokenizer.encode(&odd.text, odd.t5_ids.len())?.ids, odd.t5_ids, "{:?}", odd.text);
    }
    Ok(())
}

#[test]
fn a_prompt_that_fits_is_padded_and_not_cut() -> Outcome {
    let tokenizer = T5Tokenizer::open(&Folder::on_disk(model("tokenizer_2")))?;
    let exact = tokenizer.encode("make it night time", 512)?;
    let length = exact.ids.iter().filter(|&&id| id != 0).count();
    assert_eq!((exact.ids.len(), exact.cut), (512, None));
    let tight = tokenizer.encode("make it night time", length)?;
    assert_eq!((tight.ids.as_slice(), tight.cut), (&exact.ids[..length], None));
    Ok(())
}

#[test]
fn a_longer_prompt_is_cut_before_the_end_token_and_says_how_long_it_was() -> Outcome {
    let prompt = "word ".repeat(200);
    let clip = ClipTokenizer::open(&Folder::on_disk(model("tokenizer")))?;
    let (whole, cut) = (clip.encode(&prompt, 1000)?, clip.encode(&prompt, 77)?);
    let (start, end) = (whole.ids[0], whole.ids[999]);
    assert_eq!((cut.ids[0], cut.ids[76]), (start, end));
    assert_eq!(cut.ids[..76], whole.ids[..76]);
    assert_eq!(cut.cut, whole.ids.iter().position(|&id| id == end).map(|last| last + 1));

    let t5 = T5Tokenizer::open(&Folder::on_disk(model("tokenizer_2")))?;
    let (whole, cut) = (t5.encode(&prompt, 2000)?, t5.encode(&prompt, 64)?);
    assert_eq!((cut.ids.len(), cut.ids[63], &cut.ids[..63]), (64, 1, &whole.ids[..63]));
    assert_eq!(cut.cut, whole.ids.iter().position(|&id| id == 1).map(|last| last + 1));
    Ok(())
}

#[test]
fn any_length_and_a_prompt_of_64_kib_work() -> Outcome {
    let clip = ClipTokenizer::open(&Folder::on_disk(model("tokenizer")))?;
    let t5 = T5Tokenizer::open(&Folder::on_disk(model("tokenizer_2")))?;
    let prompt = "a".repeat(1 << 16);
    for length in [0, 1, 2] {
        assert_eq!(clip.encode(&prompt, length)?.ids.len(), length);
        assert_eq!(t5.encode(&prompt, length)?.ids.len(), length);
    }
    Ok(())
}

#[test]
fn the_pad_token_is_the_one_of_the_tokenizers_configuration() -> Outcome {
    let folder = copy_of("tokenizer", &["vocab.json", "merges.txt"])?;
    let open = || ClipTokenizer::open(&Folder::on_disk(folder.path()));
    let end = open()?.encode("", 77)?.ids[1];
    assert_eq!(open()?.encode("", 77)?.ids[76], end);
    let vocabulary: std::collections::HashMap<String, u32> =
        serde_json::from_slice(&fs::read(folder.path().join("vocab.json"))?)?;
    for pad in [r#"{"pad_token": "!"}"#, r#"{"pad_token": {"content": "!"}}"#] {
        fs::write(folder.path().join("tokenizer_config.json"), pad)?;
        assert_eq!(open()?.encode("", 77)?.ids[1..3], [end, vocabulary["!"]]);
    }
    Ok(())
}

#[test]
fn clip_opens_a_tokenizer_json_too() -> Outcome {
    let folder = tempfile::tempdir()?;
    let json = serde_json::json!({
        "version": "1.0", "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null, "added_tokens": [], "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 4], "cls": ["<|startoftext|>", 3],
            "trim_offsets": false, "add_prefix_space": false},
        "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "cat",
            "vocab": {"a": 0, "red": 1, "cat": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}},
    });
    fs::write(folder.path().join("tokenizer.json"), json.to_string())?;
    let tokenizer = ClipTokenizer::open(&Folder::on_disk(folder.path()))?;
    assert_eq!(tokenizer.encode("A red CAT", 7)?.ids, [3, 0, 1, 2, 4, 4, 4], "the file's own length must not count");
    Ok(())
}

/// The message with which the folder is refused.
fn refusal<T>(tokenizer: Result<T, retouch_text_encoder::TokenizerError>) -> String {
    tokenizer.err().map_or_else(|| "accepted".to_string(), |e| e.to_string())
}

#[test]
fn unusable_files_are_named_with_the_reason() -> Outcome {
    let folder = tempfile::tempdir()?;
    let clip = || refusal(ClipTokenizer::open(&Folder::on_disk(folder.path())));
    let t5 = || refusal(T5Tokenizer::open(&Folder::on_disk(folder.path())));
    let write = |name: &str, content: &str| fs::write(folder.path().join(name), content);
    assert!(clip().contains("no tokenizer found; expected vocab.json with merges.txt"), "{}", clip());
    assert!(t5().contains("no tokenizer found; expected tokenizer.json or spiece.model"), "{}", t5());

    write("vocab.json", r#"{"a": 0, "b": 1}"#)?;
    write("merges.txt", "#version: 0.2\na b\n")?;
    assert!(clip().contains("vocab.json: not a usable tokenizer: it has no token `<|startoftext|>`"), "{}", clip());
    write("vocab.json", r#"{"a": 0, "b": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}"#)?;
    assert!(clip().contains("merges.txt") && clip().contains("line 2 makes a piece"), "{}", clip());
    write("merges.txt", "#version: 0.2\nab\n")?;
    assert!(clip().contains("line 2 is not two pieces"), "{}", clip());
    write("vocab.json", r#"{"a": -1}"#)?;
    assert!(clip().contains("vocab.json: not valid JSON"), "{}", clip());

    let spiece = fs::read(model("tokenizer_2").join("spiece.model"))?;
    fs::write(folder.path().join("spiece.model"), &spiece[..spiece.len() / 2])?;
    assert!(t5().contains("spiece.model: not a usable tokenizer"), "{}", t5());
    // The first entry of the normalizer's table points outside: after the name come a tag, a length of three bytes, and
    // the table's own length.
    let mut damaged = spiece.clone();
    let name = b"nmt_nfkc";
    let table = damaged.windows(name.len()).position(|part| part == name).ok_or("no normalizer")? + name.len() + 8;
    damaged[table..table + 4].fill(0xff);
    fs::write(folder.path().join("spiece.model"), damaged)?;
    let encoded = T5Tokenizer::open(&Folder::on_disk(folder.path())).and_then(|t5| t5.encode("red hat", 8));
    let message = refusal(encoded);
    assert!(message.contains("spiece.model: not a usable tokenizer: its tables contradict"), "{message}");
    fs::write(folder.path().join("spiece.model"), b"")?;
    assert!(t5().contains("spiece.model: not a usable tokenizer"), "{}", t5());
    write("tokenizer.json", "{}")?;
    assert!(t5().contains("tokenizer.json: not a usable tokenizer"), "{}", t5());
    Ok(())
}

/// What the fuzzer found, as each of the files: a sentence, or as many tokens as asked for.
#[test]
fn found_files_do_no_harm() -> Outcome {
    let found = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/hostile/tokenizers");
    for file in fs::read_dir(found)? {
        let bytes = fs::read(file?.path())?;
        for name in ["tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "tokenizer_config.json"] {
            let folder = copy_of("tokenizer", &["vocab.json", "merges.txt"])?;
            fs::write(folder.path().join(name), &bytes)?;
            let of = Folder::on_disk(folder.path());
            let clip = ClipTokenizer::open(&of).and_then(|clip| clip.encode("a red hat", 77));
            let t5 = T5Tokenizer::open(&of).and_then(|t5| t5.encode("a red hat", 77));
            for encoded in [clip, t5] {
                match encoded {
                    Ok(encoded) => assert_eq!(encoded.ids.len(), 77),
                    Err(refused) => assert!(!refused.to_string().contains('\n'), "{refused}"),
                }
            }
        }
    }
    Ok(())
}

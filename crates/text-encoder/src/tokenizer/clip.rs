use std::collections::HashMap;

use retouch_weights::Folder;
use serde::Deserialize;
use tokenizers::{
    AddedToken, Result as AnyResult, SplitDelimiterBehavior, Tokenizer,
    models::bpe::{BPE, Vocab},
    normalizers::{Lowercase, NFC, Replace, replace::ReplacePattern, utils::Sequence as Normalizers},
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence as PreTokenizers,
        split::{Split, SplitPattern},
    },
    processors::roberta::RobertaProcessing,
};

use super::{FixedLength, Result, TokenIds, TokenizerError, unusable};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// The tokenizer of CLIP: byte-pair encoding of lower-case words.
pub struct ClipTokenizer(FixedLength);

/// The part of `tokenizer_config.json` that matters here.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    pad_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Described { content: String },
}

impl ClipTokenizer {
    /// The tokenizer in a model's `tokenizer` folder: `vocab.json` with `merges.txt`, or else `tokenizer.json`.
    pub fn open(folder: &Folder) -> Result<Self> {
        let config: TokenizerConfig = match folder.has("tokenizer_config.json") {
            true => folder.json("tokenizer_config.json")?,
            false => TokenizerConfig::default(),
        };
        let pad = match config.pad_token {
            Some(Token::Plain(token) | Token::Described { content: token }) => token,
            None => END.to_string(),
        };
        if folder.has("vocab.json") && folder.has("merges.txt") {
            Ok(Self(FixedLength::new(from_vocabulary(folder)?, folder.name_of("vocab.json"), END, &pad)?))
        } else if folder.has("tokenizer.json") {
            Ok(Self(FixedLength::from_json(folder, END, &pad)?))
        } else {
            Err(TokenizerError::Missing {
                folder: folder.to_string(),
                expected: "vocab.json with merges.txt, or tokenizer.json",
            })
        }
    }

    /// The ids of `prompt` between start and end of text, padded or cut to `max_length` (77 for FLUX.1).
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<TokenIds> {
        self.0.encode(prompt, max_length)
    }
}

fn from_vocabulary(folder: &Folder) -> Result<Tokenizer> {
    let vocabulary: HashMap<String, u32> = folder.json("vocab.json")?;
    let (vocabulary_file, merges_file) = (folder.name_of("vocab.json"), folder.name_of("merges.txt"));
    let id = |token: &str| {
        vocabulary.get(token).copied().ok_or_else(|| unusable(&vocabulary_file, format!("it has no token `{token}`")))
    };
    let (start, end) = (id(START)?, id(END)?);
    let merges =
        read_merges(&folder.open("merges.txt")?.bytes, &vocabulary).map_err(|reason| unusable(&merges_file, reason))?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), merges)
        .end_of_word_suffix("</w>".to_string())
        .unk_token(END.to_string())
        .build()
        .map_err(|e| unusable(&merges_file, e))?;
    assemble(bpe, start, end).map_err(|e| unusable(&vocabulary_file, e))
}

/// One pair of pieces per line, the first line a version.
fn read_merges(bytes: &[u8], vocabulary: &HashMap<String, u32>) -> std::result::Result<Vec<(String, String)>, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty());
    lines
        .map(|(number, line)| match line.split_once(' ') {
            // `BPE` takes for granted that no merged piece is longer than all of the vocabulary's.
            Some((left, right)) if vocabulary.contains_key(&format!("{left}{right}")) => {
                Ok((left.to_string(), right.to_string()))
            }
            Some(_) => Err(format!("line {} makes a piece that vocab.json does not have", number + 1)),
            None => Err(format!("line {} is not two pieces with a space between", number + 1)),
        })
        .collect()
}

/// Source: `CLIPTokenizer` in transformers' `models/clip/tokenization_clip.py`.
fn assemble(bpe: BPE, start: u32, end: u32) -> AnyResult<Tokenizer> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    let words = Split::new(
        SplitPattern::Regex(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+".into(),
        ),
        SplitDelimiterBehavior::Removed,
        true,
    )?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?;
    tokenizer
        .with_pre_tokenizer(Some(PreTokenizers::new(vec![words.into(), ByteLevel::new(false, true, true).into()])));
    tokenizer.with_post_processor(Some(
        RobertaProcessing::new((END.to_string(), end), (START.to_string(), start))
            .trim_offsets(false)
            .add_prefix_space(false),
    ));
    tokenizer.add_special_tokens([
        AddedToken::from(START, true).normalized(true),
        AddedToken::from(END, true).normalized(false),
    ])?;
    Ok(tokenizer)
}

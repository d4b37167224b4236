//! T5's tokenizer from a SentencePiece model.

use prost::Message;
use retouch_weights::ModelFile;
use tokenizers::{
    AddedToken, Result as AnyResult, Tokenizer,
    models::unigram::Unigram,
    normalizers::{Precompiled, Replace, Strip, replace::ReplacePattern, utils::Sequence as Normalizers},
    pre_tokenizers::metaspace::{Metaspace, PrependScheme},
    processors::template::TemplateProcessing,
};

use super::{Result, unusable};

/// The fields of SentencePiece's `sentencepiece_model.proto` that T5 needs; all others are skipped.
#[derive(Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
}

#[derive(Message)]
struct Trainer {
    /// 1 is unigram, the format's default.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
}

#[derive(Message)]
struct Normalizer {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
}

const UNIGRAM: i32 = 1;

const SPECIAL: [&str; 3] = ["<pad>", "</s>", "<unk>"];

/// T5 appends these to the pieces, the last one first.
const EXTRA_IDS: usize = 100;

pub fn read(file: &ModelFile) -> Result<Tokenizer> {
    let model = Model::decode(&*file.bytes).map_err(|e| unusable(&file.name, e))?;
    let trainer = model.trainer.unwrap_or_default();
    let model_type = trainer.model_type.unwrap_or(UNIGRAM);
    if model_type != UNIGRAM {
        return Err(unusable(&file.name, format!("its model type is {model_type}, and T5's is {UNIGRAM} (unigram)")));
    }
    let unknown = usize::try_from(trainer.unk_id.unwrap_or(0)).map_err(|e| unusable(&file.name, e))?;
    let charsmap = model.normalizer.and_then(|n| n.precompiled_charsmap).unwrap_or_default();
    // Adding a special token that the model does not have would give it an id that no text encoder knows.
    for token in SPECIAL {
        if !model.pieces.iter().any(|p| p.piece.as_deref() == Some(token)) {
            return Err(unusable(&file.name, format!("it has no token `{token}`")));
        }
    }
    assemble(model.pieces, unknown, &charsmap).map_err(|e| unusable(&file.name, e))
}

/// Source: `T5Converter` and `SpmConverter` in transformers' `convert_slow_tokenizer.py`.
fn assemble(pieces: Vec<Piece>, unknown: usize, charsmap: &[u8]) -> AnyResult<Tokenizer> {
    let extra: Vec<String> = (0..EXTRA_IDS).rev().map(|i| format!("<extra_id_{i}>")).collect();
    let vocabulary = pieces
        .into_iter()
        .map(|p| (p.piece.unwrap_or_default(), f64::from(p.score.unwrap_or(0.0))))
        .chain(extra.iter().map(|token| (token.clone(), 0.0)))
        .collect();
    let mut tokenizer = Tokenizer::new(Unigram::from(vocabulary, Some(unknown), false)?);

    let mut normalizers = Vec::new();
    if !charsmap.is_empty() {
        normalizers.push(Precompiled::from(charsmap)?.into());
    }
    normalizers.push(Strip::new(false, true).into());
    normalizers.push(Replace::new(ReplacePattern::Regex(" {2,}".into()), "▁")?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers)))?;
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));

    let special = SPECIAL.into_iter().map(str::to_string).chain(extra);
    tokenizer.add_special_tokens(special.map(|token| AddedToken::from(token, true).normalized(false)))?;
    let end = tokenizer.token_to_id("</s>").ok_or("it has no token `</s>`")?;
    let template = TemplateProcessing::builder()
        .try_single("$A </s>")?
        .try_pair("$A </s> $B </s>")?
        .special_tokens(vec![("</s>", end)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

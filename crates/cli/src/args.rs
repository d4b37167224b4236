//! The command line as clap reads it. A flag is documented here: `--help` and completions come from these comments, and
//! a test holds the README's table to them.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, Parser, Subcommand, ValueHint, error::ErrorKind};
use clap_complete::Shell;
use retouch::{DeviceChoice, Encoders, ModelSource, Precision, Target, image::OutputFormat};

use crate::{
    failure::{Failure, Result},
    serve::ServeArgs,
    settings::SettingsArgs,
};

/// The arguments of this process. Help, and the corrections of misspelt words, are as clap prints them; what else is
/// wrong with arguments is said in one sentence.
pub fn parse() -> Result<Cli> {
    Cli::try_parse().map_err(|error| sentence(&error).map_or_else(|| error.exit(), Failure::Usage))
}

fn sentence(error: &clap::Error) -> Option<String> {
    use ErrorKind::*;
    if !matches!(
        error.kind(),
        MissingRequiredArgument
            | ArgumentConflict
            | ValueValidation
            | InvalidValue
            | InvalidUtf8
            | NoEquals
            | TooFewValues
            | TooManyValues
            | WrongNumberOfValues
    ) {
        return None;
    }
    // What is wrong comes first, with what it is about in lines of its own; then, after an empty line, the usage.
    let text = error.render().to_string();
    let what: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    Some(format!("{}; see --help", what.join(" ").trim_start_matches("error: ")))
}

/// Edit images with words, on your own machine.
#[derive(Debug, Parser)]
#[command(name = "retouch", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub verbosity: Verbosity,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Edit an image
    #[command(override_usage = EDIT_FORMS, after_help = EDIT_EXAMPLES)]
    Edit(Box<EditArgs>),
    /// Make an image from words alone
    Generate(Box<GenerateArgs>),
    /// Show the parameters stored in an image, or describe a model folder or weight file
    Info(InfoArgs),
    /// Write a transformer or a T5 encoder to a smaller file
    #[command(after_help = CONVERT_EXAMPLES)]
    Convert(ConvertArgs),
    /// Show what an edit would keep in memory, stage by stage, without running it or reading weights
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(Box<PlanArgs>),
    /// List known and downloaded models
    Models(ModelsArgs),
    /// Serve a web page and an HTTP API, also in the form of the hosted FLUX service and of OpenAI's
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<ServeArgs>),
    /// Print a completion script for a shell
    Completions { shell: Shell },
}

const EDIT_FORMS: &str = "\
retouch edit [OPTIONS] <IMAGE> <PROMPT>
       retouch edit [OPTIONS] --from <EDITED> [IMAGE] [PROMPT]
       retouch edit [OPTIONS] --batch <FILE>";

const SERVE_EXAMPLES: &str = "\
Examples:
  retouch serve
  retouch serve --model black-forest-labs/FLUX.1-Kontext-dev --device cuda:0,cuda:1
  retouch serve --host 0.0.0.0 --api-key-file keys.txt

Open http://127.0.0.1:8090 for the page; http://127.0.0.1:8090/openapi.json describes the API.";

const PLAN_EXAMPLES: &str = "\
Examples:
  retouch plan --model black-forest-labs/FLUX.1-Kontext-dev --device cuda --vram-limit 12G --type q8_0
  retouch plan --model ~/models/FLUX.1-Kontext-dev --width 2048 --height 2048";

pub const EDIT_EXAMPLES: &str = "\
Examples:
  retouch edit photo.jpg \"make it black and white\"
  retouch edit photo.jpg \"remove the car\" -o clean.png --seed 1,2,3
  retouch edit --from clean-2.png photo.jpg
  retouch edit --batch jobs.jsonl --keep-loaded

A batch file has one JSON object per line, of these fields: image, prompt, output, seed (a number or a list), num_images,
steps, guidance, cache, negative_prompt, true_cfg, width, height, aspect_ratio, size, reference_size, lora (a text or a list),
lora_partial. All but prompt can be left out, and what a line leaves out is taken from the command line; a list of seeds says
how many images there are.
  {\"image\": \"photo.jpg\", \"prompt\": \"make it night\", \"output\": \"night.png\", \"seed\": [1, 2], \"steps\": 20}";

const CONVERT_EXAMPLES: &str = "\
Examples:
  retouch convert flux1-kontext-dev.safetensors -o flux1-kontext-dev-q4_k.gguf --type q4_k
  retouch convert FLUX.1-Kontext-dev/text_encoder_2 -o t5xxl-q8_0.gguf --type q8_0
  retouch convert flux1-kontext-dev.safetensors -o mixed.gguf --type q4_k --keep single_blocks.*.linear2

GGUF files are laid out as those of ComfyUI-GGUF are; stable-diffusion.cpp reads them, too. Norms, biases and the
layers at the transformer's ends stay as they are; what has been quantised before cannot get better.";

#[derive(Debug, Args)]
pub struct EditArgs {
    /// The image to edit: PNG, JPEG, WebP, GIF, BMP or TIFF; `-` reads it from standard input
    #[arg(required_unless_present_any = ["from", "batch"], conflicts_with = "batch", value_hint = ValueHint::FilePath)]
    pub image: Option<PathBuf>,
    /// What to do, in words
    #[arg(required_unless_present_any = ["from", "batch"], conflicts_with = "batch")]
    pub prompt: Option<String>,
    /// Repeat the edit whose parameters are stored in this image; flags given beside it replace stored ones. Its source
    /// is IMAGE, or the file of the stored name beside it or in the working directory; with another image, sizes that
    /// were given stay, and those that came from the image come from the new one
    #[arg(long, value_name = "EDITED", value_hint = ValueHint::FilePath)]
    pub from: Option<PathBuf>,
    /// Do all edits of a JSON Lines file (`-` for standard input); see the examples below
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "dump", "output"], value_hint = ValueHint::FilePath)]
    pub batch: Option<PathBuf>,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// What to show, in words
    pub prompt: String,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Debug, Default, Args)]
pub struct CommonArgs {
    #[command(flatten)]
    pub output: OutputArgs,
    #[command(flatten)]
    pub settings: SettingsArgs,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Where to write the result; `-` is standard output, a folder gets the default name [default: IMAGE's name with
    /// `-edited.png` in the working directory, numbered if that exists]
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::AnyPath)]
    pub output: Option<PathBuf>,
    /// Overwrite an existing file
    #[arg(short, long)]
    pub force: bool,
    /// png, jpeg or webp (lossless) [default: by the extension of FILE, else png]
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<OutputFormat>,
    /// Quality of a JPEG, 1 to 100 [default: 95]
    #[arg(long, value_name = "N")]
    pub quality: Option<u8>,
    /// Do not store the parameters in the image
    #[arg(long)]
    pub no_metadata: bool,
    /// Print a line of JSON for each image instead of its path
    #[arg(long)]
    pub json: bool,
    /// Also write all intermediate tensors to a safetensors file
    #[arg(long, value_name = "FILE", conflicts_with = "keep_loaded", value_hint = ValueHint::FilePath)]
    pub dump: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// A model folder in diffusers' layout, a hub id like `black-forest-labs/FLUX.1-Kontext-dev` (downloaded when
    /// first used), or `nano-kontext`, the small model inside this program [default: nano-kontext]
    #[arg(short, long, value_name = "MODEL", value_hint = ValueHint::DirPath)]
    pub model: Option<String>,
    /// A transformer as a single file (safetensors or GGUF), in place of the model's own
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub transformer: Option<PathBuf>,
    /// A VAE as a single file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub vae: Option<PathBuf>,
    /// A CLIP-L text encoder as a single file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub clip: Option<PathBuf>,
    /// A T5-XXL text encoder as a single file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub t5: Option<PathBuf>,
    /// A folder with `tokenizer` and `tokenizer_2` inside
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub tokenizers: Option<PathBuf>,
}

impl ModelArgs {
    /// The model to open. What is given takes the place of `stored` parts; --model, or all four single files, that of
    /// the whole.
    pub fn source(&self, stored: ModelSource) -> ModelSource {
        let Self { model, transformer, vae, clip, t5, tokenizers } = self.clone();
        let complete = [&transformer, &vae, &clip, &t5].iter().all(|file| file.is_some());
        let stored = if model.is_some() || complete { ModelSource::default() } else { stored };
        ModelSource {
            base: model.or(stored.base),
            transformer: transformer.or(stored.transformer),
            vae: vae.or(stored.vae),
            clip: clip.or(stored.clip),
            t5: t5.or(stored.t5),
            tokenizers: tokenizers.or(stored.tokenizers),
        }
    }
}

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Computing")]
pub struct RunArgs {
    /// auto, cpu, cuda, cuda:N or metal [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Precision of the computation: f32, bf16, f16 or fp8, which is bf16 but for the products of the transformer's blocks: 8-bit
    /// floats, faster on GPUs that have them and slow on the CPU [default: bf16 on a GPU, f32 on the CPU]
    #[arg(long, visible_alias = "precision", value_name = "DTYPE")]
    pub dtype: Option<Precision>,
    /// Hold the large matrices of the transformer and of T5 in fewer bits: a type of `retouch convert`. Reading the model takes
    /// longer then; a converted file does not
    #[arg(long, value_name = "TYPE")]
    pub quantize: Option<Target>,
    /// Keep the whole model in memory between the images of a batch or of several seeds, and write each image as soon
    /// as it is done; takes more memory than one stage of the model at a time. What of T5 has no room beside the others is read
    /// for each prompt
    #[arg(long)]
    pub keep_loaded: bool,
    /// Where the text encoders compute: device, or cpu (in f32), where they take some seconds for a prompt and nothing of the
    /// device's memory [default: on the device, unless there is no room, or the others can then stay there by --keep-loaded]
    #[arg(long, value_name = "PLACE")]
    pub encoders: Option<Encoders>,
    /// Stay within this much of the device's memory, e.g. 8G (billions of bytes) or 7.5GiB; on the CPU within this much of the
    /// computer's [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub vram_limit: Option<Bytes>,
    /// Print where the time went: per stage and kind of operation, with rates and the share of what the machine could do
    #[arg(long)]
    pub profile: bool,
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let refused = || format!("`{s}` is no amount of memory; give one like 8G, 7.5GiB or 900M");
        let digits = s.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(s.len());
        let (number, unit) = s.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "m" | "mb" => 1_000_000,
            "mib" => 1 << 20,
            "g" | "gb" => 1_000_000_000,
            "gib" => 1 << 30,
            _ => return Err(refused()),
        };
        let number: f64 = number.parse().map_err(|_| refused())?;
        Ok(Self((number * factor as f64) as u64))
    }
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Plan for matrices stored in this type, whatever the files have: bf16, fp8, q8_0, q6_k, q5_k, q4_k and others
    #[arg(long = "type", value_name = "TYPE")]
    pub target: Option<Target>,
    /// Width of the result in pixels [default: the model's usual one]
    #[arg(long, value_name = "PIXELS", value_parser = side())]
    pub width: Option<u32>,
    /// Height of the result
    #[arg(long, value_name = "PIXELS", value_parser = side())]
    pub height: Option<u32>,
    /// Size at which the model sees the image, as WxH, or `none` to make an image from words alone [default: the result's]
    #[arg(long, value_name = "SIZE")]
    pub reference_size: Option<PlannedReference>,
    /// Images of one request
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub num_images: u32,
    /// Plan for an edit with a negative prompt
    #[arg(long)]
    pub true_cfg: bool,
    #[command(flatten)]
    pub run: PlanRunArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PlanRunArgs {
    /// auto, cpu, cuda, cuda:N or metal; need not be here if --vram-limit says how much memory it has [default: auto]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Precision of the computation: f32, bf16, f16 or fp8, which is bf16 but for the products of the transformer's blocks: 8-bit
    /// floats, faster on GPUs that have them and slow on the CPU [default: bf16 on a GPU, f32 on the CPU]
    #[arg(long, visible_alias = "precision", value_name = "DTYPE")]
    pub dtype: Option<Precision>,
    /// Plan for a model that stays in memory between images
    #[arg(long)]
    pub keep_loaded: bool,
    /// Plan for text encoders on the device or on the cpu [default: where they are faster]
    #[arg(long, value_name = "PLACE")]
    pub encoders: Option<Encoders>,
    /// The device's memory, e.g. 8G (billions of bytes) or 7.5GiB [default: what is free]
    #[arg(long, value_name = "SIZE")]
    pub vram_limit: Option<Bytes>,
}

fn side() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(16..=16384)
}

/// The size of a reference image, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedReference(pub Option<(usize, usize)>);

impl FromStr for PlannedReference {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        if s == "none" {
            return Ok(Self(None));
        }
        let side = |side: &str| side.parse::<usize>().ok().filter(|side| (16..=16384).contains(side));
        let size = s.split_once('x').and_then(|(width, height)| Some((side(width)?, side(height)?)));
        size.map(|size| Self(Some(size))).ok_or_else(|| format!("`{s}` is no size; give one like 1024x768, or none"))
    }
}

#[derive(Debug, Args)]
pub struct InfoArgs {
    /// An image, a model folder, a safetensors or GGUF file, or `nano-kontext`
    #[arg(value_hint = ValueHint::AnyPath)]
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// A safetensors or GGUF file, or the folder `transformer` or `text_encoder_2` of a model folder; of several models in one
    /// file, the transformer
    #[arg(value_hint = ValueHint::AnyPath)]
    pub input: PathBuf,
    /// The file to write, in the format that its name ends in: .gguf or .safetensors
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, q3_k or q2_k for GGUF; fp8 or fp8_scaled (nearer to the original; for
    /// this program and ComfyUI) for safetensors; bf16 or f16 for both
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Target,
    /// Leave the matrices as they are whose names have this in them; `*` stands for anything. Can be given again
    #[arg(long, value_name = "PATTERN")]
    pub keep: Vec<String>,
    /// Overwrite an existing file
    #[arg(short, long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// Print a line of JSON for each model
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Default, Args)]
pub struct Verbosity {
    /// Say nothing but errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more: time per stage and peak memory; twice: what happens inside
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[cfg(test)]
mod tests;

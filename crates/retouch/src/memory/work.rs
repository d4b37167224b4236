//! What is computed with a model's parameters takes memory too: the most of it in each stage, counted in the order in which
//! the stages' code makes tensors and drops them.

use retouch_vae::MIN_ROWS;
use retouch_weights::LoraBytes;

use super::{ByPlace, DeviceKind, Encoders, ModelMemory};
use crate::{KeepLoaded, sizes::Size};

/// What decides how much memory an edit takes beside the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub output: Size,
    pub reference: Option<Size>,
    pub images: usize,
    /// 2 with a negative prompt, else 1.
    pub prompts: usize,
    pub text_tokens: usize,
    pub steps: usize,
    /// Whether a step cache keeps activations.
    pub step_cache: bool,
    /// What LoRAs take beside the text encoders and beside the transformer.
    pub text_loras: ByPlace<LoraBytes>,
    pub transformer_loras: LoraBytes,
    pub keep_loaded: KeepLoaded,
    /// Where the text encoders have to be, if somebody said so.
    pub encoders: Option<Encoders>,
}

/// Tokens that an MLP takes at a time where memory is short: enough for its products to be as fast as can be.
pub(super) const MLP_TOKENS: usize = 1024;

/// Bytes of a band of the VAE's rows, the fastest first: shorter ones compute more of their neighbours' rows.
pub(super) const BAND_BYTES: [usize; 3] = [32 << 20, 8 << 20, 2 << 20];

/// What the program itself touches while it runs: its code, tokenizers, threads.
const PROGRAM: u64 = 12 << 20;

/// Bytes of the scores that candle's operations have at once: twice what one run of queries may take.
const SCORES: u64 = 2 * (512 << 20);

/// Of packed matrices of these outputs and inputs, what is in the dtype of the arithmetic at a time: on the CPU 1024 rows; on
/// CUDA a matrix, up to 64 Mi values; on Metal up to 32 Mi, in f32 and in the dtype.
fn widened(model: &ModelMemory, kind: DeviceKind, matrices: [(usize, usize); 2]) -> u64 {
    let largest =
        |rows: usize| matrices.map(|(out, input)| out.min(rows) * input).into_iter().max().unwrap_or(0) as u64;
    match kind {
        DeviceKind::Cpu => largest(1024) * 4,
        DeviceKind::Cuda => largest(usize::MAX).min(1 << 26) * model.element(),
        DeviceKind::Metal => (1 << 25) * (4 + model.element()),
    }
}

fn area((width, height): Size) -> u64 {
    width as u64 * height as u64
}

impl Work {
    /// Tokens of text, output and reference.
    fn tokens(&self, model: &ModelMemory) -> [u64; 3] {
        let tokens = |size| area(size) / (model.size_multiple() * model.size_multiple());
        [self.text_tokens as u64, tokens(self.output), self.reference.map_or(0, tokens)]
    }

    /// What goes from stage to stage: embeddings of the prompts, latents, noise; on the CPU also the pictures and the program.
    pub(super) fn carried(&self, model: &ModelMemory, kind: DeviceKind) -> u64 {
        let pictures = 3 * (2 * self.reference.map_or(0, area) + self.images as u64 * area(self.output));
        let program = if kind == DeviceKind::Cpu { PROGRAM + pictures } else { 0 };
        let embeddings = self.prompts * (self.text_tokens * model.t5.d_model + model.flux.pooled_projection_dim);
        let latents = |size| 4 * area(size) * model.vae.latent_channels as u64 / (model.size_multiple().pow(2) / 4);
        program
            + embeddings as u64 * model.element()
            + self.reference.map_or(0, latents)
            + 2 * self.images as u64 * latents(self.output)
    }

    /// T5, one text: the scores' biases, and a block's attention or feed-forward.
    pub(super) fn text(&self, model: &ModelMemory, kind: DeviceKind, place: Encoders) -> u64 {
        let (kind, e) = match place {
            Encoders::Device => (kind, model.element()),
            Encoders::Cpu => (DeviceKind::Cpu, 4),
        };
        let (t5, tokens) = (&model.t5, self.text_tokens as u64);
        let (hidden, heads, inside) = (t5.d_model as u64, t5.num_heads as u64, t5.d_ff as u64);
        let inner = heads * t5.d_kv as u64;
        let scores = heads * tokens * tokens;
        // Looked up by the numbers of buckets; the CPU widens it.
        let bias = scores * if kind == DeviceKind::Cpu && e < 4 { 4 + e } else { e } + tokens * tokens * 4;
        let stream = 3 * tokens * hidden * 4;
        let fused = kind == DeviceKind::Cpu || (kind == DeviceKind::Cuda && e == 2 && t5.d_kv == 64);
        let attention = tokens * (hidden + 5 * inner) * e + if fused { 0 } else { 3 * scores * e };
        let feed_forward = tokens * (2 * hidden + 3 * inside) * e;
        let widened = widened(model, kind, [(t5.d_ff, t5.d_model), (t5.d_model, t5.d_ff)]);
        bias + stream + attention.max(feed_forward) + widened
    }

    /// What stays over all steps.
    fn conditioning(&self, model: &ModelMemory) -> u64 {
        let [text, output, reference] = self.tokens(model);
        let (flux, e) = (&model.flux, model.element());
        let hidden = flux.hidden() as u64;
        let vectors = (12 * flux.num_layers + 3 * flux.num_single_layers + 2) as u64 * hidden;
        let angles = (text + output + reference) * flux.attention_head_dim as u64 * 4;
        let prompt = (text + reference) * hidden * e + angles + self.steps as u64 * vectors * e;
        let cache = if self.step_cache { 3 * output * hidden * e } else { 0 };
        self.prompts as u64 * (prompt + cache)
    }

    /// Floating-point operations of one block of the transformer; double and single ones have as many: per token those of
    /// projections and MLP, and the attention of all to all.
    pub(super) fn block_flops(&self, model: &ModelMemory) -> u64 {
        let tokens: u64 = self.tokens(model).iter().sum();
        let (hidden, mlp) = (model.flux.hidden() as u64, model.flux.mlp() as u64);
        2 * tokens * hidden * (4 * hidden + 2 * mlp) + 4 * tokens * tokens * hidden
    }

    /// A step of the transformer, `mlp_tokens` at a time in its MLPs.
    ///
    /// In units of all tokens of `hidden` channels, a double block has its input, the projections and the heads at once (7); a
    /// single block its input, attention and MLP beside each other, the projections and the heads (16).
    pub(super) fn step(&self, model: &ModelMemory, kind: DeviceKind, mlp_tokens: Option<usize>) -> u64 {
        let [text, output, reference] = self.tokens(model);
        let (tokens, image, e) = (text + output + reference, output + reference, model.element());
        let hidden = model.flux.hidden() as u64;
        let of = |tokens: u64| tokens * hidden * e;
        let run = mlp_tokens.map(|run| run as u64).filter(|&run| run < tokens);
        // Without kernels of our own: copies of queries, keys and values, of what a bias is added to, and scores.
        let fused = match kind {
            DeviceKind::Cpu => true,
            DeviceKind::Cuda => e == 2 && [32, 64, 128].contains(&model.flux.attention_head_dim),
            DeviceKind::Metal => false,
        };
        let unfused = |bytes: u64| if fused { 0 } else { bytes };
        let heads = of(7 * tokens) + unfused(of(4 * tokens));
        let peak = match run {
            None => {
                let mlp = of(tokens + 6 * image) + unfused(of(4 * image));
                heads.max(mlp).max(of(16 * tokens) + unfused(of(5 * tokens) + SCORES))
            }
            Some(run) => {
                let single = of(5 * tokens + 11 * run) + unfused(of(4 * tokens) + SCORES);
                heads.max(of(tokens + image + 6 * run)).max(single)
            }
        };
        // On the CPU narrow values are widened as an operation reads and writes them.
        let wide = if kind == DeviceKind::Cpu && e < 4 { 12 * tokens * hidden * 4 } else { 0 };
        // Of the widest layers, whose outputs are sums in f32 first, and whose inputs become 8-bit floats.
        let outputs = if run.is_some() { 3 } else { 7 };
        let fp8 = if model.fp8 { tokens * hidden * (4 * outputs + 5) } else { 0 };
        let hidden = model.flux.hidden();
        let widened = widened(model, kind, [(7 * hidden, hidden), (hidden, 5 * hidden)]);
        self.conditioning(model) + peak + wide + fp8 + widened
    }

    /// The VAE over an image, at once.
    pub(super) fn pixels_whole(&self, model: &ModelMemory, kind: DeviceKind, way: Way, size: Size) -> u64 {
        let (pixels, e) = (area(size), model.vae_element(kind));
        // What candle gathers of a convolution's input, on CUDA a band at a time, and the output with its bias.
        let conv = |input: u64, output: u64| match kind {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => 2 * output,
            DeviceKind::Metal => 9 * input + 2 * output,
        };
        let layers = layers(model, way);
        let values = layers.iter().map(|layer| {
            let (input, output) = (layer.input, layer.output);
            let channels = match layer.kind {
                Kind::Residual => (2 * input + output + conv(input, output))
                    .max(input + 2 * output)
                    .max(3 * output + conv(output, output)),
                Kind::Resized(factor) => input + scaled(output + conv(input, output), factor),
                Kind::Attention => 9 * input,
                Kind::Last => 2 * input + output + conv(input, output),
            };
            scaled(channels * pixels, layer.scale) * e + layer.workspace(kind, pixels)
        });
        values.max().unwrap_or(0) + picture(way, pixels)
    }

    /// The VAE in bands of rows: of the device, with whole activations there or on the host, and of the host.
    pub(super) fn pixels_in_bands(
        &self,
        model: &ModelMemory,
        kind: DeviceKind,
        way: Way,
        size: Size,
        bands: Bands,
    ) -> (u64, u64) {
        let (pixels, e) = (area(size), model.vae_element(kind));
        let layers = layers(model, way);
        let workspace = layers.iter().map(|layer| layer.workspace(kind, pixels)).max().unwrap_or(0);
        let whole = layers.into_iter().map(|layer| {
            let channels = match layer.kind {
                Kind::Residual | Kind::Last => layer.input + layer.output,
                Kind::Resized(factor) => layer.input + scaled(layer.output, factor),
                Kind::Attention => 9 * layer.input,
            };
            (scaled(channels * pixels, layer.scale) * e, layer.kind == Kind::Attention)
        });
        // The middle, where each pixel attends to all, is on the device in any case.
        let (middle, outer): (Vec<_>, Vec<_>) = whole.partition(|(_, attention)| *attention);
        let largest = |values: Vec<(u64, bool)>| values.into_iter().map(|(bytes, _)| bytes).max().unwrap_or(0);
        let (middle, outer) = (largest(middle), largest(outer));
        // A band is no lower than some rows of the widest layer.
        let widest = model.vae.block_out_channels.iter().take(2).max().copied().unwrap_or(0);
        let rows = (MIN_ROWS * widest * size.0) as u64 * e;
        // This one and the next, normalised, and the product; nine times gathered on a GPU.
        let band = rows.max(bands.bytes as u64) * if kind == DeviceKind::Cpu { 5 } else { 16 };
        let common = workspace + picture(way, pixels);
        if bands.on_host { (middle.max(band) + common, outer) } else { (middle.max(outer + band) + common, 0) }
    }
}

/// Pixels as the encoder takes them, in f32; the decoder's are made when its activations are gone.
fn picture(way: Way, pixels: u64) -> u64 {
    if way == Way::Encode { 3 * pixels * 4 } else { 0 }
}

/// Bands of the VAE's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bands {
    /// What one takes of the larger of a layer's input and output.
    pub bytes: usize,
    /// Whether the whole activations are in the host's memory and only bands on the device.
    pub on_host: bool,
}

/// A half of the VAE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Encode,
    Decode,
}

/// A layer over an image of `scale` (a power of a quarter) of the pixels.
struct Layer {
    kind: Kind,
    input: u64,
    output: u64,
    scale: Scale,
}

impl Layer {
    /// On the CPU the transformed filters of its convolution, and the tiles that its threads have each; on a GPU the scores of
    /// the attention in the middle, which are more than a band of CUDA's windows. `pixels` are the whole image's.
    fn workspace(&self, kind: DeviceKind, pixels: u64) -> u64 {
        if kind != DeviceKind::Cpu {
            return SCORES;
        }
        let threads = rayon::current_num_threads() as u64;
        let pixels = scaled(pixels, self.scale);
        match self.kind {
            Kind::Resized(factor) if factor.times < factor.of => {
                let depth = 9 * self.input;
                let tile = ((1 << 21) / depth).min(1024).min(scaled(pixels, factor).div_ceil(4 * threads)).max(64);
                threads * depth * tile * 4
            }
            Kind::Attention => 0,
            _ => {
                let pixels = if let Kind::Resized(factor) = self.kind { scaled(pixels, factor) } else { pixels };
                // 36 values of each filter, and of each channel of 4x4 pixels.
                let run = pixels.div_ceil(16 * threads).min(128);
                36 * 4 * (self.input * self.output + threads * run * (self.input + self.output))
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Residual,
    /// To this many of the input's pixels.
    Resized(Scale),
    Attention,
    /// The norm and the convolution at the end.
    Last,
}

/// A share of pixels: `times / of`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Scale {
    times: u64,
    of: u64,
}

fn scaled(value: u64, Scale { times, of }: Scale) -> u64 {
    value * times / of
}

/// The layers of encoder or decoder, as far as they decide the peak.
fn layers(model: &ModelMemory, way: Way) -> Vec<Layer> {
    let channels: Vec<u64> = model.vae.block_out_channels.iter().map(|&channels| channels as u64).collect();
    let levels = channels.len();
    let mut layers = Vec::new();
    for (level, &output) in channels.iter().enumerate() {
        let scale = Scale { times: 1, of: 1 << (2 * level) };
        let neighbour = match way {
            Way::Encode => level.checked_sub(1),
            Way::Decode => Some(level + 1).filter(|&next| next < levels),
        };
        let input = neighbour.map_or(output, |neighbour| channels[neighbour]);
        layers.push(Layer { kind: Kind::Residual, input, output, scale });
        layers.push(Layer { kind: Kind::Residual, input: output, output, scale });
        match way {
            Way::Encode if level + 1 < levels => {
                let kind = Kind::Resized(Scale { times: 1, of: 4 });
                layers.push(Layer { kind, input: output, output, scale });
            }
            Way::Decode if level > 0 => {
                let kind = Kind::Resized(Scale { times: 4, of: 1 });
                layers.push(Layer { kind, input: output, output, scale });
            }
            _ => {}
        }
        if level + 1 == levels {
            layers.push(Layer { kind: Kind::Attention, input: output, output, scale });
        }
        if (way, level) == (Way::Decode, 0) {
            layers.push(Layer { kind: Kind::Last, input: output, output: model.vae.out_channels as u64, scale });
        }
    }
    layers
}

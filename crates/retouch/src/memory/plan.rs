//! The choice of the fastest way that fits.

use std::fmt;

use candle_core::Device;
use retouch_flow::Saving;
use retouch_vae::Tiling;

use super::{
    Budget, DeviceKind, ModelMemory, Work,
    model::LayerBytes,
    transfer::Transfer,
    work::{BAND_BYTES, Bands, MLP_TOKENS, Way},
};
use crate::{Error, Result, Stage};

/// How many layers of a part stay in memory; the others are read again at each pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resident {
    pub layers: usize,
    pub of: usize,
}

impl Resident {
    /// As the parts take it: none where all stay.
    pub(crate) fn limit(self) -> Option<usize> {
        (self.layers < self.of).then_some(self.layers)
    }
}

/// How the VAE goes over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pixels {
    Whole,
    Bands(Bands),
}

impl Pixels {
    pub(crate) fn tiling(self, device: &Device) -> Tiling {
        match self {
            Self::Whole => Tiling::Whole,
            Self::Bands(Bands { bytes, on_host }) => {
                Tiling::Bands { bytes, home: if on_host { Device::Cpu } else { device.clone() } }
            }
        }
    }
}

/// One stage of an edit in numbers, in bytes of the device that computes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    pub stage: Stage,
    /// Parameters that stay for the whole stage.
    pub resident: u64,
    /// The most of all together.
    pub peak: u64,
    /// What is read at each pass: for each prompt, and in each step.
    pub read_per_pass: u64,
}

/// What stays in memory in each stage, and what that takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    pub budget: Budget,
    pub text: Resident,
    pub transformer: Resident,
    /// The transformer's other blocks on their way to a GPU that has memory of its own.
    pub transfer: Option<Transfer>,
    /// Tokens that the transformer's MLPs take at a time; all if none is said.
    pub mlp_tokens: Option<usize>,
    /// `None` without a reference image.
    pub encode: Option<Pixels>,
    pub decode: Pixels,
    /// Whether all parts stay in memory after their stage.
    pub keep_loaded: bool,
    /// In the order of the edit.
    pub stages: Vec<StagePlan>,
}

impl MemoryPlan {
    /// The fastest way that stays within the budget.
    ///
    /// Each stage is planned for itself: in the order of speed, everything at once; then MLPs in runs of tokens and the VAE in
    /// bands; then as many layers in memory as there is room for.
    ///
    /// # Errors
    /// [`Error::Memory`] where even the smallest does not fit.
    pub fn fastest(model: &ModelMemory, work: &Work, budget: Budget) -> Result<Self> {
        let planner = Planner { model, work, budget, carried: work.carried(model, budget.kind), kept: 0 };
        if !work.keep_loaded {
            return planner.plan();
        }
        // All parts are there in each stage: what the others take is missing for its own.
        let all = model.clip
            + model.t5_layers.with(usize::MAX)
            + model.transformer.with(usize::MAX)
            + work.text_loras.resident
            + work.transformer_loras.resident
            + planner.vae_bytes(Way::Encode)
            + planner.vae_bytes(Way::Decode);
        match (Planner { kept: all, ..planner }).plan() {
            Ok(plan) if plan.text.limit().is_none() && plan.transformer.limit().is_none() => Ok(plan),
            _ => {
                // What all of them take with no limit is more than what they need, which runs and bands lower.
                let needed = all + planner.carried + work.step(model, budget.kind, Some(MLP_TOKENS));
                Err(planner.refusal("all parts together need", needed, "leave out --keep-loaded"))
            }
        }
    }

    /// The most of all stages.
    pub fn peak(&self) -> u64 {
        self.stages.iter().map(|stage| stage.peak).max().unwrap_or(0)
    }

    pub(crate) fn saving(&self) -> Saving {
        Saving {
            resident_blocks: self.transformer.limit(),
            blocks_on_host: self.transfer.is_some_and(|transfer| transfer.pinned),
            mlp_tokens: self.mlp_tokens,
        }
    }
}

impl fmt::Display for MemoryPlan {
    /// One line: what is done to save memory, and what that takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layers = |what: &str, resident: Resident| match resident.limit() {
            None => format!("{what} resident"),
            Some(layers) => format!("{what} with {layers} of {} blocks resident", resident.of),
        };
        let mut parts = vec![layers("text encoder", self.text), layers("transformer", self.transformer)];
        parts.extend(self.transfer.map(|transfer| format!("the others from {}", transfer.origin())));
        parts.extend(self.mlp_tokens.map(|tokens| format!("MLPs {tokens} tokens at a time")));
        let pixels = |pixels: Pixels| match pixels {
            Pixels::Whole => "whole",
            Pixels::Bands(Bands { on_host: false, .. }) => "in bands",
            Pixels::Bands(Bands { on_host: true, .. }) => "in bands kept on the host",
        };
        parts.extend(self.encode.map(|encode| format!("image read {}", pixels(encode))));
        parts.push(format!("pixels made {}", pixels(self.decode)));
        let stages = if self.keep_loaded { "all parts" } else { "a stage at a time" };
        let available = match (self.budget.device, self.budget.is_limit) {
            (u64::MAX, _) => String::new(),
            (bytes, true) => format!(" of {} allowed", Gigabytes(bytes)),
            (bytes, false) => format!(" of {} free", Gigabytes(bytes)),
        };
        let (peak, kind) = (Gigabytes(self.peak()), self.budget.kind);
        write!(f, "{stages}: {}; about {peak}{available} on {kind}", parts.join(", "))
    }
}

/// A number of bytes as people read it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gigabytes(pub u64);

impl fmt::Display for Gigabytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes < 1_000_000_000 => write!(f, "{:.0} MB", bytes as f64 / 1e6),
            bytes => write!(f, "{:.1} GB", bytes as f64 / 1e9),
        }
    }
}

#[derive(Clone, Copy)]
struct Planner<'a> {
    model: &'a ModelMemory,
    work: &'a Work,
    budget: Budget,
    /// What goes from stage to stage.
    carried: u64,
    /// Parameters of all parts, where all stay.
    kept: u64,
}

impl Planner<'_> {
    fn plan(&self) -> Result<MemoryPlan> {
        let (text, text_plan) = self.text()?;
        let encode = self.work.reference.map(|size| self.pixels(Way::Encode, size)).transpose()?;
        let (transformer, mlp_tokens, transformer_plan) = self.transformer()?;
        let (decode, decode_plan) = self.pixels(Way::Decode, self.work.output)?;
        let (encode, encode_plan) = encode.unzip();
        let transfer = match self.budget.kind {
            DeviceKind::Cuda => Transfer::of(self.model, self.work, transformer.layers, self.budget.host),
            DeviceKind::Cpu | DeviceKind::Metal => None,
        };
        let stages = [Some(text_plan), encode_plan, Some(transformer_plan), Some(decode_plan)];
        Ok(MemoryPlan {
            budget: self.budget,
            text,
            transformer,
            transfer,
            mlp_tokens,
            encode,
            decode,
            keep_loaded: self.work.keep_loaded,
            stages: stages.into_iter().flatten().collect(),
        })
    }

    fn fits(&self, peak: u64) -> bool {
        peak <= self.budget.device
    }

    /// The most layers for which a stage fits.
    fn layers(&self, stage: &Beside<'_>) -> Option<Resident> {
        let of = stage.part.layers.len();
        let fitting = (1.min(of)..=of).rev().find(|&layers| self.fits(stage.peak(layers)));
        fitting.map(|layers| Resident { layers, of })
    }

    fn beside<'a>(&self, part: &'a LayerBytes, stays: u64, computing: u64, merging: u64) -> Beside<'a> {
        let reads_beside = self.budget.kind != DeviceKind::Cuda;
        Beside { part, other: self.carried + stays, computing, merging, reads_beside }
    }

    fn text(&self) -> Result<(Resident, StagePlan)> {
        let (part, loras) = (&self.model.t5_layers, self.work.text_loras);
        let kept = self.kept.saturating_sub(part.with(usize::MAX) + self.model.clip + loras.resident);
        let stays = kept + self.model.clip + loras.resident;
        let computing = self.work.text(self.model, self.budget.kind);
        let stage = self.beside(part, stays, computing, loras.merging);
        let Some(resident) = self.layers(&stage) else {
            return Err(self.refusal("the text encoders need", stage.peak(1), SMALLER_MODEL));
        };
        Ok((resident, stage.plan(Stage::TextEncoders, resident, stays)))
    }

    fn transformer(&self) -> Result<(Resident, Option<usize>, StagePlan)> {
        let (part, loras) = (&self.model.transformer, self.work.transformer_loras);
        let stays = self.kept.saturating_sub(part.with(usize::MAX) + loras.resident) + loras.resident;
        let beside = |mlp| {
            let computing = self.work.step(self.model, self.budget.kind, mlp);
            self.beside(part, stays, computing, loras.merging)
        };
        // The modulation's layers are there before the blocks are.
        let before = self.carried + self.kept + self.model.modulation + loras.merging;
        // Runs of tokens cost less than reading blocks does.
        let (whole, runs) = (beside(None), beside(Some(MLP_TOKENS)));
        let all = part.layers.len();
        let (mlp, fitting) = match self.layers(&whole) {
            Some(resident) if resident.layers == all => (None, Some(resident)),
            // What runs do not lower is not done in runs.
            _ if runs.computing >= whole.computing => (None, self.layers(&whole)),
            _ => (Some(MLP_TOKENS), self.layers(&runs)),
        };
        let beside = beside(mlp);
        match fitting {
            Some(resident) if self.fits(before) => {
                let mut stage = beside.plan(Stage::Transformer, resident, stays);
                stage.peak = stage.peak.max(before);
                Ok((resident, mlp, stage))
            }
            _ => Err(self.refusal("the transformer needs", beside.peak(1).max(before), SMALLER_IMAGE)),
        }
    }

    fn vae_bytes(&self, way: Way) -> u64 {
        let in_f32 = match way {
            Way::Encode => self.model.vae_encoder,
            Way::Decode => self.model.vae_decoder,
        };
        in_f32 / 4 * self.model.vae_element(self.budget.kind)
    }

    fn pixels(&self, way: Way, size: (usize, usize)) -> Result<(Pixels, StagePlan)> {
        let (stage, who) = match way {
            Way::Encode => (Stage::VaeEncoder, "reading the image needs"),
            Way::Decode => (Stage::VaeDecoder, "making the pixels needs"),
        };
        let resident = self.kept.max(self.vae_bytes(way));
        let (model, kind) = (self.model, self.budget.kind);
        let mut ways = vec![(Pixels::Whole, self.work.pixels_whole(model, kind, way, size), 0)];
        // The CPU has no other memory to put anything into.
        let homes: &[bool] = if kind == DeviceKind::Cpu { &[false] } else { &[false, true] };
        for (&on_host, bytes) in homes.iter().flat_map(|on_host| BAND_BYTES.map(|bytes| (on_host, bytes))) {
            let bands = Bands { bytes, on_host };
            let (device, host) = self.work.pixels_in_bands(model, kind, way, size, bands);
            ways.push((Pixels::Bands(bands), device, host));
        }
        let plan = |peak: u64| StagePlan { stage, resident, peak: self.carried + resident + peak, read_per_pass: 0 };
        let fitting = ways.iter().find(|(_, device, host)| self.fits(plan(*device).peak) && *host <= self.budget.host);
        match fitting {
            Some(&(pixels, device, _)) => Ok((pixels, plan(device))),
            None => {
                let least = ways.iter().map(|(_, device, _)| *device).min().unwrap_or(0);
                Err(self.refusal(who, plan(least).peak, SMALLER_IMAGE))
            }
        }
    }

    fn refusal(&self, who: &str, needed: u64, advice: &str) -> Error {
        let Budget { kind, device, is_limit, .. } = self.budget;
        let (needed, device) = (Gigabytes(needed), Gigabytes(device));
        let there = if is_limit {
            format!("--vram-limit allows {device}; raise it, or {advice}")
        } else {
            format!("{device} are free; {advice}, or say by --vram-limit that there is more")
        };
        Error::Memory(format!("{who} at least {needed} of {kind} memory, and {there}"))
    }
}

/// A part of layers in its stage, and what else takes memory then.
struct Beside<'a> {
    part: &'a LayerBytes,
    /// What is there all the time.
    other: u64,
    computing: u64,
    /// By LoRAs, while a layer is read.
    merging: u64,
    /// Whether layers that do not stay are read where the computation is: for CUDA they are made on the host.
    reads_beside: bool,
}

impl Beside<'_> {
    /// With that many layers in memory.
    fn peak(&self, layers: usize) -> u64 {
        // Where all layers are read before the computation, or elsewhere, the two are not there together.
        let apart = layers >= self.part.layers.len() || !self.reads_beside;
        let work = if apart { self.computing.max(self.merging) } else { self.computing + self.merging };
        self.other + self.part.with(layers) + work
    }

    /// `stays` are the parameters that are there beside the part's.
    fn plan(&self, stage: Stage, Resident { layers, .. }: Resident, stays: u64) -> StagePlan {
        StagePlan {
            stage,
            resident: stays + self.part.fixed + self.part.layers.iter().take(layers).sum::<u64>(),
            peak: self.peak(layers),
            read_per_pass: self.part.read(layers),
        }
    }
}

const SMALLER_MODEL: &str = "use text encoders in fewer bits";
const SMALLER_IMAGE: &str =
    "make the result smaller (--width, --height) or the reference (--reference-size), or use a model in fewer bits";

#[cfg(test)]
mod tests {
    use retouch_weights::LoraBytes;

    use super::*;
    use crate::{ModelSource, Precision};

    const GB: u64 = 1_000_000_000;

    fn model(storage: &str) -> ModelMemory {
        let source = ModelSource { base: Some("black-forest-labs/FLUX.1-Kontext-dev".into()), ..Default::default() };
        // Not what a user may have downloaded: types and shapes alone.
        ModelMemory::find(&source, Some(storage.parse().unwrap()), Precision::Bf16).unwrap().0
    }

    fn work(side: usize) -> Work {
        Work {
            output: (side, side),
            reference: Some((side, side)),
            images: 1,
            prompts: 1,
            text_tokens: 512,
            steps: 28,
            step_cache: false,
            text_loras: LoraBytes::default(),
            transformer_loras: LoraBytes::default(),
            keep_loaded: false,
        }
    }

    fn budget(device: u64) -> Budget {
        Budget { kind: DeviceKind::Cuda, device, host: 64 * GB, is_limit: true }
    }

    fn plan(storage: &str, side: usize, gigabytes: u64) -> MemoryPlan {
        let plan = MemoryPlan::fastest(&model(storage), &work(side), budget(gigabytes * GB)).unwrap();
        assert!(plan.peak() <= gigabytes * GB, "{plan}");
        plan
    }

    #[test]
    fn parameters_are_those_of_the_published_model() {
        let model = model("bf16");
        // 11.90 billion less the modulation's 3.25 billion; two bytes each.
        let transformer = model.transformer.with(usize::MAX) as f64;
        assert!((transformer / 17.3e9 - 1.0).abs() < 0.005, "{transformer}");
        assert_eq!(model.transformer.layers.len(), 57);
        assert_eq!(model.t5_layers.layers.len(), 24);
        let t5 = model.t5_layers.with(usize::MAX) as f64;
        assert!((t5 / 9.52e9 - 1.0).abs() < 0.005, "{t5}");
        // 34.3 and 49.5 million in f32, of which the million of the attention stay in 16 bits.
        assert!((model.vae_encoder as f64 / 137.1e6 - 1.0).abs() < 0.02, "{}", model.vae_encoder);
        assert!((model.vae_decoder as f64 / 198.2e6 - 1.0).abs() < 0.02, "{}", model.vae_decoder);
    }

    #[test]
    fn the_common_cards_get_the_fastest_that_fits_them() {
        let transformer = |storage, gigabytes| plan(storage, 1024, gigabytes).transformer.limit();
        assert_eq!(transformer("bf16", 24), None, "all of 16 bits on 24 GB");
        assert_eq!(transformer("q8_0", 16), None, "8 bits on 16 GB");
        assert!(transformer("bf16", 16).is_some_and(|layers| layers > 30), "most of 16 bits on 16 GB");
        assert_eq!(transformer("q8_0", 12), None, "8 bits on 12 GB");
        assert_eq!(transformer("q4_k", 8), None, "4 bits on 8 GB");
        assert!(transformer("q8_0", 8).is_some_and(|layers| layers >= 20), "8 bits on 8 GB, some of it read");
        for storage in ["q4_k", "q8_0", "bf16"] {
            let plan = plan(storage, 1024, 6);
            assert!(storage == "q4_k" || plan.transformer.limit().is_some(), "{plan}");
        }
    }

    #[test]
    fn what_is_read_at_a_step_is_what_does_not_stay() {
        let (all, some) = (plan("bf16", 1024, 24), plan("bf16", 1024, 12));
        assert_eq!(all.stages[2].read_per_pass, 0);
        let blocks: u64 = model("bf16").transformer.layers.iter().sum();
        let StagePlan { resident, read_per_pass, .. } = some.stages[2];
        assert_eq!(resident + read_per_pass, blocks + model("bf16").transformer.fixed);
        assert_eq!(some.transfer.map(|transfer| transfer.bytes), Some(read_per_pass));
        assert_eq!(all.transfer, None);
    }

    #[test]
    fn less_memory_never_makes_a_plan_that_takes_more() {
        for storage in ["bf16", "q8_0", "q4_0"] {
            let (model, mut peak) = (model(storage), u64::MAX);
            for tenths in (30..=300).rev() {
                let Ok(plan) = MemoryPlan::fastest(&model, &work(1024), budget(tenths * GB / 10)) else {
                    break;
                };
                assert!(plan.peak() <= (tenths * GB / 10).min(peak), "{tenths}: {plan}");
                peak = plan.peak();
            }
            assert!(peak < 6 * GB, "{storage} needs {peak}");
        }
    }

    #[test]
    fn large_images_are_made_in_bands_and_in_the_end_on_the_host() {
        assert_eq!(plan("q8_0", 1024, 24).decode, Pixels::Whole);
        assert!(matches!(plan("q8_0", 2048, 8).decode, Pixels::Bands(Bands { on_host: false, .. })));
        let small = Budget { kind: DeviceKind::Cuda, device: 3 * GB, host: 64 * GB, is_limit: true };
        let model = model("q4_0");
        let work = work(2048);
        let planner = Planner { model: &model, work: &work, budget: small, carried: 0, kept: 0 };
        let (pixels, stage) = planner.pixels(Way::Decode, (2048, 2048)).unwrap();
        assert!(matches!(pixels, Pixels::Bands(Bands { on_host: true, .. })));
        assert!(stage.peak <= 3 * GB);
        // A full host does not take them.
        assert!(Planner { budget: Budget { host: GB, ..small }, ..planner }.pixels(Way::Decode, (2048, 2048)).is_err());
    }

    #[test]
    fn loras_take_room_beside_their_part() {
        let (model, free) = (model("q8_0"), budget(24 * GB));
        let peaks = |text_loras, transformer_loras, device| {
            let work = Work { text_loras, transformer_loras, ..work(1024) };
            let plan = MemoryPlan::fastest(&model, &work, Budget { device, ..free }).unwrap();
            (plan.stages.iter().map(|stage| stage.peak).collect::<Vec<_>>(), plan)
        };
        let (none, added) = (LoraBytes::default(), LoraBytes { resident: GB, merging: 0 });
        let plain = peaks(none, none, free.device).0;
        let [text, encode, steps, decode] = plain[..] else { panic!("{plain:?}") };
        assert_eq!(peaks(none, added, free.device).0, [text, encode, steps + GB, decode]);
        assert_eq!(peaks(added, none, free.device).0, [text + GB, encode, steps, decode]);
        // Merged while the layers are read, when nothing is computed yet.
        let merged = LoraBytes { resident: 0, merging: GB / 1000 };
        assert_eq!(peaks(none, merged, free.device).0, plain);
        // Layers that are read at each step merge beside the computation, and make room for what LoRAs take.
        let (_, tight) = peaks(none, none, 8 * GB);
        let (_, with) = peaks(none, added, 8 * GB);
        assert!(with.transformer.layers < tight.transformer.layers && with.peak() <= 8 * GB, "{with}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_was_needed_and_what_helps() {
        let refused = |work: Work, budget| match MemoryPlan::fastest(&model("bf16"), &work, budget) {
            Err(Error::Memory(sentence)) => sentence,
            other => panic!("{other:?}"),
        };
        let sentence = refused(work(1024), budget(GB));
        assert!(sentence.contains("--vram-limit allows 1.0 GB; raise it"), "{sentence}");
        let free = Budget { is_limit: false, ..budget(3 * GB) };
        let sentence = refused(work(2048), free);
        assert!(sentence.contains("3.0 GB are free") && sentence.contains("--width"), "{sentence}");
        let sentence = refused(Work { keep_loaded: true, ..work(1024) }, budget(24 * GB));
        assert!(sentence.contains("leave out --keep-loaded"), "{sentence}");
    }

    #[test]
    fn a_whole_model_is_kept_where_there_is_room() {
        let work = Work { keep_loaded: true, ..work(1024) };
        let plan = MemoryPlan::fastest(&model("bf16"), &work, budget(48 * GB)).unwrap();
        assert!(plan.keep_loaded && plan.transformer.limit().is_none() && plan.peak() > 27 * GB, "{plan}");
    }
}

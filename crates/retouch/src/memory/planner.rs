//! The choice of the fastest way that fits.

use super::{
    Budget, DeviceKind, Encoders, MemoryPlan, ModelMemory, Pixels, Resident, StagePlan, Transfer, Work,
    model::LayerBytes,
    plan::Gigabytes,
    work::{BAND_BYTES, Bands, MLP_TOKENS, Way},
};
use crate::{Error, KeepLoaded, Result, Stage};

impl MemoryPlan {
    /// The fastest way that stays within the budget.
    ///
    /// Each stage is planned for itself: in the order of speed, everything at once; then MLPs in runs of tokens and the VAE in
    /// bands; then as many layers in memory as there is room for. Text encoders of which not even a few layers fit are on the CPU.
    ///
    /// Where all parts stay, the transformer does so as a whole, for it is read in each step; T5 is needed once for a prompt, and
    /// blocks of it for which there is no room beside the others are read then, which takes a part of the time that the CPU needs.
    /// That comes last, and it has to be faster than to read all parts again for each prompt.
    ///
    /// # Errors
    /// [`Error::Memory`] where even the smallest does not fit.
    pub fn fastest(model: &ModelMemory, work: &Work, budget: Budget) -> Result<Self> {
        let planner = Planner { model, work, budget, carried: work.carried(model, budget.kind), kept: 0 };
        let worth_it = |plan: &Self| {
            plan.encoders == Encoders::Device
                || work.encoders == Some(Encoders::Cpu)
                || model.encodes_sooner_on_cpu(work, &budget)
        };
        match work.keep_loaded {
            KeepLoaded::No => planner.by_stages(),
            KeepLoaded::Yes => planner.together(),
            KeepLoaded::WhereItFits => planner.together().ok().filter(worth_it).map_or_else(|| planner.by_stages(), Ok),
        }
    }
}

/// Where the text encoders are, and which layers of T5 stay there.
#[derive(Clone, Copy)]
struct TextWay {
    place: Encoders,
    resident: Resident,
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
    /// A stage's parts at a time.
    fn by_stages(&self) -> Result<MemoryPlan> {
        if let Some(way) = self.text_ways().find(|&way| self.text(way).1) {
            return self.plan(way, false);
        }
        let least = |on_device: bool| {
            let ways = self.text_ways().filter(|&way| self.is_on_device(way) == on_device);
            ways.map(|way| self.text(way).0.peak).min()
        };
        if let Some(needed) = least(true) {
            return Err(self.refusal("the text encoders need", needed, SMALLER_MODEL));
        }
        let (needed, host) = (Gigabytes(least(false).unwrap_or(0)), Gigabytes(self.budget.host));
        Err(Error::Memory(format!(
            "the text encoders need at least {needed} of the computer's memory, of which {host} are free; {SMALLER_MODEL}, or \
             --encoders device"
        )))
    }

    /// All parts at once: what the others take is missing for a stage's own.
    fn together(&self) -> Result<MemoryPlan> {
        let others = self.model.transformer.with(usize::MAX)
            + self.work.transformer_loras.resident
            + self.vae_bytes(Way::Encode)
            + self.vae_bytes(Way::Decode);
        let kept = |way| others + if self.is_on_device(way) { self.text_stays(way) } else { 0 };
        let plan = |way| {
            let planner = Planner { kept: kept(way), ..*self };
            let plan = planner.text(way).1.then(|| planner.plan(way, true).ok()).flatten()?;
            plan.transformer.limit().is_none().then_some(plan)
        };
        let how = |plan: &MemoryPlan| (plan.encoders, plan.mlp_tokens, plan.encode, plan.decode);
        // Reading blocks of T5 again for each prompt costs less than what the other stages would do to make room for them.
        let ways: Vec<_> = self.text_ways().collect();
        let places = ways.chunk_by(|a, b| a.place == b.place);
        let fitting = places.into_iter().find_map(|ways| {
            let least = plan(*ways.last()?)?;
            ways.iter().find_map(|&way| plan(way).filter(|plan| how(plan) == how(&least)))
        });
        fitting.ok_or_else(|| {
            let kept = self.text_ways().map(kept).min().unwrap_or(0);
            let needed = kept + self.carried + self.work.step(self.model, self.budget.kind, Some(MLP_TOKENS));
            self.refusal("all parts together need", needed, "leave out --keep-loaded")
        })
    }

    fn plan(&self, way: TextWay, keep_loaded: bool) -> Result<MemoryPlan> {
        let (text_plan, _) = self.text(way);
        let on_host = if keep_loaded && !self.is_on_device(way) { self.text_stays(way) } else { 0 };
        let host = self.budget.host.saturating_sub(on_host);
        let encode = self.work.reference.map(|size| self.pixels(Way::Encode, size, host)).transpose()?;
        let (transformer, mlp_tokens, transformer_plan) = self.transformer()?;
        let (decode, decode_plan) = self.pixels(Way::Decode, self.work.output, host)?;
        let (encode, encode_plan) = encode.unzip();
        let transfer = match self.budget.kind {
            DeviceKind::Cuda => Transfer::of(self.model, self.work, transformer.layers, host),
            DeviceKind::Cpu | DeviceKind::Metal => None,
        };
        let stages = [Some(text_plan), encode_plan, Some(transformer_plan), Some(decode_plan)];
        Ok(MemoryPlan {
            budget: self.budget,
            encoders: way.place,
            text: way.resident,
            transformer,
            transfer,
            mlp_tokens,
            encode,
            decode,
            keep_loaded,
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

    /// Where the text encoders can be, and how many layers of T5 stay there, the fastest first.
    fn text_ways(&self) -> impl Iterator<Item = TextWay> {
        let places = match (self.work.encoders, self.budget.kind) {
            (Some(place), _) => vec![place],
            (None, DeviceKind::Cuda) => vec![Encoders::Device, Encoders::Cpu],
            // On the CPU they are anyhow, and Metal's memory is the CPU's.
            (None, DeviceKind::Cpu | DeviceKind::Metal) => vec![Encoders::Device],
        };
        let of = self.model.t5.num_layers;
        let layers =
            move |place| (1.min(of)..=of).rev().map(move |layers| TextWay { place, resident: Resident { layers, of } });
        places.into_iter().flat_map(layers)
    }

    /// Whether the text encoders take the memory of the device that computes.
    fn is_on_device(&self, way: TextWay) -> bool {
        way.place == Encoders::Device || self.budget.kind == DeviceKind::Cpu
    }

    /// What stays of the text encoders between prompts: parameters, and on a GPU the places to which the other layers are sent.
    fn text_stays(&self, way: TextWay) -> u64 {
        let text = self.model.text.at(way.place);
        let t5 = match self.budget.kind {
            DeviceKind::Cuda if self.is_on_device(way) => text.t5.with(way.resident.layers),
            _ => text.t5.resident(way.resident.layers),
        };
        text.clip + t5 + self.work.text_loras.at(way.place).resident
    }

    /// The text encoders' stage, and whether it fits.
    fn text(&self, way: TextWay) -> (StagePlan, bool) {
        let (text, loras) = (self.model.text.at(way.place), self.work.text_loras.at(way.place));
        let (device, room, carried, kept) = if self.is_on_device(way) {
            let Budget { kind, device, .. } = self.budget;
            (kind, device, self.carried, self.kept.saturating_sub(self.text_stays(way)))
        } else {
            (DeviceKind::Cpu, self.budget.host, 0, 0)
        };
        let stays = kept + text.clip + loras.resident;
        let computing = self.work.text(self.model, self.budget.kind, way.place);
        let beside = Beside { part: &text.t5, device, other: carried + stays, computing, merging: loras.merging };
        let stage = beside.plan(Stage::TextEncoders, way.resident, stays);
        let fits = stage.peak <= room;
        (stage, fits)
    }

    fn transformer(&self) -> Result<(Resident, Option<usize>, StagePlan)> {
        let (part, loras) = (&self.model.transformer, self.work.transformer_loras);
        let stays = self.kept.saturating_sub(part.with(usize::MAX) + loras.resident) + loras.resident;
        let beside = |mlp| {
            let computing = self.work.step(self.model, self.budget.kind, mlp);
            let (device, other) = (self.budget.kind, self.carried + stays);
            Beside { part, device, other, computing, merging: loras.merging }
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

    /// `host_left` is what the host's memory has left.
    fn pixels(&self, way: Way, size: (usize, usize), host_left: u64) -> Result<(Pixels, StagePlan)> {
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
        let plan = |peak: u64| StagePlan {
            stage,
            device: kind,
            resident,
            peak: self.carried + resident + peak,
            read_per_pass: 0,
        };
        let fitting = ways.iter().find(|(_, device, host)| self.fits(plan(*device).peak) && *host <= host_left);
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
    device: DeviceKind,
    /// What is there all the time.
    other: u64,
    computing: u64,
    /// By LoRAs, while a layer is read.
    merging: u64,
}

impl Beside<'_> {
    /// With that many layers in memory.
    fn peak(&self, layers: usize) -> u64 {
        // Where all layers are read before the computation, or, as for CUDA, made on the host, the two are not there together.
        let apart = layers >= self.part.layers.len() || self.device == DeviceKind::Cuda;
        let work = if apart { self.computing.max(self.merging) } else { self.computing + self.merging };
        self.other + self.part.with(layers) + work
    }

    /// `stays` are the parameters that are there beside the part's.
    fn plan(&self, stage: Stage, Resident { layers, .. }: Resident, stays: u64) -> StagePlan {
        StagePlan {
            stage,
            device: self.device,
            resident: stays + self.part.resident(layers),
            peak: self.peak(layers),
            read_per_pass: self.part.read(layers),
        }
    }
}

const SMALLER_MODEL: &str = "use text encoders in fewer bits";
const SMALLER_IMAGE: &str =
    "make the result smaller (--width, --height) or the reference (--reference-size), or use a model in fewer bits";

#[cfg(test)]
mod tests;

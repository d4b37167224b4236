//! Which files make up a model.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device};
use retouch_models::{ModelDefaults, NANO_KONTEXT_ID, defaults_for, known};
use retouch_sampler::SchedulerConfig;
use retouch_weights::{
    Component, Folder, Pipeline, Weights, WeightsError,
    hub::{self, DownloadProgress, HubId, HubOptions},
};
use serde::de::DeserializeOwned;

use crate::{
    Error, Parameters, Result,
    paths::{from_stored, to_stored},
};

/// The model to edit with: a base, and single files in place of some or all of its parts.
#[derive(Debug, Clone, Default)]
pub struct ModelSource {
    /// A model folder in diffusers' layout, or a hub id `owner/name`. `None` is the embedded nano-kontext, unless
    /// single files are given.
    pub base: Option<String>,
    /// A single-file transformer, in Black Forest Labs' or diffusers' naming.
    pub transformer: Option<PathBuf>,
    /// A single-file VAE.
    pub vae: Option<PathBuf>,
    /// A single-file CLIP-L text encoder.
    pub clip: Option<PathBuf>,
    /// A single-file T5-XXL text encoder.
    pub t5: Option<PathBuf>,
    /// A folder with `tokenizer` and `tokenizer_2` inside, in place of the base's.
    pub tokenizers: Option<PathBuf>,
}

impl ModelSource {
    /// The model that made an image, to make it again.
    pub fn of(parameters: &Parameters) -> Self {
        let Parameters { model, single_files, .. } = parameters;
        let file = |option: &str| single_files.get(option).map(|path| from_stored(path));
        let [transformer, vae, clip, t5] =
            [Component::Transformer, Component::Vae, Component::Clip, Component::T5].map(|part| file(part.option()));
        // Without a base it is the transformer that gives the name.
        let base = (single_files.get(Component::Transformer.option()) != Some(model))
            .then(|| from_stored(model).to_string_lossy().into_owned());
        Self { base, transformer, vae, clip, t5, tokenizers: file(TOKENIZERS) }
    }

    pub(crate) fn file(&self, component: Component) -> Option<&Path> {
        match component {
            Component::Transformer => self.transformer.as_deref(),
            Component::Vae => self.vae.as_deref(),
            Component::Clip => self.clip.as_deref(),
            Component::T5 => self.t5.as_deref(),
        }
    }
}

/// A model's files, found and of a supported kind; weights are not read yet.
pub(crate) struct ModelFiles {
    /// How results name the model: a hub id, the embedded model's, or a path as [`crate::paths`] stores it.
    pub name: String,
    pub pipeline: Pipeline,
    pub defaults: ModelDefaults,
    pub scheduler: SchedulerConfig,
    pub clip_tokenizer: Folder,
    pub t5_tokenizer: Folder,
    source: ModelSource,
    base: Option<Folder>,
}

impl ModelFiles {
    /// Finds the files, downloading from the hub what is not there.
    pub fn find(source: &ModelSource, hub: &HubOptions, progress: &mut dyn DownloadProgress) -> Result<Self> {
        let single_files = Component::ALL.into_iter().filter_map(|component| source.file(component)).count();
        let base = match &source.base {
            Some(name) => base_folder(name, source, hub, progress)?,
            None if single_files == 0 => nano_kontext(),
            None => return Self::of_single_files(source, hub, progress),
        };
        let pipeline = Pipeline::of(&base)?;
        let scheduler: SchedulerConfig = base.json(SCHEDULER)?;
        if let Some(reason) = scheduler.unsupported() {
            return Err(WeightsError::Unsupported { what: base.name_of(SCHEDULER), reason }.into());
        }
        let name = match &source.base {
            Some(folder) if Path::new(folder).is_dir() => to_stored(Path::new(folder)),
            Some(id) => id.clone(),
            None => NANO_KONTEXT_ID.into(),
        };
        let defaults = if base.has(OWN_DEFAULTS) {
            base.json(OWN_DEFAULTS)?
        } else if retouch_models::known(&name).is_some() {
            defaults_for(&name)
        } else {
            defaults_for(pipeline.class())
        };
        let tokenizers = source.tokenizers.as_ref().map_or_else(|| base.clone(), Folder::on_disk);
        Ok(Self {
            pipeline,
            defaults,
            scheduler,
            clip_tokenizer: tokenizers.sub("tokenizer"),
            t5_tokenizer: tokenizers.sub("tokenizer_2"),
            name,
            source: source.clone(),
            base: Some(base),
        })
    }

    /// The same without downloading anything: none where the base is a known model that is not here, or not all of it. The
    /// tokenizers are not looked for.
    pub fn here(source: &ModelSource) -> Result<Option<Self>> {
        let mut source = ModelSource { tokenizers: Some(PathBuf::new()), ..source.clone() };
        let hub = HubOptions::from_env();
        if let Some(id) = source.base.as_ref().filter(|base| !Path::new(base).is_dir() && *base != NANO_KONTEXT_ID) {
            let cached = hub::cached_models(&hub).into_iter().find(|cached| cached.id.eq_ignore_ascii_case(id));
            match cached.filter(|cached| cached.missing.is_none()) {
                Some(cached) => source.base = Some(cached.folder.to_string_lossy().into_owned()),
                None if known(id).is_some() => return Ok(None),
                None => {
                    return Err(Error::BadRequest(format!(
                        "{id} is neither a folder, nor downloaded, nor a model that is known; see `retouch models`"
                    )));
                }
            }
        }
        Self::find(&source, &hub, &mut hub::NoProgress).map(Some)
    }

    /// FLUX.1 Kontext [dev] from four files; the tokenizers are small and come from the hub if no folder is given.
    fn of_single_files(source: &ModelSource, hub: &HubOptions, progress: &mut dyn DownloadProgress) -> Result<Self> {
        if let Some(missing) = Component::ALL.into_iter().find(|&component| source.file(component).is_none()) {
            return Err(Error::BadRequest(format!(
                "single files without --model must be all four: give the {missing} by {}, or a folder or hub id by --model",
                missing.option()
            )));
        }
        let (clip_tokenizer, t5_tokenizer) = match &source.tokenizers {
            Some(path) => {
                let folder = Folder::on_disk(path);
                (folder.sub("tokenizer"), folder.sub("tokenizer_2"))
            }
            None => (hub::clip_tokenizer(hub, progress)?, hub::t5_tokenizer(hub, progress)?),
        };
        Ok(Self {
            name: source.transformer.as_deref().map(to_stored).unwrap_or_default(),
            pipeline: Pipeline::FluxKontext,
            defaults: defaults_for(Pipeline::FluxKontext.class()),
            scheduler: SchedulerConfig::flux_dev(),
            clip_tokenizer,
            t5_tokenizer,
            source: source.clone(),
            base: None,
        })
    }

    /// The files that stand in for parts of the base, by the command line's option that gives them.
    pub fn single_files(&self) -> BTreeMap<String, String> {
        let parts = Component::ALL.into_iter().map(|component| (component.option(), self.source.file(component)));
        let named = |(option, path): (&str, Option<&Path>)| Some((option.to_string(), to_stored(path?)));
        parts.chain([(TOKENIZERS, self.source.tokenizers.as_deref())]).filter_map(named).collect()
    }

    /// The weights of a part, opened and checked but not read.
    pub fn weights(&self, component: Component, dtype: DType, device: &Device) -> Result<Weights> {
        let weights = match (self.source.file(component), &self.base) {
            (Some(path), _) => component.in_file(path, dtype, device),
            (None, Some(base)) => component.in_folder(base, dtype, device),
            (None, None) => {
                Err(WeightsError::NoWeights { what: component.to_string(), expected: component.option().into() })
            }
        };
        Ok(weights?)
    }

    /// The configuration of a part and the name of its file; none for a single file without a base.
    ///
    /// A single file given together with a base must have the base's sizes.
    pub fn config<T: DeserializeOwned>(&self, component: Component) -> Result<Option<(T, String)>> {
        let Some(base) = &self.base else { return Ok(None) };
        let file = format!("{}/config.json", component.folder());
        Ok(Some((base.json(&file)?, base.name_of(&file))))
    }
}

/// The option for the tokenizers' folder, as [`Component::option`] has those for weights.
const TOKENIZERS: &str = "--tokenizers";
const SCHEDULER: &str = "scheduler/scheduler_config.json";
/// A model folder's own defaults, which diffusers does not know.
const OWN_DEFAULTS: &str = "retouch.json";

fn nano_kontext() -> Folder {
    Folder::embedded(NANO_KONTEXT_ID, retouch_models::NANO_KONTEXT)
}

/// `name` is a folder, the embedded model or a hub id.
fn base_folder(
    name: &str,
    source: &ModelSource,
    hub: &HubOptions,
    progress: &mut dyn DownloadProgress,
) -> Result<Folder> {
    let path = Path::new(name);
    if path.is_dir() {
        Ok(Folder::on_disk(path))
    } else if name == NANO_KONTEXT_ID {
        Ok(nano_kontext())
    } else if path.is_file() {
        Err(Error::BadRequest(format!(
            "{name} is a file, not a model folder; pass single files by --transformer, --vae, --clip and --t5"
        )))
    } else if HubId::parse(name).is_none() {
        Err(WeightsError::NoSuchModel(path.to_path_buf()).into())
    } else {
        // What a single file replaces need not be downloaded.
        let needed: Vec<Component> = Component::ALL.into_iter().filter(|&c| source.file(c).is_none()).collect();
        Ok(hub::model(name, &needed, hub, progress)?)
    }
}

/// The configuration of a part: from its folder, or read off the tensors `of` a single file; refused where `check` does.
pub(crate) fn config<C: DeserializeOwned>(
    files: &ModelFiles,
    component: Component,
    of: fn(&Weights) -> retouch_weights::Result<C>,
    check: fn(&C, &str) -> retouch_weights::Result<()>,
) -> Result<C> {
    let (config, file) = match files.config::<C>(component)? {
        Some(found) => found,
        None => {
            let weights = files.weights(component, DType::F32, &Device::Cpu)?;
            (of(&weights)?, weights.store().describe())
        }
    };
    check(&config, &file)?;
    Ok(config)
}

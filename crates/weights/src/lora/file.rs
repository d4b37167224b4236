//! A LoRA file: which layers it changes, and by which of its tensors.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use candle_core::{DType, Device};

use super::{
    config::Configs,
    names::{Target, other_model},
};
use crate::{Component, Kind, ModelFile, Result, Store, WeightsError, detect};

/// An open LoRA file. Its matrices are read when the parameters that they change are.
pub struct LoraFile {
    store: Store,
    changes: Vec<Change>,
    /// Tensors that say nothing about FLUX.1 by their names, sorted.
    unknown: Vec<String>,
}

/// What a file does to one parameter.
#[derive(Debug)]
pub(super) struct Change {
    pub target: Target,
    /// The parameter's name in the code: that of the target's weight or bias.
    pub parameter: String,
    pub delta: Stored,
    /// Before the user's own scale.
    pub scale: f64,
    /// All tensors that belong to it.
    pub keys: Vec<String>,
}

/// The tensors that a delta is made of, by their names in the file.
#[derive(Debug)]
pub(super) enum Stored {
    /// `up [out, rank]` times `down [rank, in]`.
    LowRank { down: String, up: String },
    /// The Kronecker product of two matrices.
    Kronecker { left: Factor, right: Factor },
    /// The difference itself, of the parameter's shape.
    Full(String),
}

#[derive(Debug)]
pub(super) enum Factor {
    Whole(String),
    Product(String, String),
}

/// What one tensor of a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Down,
    Up,
    UpBias,
    Alpha,
    Left,
    LeftA,
    LeftB,
    Right,
    RightA,
    RightB,
    Difference,
    BiasDifference,
}

/// How files end the names of a layer's tensors.
const ENDINGS: [(&str, Role); 20] = [
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_B.bias", Role::UpBias),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".alpha", Role::Alpha),
    (".lokr_w1", Role::Left),
    (".lokr_w1_a", Role::LeftA),
    (".lokr_w1_b", Role::LeftB),
    (".lokr_w2", Role::Right),
    (".lokr_w2_a", Role::RightA),
    (".lokr_w2_b", Role::RightB),
    (".diff", Role::Difference),
    (".diff_b", Role::BiasDifference),
];
/// XLabs' endings are short: they count only where its module names stand before them.
const XLABS_ENDINGS: [(&str, Role); 2] = [(".down.weight", Role::Down), (".up.weight", Role::Up)];
const XLABS_MODULES: &str = ".processor.";

/// Kinds of adapter that are refused, by a piece of their tensors' names.
const UNSUPPORTED: [(&str, &str); 8] = [
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    (".hada_w", "LoHa"),
    (".lokr_t2", "LoKr with a Tucker core"),
    (".lora_mid.", "LoCon with a Tucker core"),
    (".oft_", "OFT"),
    (".ia3_", "IA3"),
    (".set_weight", "replacement of whole matrices"),
];

/// The layer and the role that a tensor's name means.
fn split(key: &str) -> Option<(&str, Role)> {
    let ends = |endings: &[(&str, Role)]| endings.iter().find_map(|(end, role)| Some((key.strip_suffix(end)?, *role)));
    ends(&ENDINGS).or_else(|| ends(&XLABS_ENDINGS).filter(|(module, _)| module.contains(XLABS_MODULES)))
}

/// Whether a tensor of that name belongs to a LoRA or another adapter.
pub(crate) fn is_lora_key(key: &str) -> bool {
    split(key).is_some() || unsupported_kind(key).is_some()
}

fn unsupported_kind(key: &str) -> Option<&'static str> {
    UNSUPPORTED.iter().find(|(piece, _)| key.contains(piece)).map(|&(_, kind)| kind)
}

/// The tensors of one layer by their roles.
type Parts<'a> = BTreeMap<Role, &'a str>;

impl LoraFile {
    /// Opens the file, finds out what its tensors mean, and reads nothing but its scales.
    ///
    /// # Errors
    /// A file that is no LoRA, a kind of adapter that is not supported, and layers with incomplete tensors.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(Store::open(vec![ModelFile::open(path)?])?, path)
    }

    /// The same for a store; PEFT's configuration is looked for beside `path`.
    pub(crate) fn of(store: Store, path: &Path) -> Result<Self> {
        let refuse = |reason: String| WeightsError::Unsupported { what: store.describe(), reason };
        let mut keys: Vec<&str> = store.names().collect();
        keys.sort_unstable();
        if let Some((key, kind)) = keys.iter().find_map(|key| Some((key, unsupported_kind(key)?))) {
            return Err(refuse(format!(
                "it is a {kind} adapter (`{key}`), which is not supported; give a LoRA or a LoKr"
            )));
        }
        let (mut layers, mut unknown) = (BTreeMap::<&str, Parts>::new(), Vec::new());
        for key in &keys {
            match split(key) {
                Some((module, role)) => {
                    layers.entry(module).or_default().insert(role, key);
                }
                None => unknown.push(key.to_string()),
            }
        }
        if layers.is_empty() {
            return Err(not_a_lora(&store));
        }
        let configs = Configs::find(path, store.metadata()).map_err(refuse)?;
        let mut changes = Vec::new();
        for (module, parts) in layers {
            match Target::of(module) {
                Some(target) => changes.extend(layer(&store, &configs, module, &parts, &target)?),
                None => unknown.extend(parts.values().map(|key| key.to_string())),
            }
        }
        let mut places: HashMap<(&Target, &str), &Change> = HashMap::new();
        for change in &changes {
            if let Some(other) = places.insert((&change.target, &change.parameter), change) {
                return Err(refuse(format!(
                    "`{}` and `{}` both change {}; give a file that has each layer once",
                    other.keys[0], change.keys[0], change.parameter
                )));
            }
        }
        unknown.sort_unstable();
        Ok(Self { changes, unknown, store })
    }

    /// The file's name, for messages.
    pub fn name(&self) -> String {
        self.store.describe()
    }

    /// Whether it changes anything of a component.
    pub fn changes(&self, component: Component) -> bool {
        self.changes.iter().any(|change| change.target.component == component)
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn all_changes(&self) -> &[Change] {
        &self.changes
    }

    pub(super) fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// What the file says that it was made for, or looks like.
    pub(super) fn made_for(&self) -> Option<String> {
        let metadata = self.store.metadata();
        let said = ["modelspec.architecture", "ss_base_model_version"].iter().find_map(|key| metadata.get(*key));
        let is_other = |said: &&String| {
            let said = said.to_lowercase();
            !["flux1", "flux-1", "flux.1"].iter().any(|ours| said.starts_with(ours))
        };
        let names: Vec<&str> = self.store.names().collect();
        said.filter(is_other).cloned().or_else(|| other_model(&names).map(str::to_string))
    }
}

fn not_a_lora(store: &Store) -> WeightsError {
    let kinds = detect(store);
    let found = kinds.iter().map(Kind::with_article).collect::<Vec<_>>().join(" and ");
    let advice = match kinds.iter().find_map(Kind::component) {
        Some(component) => format!("pass it as {}", component.option()),
        None => "give a LoRA that was made for FLUX.1".to_string(),
    };
    WeightsError::WrongKind { file: store.describe(), found, wanted: "LoRA".to_string(), advice }
}

/// What the tensors of one layer do to its weight and to its bias.
fn layer(store: &Store, configs: &Configs, module: &str, parts: &Parts, target: &Target) -> Result<Vec<Change>> {
    let part = |role| parts.get(&role).map(|key| key.to_string());
    let incomplete = || WeightsError::Unsupported {
        what: store.describe(),
        reason: format!(
            "of the layer `{module}` it has only {}, which makes no change; is the file complete?",
            parts.values().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
        ),
    };
    let factor = |whole, a, b| match (part(whole), part(a), part(b)) {
        (Some(whole), None, None) => Some(Factor::Whole(whole)),
        (None, Some(a), Some(b)) => Some(Factor::Product(a, b)),
        _ => None,
    };
    let has = |roles: &[Role]| roles.iter().any(|role| parts.contains_key(role));
    let change = |delta, scale, roles: &[Role]| {
        let keys = roles.iter().filter_map(|&role| part(role)).collect();
        Change { target: target.clone(), parameter: target.weight(), delta, scale, keys }
    };
    let mut changes = Vec::new();
    if has(&[Role::Down, Role::Up, Role::UpBias]) {
        let (Some(down), Some(up)) = (part(Role::Down), part(Role::Up)) else { return Err(incomplete()) };
        let scale = scale(store, configs, module, parts, dimension(store, &down, 0))?;
        let bias = part(Role::UpBias).map(Stored::Full);
        changes.push(change(Stored::LowRank { down, up }, scale, &[Role::Down, Role::Up, Role::Alpha]));
        changes.extend(bias.map(|bias| Change { parameter: target.bias(), ..change(bias, scale, &[Role::UpBias]) }));
    } else if has(&KRONECKER) {
        let left = factor(Role::Left, Role::LeftA, Role::LeftB).ok_or_else(incomplete)?;
        let right = factor(Role::Right, Role::RightA, Role::RightB).ok_or_else(incomplete)?;
        // The rank of the right factor where both have one, as LyCORIS has the same for both.
        let rank = |factor: &Factor| match factor {
            Factor::Whole(_) => None,
            Factor::Product(_, b) => dimension(store, b, 0),
        };
        let scale = scale(store, configs, module, parts, rank(&right).or_else(|| rank(&left)))?;
        let roles: Vec<Role> = KRONECKER.into_iter().chain([Role::Alpha]).collect();
        changes.push(change(Stored::Kronecker { left, right }, scale, &roles));
    }
    if let Some(difference) = part(Role::Difference) {
        changes.push(change(Stored::Full(difference), 1.0, &[Role::Difference, Role::Alpha]));
    }
    if let Some(difference) = part(Role::BiasDifference) {
        let change = change(Stored::Full(difference), 1.0, &[Role::BiasDifference]);
        changes.push(Change { parameter: target.bias(), ..change });
    }
    if changes.is_empty() { Err(incomplete()) } else { Ok(changes) }
}

const KRONECKER: [Role; 6] = [Role::Left, Role::LeftA, Role::LeftB, Role::Right, Role::RightA, Role::RightB];

fn dimension(store: &Store, key: &str, axis: usize) -> Option<usize> {
    store.shape(key)?.get(axis).copied().filter(|&size| size > 0)
}

/// `alpha / rank`, by the layer's own alpha, else by PEFT's configuration, else 1.
fn scale(store: &Store, configs: &Configs, module: &str, parts: &Parts, rank: Option<usize>) -> Result<f64> {
    let Some(key) = parts.get(&Role::Alpha) else {
        return Ok(configs.scale(module, rank).unwrap_or(1.0));
    };
    let values = match store.shape(key) {
        Some([] | [1]) => store.tensor(key, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?,
        _ => Vec::new(),
    };
    match (values.as_slice(), rank) {
        // LyCORIS does not scale the product of two whole matrices, whatever alpha it notes.
        ([_], None) => Ok(1.0),
        ([alpha], Some(rank)) if alpha.is_finite() => Ok(f64::from(*alpha) / rank as f64),
        _ => Err(WeightsError::Unsupported {
            what: store.describe(),
            reason: format!("`{key}` is not one number; is the file damaged?"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_told_by_the_ends_of_their_names() {
        for (key, expected) in [
            ("a.lora_A.weight", Some(("a", Role::Down))),
            ("a.lora_B.default.weight", Some(("a", Role::Up))),
            ("lora_unet_a.lora_down.weight", Some(("lora_unet_a", Role::Down))),
            ("a.b.lora.up.weight", Some(("a.b", Role::Up))),
            ("double_blocks.0.processor.qkv_lora1.up.weight", Some(("double_blocks.0.processor.qkv_lora1", Role::Up))),
            ("a.lokr_w2_b", Some(("a", Role::RightB))),
            ("a.diff_b", Some(("a", Role::BiasDifference))),
            ("a.up.weight", None),
            ("decoder.up.weight", None),
            ("a.weight", None),
            (".alpha", Some(("", Role::Alpha))),
        ] {
            assert_eq!(split(key), expected, "{key}");
        }
    }
}

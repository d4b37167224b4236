//! Several LoRA files together, matched to one component of a model.

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::{
    delta::{Delta, Piece},
    file::{Change, Factor, LoraFile, Stored},
    names::Part,
};
use crate::{Component, Result, Store, Weights, WeightsError};

/// What several files do to one component.
pub struct Adapters {
    files: Vec<(Arc<LoraFile>, f64)>,
    /// Of each parameter that is changed, by its name in the code: places in `files` and in the changes of that file.
    changes: HashMap<String, Vec<(usize, usize)>>,
}

impl Adapters {
    /// Those of the files' changes that are to `component`, whose `weights` are to be read. Layers that the component does
    /// not have are left out: see [`LoraFile::without_place`].
    ///
    /// # Errors
    /// Matrices that do not fit the component's.
    pub fn new(files: &[(Arc<LoraFile>, f64)], component: Component, weights: &Weights) -> Result<Self> {
        let mut changes: HashMap<String, Vec<(usize, usize)>> = HashMap::new();
        for (at, (file, _)) in files.iter().enumerate() {
            for (i, change) in file.all_changes().iter().enumerate() {
                if change.target.component == component
                    && let Some(shape) = place(change, weights)
                {
                    Fit::of(file, change, &shape)?;
                    changes.entry(change.parameter.clone()).or_default().push((at, i));
                }
            }
        }
        Ok(Self { files: files.to_vec(), changes })
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The parameters that are changed.
    pub(super) fn parameters(&self) -> impl Iterator<Item = &str> {
        self.changes.keys().map(String::as_str)
    }

    /// The changes to a parameter, with their files.
    pub(super) fn changes_to(&self, parameter: &str) -> impl Iterator<Item = (&LoraFile, &Change)> {
        let places = self.changes.get(parameter).into_iter().flatten();
        places.map(|&(file, change)| {
            let file = &*self.files[file].0;
            (file, &file.all_changes()[change])
        })
    }

    pub(crate) fn change(&self, parameter: &str) -> bool {
        self.changes.contains_key(parameter)
    }

    /// What is added to a parameter, in f32.
    pub(crate) fn pieces(&self, parameter: &str, weights: &Weights) -> Result<Vec<Piece>> {
        let changes = self.changes.get(parameter).into_iter().flatten();
        let piece = |&(file, change): &(usize, usize)| {
            let (file, scale) = &self.files[file];
            let change = &file.all_changes()[change];
            let shape = place(change, weights).unwrap_or_default();
            Fit::of(file, change, &shape)?.read(file.store(), change, *scale, weights.device())
        };
        changes.map(piece).collect()
    }
}

impl LoraFile {
    /// The tensors that have no place in a model, sorted: of names that are not known, or of layers that it does not have.
    pub fn without_place(&self, weights: impl Fn(Component) -> Result<Weights>) -> Result<Vec<String>> {
        let mut keys = self.unknown().to_vec();
        for component in [Component::Transformer, Component::Clip, Component::T5] {
            if self.changes(component) {
                let weights = weights(component)?;
                let of_component = self.all_changes().iter().filter(|change| change.target.component == component);
                let absent = of_component.filter(|change| place(change, &weights).is_none());
                keys.extend(absent.flat_map(|change| change.keys.iter().cloned()));
            }
        }
        keys.sort_unstable();
        Ok(keys)
    }

    /// # Errors
    /// A file some of whose tensors have no place in the model, with what it looks like; all of whose have none, also if
    /// `partial`.
    pub fn check_places(&self, partial: bool, weights: impl Fn(Component) -> Result<Weights>) -> Result<()> {
        const SHOWN: usize = 3;
        let (without, all) = (self.without_place(weights)?, self.store().names().count());
        if without.is_empty() || (partial && without.len() < all) {
            return Ok(());
        }
        let examples: Vec<_> = without.iter().take(SHOWN).map(|key| format!("`{key}`")).collect();
        let more = if without.len() > SHOWN { " and others" } else { "" };
        let looks = self.made_for().map(|model| format!("; it looks made for {model}")).unwrap_or_default();
        let advice = if without.len() < all {
            "give a LoRA that was made for this model, or use what fits by --lora-partial"
        } else {
            "give a LoRA that was made for this model"
        };
        Err(WeightsError::Unsupported {
            what: self.name(),
            reason: format!(
                "{} of its {all} tensors have no place in this model ({}{more}){looks}; {advice}",
                without.len(),
                examples.join(", ")
            ),
        })
    }
}

/// The shape of the weight of the change's layer, if the model has the parameter.
pub(super) fn place(change: &Change, weights: &Weights) -> Option<Vec<usize>> {
    weights.shape_by_full_name(&change.parameter)?;
    weights.shape_by_full_name(&change.target.weight())
}

/// Where a change belongs in its parameter.
struct Fit {
    rows: std::ops::Range<usize>,
}

impl Fit {
    /// Checks the change's matrices against a layer whose weight has the shape `[out, in]`, or of a norm `[out]`.
    fn of(file: &LoraFile, change: &Change, layer: &[usize]) -> Result<Self> {
        let store = file.store();
        let (out, input) = match *layer {
            [out, input] => (out, Some(input)),
            [out] => (out, None),
            _ => (0, None),
        };
        let is_weight = change.parameter == change.target.weight();
        let rows = change.target.part.rows(out, input.unwrap_or_default());
        let wanted = rows.clone().map(|rows| match input {
            Some(input) if is_weight => vec![rows.len(), input],
            _ => vec![rows.len()],
        });
        let found = shape(store, &change.delta);
        match rows {
            Some(rows) if found.is_some() && found == wanted => Ok(Self { rows }),
            _ => Err(misfit(file, change, layer)),
        }
    }

    fn read(self, store: &Store, change: &Change, scale: f64, device: &Device) -> Result<Piece> {
        let read = |name: &str| store.tensor(name, DType::F32, device);
        let factor = |factor: &Factor| {
            Ok::<_, WeightsError>(match factor {
                Factor::Whole(name) => read(name)?,
                Factor::Product(a, b) => read(a)?.matmul(&read(b)?)?,
            })
        };
        let scaled = |x: Tensor| x * (change.scale * scale);
        let delta = match &change.delta {
            Stored::LowRank { down, up } => Delta::LowRank { up: scaled(read(up)?)?, down: read(down)? },
            Stored::Kronecker { left, right } => {
                Delta::Kronecker { left: scaled(factor(left)?)?, right: factor(right)? }
            }
            Stored::Full(name) => Delta::Full(scaled(read(name)?)?),
        };
        let delta = if change.target.part == Part::SwappedHalves { delta.with_swapped_halves()? } else { delta };
        Ok(Piece { rows: self.rows, delta })
    }
}

/// The shape of a product of two matrices, where they fit each other.
fn product(store: &Store, a: &str, b: &str) -> Option<[usize; 2]> {
    match (store.shape(a)?, store.shape(b)?) {
        (&[rows, inner], &[same, columns]) if inner == same && inner > 0 => Some([rows, columns]),
        _ => None,
    }
}

pub(super) fn factor_shape(store: &Store, factor: &Factor) -> Option<[usize; 2]> {
    match factor {
        Factor::Whole(name) => <[usize; 2]>::try_from(store.shape(name)?).ok(),
        Factor::Product(a, b) => product(store, a, b),
    }
}

/// The shape of what a change's tensors make, where they fit each other.
fn shape(store: &Store, stored: &Stored) -> Option<Vec<usize>> {
    match stored {
        Stored::LowRank { down, up } => product(store, up, down).map(Vec::from),
        Stored::Kronecker { left, right } => {
            let ([a, b], [c, d]) = (factor_shape(store, left)?, factor_shape(store, right)?);
            Some(vec![a.checked_mul(c)?, b.checked_mul(d)?])
        }
        Stored::Full(name) => store.shape(name).map(<[usize]>::to_vec),
    }
}

fn misfit(file: &LoraFile, change: &Change, layer: &[usize]) -> WeightsError {
    let shapes = change.keys.iter().filter_map(|key| Some(format!("`{key}` {:?}", file.store().shape(key)?)));
    let looks = file.made_for().map(|model| format!("; it looks made for {model}")).unwrap_or_default();
    WeightsError::Unsupported {
        what: file.name(),
        reason: format!(
            "{} do not fit this model's {}, which has the shape {layer:?}{looks}; give a LoRA that was made for this model",
            shapes.collect::<Vec<_>>().join(" and "),
            change.target.module
        ),
    }
}

//! How cuDNN computes a task: the first of the engines that it recommends whose arithmetic and workspace will do.

use candle_core::DType;

use super::{
    super::tasks::Task,
    descriptor::{Descriptor, HandlePointer, HeuristicMode, NumericalNote},
    graph,
    library::{Handle, Library},
    numbers::*,
};

/// Bytes that an engine may take for itself: as much as the image and the result of the largest convolutions that it is asked
/// for (`conv.rs`), which it keeps in another order, and its own.
const WORKSPACE: usize = 576 << 20;

/// The GPU that plans are made for.
pub enum Target<'a> {
    Handle(&'a Handle),
    /// As cuDNN would describe it itself, in JSON: enough to make plans, not to run them.
    #[cfg(test)]
    Described(&'a str),
}

/// An engine that is ready to run.
pub struct Plan {
    pub descriptor: Descriptor,
    /// Bytes.
    pub workspace: usize,
    /// What the plan was chosen from.
    _heuristics: Descriptor,
}

/// An error says why there is none.
pub fn plan(library: &'static Library, target: &Target<'_>, task: &Task) -> Result<Plan, String> {
    let graph = target.graph(graph::operation(library, task)?)?;
    let heuristics = target.heuristics(graph)?;
    let count = heuristics.count_of_descriptors(CUDNN_ATTR_ENGINEHEUR_RESULTS)?;
    let choices = heuristics.descriptors(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, count)?;
    let mut refusal = "it has no engine for this".to_string();
    for choice in choices {
        let made = exact(&choice, task).and_then(|()| target.plan(choice)).and_then(|descriptor| {
            let workspace = descriptor.number(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
            match usize::try_from(workspace) {
                Ok(workspace) if workspace <= WORKSPACE => Ok((descriptor, workspace)),
                _ => Err(format!("its workspace would be {} MB", workspace >> 20)),
            }
        });
        match made {
            Ok((descriptor, workspace)) => return Ok(Plan { descriptor, workspace, _heuristics: heuristics }),
            Err(reason) => refusal = reason,
        }
    }
    Err(refusal)
}

/// Whether an engine adds up products of the inputs as they are, the same way each time: not with inputs or sums in fewer bits and
/// not by transforms of the image. Narrow values are multiplied in tensor cores, without which ours would be faster; values in f32 are
/// not, since they would be rounded to TF32 there.
fn exact(choice: &Descriptor, task: &Task) -> Result<(), String> {
    let engines = choice.descriptors(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_BACKEND_ENGINE_DESCRIPTOR, 1)?;
    let engine = engines.first().ok_or("an engine configuration is of no engine")?;
    let notes = engine.values(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, NumericalNote(-1))?;
    let narrow = task.dtype() != DType::F32;
    let tensor_core = NumericalNote(CUDNN_NUMERICAL_NOTE_TENSOR_CORE);
    let harmless = [tensor_core, NumericalNote(CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP)];
    if notes.contains(&tensor_core) == narrow && notes.iter().all(|note| harmless.contains(note)) {
        return Ok(());
    }
    Err(format!("its engine has the numerical notes {:?}", notes.iter().map(|note| note.0).collect::<Vec<_>>()))
}

impl Target<'_> {
    fn graph(&self, operation: Descriptor) -> Result<Descriptor, String> {
        let graph = Descriptor::new(operation.library(), CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .made_of(CUDNN_ATTR_OPERATIONGRAPH_OPS, operation)?;
        match self {
            Self::Handle(handle) => graph.with(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[HandlePointer(handle.raw())])?,
            #[cfg(test)]
            Self::Described(_) => graph,
        }
        .finished()
    }

    /// The engines that cuDNN expects to be the fastest, these first.
    fn heuristics(&self, graph: Descriptor) -> Result<Descriptor, String> {
        let library = graph.library();
        let heuristics = Descriptor::new(library, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
            .made_of(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph)?
            .with(CUDNN_ATTR_ENGINEHEUR_MODE, &[HeuristicMode(CUDNN_HEUR_MODE_A)])?;
        match self {
            Self::Handle(_) => heuristics,
            #[cfg(test)]
            Self::Described(gpu) => {
                heuristics.made_of(described::CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, properties(library, gpu)?)?
            }
        }
        .finished()
    }

    fn plan(&self, choice: Descriptor) -> Result<Descriptor, String> {
        let library = choice.library();
        let plan = Descriptor::new(library, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .made_of(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, choice)?;
        match self {
            Self::Handle(handle) => plan.with(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[HandlePointer(handle.raw())])?,
            #[cfg(test)]
            Self::Described(gpu) => {
                plan.made_of(described::CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, properties(library, gpu)?)?
            }
        }
        .finished()
    }
}

/// A GPU as it is described.
#[cfg(test)]
fn properties(library: &'static Library, gpu: &str) -> Result<Descriptor, String> {
    use described::*;
    Descriptor::new(library, CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR)?
        .with(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, gpu.as_bytes())?
        .finished()
}

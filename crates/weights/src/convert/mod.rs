//! From one file of weights to another in fewer bits, a few rows at a time: memory does not grow with the file.

mod layout;
mod stream;
mod target;

use std::{io::Write, ops::ControlFlow, path::Path};

use candle_core::{DType, Device};

use crate::{
    Component, Encoding, FluxShape, Folder, ModelFile, Result, Store, T5Shape, Weights, WeightsError, detect,
    format::encode,
    naming::{Naming, flux, t5},
};

pub use layout::FileFormat;
use layout::{Note, Written};
pub(crate) use stream::quantised;
use stream::{each_run, scale_for};
pub use target::Target;
use target::is_large;
pub(crate) use target::is_worthwhile;

/// A conversion with all choices made.
pub struct Conversion {
    weights: Weights,
    component: Component,
    target: Target,
    format: FileFormat,
    tensors: Vec<Planned>,
}

struct Planned {
    /// Under which the code knows the parameter.
    name: String,
    written: Written,
    content: Content,
}

enum Content {
    /// The bytes of this tensor as they are.
    Copied(String),
    /// The parameter's values in the encoding; 8-bit floats by the scale that makes the most of them, where `scaled`.
    Encoded { scaled: bool },
    /// The scale of the matrix before it.
    Scale,
    /// A tensor of no values.
    Nothing,
}

impl Conversion {
    /// Decides what becomes of each tensor of `input`: a single file, or a component's folder in a model folder.
    ///
    /// Matrices whose names match one of the patterns `keep` stay as they are, as norms, biases and the layers at the ends do.
    ///
    /// # Errors
    /// When there is no transformer and no T5 encoder in `input`, and for a target that the format does not have.
    pub fn plan(input: &Path, format: FileFormat, target: Target, keep: &[String]) -> Result<Self> {
        let reason = match (format, target) {
            (FileFormat::Gguf, Target::Fp8 | Target::Fp8Scaled) => {
                Some("GGUF has no 8-bit floats; give the output a name that ends in .safetensors, or take q8_0")
            }
            (FileFormat::Safetensors, Target::Blocks(_)) => {
                Some("only GGUF has this type; give the output a name that ends in .gguf, or take fp8_scaled")
            }
            _ => None,
        };
        if let Some(reason) = reason {
            return Err(WeightsError::Unsupported { what: target.to_string(), reason: reason.to_string() });
        }
        let store = open(input)?;
        let kinds = detect(&store);
        let holds = |component: &Component| kinds.iter().any(|kind| kind.component() == Some(*component));
        let Some(component) = [Component::Transformer, Component::T5].into_iter().find(holds) else {
            return Err(WeightsError::Unsupported {
                what: store.describe(),
                reason:
                    "neither a FLUX transformer nor a T5 encoder is in here, and the other parts are too small to be \
                         worth fewer bits"
                        .to_string(),
            });
        };
        let weights = component.in_store(store, DType::F32, &Device::Cpu)?;
        let names = match component {
            Component::T5 => t5::parameters(T5Shape::of(&weights)?.layers),
            _ => {
                let shape = FluxShape::of(&weights)?;
                flux::parameters(shape.double_blocks, shape.single_blocks)
            }
        };
        let present: Vec<String> = names.into_iter().filter(|name| weights.has(name)).collect();
        let mut conversion = Self { weights, component, target, format, tensors: Vec::new() };
        for name in present {
            conversion.add(name, keep)?;
        }
        if target == Target::Fp8Scaled {
            // By this tensor ComfyUI knows that there are scales.
            let written = Written { name: "scaled_fp8".to_string(), shape: vec![0], encoding: target.encoding() };
            conversion.tensors.push(Planned { name: String::new(), written, content: Content::Nothing });
        }
        // What cannot be written is found before the work.
        conversion.header()?;
        Ok(conversion)
    }

    /// What is converted.
    pub fn component(&self) -> Component {
        self.component
    }

    /// Bytes that will be written.
    pub fn bytes(&self) -> Result<usize> {
        let tensors = self.tensors.iter().map(|tensor| {
            let bytes = tensor.written.bytes()?;
            Ok(bytes + self.format.padding(bytes))
        });
        Ok(self.header()?.len() + tensors.sum::<Result<usize>>()?)
    }

    /// Writes the file, telling `progress` the bytes that are done; a break ends it with [`WeightsError::Cancelled`].
    pub fn write(&self, out: &mut dyn Write, progress: &mut dyn FnMut(usize) -> ControlFlow<()>) -> Result<()> {
        let mut out = Counted { out, done: 0, progress };
        out.write(&self.header()?)?;
        let mut scale = 1.0;
        for tensor in &self.tensors {
            match &tensor.content {
                Content::Copied(name) => {
                    out.write(self.weights.store().raw(name)?.unwrap_or_default())?;
                    self.weights.store().release(name);
                }
                Content::Encoded { scaled } => {
                    let Written { shape, encoding, .. } = &tensor.written;
                    scale = match encoding {
                        Encoding::Fp8(format) if *scaled => scale_for(&self.weights, &tensor.name, shape, *format)?,
                        _ => 1.0,
                    };
                    each_run(&self.weights, &tensor.name, shape, |values| {
                        out.write(&encode(encoding, values, columns(shape), scale)?)
                    })?;
                }
                Content::Scale => out.write(&scale.to_le_bytes())?,
                Content::Nothing => {}
            }
            out.write(&vec![0; self.format.padding(tensor.written.bytes()?)])?;
        }
        Ok(())
    }

    fn add(&mut self, name: String, keep: &[String]) -> Result<()> {
        let shape = self.weights.shape(&name).unwrap_or_default();
        // Of parts that are stacked the first one speaks for all.
        let stored = self.weights.stored_encoding(&name);
        let large =
            is_large(self.component, &name, &shape) && !keep.iter().any(|pattern| target::matches(pattern, &name));
        let encoding = match stored {
            _ if large => self.target.encoding_for(columns(&shape)),
            // As the programs that read GGUF expect it.
            _ if self.format == FileFormat::Gguf && shape.len() == 1 => Encoding::F32,
            Some(half @ (Encoding::F16 | Encoding::Bf16)) => half.clone(),
            Some(Encoding::Fp8(_)) => Encoding::Bf16,
            _ => Encoding::F32,
        };
        let scaled = large && self.target == Target::Fp8Scaled;
        let store = self.weights.store();
        let same = match self.weights.single_tensor(&name) {
            Some(tensor) if !scaled && store.encoding(&tensor) == Some(&encoding) => {
                store.raw(&tensor)?.map(|_| tensor)
            }
            _ => None,
        };
        let written = Written { name: self.name_in_file(&name), shape, encoding };
        let content = same.map_or(Content::Encoded { scaled }, Content::Copied);
        let scale_name = format!("{}scale_weight", written.name.trim_end_matches("weight"));
        self.tensors.push(Planned { name: name.clone(), written, content });
        if scaled {
            let written = Written { name: scale_name, shape: vec![], encoding: Encoding::F32 };
            self.tensors.push(Planned { name, written, content: Content::Scale });
        }
        Ok(())
    }

    /// Black Forest Labs' names for the transformer; for T5 transformers' in safetensors, llama.cpp's in GGUF.
    fn name_in_file(&self, name: &str) -> String {
        match (self.component, self.format) {
            (Component::T5, FileFormat::Gguf) => t5::LlamaCpp.recipe(name).parts().concat(),
            _ => name.to_string(),
        }
    }

    fn header(&self) -> Result<Vec<u8>> {
        let architecture = if self.component == Component::T5 { "t5encoder" } else { "flux" };
        let notes = [
            ("general.architecture", Note::Text(architecture)),
            ("general.quantization_version", Note::Number(2)),
            ("general.file_type", Note::Number(self.target.file_type())),
        ];
        let tensors: Vec<_> = self.tensors.iter().map(|tensor| &tensor.written).collect();
        self.format.header(&tensors, &notes)
    }
}

/// A file, or a component's folder.
fn open(input: &Path) -> Result<Store> {
    if !input.is_dir() {
        return Store::open(vec![ModelFile::open(input)?]);
    }
    let folder = Folder::on_disk(input);
    if folder.has("model_index.json") {
        return Err(WeightsError::Unsupported {
            what: folder.to_string(),
            reason: "this is a whole model; give one of its parts: the folder `transformer` or `text_encoder_2` in it"
                .to_string(),
        });
    }
    let stems = [Component::Transformer, Component::T5].map(Component::stem);
    let has =
        |stem: &&str| [".safetensors", ".safetensors.index.json"].iter().any(|end| folder.has(&format!("{stem}{end}")));
    Store::open_component(&folder, stems.into_iter().find(has).unwrap_or(stems[0]))
}

fn columns(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(1)
}

/// A file being written, and who wants to know how far it is.
struct Counted<'a> {
    out: &'a mut dyn Write,
    done: usize,
    progress: &'a mut dyn FnMut(usize) -> ControlFlow<()>,
}

impl Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|source| WeightsError::Io { file: "the output".to_string(), source })?;
        self.done += bytes.len();
        match (self.progress)(self.done) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(WeightsError::Cancelled),
        }
    }
}

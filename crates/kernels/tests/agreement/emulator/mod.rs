//! The CUDA kernels without a GPU: compiled by the host's C++ compiler, their threads run as coroutines (emulator.cpp), and
//! launched by the same code on tensors of the CPU.

use std::{
    ffi::{CStr, OsStr, c_char, c_void},
    io::Write,
    path::Path,
    process::Command,
    sync::{Mutex, OnceLock},
};

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail, quantized::QTensor};
use libloading::Library;
use retouch_kernels::{
    Fp8,
    cuda::{Attention, Convolution, Cuda, Gpu, Launch, Operands, Params, Product, Standing, Task, Verdict},
    portable,
};

/// The emulated GPUs: one with an H100's shared memory, one with an RTX 40's, one with a library that has a plan for everything.
/// None where there is no compiler, or `RETOUCH_EMULATOR` is `off`, as beside a GPU that shows the same.
pub fn gpus() -> &'static [(&'static str, Cuda<Emulator>)] {
    static GPUS: OnceLock<Vec<(&str, Cuda<Emulator>)>> = OnceLock::new();
    GPUS.get_or_init(|| match library() {
        Ok(library) => {
            let gpu = |shared_memory, scales| Emulator { library, shared_memory, scales, log: None, planner: None };
            let (h100, rtx40) = (gpu(228 << 10, true), gpu(100 << 10, false));
            let with_library = h100.with_planner(None).0;
            let all =
                [("emulated H100", h100), ("emulated RTX 40", rtx40), ("emulated H100 with a library", with_library)];
            all.map(|(name, gpu)| (name, Cuda(gpu))).into()
        }
        // Not `eprintln!`, which is shown of failed tests only.
        Err(reason) => {
            let _ = writeln!(std::io::stderr(), "skipped: the CUDA kernels are not emulated: {reason}");
            Vec::new()
        }
    })
}

/// The kernels as a library of the host; an error if nothing can compile them, a panic if they do not compile.
fn library() -> std::result::Result<&'static Library, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (here, kernels) = (root.join("tests/agreement/emulator"), root.join("src/cuda/kernels"));
    if std::env::var_os("RETOUCH_EMULATOR").is_some_and(|value| value == "off") {
        return Err("RETOUCH_EMULATOR is off".into());
    }
    if !cfg!(target_os = "linux") {
        return Err("that needs Linux".into());
    }
    let sources = std::fs::read_dir(&kernels).map_err(|e| format!("{}: {e}", kernels.display()))?;
    let sources = sources.filter_map(|file| Some(file.ok()?.path()));
    let sources: Vec<_> = sources.filter(|path| path.extension() == Some(OsStr::new("cu"))).collect();
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulated-kernels-{}.so", std::process::id()));
    let mut compiler = Command::new("g++");
    // Fibres jump from stack to stack, which fortified longjmp takes for an error.
    compiler.args("-std=c++17 -O2 -shared -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas".split(' '));
    compiler.args(["-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-I"]).arg(&here);
    compiler.arg("-o").arg(&library).args(["-x", "c++"]).args(&sources).arg(here.join("emulator.cpp"));
    let output = compiler.output().map_err(|e| format!("g++: {e}"))?;
    assert!(output.status.success(), "the kernels do not compile:\n{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: code of this crate, without initialisers.
    let loaded = unsafe { Library::new(&library) }.unwrap();
    std::fs::remove_file(&library).unwrap();
    Ok(Box::leak(Box::new(loaded)))
}

#[derive(Debug)]
pub struct Emulator {
    library: &'static Library,
    shared_memory: usize,
    /// Whether its library scales rows of 8-bit floats.
    scales: bool,
    /// Names of the kernels that were launched, if asked for.
    log: Option<Mutex<Vec<String>>>,
    planner: Option<Planner>,
}

/// A library with a plan for every task.
#[derive(Debug)]
struct Planner {
    /// What becomes of a right result in f32; nothing in a library that is right.
    distortion: Option<fn(&Tensor) -> Result<Tensor>>,
    /// Tasks that ran, and what was said of results.
    ran: Mutex<Vec<Task>>,
    verdicts: Mutex<Vec<(Task, Verdict)>>,
}

impl Emulator {
    /// The same GPU with a log of its own.
    pub fn logged(&self) -> Cuda<Self> {
        Cuda(Self { log: Some(Mutex::default()), planner: None, ..*self })
    }

    /// The same GPU with a library, whose results are changed by a `distortion`.
    pub fn with_planner(&self, distortion: Option<fn(&Tensor) -> Result<Tensor>>) -> Cuda<Self> {
        let planner = Planner { distortion, ran: Mutex::default(), verdicts: Mutex::default() };
        Cuda(Self { log: Some(Mutex::default()), planner: Some(planner), ..*self })
    }

    /// Tasks that the library computed, and what was said of its results.
    pub fn planned(&self) -> (Vec<Task>, Vec<Verdict>) {
        let planner = self.planner.as_ref().unwrap();
        let verdicts = planner.verdicts.lock().unwrap().iter().map(|(_, verdict)| *verdict).collect();
        (planner.ran.lock().unwrap().clone(), verdicts)
    }

    pub fn log(&self) -> Vec<String> {
        self.log.as_ref().map(|log| log.lock().unwrap().clone()).unwrap_or_default()
    }
}

/// `struct Range` of emulator.cpp.
#[repr(C)]
struct Range {
    start: u64,
    bytes: u64,
    writable: u64,
}

/// `struct Launch` of emulator.cpp.
#[repr(C)]
struct Call {
    kernel: *const c_void,
    params: *const c_void,
    params_bytes: u64,
    grid: [u64; 3],
    threads: u64,
    shared_bytes: u64,
    ranges: *const Range,
    ranges_count: u64,
}

impl Gpu for Emulator {
    fn address(&self, x: &Tensor) -> Result<u64> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("not on the CPU") };
        Ok(whole(storage).start + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
    }

    fn blocks(&self, blocks: &QTensor) -> Result<u64> {
        Ok(blocks.data()?.as_ptr() as u64)
    }

    /// NaN, so that what a kernel does not write is found; of 8-bit floats too.
    fn uninitialised(&self, shape: Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        if dtype == DType::U8 {
            return Tensor::full(0x7f_u8, shape, device)?.force_contiguous();
        }
        Tensor::full(f32::NAN, shape, device)?.to_dtype(dtype)?.force_contiguous()
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    fn launch<P: Params>(&self, launch: &Launch<'_>, params: &P) -> Result<()> {
        if let Some(log) = &self.log {
            log.lock().unwrap().push(launch.name());
        }
        let range = |x: &&Tensor, writable| match &*x.storage_and_layout().0 {
            Storage::Cpu(storage) => Range { writable, ..whole(storage) },
            _ => panic!("not on the CPU"),
        };
        let reads = launch.reads.iter().map(|x| range(x, 0));
        let packed = launch.packed.map(|blocks| {
            let bytes = blocks.data().unwrap();
            Range { start: bytes.as_ptr() as u64, bytes: bytes.len() as u64, writable: 0 }
        });
        let ranges: Vec<Range> = reads.chain(launch.writes.iter().map(|x| range(x, 1))).chain(packed).collect();
        // SAFETY: emulator.cpp's `emulate`; a kernel's function is only handed on to it. What the kernel writes to are new
        // tensors, which nothing else holds yet.
        let error = unsafe {
            let emulate = self.library.get::<unsafe extern "C" fn(*const Call) -> *const c_char>(b"emulate").unwrap();
            let kernel = self.library.get::<unsafe extern "C" fn()>(launch.name().as_bytes());
            let kernel = kernel.unwrap_or_else(|e| panic!("{}: {e}", launch.name()));
            let call = Call {
                kernel: *kernel as *const c_void,
                params: (params as *const P).cast(),
                params_bytes: size_of::<P>() as u64,
                grid: launch.blocks.map(|count| count as u64),
                threads: launch.threads.into(),
                shared_bytes: launch.shared_memory as u64,
                ranges: ranges.as_ptr(),
                ranges_count: ranges.len() as u64,
            };
            let error = emulate(&call);
            (!error.is_null()).then(|| CStr::from_ptr(error).to_string_lossy().into_owned())
        };
        match error {
            Some(error) => panic!("{}: {error}", launch.name()),
            None => Ok(()),
        }
    }

    /// Of cublasLt only what is asked of it: the product that strides and addresses describe.
    fn multiply(&self, product: Product, of: Operands<'_>) -> Result<bool> {
        if of.scales.is_some() && !self.scales {
            return Ok(false);
        }
        let scales = |scales: Option<&Tensor>, count: usize| match scales {
            Some(scales) => elements(scales, 1, 0, count),
            None => vec![1.0; count],
        };
        let x_scales = scales(of.scales.map(|scales| scales.x), product.rows);
        let weight_scales = scales(of.scales.map(|scales| scales.weight), product.outputs);
        let x = elements(of.x, product.rows, product.x_stride, product.depth);
        let weight = elements(of.weight, product.outputs, product.weight_stride, product.depth);
        let bias = of.bias.map_or(vec![0.0; product.outputs], |bias| elements(bias, 1, 0, product.outputs));
        let mut sums = Vec::with_capacity(product.rows * product.outputs);
        for (x, x_scale) in x.chunks(product.depth).zip(&x_scales) {
            for ((weight, bias), weight_scale) in weight.chunks(product.depth).zip(&bias).zip(&weight_scales) {
                let sum: f64 = x.iter().zip(weight).map(|(x, w)| x * w).sum();
                sums.push(bias + sum * x_scale * weight_scale);
            }
        }
        let y = Tensor::from_vec(sums, of.y.shape(), &Device::Cpu)?;
        of.y.slice_set(&(if product.gelu { y.gelu()? } else { y }).to_dtype(product.result)?, 0, 0)?;
        Ok(true)
    }

    /// A library that was wrong has no plans any more.
    fn planned(&self, task: &Task) -> Option<Standing> {
        let verdicts = self.planner.as_ref()?.verdicts.lock().unwrap();
        if verdicts.iter().any(|(_, verdict)| matches!(verdict, Verdict::Differs(_))) {
            return None;
        }
        let proven = verdicts.contains(&(*task, Verdict::Agrees));
        Some(if proven { Standing::Proven } else { Standing::Unproven })
    }

    /// What the task says, of the operands' memory as the task describes it.
    fn run(&self, task: &Task, operands: &[&Tensor], y: &Tensor) -> Result<bool> {
        let planner = self.planner.as_ref().unwrap();
        planner.ran.lock().unwrap().push(*task);
        let (result, dtype) = match task {
            Task::Attention(task) => (attention(task, operands, y)?, task.dtype),
            Task::Convolution(task) => (convolution(task, operands, y)?, task.dtype),
        };
        let result = planner.distortion.map_or(Ok(result.clone()), |distorted| distorted(&result))?.to_dtype(dtype)?;
        y.slice_set(&result, if result.rank() == 3 { 2 } else { 0 }, 0)?;
        Ok(true)
    }

    fn judge(&self, task: &Task, verdict: Verdict) {
        let planner = self.planner.as_ref().unwrap();
        let slandered = planner.distortion.is_none() && matches!(verdict, Verdict::Differs(_));
        assert!(!slandered, "a right library was judged wrong: {task:?}: {verdict:?}");
        planner.verdicts.lock().unwrap().push((*task, verdict));
    }
}

fn attention(task: &Attention, operands: &[&Tensor], y: &Tensor) -> Result<Tensor> {
    let Attention { batch, heads, queries, keys, head_dim, strides, .. } = *task;
    let [of_batch, of_token, of_head] = strides[3];
    assert_eq!((y.stride(), of_head), (&[of_batch as usize, of_token as usize, 1][..], head_dim as i64));
    let operand = |i: usize, tokens: usize| {
        let of = strides[i].map(|stride| stride as usize);
        assert!(of.iter().all(|stride| stride % 8 == 0), "{task:?}");
        let last: usize = [batch, tokens, heads].iter().zip(of).map(|(size, stride)| (size - 1) * stride).sum();
        let all = elements(operands[i], 1, 0, last + head_dim);
        let mut values = Vec::with_capacity(batch * tokens * heads * head_dim);
        for image in 0..batch {
            for token in 0..tokens {
                for head in 0..heads {
                    let start = image * of[0] + token * of[1] + head * of[2];
                    values.extend_from_slice(&all[start..start + head_dim]);
                }
            }
        }
        Tensor::from_vec(values, (batch, tokens, heads, head_dim), &Device::Cpu)?.to_dtype(DType::F32)
    };
    let (q, k, v) = (operand(0, queries)?, operand(1, keys)?, operand(2, keys)?);
    portable::attention(&q, &k, &v, None, f32::from_bits(task.scale).into())
}

fn convolution(task: &Convolution, operands: &[&Tensor], y: &Tensor) -> Result<Tensor> {
    let Convolution { batch, channels, height, width, outputs, kernel, rows, columns, .. } = *task;
    let [x, weight] = [operands[0], operands[1]];
    assert!(x.is_contiguous() && weight.is_contiguous() && y.is_contiguous());
    assert_eq!(
        (x.dims(), weight.dims()),
        (&[batch, channels, height, width][..], &[outputs, channels, kernel, kernel][..])
    );
    let [x, weight] = [x, weight].map(|x| x.to_dtype(DType::F32));
    let padded = x?.pad_with_zeros(2, rows[0], rows[1])?.pad_with_zeros(3, columns[0], columns[1])?;
    let result = padded.conv2d(&weight?, 0, task.stride, 1, 1)?;
    assert_eq!(result.dims(), y.dims());
    Ok(result)
}

/// `rows` rows of `columns`, `stride` apart in the tensor's memory.
fn elements(x: &Tensor, rows: usize, stride: usize, columns: usize) -> Vec<f64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
    let element = |i: usize| match storage {
        CpuStorage::F32(x) => f64::from(x[i]),
        CpuStorage::BF16(x) => x[i].to_f64(),
        CpuStorage::F16(x) => x[i].to_f64(),
        CpuStorage::U8(x) => f64::from(Fp8::E4m3.value(x[i])),
        _ => panic!("no dtype of the kernels"),
    };
    let start = |row| layout.start_offset() + row * stride;
    (0..rows).flat_map(|row| start(row)..start(row) + columns).map(element).collect()
}

/// All of a storage's memory.
fn whole(storage: &CpuStorage) -> Range {
    let (start, bytes) = match storage {
        CpuStorage::F32(x) => (x.as_ptr() as u64, size_of_val(x.as_slice())),
        CpuStorage::BF16(x) => (x.as_ptr() as u64, size_of_val(x.as_slice())),
        CpuStorage::F16(x) => (x.as_ptr() as u64, size_of_val(x.as_slice())),
        CpuStorage::U8(x) => (x.as_ptr() as u64, size_of_val(x.as_slice())),
        _ => panic!("no dtype of the kernels"),
    };
    Range { start, bytes: bytes as u64, writable: 0 }
}

//! A GPU: opening it, loading the kernels, starting them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice, DType, Device, Error, Result, Shape, Storage, Tensor, bail,
    cuda_backend::{
        CudaError, WrapErr,
        cudarc::{
            cublas::{result::CublasError, sys::cublasStatus_t},
            driver::{
                CudaContext, CudaFunction, CudaModule, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig,
                PushKernelArg, result, sys,
            },
            nvrtc::Ptx,
        },
    },
    quantized::QTensor,
};
use half::{bf16, f16};

use super::{
    Cuda, Gpu, Launch, Params,
    cublaslt::{Blas, BlasError},
    cudnn::{Cudnn, Use},
    linear::{Operands, Product},
    requirements::{self, OLDEST},
    tasks::{Standing, Task, Verdict},
};
use crate::{Kernels, Portable};

/// Each file of kernels, compiled (build.rs).
static IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The toolkit that compiled candle's kernels, whose PTX an older driver does not take.
const TOOLKIT: &str = env!("RETOUCH_CUDA_TOOLKIT");

/// What candle's kernels were compiled for, if that was said: 80, or 90a.
const BUILT_FOR: Option<&str> = option_env!("CUDA_COMPUTE_CAP");

/// Opens a GPU for this crate's use; an error is one sentence that says what is wrong and what to do.
///
/// Memory that tensors give back stays reserved, so that a step's buffers are the last step's. Uses of tensors are not
/// tracked by events: all of the device's work goes into one stream, whichever thread it comes from, which orders it. For the
/// copies that do not, `slots.rs` sees to the order.
pub fn open(ordinal: usize) -> std::result::Result<Device, String> {
    // The driver counts in 32 bits, to which a larger number would be cut.
    let counted = i32::try_from(ordinal).map_err(|_| not_opened(ordinal, NO_SUCH_GPU))?;
    let context = CudaContext::new(counted as usize).map_err(|e| not_opened(ordinal, e))?;
    requirements::check_driver(driver_version().map_err(|e| e.to_string())?, TOOLKIT)?;
    let capability = context.compute_capability().map_err(|e| e.to_string())?;
    let name = context.name().unwrap_or_else(|_| format!("GPU {ordinal}"));
    requirements::check_capability(&name, capability, BUILT_FOR)?;
    keep_memory(&context).map_err(|e| format!("the memory pool of {name} cannot be set up: {e}"))?;
    let device = CudaDevice::new_with_stream(ordinal).map_err(|e| format!("{name} cannot be used: {e}"))?;
    // SAFETY: one stream, which orders all uses and frees; what another copies to has marks of its own.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

/// Whether a GPU multiplies 8-bit floats; an error is one sentence that says what to do.
pub fn check_fp8(device: &CudaDevice) -> std::result::Result<(), String> {
    let context = device.cuda_stream().context().clone();
    let capability = context.compute_capability().map_err(|e| e.to_string())?;
    requirements::check_fp8(&context.name().unwrap_or_else(|_| "the GPU".into()), capability)
}

const NO_SUCH_GPU: DriverError = DriverError(sys::CUresult::CUDA_ERROR_INVALID_DEVICE);

fn not_opened(ordinal: usize, error: DriverError) -> String {
    use sys::CUresult;
    match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => {
            "the driver finds no NVIDIA GPU; see what `nvidia-smi` says, or use --device cpu".into()
        }
        CUresult::CUDA_ERROR_INVALID_DEVICE => match CudaContext::device_count() {
            Ok(1) => format!("there is no GPU {ordinal}; this machine has one, --device cuda:0"),
            Ok(count) => {
                format!("there is no GPU {ordinal}; this machine has {count}, from cuda:0 to cuda:{}", count - 1)
            }
            Err(error) => format!("there is no GPU {ordinal}, and the driver does not say how many there are: {error}"),
        },
        CUresult::CUDA_ERROR_STUB_LIBRARY => "the library libcuda.so.1 that was found is the toolkit's stub, not the \
             driver's; take the toolkit's folder `stubs` out of LD_LIBRARY_PATH"
            .into(),
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => format!(
            "the driver's parts do not fit each other ({error}); restart the machine, or install the driver again"
        ),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "no memory of the GPU is left even to begin; end other programs that use it (`nvidia-smi` lists them)"
                .into()
        }
        _ => format!("the driver does not open it: {error}; see what `nvidia-smi` says, or use --device cpu"),
    }
}

/// As [`requirements::check_driver`] takes it.
fn driver_version() -> std::result::Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// Sets the release threshold of the memory pool to all of the memory: else every synchronisation would give it back.
fn keep_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    if context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
        return Ok(()); // memory is then taken and given back directly
    }
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device exists, and the attribute is a 64-bit integer.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
    }
}

/// If an operation failed for want of memory: how much there is, and what to do.
pub fn out_of_memory(error: &Error) -> Option<String> {
    match error {
        Error::WithBacktrace { inner, .. } | Error::WithPath { inner, .. } => out_of_memory(inner),
        Error::Context { inner, context } => out_of_memory(inner).map(|reason| format!("{context}, and {reason}")),
        Error::Cuda(error) => is_full(error.as_ref()).then(|| {
            free_memory().map_or_else(
                |_| "the GPU's memory is used up".into(),
                |(free, total)| format!("of the GPU's {:.1} GB only {:.1} are free", gigabytes(total), gigabytes(free)),
            )
        }),
        _ => None,
    }
}

/// Whether a library of CUDA's says that there is no memory left.
fn is_full(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<BlasError>() {
        return error.is_full();
    }
    match error.downcast_ref::<CudaError>() {
        Some(CudaError::Cuda(error)) => error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        Some(CudaError::Load { cuda, .. }) => cuda.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        Some(CudaError::Cublas(CublasError(status))) => *status == cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED,
        _ => false,
    }
}

/// Free and total bytes of the current GPU; what the memory pool holds without a tensor in it is free.
fn free_memory() -> std::result::Result<(usize, usize), DriverError> {
    use sys::CUmemPool_attribute::{CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT};
    let (free, total) = result::mem_get_info()?;
    let [mut reserved, mut used] = [0u64; 2];
    let mut gpu = 0;
    // SAFETY: a GPU's number, its pool, and 64-bit integers, as these attributes are.
    unsafe {
        sys::cuCtxGetDevice(&mut gpu).result()?;
        let pool = result::device::get_default_mem_pool(gpu)?;
        let attributes =
            [(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &mut reserved), (CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &mut used)];
        for (attribute, value) in attributes {
            result::mem_pool::get_attribute(pool, attribute, (&raw mut *value).cast())?;
        }
    }
    Ok((free + reserved.saturating_sub(used) as usize, total))
}

fn gigabytes(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

/// The operations on `device`'s GPU. Made once for each and kept: the kernels stay loaded.
pub fn kernels(device: &CudaDevice) -> &'static dyn Kernels {
    with_cudnn(device, Use::WhereFaster)
}

/// [`kernels`] that ask cuDNN at other times, for checks and benches.
pub fn with_cudnn(device: &CudaDevice, when: Use) -> &'static dyn Kernels {
    match card(device, when) {
        Some(card) => card,
        None => &Portable,
    }
}

/// Whether [`with_cudnn`]'s operations have used cuDNN, in one line.
pub fn cudnn_status(device: &CudaDevice, when: Use) -> String {
    card(device, when).map_or_else(|| "not used: the GPU is too old".into(), |card| card.0.cudnn.status())
}

/// None for GPUs that have no kernels.
fn card(device: &CudaDevice, when: Use) -> Option<&'static Cuda<Card>> {
    type Cards = BTreeMap<(usize, Use), Option<&'static Cuda<Card>>>;
    static CARDS: Mutex<Cards> = Mutex::new(Cards::new());
    let context = device.cuda_stream().context().clone();
    let mut cards = CARDS.lock().unwrap_or_else(PoisonError::into_inner);
    *cards.entry((context.ordinal(), when)).or_insert_with(|| match context.compute_capability() {
        Ok(capability) if capability < OLDEST => None,
        capability => Some(Box::leak(Box::new(Cuda(Card::new(&context, capability.unwrap_or(OLDEST), when))))),
    })
}

/// A GPU with its kernels loaded.
#[derive(Debug)]
struct Card {
    /// By file; or why they are missing, which the first operation says.
    modules: std::result::Result<HashMap<&'static str, Arc<CudaModule>>, String>,
    /// Those used so far, by name.
    functions: Mutex<HashMap<String, CudaFunction>>,
    shared_memory: usize,
    blas: Blas,
    cudnn: Cudnn,
}

impl Card {
    fn new(context: &Arc<CudaContext>, capability: (i32, i32), when: Use) -> Self {
        let load = |(file, image): &(&'static str, &[u8])| {
            let module = context.load_module(Ptx::from_binary(image.to_vec()));
            module.map(|module| (*file, module)).map_err(|e| format!("the CUDA kernels `{file}` do not load: {e}"))
        };
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR;
        Self {
            modules: IMAGES.iter().map(load).collect(),
            functions: Mutex::default(),
            shared_memory: context.attribute(attribute).unwrap_or(0) as usize,
            blas: Blas::default(),
            cudnn: Cudnn::new(context, capability, when),
        }
    }

    fn function(&self, launch: &Launch<'_>) -> Result<CudaFunction> {
        let name = launch.name();
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&name) {
            return Ok(function.clone());
        }
        let modules = self.modules.as_ref().map_err(Error::msg)?;
        let Some(module) = modules.get(launch.file) else { bail!("there are no CUDA kernels `{}`", launch.file) };
        let function = module.load_function(&name).w()?;
        // Beyond 48 KB a kernel must be allowed what it asks for. One kernel always asks for the same.
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, launch.shared_memory as i32).w()?;
        functions.insert(name, function.clone());
        Ok(function)
    }
}

impl Gpu for Card {
    fn address(&self, x: &Tensor) -> Result<u64> {
        address(x)
    }

    fn blocks(&self, blocks: &QTensor) -> Result<u64> {
        if !blocks.device().is_cuda() {
            bail!("a CUDA kernel was given blocks of another device")
        }
        Ok(blocks.device_ptr()?.addr() as u64)
    }

    fn uninitialised(&self, shape: Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let bytes = shape.elem_count() * dtype.size_in_bytes();
        // SAFETY: numbers of any value are valid, and a kernel writes all of them before anything reads them.
        let x = unsafe { Tensor::empty(shape, dtype, device) };
        x.map_err(|e| e.context(format!("a result needs {:.1} GB", gigabytes(bytes))))
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    fn launch<P: Params>(&self, launch: &Launch<'_>, params: &P) -> Result<()> {
        let stream = stream(launch.reads.iter().chain(launch.writes).copied())?;
        if let (Some(blocks), [y, ..]) = (launch.packed, launch.writes)
            && !blocks.device().same_device(y.device())
        {
            bail!("tensors on {:?} and {:?} in one operation", blocks.device().location(), y.device().location())
        }
        let function = self.function(launch)?;
        let [x, y, z] = launch.blocks.map(|count| count as u32);
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (launch.threads, 1, 1),
            shared_mem_bytes: launch.shared_memory as u32,
        };
        // SAFETY: `Params` promises the layout; `Argument` is nothing but P.
        let argument = unsafe { &*std::ptr::from_ref(params).cast::<Argument<P>>() };
        let mut builder = stream.launch_builder(&function);
        builder.arg(argument);
        // SAFETY: the operations launch with addresses and strides of tensors and blocks that they hold until the launch is in
        // the stream, in which their memory is given back after it; what is copied over them waits for it (slots.rs).
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    fn multiply(&self, product: Product, operands: Operands<'_>) -> Result<bool> {
        self.blas.multiply(self, product, operands)
    }

    fn planned(&self, task: &Task) -> Option<Standing> {
        self.cudnn.planned(task)
    }

    fn run(&self, task: &Task, operands: &[&Tensor], y: &Tensor) -> Result<bool> {
        let all = || operands.iter().copied().chain([y]);
        let addresses = all().map(address).collect::<Result<Vec<_>>>()?;
        self.cudnn.run(task, &addresses, &stream(all())?)
    }

    fn judge(&self, task: &Task, verdict: Verdict) {
        self.cudnn.judge(task, verdict);
    }
}

#[repr(transparent)]
struct Argument<P>(P);

// SAFETY: what `Params` promises.
unsafe impl<P: Params> DeviceRepr for Argument<P> {}

/// The address of a tensor's first element, of the dtypes that kernels take.
pub fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("a CUDA kernel was given a tensor of another device") };
    let stream = storage.device.cuda_stream();
    let start = match x.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
        DType::U8 => storage.as_cuda_slice::<u8>()?.device_ptr(&stream).0,
        other => bail!("a CUDA kernel was given {other:?}; it takes f32, bf16, f16 and 8-bit floats as u8"),
    };
    Ok(start + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
}

/// The stream of the device that all tensors are on.
pub fn stream<'a>(mut tensors: impl Iterator<Item = &'a Tensor>) -> Result<Arc<CudaStream>> {
    let Some(first) = tensors.next() else { bail!("a CUDA kernel was given no tensors") };
    let Device::Cuda(device) = first.device() else { bail!("a CUDA kernel was given a tensor of another device") };
    if let Some(other) = tensors.find(|x| !x.device().same_device(first.device())) {
        bail!("tensors on {:?} and {:?} in one operation", first.device().location(), other.device().location())
    }
    Ok(device.cuda_stream())
}

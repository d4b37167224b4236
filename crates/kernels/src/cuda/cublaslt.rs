//! Matrix products by cublasLt, which scales rows of 8-bit floats, adds the bias and takes the GELU (its tanh form) as it writes.

use std::{
    collections::HashMap,
    ffi::c_void,
    fmt::{self, Display, Formatter},
    sync::{Mutex, OnceLock, PoisonError},
};

use candle_core::{
    DType, Error, Result,
    cuda_backend::{
        WrapErr,
        cudarc::{
            cublas::sys::cublasOperation_t,
            cublaslt::{
                result::{self, CublasError},
                sys,
            },
            driver::{CudaSlice, DevicePtr},
        },
        gemm_reduced_precision_f32,
    },
};

use super::{
    Gpu,
    device::stream,
    linear::{Operands, Product},
};

/// What an algorithm may take for itself: NVIDIA's recommendation for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Whether this toolkit's cublasLt knows of scales for each row of both matrices (since 12.9, for 9.0 alone).
const OUTER_SCALES: bool = cfg!(outer_scales);

/// All that decides how a product is best computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    product: Product,
    bias: bool,
    /// Whether rows have scales.
    scales: bool,
    tf32: bool,
    /// Of the weight, `x`, the result and the bias, in bytes.
    alignments: [u32; 4],
}

/// An algorithm, and the workspace it needs.
type Algorithm = (sys::cublasLtMatmulAlgo_t, usize);

/// cublasLt on one GPU.
#[derive(Debug, Default)]
pub struct Blas {
    handle: OnceLock<std::result::Result<Handle, CublasError>>,
    /// What the heuristic chose; none where cublasLt does not compute the product.
    algorithms: Mutex<HashMap<Key, Option<Algorithm>>>,
}

#[derive(Debug)]
struct Handle(sys::cublasLtHandle_t);

// SAFETY: a cublasLt handle may be used by several threads at a time.
unsafe impl Send for Handle {}
unsafe impl Sync for Handle {}

impl Blas {
    /// Writes the product; false if cublasLt has no algorithm for it.
    pub fn multiply(&self, gpu: &impl Gpu, product: Product, of: Operands<'_>) -> Result<bool> {
        let scales = of.scales.map(|scales| [scales.weight, scales.x]);
        let stream = stream([of.x, of.weight, of.y].into_iter().chain(of.bias).chain(scales.into_iter().flatten()))?;
        stream.context().bind_to_thread().w()?;
        let addresses = [
            gpu.address(of.weight)?,
            gpu.address(of.x)?,
            gpu.address(of.y)?,
            of.bias.map(|bias| gpu.address(bias)).transpose()?.unwrap_or(0),
        ];
        let scales = match scales {
            Some([weight, x]) => Some([gpu.address(weight)?, gpu.address(x)?]),
            None => None,
        };
        if scales.is_some_and(|scales| !OUTER_SCALES || scales.iter().any(|scale| !scale.is_multiple_of(16))) {
            return Ok(false);
        }
        let key = Key {
            product,
            bias: of.bias.is_some(),
            scales: scales.is_some(),
            tf32: gemm_reduced_precision_f32(),
            // 256 is what cublasLt assumes at best, and what an allocation has; no bias does not lower it.
            alignments: addresses.map(|address| if address == 0 { 256 } else { 1 << address.trailing_zeros().min(8) }),
        };
        let [weight_address, x_address, y_address, bias_address] = addresses;
        let handle = self.handle()?;
        let plan = Plan::new(key, bias_address, scales).map_err(failed)?;
        let Some((algorithm, workspace)) = self.algorithm(handle, key, &plan) else { return Ok(false) };
        // Of its own for each product, from the pool: threads do not share it.
        // SAFETY: written before it is read, by cublasLt.
        let workspace: Option<CudaSlice<u8>> =
            (workspace > 0).then(|| unsafe { stream.alloc(workspace) }).transpose().w()?;
        let workspace_address = workspace.as_ref().map_or(0, |workspace| workspace.device_ptr(&stream).0);
        let (one, zero) = (1f32, 0f32);
        // SAFETY: addresses and layouts are those of tensors held until the product is in the stream.
        unsafe {
            result::matmul(
                handle,
                plan.product.handle,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight_address as *const c_void,
                plan.weight.handle,
                x_address as *const c_void,
                plan.x.handle,
                y_address as *const c_void,
                plan.y.handle,
                y_address as *mut c_void,
                plan.y.handle,
                &algorithm,
                workspace_address as *mut c_void,
                workspace.as_ref().map_or(0, |workspace| workspace.num_bytes()),
                stream.cu_stream().cast(),
            )
        }
        .map_err(failed)?;
        Ok(true)
    }

    fn handle(&self) -> Result<sys::cublasLtHandle_t> {
        let handle = self.handle.get_or_init(|| result::create_handle().map(Handle));
        handle.as_ref().map(|handle| handle.0).map_err(|error| failed(*error))
    }

    /// Asked of cublasLt once for each product.
    fn algorithm(&self, handle: sys::cublasLtHandle_t, key: Key, plan: &Plan) -> Option<Algorithm> {
        let mut algorithms = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        *algorithms.entry(key).or_insert_with(|| {
            // An error is how it says that there is none.
            let found = plan.heuristic(handle, key.alignments).ok()?;
            Some((found.algo, found.workspaceSize))
        })
    }
}

fn failed(error: CublasError) -> Error {
    Error::Cuda(Box::new(BlasError(error)))
}

/// What cublasLt says, in a form that `out_of_memory` can look into.
#[derive(Debug)]
pub struct BlasError(CublasError);

impl BlasError {
    /// Whether it had no memory for its own.
    pub fn is_full(&self) -> bool {
        self.0.0 == sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED
    }
}

impl Display for BlasError {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "cublasLt: {}", self.0)
    }
}

impl std::error::Error for BlasError {}

/// cublasLt's description of a product. It counts columns first: what is a row here is a column there, so that
/// `y = x W^T` is computed as `y^T = W x^T`.
struct Plan {
    product: Owned<sys::cublasLtMatmulDesc_t>,
    weight: Owned<sys::cublasLtMatrixLayout_t>,
    x: Owned<sys::cublasLtMatrixLayout_t>,
    y: Owned<sys::cublasLtMatrixLayout_t>,
}

impl Plan {
    /// `scales` are the addresses of those of weight and `x`.
    fn new(
        Key { product: p, bias: with_bias, tf32, .. }: Key,
        bias: u64,
        scales: Option<[u64; 2]>,
    ) -> std::result::Result<Self, CublasError> {
        use sys::{
            cublasComputeType_t as Compute, cublasLtEpilogue_t as Epilogue,
            cublasLtMatmulDescAttributes_t as Attribute, cudaDataType as Type,
        };
        let number = |dtype| match dtype {
            DType::U8 => Type::CUDA_R_8F_E4M3,
            DType::BF16 => Type::CUDA_R_16BF,
            DType::F16 => Type::CUDA_R_16F,
            _ => Type::CUDA_R_32F,
        };
        let compute = match p.dtype {
            DType::F32 if tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => Compute::CUBLAS_COMPUTE_32F,
        };
        let epilogue = match (with_bias, p.gelu) {
            (false, false) => Epilogue::CUBLASLT_EPILOGUE_DEFAULT,
            (true, false) => Epilogue::CUBLASLT_EPILOGUE_BIAS,
            (false, true) => Epilogue::CUBLASLT_EPILOGUE_GELU,
            (true, true) => Epilogue::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        let product = result::create_matmul_desc(compute, Type::CUDA_R_32F)?;
        let product = Owned { handle: product, destroy: result::destroy_matmul_desc };
        let transpose = cublasOperation_t::CUBLAS_OP_T;
        // SAFETY: each attribute with a value of its type.
        unsafe {
            set(&product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transpose, result::set_matmul_desc_attribute)?;
            set(&product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, result::set_matmul_desc_attribute)?;
            if with_bias {
                set(&product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, result::set_matmul_desc_attribute)?;
            }
        }
        #[cfg(outer_scales)]
        if let Some([weight, x]) = &scales {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            // SAFETY: each attribute with a value of its type.
            unsafe {
                for (attribute, address) in [
                    (Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight),
                    (Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x),
                ] {
                    set(&product, attribute, address, result::set_matmul_desc_attribute)?;
                }
                for attribute in
                    [Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE]
                {
                    set(&product, attribute, &mode, result::set_matmul_desc_attribute)?;
                }
            }
        }
        let layout = |dtype: DType, length: usize, count: usize, stride: usize| {
            let handle = result::create_matrix_layout(number(dtype), length as u64, count as u64, stride as i64)?;
            Ok(Owned { handle, destroy: result::destroy_matrix_layout })
        };
        Ok(Self {
            product,
            weight: layout(p.dtype, p.depth, p.outputs, p.weight_stride)?,
            x: layout(p.dtype, p.depth, p.rows, p.x_stride)?,
            y: layout(p.result, p.outputs, p.rows, p.outputs)?,
        })
    }

    fn heuristic(
        &self,
        handle: sys::cublasLtHandle_t,
        [weight, x, y, bias]: [u32; 4],
    ) -> std::result::Result<sys::cublasLtMatmulHeuristicResult_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref()?;
        let preference = Owned { handle: preference, destroy: result::destroy_matmul_pref };
        let result_alignment = y.min(bias);
        // SAFETY: each attribute with a value of its type; the handles live.
        unsafe {
            let bytes = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            set(&preference, bytes, &WORKSPACE, result::set_matmul_pref_attribute)?;
            for (attribute, alignment) in [
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, weight),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, result_alignment),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, result_alignment),
            ] {
                set(&preference, attribute, &alignment, result::set_matmul_pref_attribute)?;
            }
            let (y, product) = (self.y.handle, self.product.handle);
            result::get_matmul_algo_heuristic(
                handle,
                product,
                self.weight.handle,
                self.x.handle,
                y,
                y,
                preference.handle,
            )
        }
    }
}

/// A description of cublasLt's, destroyed when it is dropped.
struct Owned<H: Copy> {
    handle: H,
    destroy: unsafe fn(H) -> std::result::Result<(), CublasError>,
}

impl<H: Copy> Drop for Owned<H> {
    fn drop(&mut self) {
        // SAFETY: made by cublasLt and destroyed here only. It fails for what is no handle alone.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

/// Sets an attribute to a value of its type.
unsafe fn set<H: Copy, A, V>(
    of: &Owned<H>,
    attribute: A,
    value: &V,
    how: unsafe fn(H, A, *const c_void, usize) -> std::result::Result<(), CublasError>,
) -> std::result::Result<(), CublasError> {
    // SAFETY: the caller's.
    unsafe { how(of.handle, attribute, std::ptr::from_ref(value).cast(), size_of::<V>()) }
}

//! cuDNN's library, looked for when it is first wanted: the program starts and works without it.

use std::{
    env,
    error::Error,
    ffi::{CStr, c_char, c_int, c_void},
    path::Path,
    sync::OnceLock,
};

use super::descriptor::Descriptor;

/// Which library: the path of one, or `off`.
const VARIABLE: &str = "RETOUCH_CUDNN";

/// Where the loader's search path has it.
const NAME: &str = if cfg!(windows) { "cudnn64_9.dll" } else { "libcudnn.so.9" };

/// What lies beside it and is loaded by it when it is needed: without one of these, its functions end the program.
const BESIDE: [&str; 4] = if cfg!(windows) {
    [
        "cudnn_graph64_9.dll",
        "cudnn_heuristic64_9.dll",
        "cudnn_engines_precompiled64_9.dll",
        "cudnn_engines_runtime_compiled64_9.dll",
    ]
} else {
    [
        "libcudnn_graph.so.9",
        "libcudnn_heuristic.so.9",
        "libcudnn_engines_precompiled.so.9",
        "libcudnn_engines_runtime_compiled.so.9",
    ]
};

/// The toolkit that the program was built with, such as 13.0.
const TOOLKIT: Option<&str> = option_env!("RETOUCH_CUDA_TOOLKIT");

/// 9.13.1, the first with attention as one operation without restrictions on what else is in its graph.
const OLDEST: usize = 91301;

/// What the functions return; 0 is success.
type Status = c_int;
/// `cudnnHandle_t` or `cudnnBackendDescriptor_t`.
pub type Pointer = *mut c_void;

/// The functions that are used, as `cudnn_graph.h` declares them.
pub struct Library {
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    create: unsafe extern "C" fn(*mut Pointer) -> Status,
    destroy: unsafe extern "C" fn(Pointer) -> Status,
    set_stream: unsafe extern "C" fn(Pointer, Pointer) -> Status,
    pub(super) create_descriptor: unsafe extern "C" fn(c_int, *mut Pointer) -> Status,
    pub(super) destroy_descriptor: unsafe extern "C" fn(Pointer) -> Status,
    pub(super) set_attribute: unsafe extern "C" fn(Pointer, c_int, c_int, i64, *const c_void) -> Status,
    pub(super) get_attribute: unsafe extern "C" fn(Pointer, c_int, c_int, i64, *mut i64, *mut c_void) -> Status,
    pub(super) finalize: unsafe extern "C" fn(Pointer) -> Status,
    execute: unsafe extern "C" fn(Pointer, Pointer, Pointer) -> Status,
    /// As cuDNN counts: 91900 is 9.19.0.
    version: usize,
}

/// The library, once for the process; or why there is none, as a clause.
pub fn library() -> Result<&'static Library, String> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            let name = env::var(VARIABLE).unwrap_or_default();
            match name.as_str() {
                "off" => Err(format!("{VARIABLE} is off")),
                "" => Library::load(NAME),
                name => Library::load(name),
            }
        })
        .as_ref()
        .map_err(String::clone)
}

impl Library {
    fn load(name: &str) -> Result<Self, String> {
        let open = |name: &Path| {
            // SAFETY: NVIDIA's libraries under their names, or what the user named as such.
            let opened = unsafe { libloading::Library::new(name) };
            opened.map_err(|e| {
                let reason = e.source().map_or_else(|| e.to_string(), ToString::to_string);
                format!("{} is not to be had: {reason}", name.display())
            })
        };
        let beside = BESIDE.map(|beside| open(&Path::new(name).with_file_name(beside)));
        let beside = beside.into_iter().collect::<Result<Vec<_>, _>>()?;
        let library = open(Path::new(name))?;
        /// A function of the library, of the type that its place has.
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: declared so in cudnn_graph.h of cuDNN 9. The library is never unloaded.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|e| format!("{name} is not cuDNN 9: {e}"))?
            };
        }
        let version: unsafe extern "C" fn() -> usize = function!("cudnnGetVersion");
        let runtime: unsafe extern "C" fn() -> usize = function!("cudnnGetCudartVersion");
        // SAFETY: they return numbers.
        let (version, runtime) = unsafe { (version(), runtime()) };
        check_version(version)?;
        check_runtime(runtime, TOOLKIT)?;
        let loaded = Self {
            error_string: function!("cudnnGetErrorString"),
            last_error: function!("cudnnGetLastErrorString"),
            create: function!("cudnnCreate"),
            destroy: function!("cudnnDestroy"),
            set_stream: function!("cudnnSetStream"),
            create_descriptor: function!("cudnnBackendCreateDescriptor"),
            destroy_descriptor: function!("cudnnBackendDestroyDescriptor"),
            set_attribute: function!("cudnnBackendSetAttribute"),
            get_attribute: function!("cudnnBackendGetAttribute"),
            finalize: function!("cudnnBackendFinalize"),
            execute: function!("cudnnBackendExecute"),
            version,
        };
        std::mem::forget((library, beside));
        Ok(loaded)
    }

    /// Such as 9.19.0.
    pub fn version(&self) -> String {
        readable(self.version)
    }

    /// An error's name, and what cuDNN says of the last one in this thread.
    pub(super) fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut message = [0; 512];
        // SAFETY: a constant string; at most that many bytes, with a zero at the end.
        let (name, message) = unsafe {
            (self.last_error)(message.as_mut_ptr(), message.len());
            (CStr::from_ptr((self.error_string)(status)), CStr::from_ptr(message.as_ptr()))
        };
        Err(format!("{} ({})", name.to_string_lossy(), message.to_string_lossy().trim()))
    }
}

fn check_version(version: usize) -> Result<(), String> {
    if (OLDEST..100_000).contains(&version) {
        return Ok(());
    }
    Err(format!("it is {}, and 9.13.1 or a newer 9 is needed", readable(version)))
}

/// Whether a library that was built with the CUDA runtime of `version` (13010 is 13.1) finds the libraries that it needs among those
/// of our toolkit. Else its search for them would end the program.
fn check_runtime(version: usize, toolkit: Option<&str>) -> Result<(), String> {
    let ours = toolkit.and_then(|toolkit| toolkit.split('.').next()?.parse::<usize>().ok());
    match ours {
        Some(ours) if version / 1000 != ours => {
            Err(format!("it is for CUDA {} and this program was built with CUDA {ours}", version / 1000))
        }
        _ => Ok(()),
    }
}

fn readable(version: usize) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

/// `cudnnHandle_t`, for the GPU whose context is current when it is made.
pub struct Handle {
    library: &'static Library,
    raw: Pointer,
}

// SAFETY: cuDNN lets a handle go from thread to thread, used by one at a time.
unsafe impl Send for Handle {}

impl Handle {
    pub fn new(library: &'static Library) -> Result<Self, String> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes the handle.
        library.check(unsafe { (library.create)(&mut raw) })?;
        Ok(Self { library, raw })
    }

    pub fn raw(&self) -> Pointer {
        self.raw
    }

    /// Starts a plan in a stream.
    ///
    /// # Safety
    /// The addresses in `memory` are those of tensors as the plan's graph describes them, which are given back in `stream` only.
    pub unsafe fn execute(&self, plan: &Descriptor, memory: &Descriptor, stream: Pointer) -> Result<(), String> {
        // SAFETY: the caller's.
        self.library.check(unsafe { (self.library.set_stream)(self.raw, stream) })?;
        self.library.check(unsafe { (self.library.execute)(self.raw, plan.raw(), memory.raw()) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by cuDNN and destroyed here only. An error at the end has no one to tell.
        let _ = unsafe { (self.library.destroy)(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_must_be_new_enough_and_for_our_toolkit() {
        assert!(check_version(91301).is_ok() && check_version(92801).is_ok());
        let refusal = check_version(91002).unwrap_err();
        assert!(refusal.contains("it is 9.10.2, and 9.13.1"), "{refusal}");
        assert!(check_version(8907).is_err() && check_version(100_000).is_err());
        assert!(check_runtime(13010, Some("13.0")).is_ok() && check_runtime(12090, None).is_ok());
        let refusal = check_runtime(12090, Some("13.0")).unwrap_err();
        assert!(refusal.contains("for CUDA 12") && refusal.contains("with CUDA 13"), "{refusal}");
    }

    #[test]
    fn a_library_that_is_none_is_refused_with_a_sentence() {
        let refusal = |name: &str| Library::load(name).err().unwrap_or_default();
        let found = refusal("/nowhere/libcudnn.so.9");
        assert!(found.contains("nowhere") && found.contains("is not to be had: "), "{found}");
    }
}

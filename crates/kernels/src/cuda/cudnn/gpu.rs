//! cuDNN on one GPU.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use candle_core::{
    Result,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaContext, CudaStream, DevicePtr},
    },
};

use super::{
    Use,
    descriptor::Address,
    expected_faster,
    graph::{self, ALIGNMENT},
    ledger::Ledger,
    library::{Handle, Library, library},
    plan::{Plan, Target, plan},
};
use crate::cuda::tasks::{Standing, Task, Verdict};

/// cuDNN, or why it is not used.
pub struct Cudnn {
    context: Arc<CudaContext>,
    capability: (i32, i32),
    when: Use,
    /// Of the first task that is worth it.
    opened: OnceLock<std::result::Result<Opened, String>>,
}

struct Opened {
    library: &'static Library,
    /// One at a time uses the handle.
    inner: Mutex<Inner>,
}

struct Inner {
    ledger: Ledger<Plan>,
    // After the plans that were made with it.
    handle: Handle,
}

impl fmt::Debug for Cudnn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cudnn").field("when", &self.when).field("capability", &self.capability).finish_non_exhaustive()
    }
}

impl Cudnn {
    pub fn new(context: &Arc<CudaContext>, capability: (i32, i32), when: Use) -> Self {
        Self { context: context.clone(), capability, when, opened: OnceLock::new() }
    }

    /// None if cuDNN is not asked for the task or does not compute it.
    pub fn planned(&self, task: &Task) -> Option<Standing> {
        let asked = match self.when {
            Use::Never => false,
            Use::WhereFaster => expected_faster(task, self.capability),
            Use::Always => true,
        };
        let opened = asked.then(|| self.opened()).flatten()?;
        self.context.bind_to_thread().ok()?;
        let mut inner = opened.inner();
        let Inner { ledger, handle } = &mut *inner;
        ledger.standing(task, |oldest| {
            if oldest.is_some() {
                // What runs by the plan must have ended before it goes.
                self.context.synchronize().ok()?;
            }
            drop(oldest);
            let made = plan(opened.library, &Target::Handle(handle), task);
            made.inspect_err(|reason| tracing::debug!("cuDNN does not compute {task:?}: {reason}")).ok()
        })
    }

    /// Writes a task's result by its plan; false if that fails, and nothing can be relied on in the result.
    ///
    /// `addresses` are those of the task's operands and of its result.
    pub fn run(&self, task: &Task, addresses: &[u64], stream: &Arc<CudaStream>) -> Result<bool> {
        let Some(opened) = self.opened() else { return Ok(false) };
        let mut inner = opened.inner();
        let Inner { ledger, handle } = &mut *inner;
        let Some(plan) = ledger.plan(task) else { return Ok(false) };
        if addresses.iter().any(|address| !address.is_multiple_of(ALIGNMENT)) {
            return Ok(false);
        }
        self.context.bind_to_thread().w()?;
        // Of its own for each run, from the pool; where there is too little memory for that, ours may still do.
        // SAFETY: written before it is read, by cuDNN.
        let workspace = (plan.workspace > 0).then(|| unsafe { stream.alloc::<u8>(plan.workspace) }).transpose();
        let Ok(workspace) = workspace else { return Ok(false) };
        let workspace_address = workspace.as_ref().map_or(0, |workspace| workspace.device_ptr(stream).0);
        let scale = if let Task::Attention(attention) = task { attention.scale } else { 0 };
        let mut addresses: Vec<Address> = addresses.iter().copied().map(Address).collect();
        if let Task::Attention(_) = task {
            addresses.push(Address((&raw const scale) as u64)); // the bits of an f32, read by the call
        }
        let memory = graph::memory(opened.library, &addresses, Address(workspace_address));
        // SAFETY: the caller holds the tensors that the task describes until this is in the stream, in which their memory and
        // the workspace are given back after it.
        let done =
            memory.and_then(|memory| unsafe { handle.execute(&plan.descriptor, &memory, stream.cu_stream().cast()) });
        if let Err(reason) = &done
            && ledger.switch_off(format!("{task:?} failed: {reason}"))
        {
            warn(ledger);
        }
        Ok(done.is_ok())
    }

    /// Notes how the first result of a task's plan compared with ours.
    pub fn judge(&self, task: &Task, verdict: Verdict) {
        let Some(opened) = self.opened() else { return };
        let mut inner = opened.inner();
        if inner.ledger.judge(task, verdict) {
            warn(&inner.ledger);
        }
    }

    /// In one line: which one is used, or why none is.
    pub fn status(&self) -> String {
        match self.opened.get() {
            None => "not asked for yet".into(),
            Some(Err(reason)) => format!("not used: {reason}"),
            Some(Ok(opened)) => match opened.inner().ledger.off() {
                None => format!("{} is used", opened.library.version()),
                Some(reason) => format!("{} is not used any more: {reason}", opened.library.version()),
            },
        }
    }

    /// The library with a handle for the GPU, asked for once.
    fn opened(&self) -> Option<&Opened> {
        let opened = self.opened.get_or_init(|| {
            let opened = self.open();
            match &opened {
                Ok(opened) => tracing::info!("cuDNN {} is used", opened.library.version()),
                Err(reason) => tracing::info!("cuDNN is not used: {reason}"),
            }
            opened
        });
        opened.as_ref().ok()
    }

    fn open(&self) -> std::result::Result<Opened, String> {
        let library = library()?;
        self.context.bind_to_thread().map_err(|e| e.to_string())?;
        let handle = Handle::new(library)?;
        Ok(Opened { library, inner: Mutex::new(Inner { ledger: Ledger::default(), handle }) })
    }
}

impl Opened {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn warn(ledger: &Ledger<Plan>) {
    tracing::warn!("cuDNN is not used any more, our own kernels are: {}", ledger.off().unwrap_or_default());
}

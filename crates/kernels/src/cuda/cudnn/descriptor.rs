//! cuDNN's descriptors as values: made, filled in, finished, and destroyed when they are dropped.

use std::ffi::c_void;

use super::{
    library::{Library, Pointer},
    numbers::CUDNN_TYPE_BACKEND_DESCRIPTOR,
};

/// A descriptor, with those that it is made of.
pub struct Descriptor {
    library: &'static Library,
    raw: Pointer,
    parts: Vec<Descriptor>,
}

// SAFETY: a descriptor belongs to no thread, and a finished one is only read.
unsafe impl Send for Descriptor {}

impl Descriptor {
    pub fn new(library: &'static Library, kind: i32) -> Result<Self, String> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes the descriptor.
        library.check(unsafe { (library.create_descriptor)(kind, &mut raw) })?;
        Ok(Self { library, raw, parts: Vec::new() })
    }

    /// With an attribute of one or more values.
    pub fn with<A: Attribute>(self, name: i32, values: &[A]) -> Result<Self, String> {
        // SAFETY: `Attribute` promises the layout; cuDNN copies the values.
        unsafe { self.set(name, A::NUMBER, values.len(), values.as_ptr().cast())? };
        Ok(self)
    }

    /// With another descriptor, which is finished, as an attribute.
    pub fn made_of(mut self, name: i32, part: Descriptor) -> Result<Self, String> {
        // SAFETY: one descriptor, which lives as long as this one.
        unsafe { self.set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, (&raw const part.raw).cast())? };
        self.parts.push(part);
        Ok(self)
    }

    /// # Safety
    /// `values` are `count` values of the type `kind`.
    unsafe fn set(&self, name: i32, kind: i32, count: usize, values: *const c_void) -> Result<(), String> {
        // SAFETY: the caller's.
        self.library.check(unsafe { (self.library.set_attribute)(self.raw, name, kind, count as i64, values) })
    }

    /// Checked by cuDNN, and ready for use; an error says what it does not take.
    pub fn finished(self) -> Result<Self, String> {
        // SAFETY: a descriptor that is not finished yet.
        self.library.check(unsafe { (self.library.finalize)(self.raw) })?;
        Ok(self)
    }

    /// An attribute of one value.
    pub fn number(&self, name: i32) -> Result<i64, String> {
        let (mut value, mut count) = (0i64, 0);
        let at = (&raw mut value).cast();
        // SAFETY: room for one value.
        self.library.check(unsafe {
            (self.library.get_attribute)(self.raw, name, <i64 as Attribute>::NUMBER, 1, &mut count, at)
        })?;
        Ok(value)
    }

    /// An attribute of any number of values, none of which is `blank`.
    pub fn values<A: Attribute>(&self, name: i32, blank: A) -> Result<Vec<A>, String> {
        let count = self.count(name, A::NUMBER)?;
        let (mut values, mut written) = (vec![blank; count], 0);
        if count > 0 {
            // SAFETY: room for `count` values.
            self.library.check(unsafe {
                let at = values.as_mut_ptr().cast();
                (self.library.get_attribute)(self.raw, name, A::NUMBER, count as i64, &mut written, at)
            })?;
        }
        values.truncate(written.max(0) as usize);
        Ok(values)
    }

    /// At most `count` descriptors of one kind, which are finished.
    pub fn descriptors(&self, name: i32, kind: i32, count: usize) -> Result<Vec<Descriptor>, String> {
        // cuDNN fills in descriptors that it is given.
        let mut all = (0..count).map(|_| Self::new(self.library, kind)).collect::<Result<Vec<_>, _>>()?;
        let mut raw: Vec<Pointer> = all.iter().map(|one| one.raw).collect();
        let mut written = 0;
        if count > 0 {
            // SAFETY: `count` descriptors of that kind.
            self.library.check(unsafe {
                let (kind, at) = (CUDNN_TYPE_BACKEND_DESCRIPTOR, raw.as_mut_ptr().cast());
                (self.library.get_attribute)(self.raw, name, kind, count as i64, &mut written, at)
            })?;
        }
        all.truncate(written.max(0) as usize);
        Ok(all)
    }

    /// How many descriptors an attribute has; not all of them may be usable.
    pub fn count_of_descriptors(&self, name: i32) -> Result<usize, String> {
        self.count(name, CUDNN_TYPE_BACKEND_DESCRIPTOR)
    }

    fn count(&self, name: i32, kind: i32) -> Result<usize, String> {
        let mut count = 0;
        // SAFETY: without room for any, cuDNN counts them.
        self.library.check(unsafe {
            (self.library.get_attribute)(self.raw, name, kind, 0, &mut count, std::ptr::null_mut())
        })?;
        Ok(count.max(0) as usize)
    }

    pub fn raw(&self) -> Pointer {
        self.raw
    }

    #[cfg(test)]
    pub fn parts(&self) -> &[Descriptor] {
        &self.parts
    }

    pub fn library(&self) -> &'static Library {
        self.library
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by cuDNN and destroyed here only. It fails for what is no descriptor alone.
        let _ = unsafe { (self.library.destroy_descriptor)(self.raw) };
    }
}

/// What an attribute may be set to: plain data of one of the types in `numbers`.
///
/// # Safety
/// A value of the type is laid out as cuDNN's type `NUMBER`.
pub unsafe trait Attribute: Copy {
    const NUMBER: i32;
}

macro_rules! attributes {
    ($($type:ty: $number:ident,)*) => {
        // SAFETY: the types that cudnn_graph.h names for these numbers; enumerations are C's int.
        $(unsafe impl Attribute for $type { const NUMBER: i32 = super::numbers::$number; })*
    };
}

attributes! {
    bool: CUDNN_TYPE_BOOLEAN,
    i64: CUDNN_TYPE_INT64,
    f32: CUDNN_TYPE_FLOAT,
    DataType: CUDNN_TYPE_DATA_TYPE,
    ConvolutionMode: CUDNN_TYPE_CONVOLUTION_MODE,
    HeuristicMode: CUDNN_TYPE_HEUR_MODE,
    NumericalNote: CUDNN_TYPE_NUMERICAL_NOTE,
    Address: CUDNN_TYPE_VOID_PTR,
    HandlePointer: CUDNN_TYPE_HANDLE,
}

/// Characters.
// SAFETY: C's char.
#[cfg(test)]
unsafe impl Attribute for u8 {
    const NUMBER: i32 = super::numbers::described::CUDNN_TYPE_CHAR;
}

macro_rules! wrappers {
    ($($(#[$what:meta])* $name:ident($type:ty);)*) => {
        $($(#[$what])* #[derive(Debug, Clone, Copy, PartialEq, Eq)] #[repr(transparent)] pub struct $name(pub $type);)*
    };
}

wrappers! {
    /// `cudnnDataType_t`.
    DataType(i32);
    /// `cudnnConvolutionMode_t`.
    ConvolutionMode(i32);
    /// `cudnnBackendHeurMode_t`.
    HeuristicMode(i32);
    /// `cudnnBackendNumericalNote_t`.
    NumericalNote(i32);
    /// Of memory of the GPU, or of a number of the host's that is read when a plan is started.
    Address(u64);
    /// `cudnnHandle_t`.
    HandlePointer(Pointer);
}

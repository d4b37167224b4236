//! An allocator that ends the program when reading a file takes more memory than its size justifies.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    process,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

struct Counting;

impl Counting {
    fn add(size: usize) {
        let live = LIVE.fetch_add(size, Relaxed) + size;
        let limit = LIMIT.load(Relaxed);
        if live > limit {
            LIMIT.store(usize::MAX, Relaxed); // for the message and the trace
            let trace = std::backtrace::Backtrace::force_capture();
            eprintln!("an allocation of {size} bytes is {} above what the input may take\n{trace}", live - limit);
            process::abort();
        }
    }
}

// SAFETY: all is the system's; only sizes are counted beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be there at once.
        Self::add(size);
        let moved = unsafe { System.realloc(pointer, layout, size) };
        LIVE.fetch_sub(layout.size(), Relaxed);
        moved
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `f`, during which no more than `bytes` and `times` the input's size may be allocated at once.
pub fn bounded(input: &[u8], times: usize, bytes: usize, f: impl FnOnce()) {
    LIMIT.store(LIVE.load(Relaxed) + times * input.len() + bytes, Relaxed);
    f();
    LIMIT.store(usize::MAX, Relaxed);
}

//! Large buffers.

/// Zeros for a result or a workspace.
///
/// Fresh memory comes from the system page by page as it is first written, at about a microsecond for each 4 KiB. For
/// large buffers Linux is asked for pages of 2 MiB, which it gives where it is set up for that.
pub fn zeros(len: usize) -> Vec<f32> {
    let buffer = vec![0f32; len];
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let start = buffer.as_ptr().addr();
        let (first, end) = (start.next_multiple_of(HUGE), (start + size_of_val(&buffer[..])) / HUGE * HUGE);
        if first < end {
            // SAFETY: whole pages of memory that is ours; its contents stay as they are. An error means small pages.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    buffer
}

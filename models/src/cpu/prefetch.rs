//! Hints at memory that is read soon. A processor follows a stream of reads only to the end of a page; where that is far from
//! what is read next, or much of it lies in main memory, it has to be told.

/// Bytes that are fetched at once.
const LINE: usize = 64;

/// Asks for what lies from `start` on to be brought into the second-level cache. Nothing is read by this, so any address
/// will do.
#[inline(always)]
pub fn prefetch<T>(start: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for byte in (0..count * size_of::<T>()).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let line = start.cast::<i8>().wrapping_add(byte);
        #[allow(unused_unsafe, reason = "older compilers want it around a prefetch")]
        // SAFETY: a hint, which reads nothing and cannot fail, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(line)
        };
    }
}

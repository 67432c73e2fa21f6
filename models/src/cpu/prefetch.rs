//! Hints at memory that is read or written soon. A processor follows a stream of reads only to the end of a page; where that
//! is far from what is read next, or much of it lies in main memory, it has to be told.

/// Asks for the `count` elements from `start` on to be brought into the second-level cache, on processors where that is
/// written out. Nothing is read by this, so any address will do.
#[inline(always)]
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(unused_variables, reason = "only hints use them")
)]
pub fn prefetch<T>(start: *const T, count: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        /// Bytes that are fetched at once.
        const LINE: usize = 64;
        let before = start.addr() % LINE;
        let first = start.cast::<i8>().wrapping_sub(before);
        for byte in (0..before + count * size_of::<T>()).step_by(LINE) {
            prefetch_line(first.wrapping_add(byte));
        }
    }
}

/// As [`prefetch`], of the one cache line that `at` lies in: for inner loops, in which counting lines would cost more than
/// they are worth.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub fn prefetch_line<T>(at: *const T) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    #[allow(unused_unsafe, reason = "older compilers want it around a prefetch")]
    // SAFETY: a hint, which reads nothing and cannot fail, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
}

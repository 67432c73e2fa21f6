//! The one inner loop: a small tile of a matrix product held in registers. The projections and both products of
//! attention run through it.

use half::bf16;
use pulp::Simd;

/// What columns of a product may be stored as.
pub trait Column: Copy {
    /// One vector, in float32.
    ///
    /// # Safety
    /// `at` must be readable for `S::F32_LANES` elements; it need not be aligned.
    unsafe fn load<S: Simd>(at: *const Self) -> S::f32s;
}

impl Column for f32 {
    /// # Safety
    /// The trait's.
    #[inline(always)]
    unsafe fn load<S: Simd>(at: *const Self) -> S::f32s {
        // SAFETY: in bounds by this function's contract; the read needs no alignment.
        unsafe { at.cast::<S::f32s>().read_unaligned() }
    }
}

impl Column for bf16 {
    /// # Safety
    /// The trait's.
    #[inline(always)]
    unsafe fn load<S: Simd>(at: *const Self) -> S::f32s {
        // As many as the longest vector has; the compiler makes them one of the right length.
        let mut wide = [0.0; 16];
        for (lane, wide) in wide[..S::F32_LANES].iter_mut().enumerate() {
            // SAFETY: in bounds by this function's contract; the read needs no alignment.
            let narrow = unsafe { at.add(lane).read_unaligned() };
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
        S::as_simd_f32s(&wide[..S::F32_LANES]).0[0]
    }
}

/// Rows of the largest tile, by the number of vector registers.
pub const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 12 } else { 6 }
}

/// `acc[m][v] += sum over k of a[m][k] * b[v][k]`, for `MR` rows and `NV` vectors of columns, which may lie anywhere.
///
/// Every element is a chain of fused multiply-adds in the order of `k`, so its value does not depend on `MR` or `NV`.
///
/// # Safety
/// `a[m]` must be readable for `depth` floats, and `b[v]` for a vector at each of `depth` rows of `stride` elements.
#[inline(always)]
pub unsafe fn multiply<S: Simd, W: Column, const MR: usize, const NV: usize>(
    simd: S,
    depth: usize,
    a: &[*const f32; MR],
    b: &[*const W; NV],
    stride: usize,
    acc: &mut [[S::f32s; NV]; MR],
) {
    let mut sums = *acc;
    for k in 0..depth {
        // SAFETY: in bounds by this function's contract.
        let columns: [S::f32s; NV] = std::array::from_fn(|v| unsafe { W::load::<S>(b[v].add(k * stride)) });
        for m in 0..MR {
            // SAFETY: in bounds by this function's contract.
            let factor = simd.splat_f32s(unsafe { *a[m].add(k) });
            for v in 0..NV {
                sums[m][v] = simd.mul_add_f32s(factor, columns[v], sums[m][v]);
            }
        }
    }
    *acc = sums;
}

/// Splits `rows` into tiles of at most `$most` (to 12), nearly equal so that none has too few sums to keep the processor busy,
/// and calls `$body` with the tile's first row and its size as a constant, so that every size has its own unrolled code.
macro_rules! for_row_tiles {
    ($most:expr, $rows:expr, |$first:ident, $MR:ident| $body:expr) => {{
        let rows: usize = $rows;
        let mut $first = 0;
        for left in (1..=rows.div_ceil($most)).rev() {
            let size = (rows - $first).div_ceil(left);
            macro_rules! size {
                ($n:literal) => {{
                    const $MR: usize = $n;
                    $body
                }};
            }
            match size {
                1 => size!(1),
                2 => size!(2),
                3 => size!(3),
                4 => size!(4),
                5 => size!(5),
                6 => size!(6),
                7 => size!(7),
                8 => size!(8),
                9 => size!(9),
                10 => size!(10),
                11 => size!(11),
                _ => size!(12),
            }
            $first += size;
        }
    }};
}
pub(crate) use for_row_tiles;

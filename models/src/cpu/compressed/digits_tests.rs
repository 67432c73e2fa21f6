//! Products by digits against their definition, against float64, and each way of multiplying against the others.

use super::super::CompressedPanels;
use super::*;
use crate::cpu::numbers;
use crate::cpu::stored::StoredMatrix;

const FORMATS: [Format; 3] = [Format::FourBy32, Format::EightBy32, Format::EightBy16];

fn matrix(format: Format, outputs: usize, depth: usize) -> StoredMatrix {
    let mut matrix = StoredMatrix::with_room(format, depth, outputs * depth);
    let lowest = if format.bits() == 4 { 0 } else { -128 };
    let mut values = (0i32..).map(|index| (lowest + index * 37 % (1 << format.bits())) as i8);
    for factors in numbers(2 * outputs * depth / format.group(), 51).chunks_exact(2) {
        matrix.push(factors[0], factors[1], values.by_ref().take(format.group()));
    }
    matrix
}

/// All outputs of some rows, row by row, the same in whatever way they are multiplied, if this processor has the
/// instructions: on others there is nothing to test.
fn products(matrix: &StoredMatrix, x: &[f32]) -> Option<Vec<f32>> {
    if !are_fast() {
        return None;
    }
    let (panels, rows) = (CompressedPanels::pack(matrix), x.len() / matrix.depth);
    let (mut buffer, mut memory) = (vec![f32::NAN; 7], <[Memory; 3]>::default());
    // What was rounded before, of more rows, leaves nothing behind.
    for memory in &mut memory {
        Digits::round(
            &vec![f32::NAN; x.len() + 40 * matrix.depth],
            matrix.depth,
            matrix.format,
            memory,
        );
    }
    let mut found = ways(matrix, x, &mut memory)
        .into_iter()
        .map(|x| products_of(matrix, &panels, rows, &x, &mut buffer));
    let first = found.next()?;
    for (nth, others) in found.enumerate() {
        let differ = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits() && !(a.is_nan() && b.is_nan());
        let at = first.iter().zip(&others).position(differ);
        assert_eq!(at, None, "{:?}, way {nth}", matrix.format);
    }
    Some(first)
}

/// Activations as they would be rounded, and in every way that there is for weights of four bits.
fn ways<'a>(matrix: &StoredMatrix, x: &[f32], memory: &'a mut [Memory; 3]) -> Vec<Digits<'a>> {
    let ([as_usual, plain, in_pairs], depth) = (memory, matrix.depth);
    let mut ways = vec![Digits::round(x, depth, matrix.format, as_usual)];
    if matrix.format == Format::FourBy32 {
        ways.push(Digits::FourBy32(tiles::<4, 32, false>(x, depth, &mut plain.by_32)));
        ways.push(Digits::FourInPairs(tiles::<4, 32, true>(x, depth, &mut in_pairs.by_32)));
    }
    ways
}

fn products_of(
    matrix: &StoredMatrix,
    panels: &CompressedPanels,
    rows: usize,
    x: &Digits,
    buffer: &mut Vec<f32>,
) -> Vec<f32> {
    let mut all = vec![f32::NAN; rows * matrix.outputs()];
    for panel in 0..matrix.outputs().div_ceil(WIDTH) {
        let mut sums = vec![f32::NAN; rows * WIDTH];
        let words = panels.block(panel, 0, matrix.depth).words;
        x.multiply(words, 0..rows, &mut sums, buffer);
        for (all, sums) in all.chunks_exact_mut(matrix.outputs()).zip(sums.chunks_exact(WIDTH)) {
            all.iter_mut()
                .skip(panel * WIDTH)
                .zip(sums)
                .for_each(|(to, sum)| *to = *sum);
        }
    }
    all
}

/// One product, by the definition.
fn defined(matrix: &StoredMatrix, x: &[f32], output: usize) -> f32 {
    let largest = x.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let most = most(matrix.format.bits());
    let inverse = if largest > SMALLEST { most / largest } else { 0.0 };
    let group = matrix.format.group();
    let mut sum = 0.0;
    for (index, x) in x.chunks_exact(group).enumerate() {
        let at = output * matrix.depth / group + index;
        let (scale, minimum) = (matrix.scales[at], matrix.minima[at]);
        let weights = matrix.values[at * group..][..group]
            .iter()
            .map(|&value| i64::from(value));
        let values = || x.iter().map(|x| (x * inverse).round_ties_even() as i64);
        let whole = values().sum::<i64>() as f32;
        if matrix.format.bits() == 4 {
            let products: i64 = weights.zip(values()).map(|(weight, value)| (weight - 8) * value).sum();
            sum = (products as f32).mul_add(scale, sum);
            sum = scale.mul_add(8.0, minimum).mul_add(whole, sum);
        } else {
            let (mut high, mut low) = (0, 0);
            for (weight, value) in weights.zip(values()) {
                let last = i64::from(value as i8);
                high += weight * ((value - last) / 256);
                low += weight * last;
            }
            sum = (high as f32).mul_add(256.0 * scale, sum);
            sum = (low as f32).mul_add(scale, sum);
            sum = minimum.mul_add(whole, sum);
        }
    }
    sum * (largest / most)
}

#[test]
fn products_are_what_the_definition_says() {
    for format in FORMATS {
        let shapes = [(1, 32, 1), (31, 64, 2), (33, 96, 5), (64, 576, 16), (70, 1536, 41)];
        for (outputs, depth, rows) in shapes.into_iter().chain([3, 4, 6, 7, 8].map(|rows| (40, 160, rows))) {
            let (matrix, x) = (matrix(format, outputs, depth), numbers(rows * depth, 52));
            let Some(found) = products(&matrix, &x) else { return };
            for (at, found) in found.iter().enumerate() {
                let exact = defined(&matrix, &x[at / outputs * depth..][..depth], at % outputs);
                assert_eq!(
                    *found,
                    exact,
                    "row {}, output {} in {format:?}",
                    at / outputs,
                    at % outputs
                );
            }
        }
    }
}

/// The largest numbers there are overflow nothing.
#[test]
fn extremes_are_summed_exactly() {
    for (format, weights) in [
        (Format::FourBy32, [15, 15]),
        (Format::FourBy32, [15, 0]),
        (Format::FourBy32, [0, 0]),
        (Format::EightBy32, [127, 127]),
        (Format::EightBy16, [127, -128]),
        (Format::EightBy32, [-128, -128]),
        (Format::EightBy16, [-128, -128]),
    ] {
        let mut matrix = StoredMatrix::with_room(format, 64, 64);
        for _ in 0..64 / format.group() {
            matrix.push(1.0, 0.0, weights.into_iter().cycle().take(format.group()));
        }
        for signs in [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]] {
            let x: Vec<f32> = signs.into_iter().cycle().take(3 * 64).collect();
            let Some(found) = products(&matrix, &x) else { return };
            let exact = 32.0 * (signs[0] * f32::from(weights[0]) + signs[1] * f32::from(weights[1]));
            for product in found {
                let off = (product - exact).abs();
                assert!(off <= 1e-6 * exact.abs(), "{weights:?} {signs:?}: {product}");
            }
        }
    }
}

/// Against float64: better than a chain of fused multiply-adds in float32, and not much worse where one activation is far
/// larger than the others.
#[test]
fn products_have_float32s_accuracy() {
    for format in FORMATS {
        for (depth, outlier, times) in [
            (576, 1.0, 1.0),
            (1536, 1.0, 1.0),
            (576, 1000.0, 10.0),
            (1536, 1000.0, 10.0),
        ] {
            let (outputs, rows) = (48, 24);
            let matrix = matrix(format, outputs, depth);
            let mut x = numbers(rows * depth, 53);
            x.iter_mut().skip(100).step_by(depth).for_each(|x| *x = outlier);
            let Some(found) = products(&matrix, &x) else { return };
            let weights = matrix.weights();
            let (mut off, mut off_in_float32, mut all) = (0.0, 0.0, 0.0);
            for (at, found) in found.iter().enumerate() {
                let x = &x[at / outputs * depth..][..depth];
                let factors = || x.iter().zip(&weights[at % outputs * depth..]);
                let exact: f64 = factors().map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                let in_float32 = factors().fold(0.0, |sum, (x, w)| x.mul_add(*w, sum));
                off += (f64::from(*found) - exact).powi(2);
                off_in_float32 += (f64::from(in_float32) - exact).powi(2);
                all += exact.powi(2);
            }
            let [off, off_in_float32] = [off, off_in_float32].map(|off| (off / all).sqrt());
            assert!(
                off < 1e-5 && off < times * off_in_float32,
                "{off:e}, in float32 {off_in_float32:e}: {format:?}, {depth} inputs, one of them {outlier}"
            );
        }
    }
}

#[test]
fn what_is_not_finite_stays_so_and_what_is_nearly_nothing_is_small() {
    for format in FORMATS {
        let matrix = matrix(format, 40, 64);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let mut x = numbers(5 * 64, 54);
            (x[64 + 40], x[64 + 41]) = (bad, bad);
            x[2 * 64..3 * 64].fill(0.0);
            x[3 * 64..4 * 64].iter_mut().for_each(|x| *x *= 1e-33);
            x[4 * 64..].iter_mut().for_each(|x| *x *= 1e34);
            let Some(found) = products(&matrix, &x) else { return };
            let rows: Vec<&[f32]> = found.chunks_exact(40).collect();
            assert!(rows[1].iter().all(|product| !product.is_finite()), "{bad}");
            assert_eq!(rows[2], [0.0; 40]);
            assert!(rows[3].iter().all(|product| product.abs() < 1e-28), "{bad}");
            assert!(
                rows[0].iter().chain(rows[4]).all(|product| product.is_finite()),
                "{bad}"
            );
        }
    }
}

#[test]
fn rows_from_a_later_tile_on_are_the_same() {
    let (matrix, x) = (matrix(Format::FourBy32, 32, 96), numbers(40 * 96, 55));
    let Some(all) = products(&matrix, &x) else { return };
    let panels = CompressedPanels::pack(&matrix);
    for x in ways(&matrix, &x, &mut Default::default()) {
        let mut some = vec![f32::NAN; 24 * WIDTH];
        x.multiply(panels.block(0, 0, 96).words, 16..40, &mut some, &mut Vec::new());
        assert_eq!(some, all[16 * WIDTH..]);
    }
}

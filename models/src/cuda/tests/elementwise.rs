//! Lookup, angles, norms, activation, rotation.

use half::{bf16, f16};

use super::*;

fn embed<T: Element>() {
    let (vocabulary, hidden) = (7, 37);
    let table = numbers(vocabulary * hidden, 1);
    // The last two are what rows 1 and 0 of the step before chose: a token, and none.
    let (tokens, sampled) = ([3, 6, 0, 3, 1 << 31 | 1, 1 << 31], [u32::MAX, 5]);
    let launch = Launch {
        kernel: &format!("embed_{}", T::NAME),
        grid: [6, 1, 1],
        block: 256,
        shared: 0,
    };
    let found = launch.run(&[
        store::<T>(&table),
        words(&tokens),
        words(&sampled),
        store::<f32>(&vec![f32::NAN; 6 * hidden]),
        int(hidden),
        int(vocabulary),
    ]);
    let stored = rounded::<T>(&table);
    let expected: Vec<_> = [3, 6, 0, 3, 5, 0]
        .into_iter()
        .flat_map(|t: usize| &stored[t * hidden..][..hidden])
        .copied()
        .collect();
    assert_eq!(load::<f32>(&found[3]), expected);
}

#[test]
fn embedding_rows_are_looked_up() {
    embed::<f32>();
    embed::<bf16>();
    embed::<f16>();
}

#[test]
fn angles_are_products_of_position_and_frequency() {
    let (positions, inverse) = ([0, 5, 100_000], [1.0, 0.3, 1e-3]);
    let launch = Launch {
        kernel: "angles",
        grid: [3, 1, 1],
        block: 128,
        shared: 0,
    };
    let nothing = store::<f32>(&[f32::NAN; 9]);
    let found = launch.run(&[
        words(&positions),
        store::<f32>(&inverse),
        nothing.clone(),
        nothing,
        int(3),
    ]);
    let (cos, sin) = crate::rope::cos_sin(&inverse, &positions.map(|p| p as usize));
    assert_close(&load::<f32>(&found[2]), &cos, 1e-6);
    assert_close(&load::<f32>(&found[3]), &sin, 1e-6);
}

fn residual_norm<T: Element>(with_delta: bool, rows: Option<&[u32]>) {
    let (tokens, hidden) = (3, 300);
    let (x, delta, weight) = (
        numbers(tokens * hidden, 1),
        numbers(tokens * hidden, 2),
        numbers(hidden, 3),
    );
    let delta = if with_delta {
        rounded::<T>(&delta)
    } else {
        vec![0.0; tokens * hidden]
    };
    let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
    let all: Vec<u32> = (0..tokens as u32).collect();
    let chosen = rows.unwrap_or(&all);
    let expected = chosen.iter().flat_map(|&row| {
        let row = &sum[row as usize * hidden..][..hidden];
        let mean = row.iter().map(|v| f64::from(v * v)).sum::<f64>() / hidden as f64;
        let scale = 1.0 / (mean + 1e-5).sqrt();
        row.iter()
            .zip(&weight)
            .map(move |(v, w)| (f64::from(*v) * scale) as f32 * w)
    });
    let expected: Vec<f32> = expected.collect();
    let launch = Launch {
        kernel: &format!("residual_norm_{}", T::NAME),
        grid: [chosen.len() as u32, 1, 1],
        block: 256,
        shared: 4 * hidden as u32,
    };
    let found = launch.run(&[
        store::<f32>(&x),
        if with_delta { store::<T>(&delta) } else { Argument::Null },
        rows.map_or(Argument::Null, words),
        store::<f32>(&weight),
        store::<T>(&vec![f32::NAN; chosen.len() * hidden]),
        int(hidden),
        Argument::Float(1e-5),
    ]);
    assert_eq!(load::<f32>(&found[0]), if rows.is_none() { sum } else { x });
    assert_close(&load::<T>(found.last().unwrap()), &expected, T::EPSILON + 1e-6);
}

#[test]
fn residual_is_added_and_normalised() {
    residual_norm::<f32>(false, None);
    residual_norm::<f32>(true, None);
    residual_norm::<bf16>(true, None);
    residual_norm::<f16>(true, Some(&[2, 0]));
    residual_norm::<f32>(true, Some(&[1]));
}

fn silu_mul<T: Element>() {
    let (tokens, inner) = (3, 2056);
    let gate_up = rounded::<T>(
        &numbers(tokens * 2 * inner, 5)
            .iter()
            .map(|v| v * 8.0)
            .collect::<Vec<_>>(),
    );
    let expected: Vec<f32> = gate_up
        .chunks(2 * inner)
        .flat_map(|row| {
            row[..inner]
                .iter()
                .zip(&row[inner..])
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        })
        .collect();
    let wide = 16 / size_of::<T>();
    let launch = Launch {
        kernel: &format!("silu_mul_{}", T::NAME),
        grid: [tokens as u32, inner.div_ceil(256 * wide) as u32, 1],
        block: 256,
        shared: 0,
    };
    let found = launch.run(&[
        store::<T>(&gate_up),
        store::<T>(&vec![f32::NAN; tokens * inner]),
        int(inner),
    ]);
    assert_close(&load::<T>(&found[1]), &expected, T::EPSILON + 1e-6);
}

#[test]
fn gates_open() {
    silu_mul::<f32>();
    silu_mul::<bf16>();
    silu_mul::<f16>();
}

/// Two query heads, two KV heads, three tokens; the second has no slot.
fn rope_store<T: Element>(dim: usize, with_norm: bool, with_bias: bool) {
    const SLOTS: usize = 6;
    let (heads, kv_heads, half, slots) = (2, 2, dim / 2, [4, u32::MAX, 1]);
    let all = heads + 2 * kv_heads;
    let qkv = rounded::<T>(&numbers(3 * all * dim, 1));
    let (bias, query_norm, key_norm) = (numbers(all * dim, 2), numbers(dim, 3), numbers(dim, 4));
    let angles = numbers(3 * half, 5);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| ((a * 9.0).cos(), (a * 9.0).sin())).unzip();
    let mut queries = qkv.clone();
    let mut pools = [vec![0.0; SLOTS * kv_heads * dim], vec![0.0; SLOTS * kv_heads * dim]];
    for token in 0..3 {
        for head in 0..all {
            let at = (token * all + head) * dim;
            let mut row = qkv[at..at + dim].to_vec();
            if with_bias {
                row.iter_mut().zip(&bias[head * dim..]).for_each(|(v, b)| *v += b);
            }
            let value = head >= heads + kv_heads;
            if with_norm && !value {
                let norm = if head < heads { &query_norm } else { &key_norm };
                let scale = 1.0 / (row.iter().map(|v| v * v).sum::<f32>() / dim as f32 + 1e-6).sqrt();
                row.iter_mut().zip(norm).for_each(|(v, w)| *v = *v * scale * w);
            }
            if !value {
                for i in 0..half {
                    let (a, b, c, s) = (row[i], row[half + i], cos[token * half + i], sin[token * half + i]);
                    (row[i], row[half + i]) = (a * c - b * s, b * c + a * s);
                }
            }
            if head < heads {
                queries[at..at + dim].copy_from_slice(&row);
            } else if slots[token] != u32::MAX {
                let to = (slots[token] as usize * kv_heads + (head - heads) % kv_heads) * dim;
                pools[usize::from(value)][to..to + dim].copy_from_slice(&row);
            }
        }
    }
    let launch = Launch {
        kernel: &format!("rope_store_{}", T::NAME),
        grid: [3, all.div_ceil(4) as u32, 1],
        block: 128,
        shared: 0,
    };
    let optional = |wanted: bool, values: &[f32]| if wanted { store::<f32>(values) } else { Argument::Null };
    let empty = store::<T>(&vec![0.0; SLOTS * kv_heads * dim]);
    let found = launch.run(&[
        store::<T>(&qkv),
        optional(with_bias, &bias),
        optional(with_norm, &query_norm),
        optional(with_norm, &key_norm),
        store::<f32>(&cos),
        store::<f32>(&sin),
        words(&slots),
        empty.clone(),
        empty,
        int(heads),
        int(kv_heads),
        int(dim),
        Argument::Float(1e-6),
    ]);
    let tolerance = T::EPSILON + 2e-6;
    assert_close(&load::<T>(&found[0]), &queries, tolerance);
    let [.., keys, values] = found.as_slice() else {
        unreachable!()
    };
    assert_close(&load::<T>(keys), &pools[0], tolerance);
    assert_close(&load::<T>(values), &pools[1], tolerance);
}

#[test]
fn heads_are_rotated_and_stored() {
    rope_store::<f32>(64, false, false);
    rope_store::<f32>(128, true, false);
    rope_store::<bf16>(256, true, true);
    rope_store::<f16>(96, false, true);
}

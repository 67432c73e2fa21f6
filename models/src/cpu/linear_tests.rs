//! Projections by each kind of weights, against sums in float64 and against each other.

use candle_core::quantized::GgmlDType;

use super::super::panels::panel_width;
use super::super::{numbers, quantized_numbers};
use super::*;

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

fn product(linear: &Linear, x: &[f32]) -> Vec<f32> {
    // What is in the memory already is of no account.
    let mut out = vec![f32::NAN; 5];
    linear.forward(x, &mut out).unwrap();
    out
}

fn gated(gate_up: &GateUp, x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; 5];
    gate_up.forward(x, &mut out).unwrap();
    out
}

/// The product added to ones.
fn sum(linear: &Linear, x: &[f32], outputs: usize) -> Vec<f32> {
    let mut sum = vec![1.0; x.len() / linear.matrix.depth() * outputs];
    linear.add_to(&mut sum, x).unwrap();
    sum
}

fn near(found: f32, exact: f64, depth: usize) {
    assert!(
        (found as f64 - exact).abs() < 1e-6 * depth as f64,
        "{found} is not {exact}"
    );
}

#[test]
fn products_of_odd_sizes_are_exact_to_rounding() {
    for (rows, inputs, outputs) in [
        (1, 1, 1),
        (2, 15, 16),
        (3, 16, 15),
        (5, 17, 31),
        (7, 257, 17),
        (13, 511, 67),
        (25, 600, 33),
        (97, 31, 101),
        (97, 700, 33),
    ] {
        let (x, weight) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
        let (up, bias) = (numbers(outputs * inputs, 3), numbers(outputs, 4));
        let linear = Linear::new(&weight, inputs, Some(bias.clone()), DType::F32).unwrap();
        let (product, sum) = (product(&linear, &x), sum(&linear, &x, outputs));
        let gated = gated(&GateUp::new(&weight, &up, inputs, DType::F32).unwrap(), &x);
        for row in 0..rows {
            let x = &x[row * inputs..][..inputs];
            for output in 0..outputs {
                let exact = dot(x, &weight[output * inputs..][..inputs]);
                near(
                    product[row * outputs + output],
                    exact + bias[output] as f64,
                    inputs + 10,
                );
                near(sum[row * outputs + output], exact + 1.0, inputs + 10);
                let silu = exact / (1.0 + (-exact).exp());
                let up = dot(x, &up[output * inputs..][..inputs]);
                near(gated[row * outputs + output], silu * up, 20 * (inputs + 10));
            }
        }
    }
}

#[test]
fn quantized_products_of_odd_sizes_are_near() {
    for (rows, inputs, outputs, dtype) in [
        (1, 32, 1, GgmlDType::Q4_1),
        (3, 64, 9, GgmlDType::Q8_0),
        (5, 96, 17, GgmlDType::Q4_0),
        (97, 576, 67, GgmlDType::Q4_1),
        (97, 1408, 33, GgmlDType::Q4_1),
        (25, 1024, 43, GgmlDType::Q8_0),
    ] {
        let stored = |seed| {
            let (stored, stands_for) = quantized_numbers(outputs, inputs, dtype, seed);
            (quantized::read(&stored).unwrap(), stands_for)
        };
        let ((weight, exact), (up, exact_up)) = (stored(21), stored(22));
        let (x, bias) = (numbers(rows * inputs, 23), numbers(outputs, 24));
        // Of activations to one, rounded to 1 / 127, each is off by half of that at most, one way or the other.
        let within = 6.0 / 254.0 * (inputs as f64 / 9.0).sqrt();
        Near {
            x,
            exact,
            exact_up,
            bias: bias.clone(),
            inputs,
            within,
        }
        .check(
            Linear::quantized(&weight, None).unwrap(),
            Linear::quantized(&weight, Some(bias)).unwrap(),
            GateUp::quantized(&weight, &up).unwrap(),
        );
    }
}

/// Whether this processor would choose them or not.
#[test]
fn bfloat16_products_of_odd_sizes_are_near() {
    for (rows, inputs, outputs) in [(1, 1, 1), (3, 15, 47), (5, 64, 48), (9, 257, 49), (97, 300, 101)] {
        let (weight, up) = (numbers(outputs * inputs, 25), numbers(outputs * inputs, 26));
        let (x, bias) = (numbers(rows * inputs, 27), numbers(outputs, 28));
        let linear = |bias| Linear {
            matrix: Matrix::Bfloat16(Bfloat16Panels::pack(&weight, inputs)),
            bias,
        };
        let gate_up = GateUp {
            matrix: Matrix::Bfloat16(Bfloat16Panels::pack_pairs(&weight, &up, inputs)),
        };
        // Each of two factors to one is off by 1 / 512 at most, one way or the other.
        let within = 6.0 * 2.0 / 512.0 * (inputs as f64 / 9.0).sqrt();
        let (linear, biased) = (linear(None), linear(Some(bias.clone())));
        Near {
            x,
            exact: weight.clone(),
            exact_up: up.clone(),
            bias,
            inputs,
            within,
        }
        .check(linear, biased, gate_up);
    }
}

/// What products are near to, and how near.
struct Near {
    /// `[rows, inputs]`
    x: Vec<f32>,
    /// `[outputs, inputs]`
    exact: Vec<f32>,
    exact_up: Vec<f32>,
    /// `[outputs]`
    bias: Vec<f32>,
    inputs: usize,
    within: f64,
}

impl Near {
    fn check(self, linear: Linear, biased: Linear, gate_up: GateUp) {
        let Self { inputs, within, .. } = self;
        let (rows, outputs) = (self.x.len() / inputs, self.bias.len());
        let (biased, sum) = (product(&biased, &self.x), sum(&linear, &self.x, outputs));
        let (product, gated) = (product(&linear, &self.x), gated(&gate_up, &self.x));
        for row in 0..rows {
            let x = &self.x[row * inputs..][..inputs];
            for output in 0..outputs {
                let exact = dot(x, &self.exact[output * inputs..][..inputs]);
                let up = dot(x, &self.exact_up[output * inputs..][..inputs]);
                let silu = exact / (1.0 + (-exact).exp());
                for (found, exact, within) in [
                    (product[row * outputs + output], exact, within),
                    (sum[row * outputs + output], exact + 1.0, within),
                    (biased[row * outputs + output], exact + self.bias[output] as f64, within),
                    (
                        gated[row * outputs + output],
                        silu * up,
                        within * (exact.abs() + up.abs() + 1.0) * 1.1,
                    ),
                ] {
                    let off = (found as f64 - exact).abs();
                    assert!(
                        off <= within,
                        "row {row}, output {output} of {outputs}: {found} is not {exact}"
                    );
                }
            }
        }
    }
}

/// However this processor multiplies them.
#[test]
fn compressed_products_have_float32s_accuracy() {
    for (rows, inputs, outputs, dtype) in [
        (1, 32, 1, GgmlDType::Q4_0),
        (9, 96, 33, GgmlDType::Q4_1),
        (97, 1408, 67, GgmlDType::Q4_1),
        (25, 576, 31, GgmlDType::Q5_1),
        (3, 512, 40, GgmlDType::Q4K),
        (11, 256, 33, GgmlDType::Q5K),
        (130, 416, 101, GgmlDType::Q8_0),
        (17, 1024, 43, GgmlDType::Q6K),
    ] {
        let stored = |seed| {
            let (stored, stands_for) = quantized_numbers(outputs, inputs, dtype, seed);
            (StoredMatrix::read(&stored).unwrap(), stands_for)
        };
        let ((weight, exact), (up, exact_up)) = (stored(35), stored(36));
        let (x, bias) = (numbers(rows * inputs, 37), numbers(outputs, 38));
        Near {
            x,
            exact,
            exact_up,
            bias: bias.clone(),
            inputs,
            // Sums of numbers up to one, rounded once an input.
            within: 1e-6 * (inputs as f64).sqrt(),
        }
        .check(
            Linear::compressed(&weight, None),
            Linear::compressed(&weight, Some(bias)),
            GateUp::compressed(&weight, &up),
        );
    }
}

#[test]
fn compressed_products_in_float32_are_those_of_float32_weights() {
    for (dtype, inputs, outputs) in [
        (GgmlDType::Q4_0, 32, 1),
        (GgmlDType::Q4_1, 96, 33),
        (GgmlDType::Q4_1, 1408, 67),
        (GgmlDType::Q5_1, 576, 31),
        (GgmlDType::Q8_0, 416, 101),
        (GgmlDType::Q4K, 512, 65),
        (GgmlDType::Q6K, 256, 32),
        (GgmlDType::Q6K, 1024, 43),
    ] {
        let (read, exact) = quantized_numbers(outputs, inputs, dtype, 31);
        let (up, exact_up) = quantized_numbers(outputs, inputs, dtype, 32);
        let [read, up] = [read, up].map(|weight| StoredMatrix::read(&weight).unwrap());
        let bias = numbers(outputs, 33);
        let matrix = |panels: CompressedPanels| Matrix::Compressed(panels.in_float32());
        let compressed = Linear {
            matrix: matrix(CompressedPanels::pack(&read)),
            bias: Some(bias.clone()),
        };
        let wide = Linear::new(&exact, inputs, Some(bias), DType::F32).unwrap();
        let bits = match dtype {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => 6,
            GgmlDType::Q6K => 12,
            _ => 10,
        };
        let width = panel_width();
        assert_eq!(8 * compressed.bytes(), outputs.next_multiple_of(width) * inputs * bits);
        let last = [outputs as u32 - 1, 0];
        let rows = |linear: &Linear| {
            let mut rows = Vec::new();
            linear.gather(&last, &mut rows);
            rows
        };
        assert!(rows(&compressed) == rows(&wide), "{dtype:?}");
        let compressed_pair = GateUp {
            matrix: matrix(CompressedPanels::pack_pairs(&read, &up)),
        };
        let wide_pair = GateUp::new(&exact, &exact_up, inputs, DType::F32).unwrap();
        for rows in [1, 2, 3, 4, 7, 8, 9, 16, 29, 97, 130] {
            let x = numbers(rows * inputs, 34);
            let what = format!("{rows} rows by {outputs} x {inputs} in {dtype:?}");
            assert!(product(&compressed, &x) == product(&wide, &x), "{what}");
            assert!(gated(&compressed_pair, &x) == gated(&wide_pair, &x), "{what}, in pairs");
        }
    }
}

#[test]
fn a_row_is_the_same_in_any_batch() {
    let (inputs, outputs) = (512, 83);
    let weight = numbers(outputs * inputs, 5);
    let x = numbers(128 * inputs, 6);
    let dense = [DType::F32, DType::BF16, DType::F16].map(|dtype| {
        let linear = Linear::new(&weight, inputs, None, dtype).unwrap();
        (format!("{dtype:?}"), linear)
    });
    let of_a_file = [GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q6K].map(|dtype| {
        let (stored, _) = quantized_numbers(outputs, inputs, dtype, 5);
        let quantized = Linear::quantized(&quantized::read(&stored).unwrap(), None).unwrap();
        let read = StoredMatrix::read(&stored).unwrap();
        let in_float32 = Linear {
            matrix: Matrix::Compressed(CompressedPanels::pack(&read).in_float32()),
            bias: None,
        };
        [
            (format!("{dtype:?}, rounded"), quantized),
            (format!("{dtype:?}"), Linear::compressed(&read, None)),
            (format!("{dtype:?}, in float32"), in_float32),
        ]
    });
    for (dtype, linear) in dense.into_iter().chain(of_a_file.into_iter().flatten()) {
        let all = product(&linear, &x);
        for batch in 1..=128 {
            let first = 128 - batch;
            let some = product(&linear, &x[first * inputs..]);
            assert!(some == all[first * outputs..], "batch of {batch} as {dtype}");
        }
    }
}

/// What a file stores in bfloat16 takes no more memory in float32, and multiplies as if it did.
#[test]
fn weights_that_are_bfloat16_stay_so_and_give_float32s_products() {
    let (inputs, outputs) = (300, 83);
    let narrow = |seed| -> Vec<f32> {
        let numbers = numbers(outputs * inputs, seed).into_iter();
        numbers.map(|number| half::bf16::from_f32(number).to_f32()).collect()
    };
    let (weight, up) = (narrow(8), narrow(9));
    let linear = Linear::new(&weight, inputs, None, DType::F32).unwrap();
    let gate_up = GateUp::new(&weight, &up, inputs, DType::F32).unwrap();
    let wide = |panels: Result<Panels>| Matrix::Dense(panels.unwrap());
    let wide_linear = Linear {
        matrix: wide(Panels::pack(&weight, inputs, DType::F32)),
        bias: None,
    };
    let wide_gate_up = GateUp {
        matrix: wide(Panels::pack_pairs(&weight, &up, inputs, DType::F32)),
    };
    assert_eq!(
        (2 * linear.bytes(), 2 * gate_up.bytes()),
        (wide_linear.bytes(), wide_gate_up.bytes())
    );
    for rows in [1, 11, 40] {
        let x = numbers(rows * inputs, 10);
        assert!(product(&linear, &x) == product(&wide_linear, &x), "{rows} rows");
        assert!(gated(&gate_up, &x) == gated(&wide_gate_up, &x), "{rows} rows");
    }
    let mut one_wide = weight;
    one_wide[17] = 0.3;
    assert_eq!(
        Linear::new(&one_wide, inputs, None, DType::F32).unwrap().bytes(),
        wide_linear.bytes()
    );
}

#[test]
fn lookup_finds_the_rows_that_were_packed() {
    let weight = numbers(40 * 7, 7);
    let linear = Linear::new(&weight, 7, None, DType::F32).unwrap();
    let mut rows = Vec::new();
    linear.gather(&[39, 0, 17], &mut rows);
    assert_eq!(
        rows,
        [&weight[39 * 7..], &weight[..7], &weight[17 * 7..18 * 7]].concat()
    );
}

//! Products with quantized matrices on the first GPU; run where `SCONCE_TEST_DEVICE=cuda` says that there is one.

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::cpu::numbers;
use crate::cuda::quantized::{Activations, Quantized};
use crate::cuda::weights::address;

const INPUTS: usize = 256;

/// A part of a matrix in blocks of this type, on a device, and the numbers that it stands for.
fn part(dtype: GgmlDType, outputs: usize, device: &Device) -> (QTensor, Tensor) {
    let values = Tensor::from_vec(
        numbers(outputs * INPUTS, outputs as u32),
        (outputs, INPUTS),
        &Device::Cpu,
    )
    .unwrap();
    let quantized = QTensor::quantize(&values, dtype).unwrap();
    let placed = QStorage::from_data(quantized.data().unwrap(), device, dtype).unwrap();
    let placed = QTensor::new(placed, (outputs, INPUTS)).unwrap();
    (placed, quantized.dequantize(&Device::Cpu).unwrap())
}

fn product(dtype: DType, rows: usize, float_out: bool) {
    let device = Device::new_cuda_with_stream(0).unwrap();
    let stream = device.as_cuda_device().unwrap().cuda_stream();
    let (parts, values): (Vec<_>, Vec<_>) = [(GgmlDType::Q4_1, 96), (GgmlDType::Q6K, 32), (GgmlDType::Q8_0, 64)]
        .into_iter()
        .map(|(dtype, outputs)| part(dtype, outputs, &device))
        .unzip();
    let x = Tensor::from_vec(numbers(rows * INPUTS, 7), (rows, INPUTS), &Device::Cpu).unwrap();
    let expected = x.matmul(&Tensor::cat(&values, 0).unwrap().t().unwrap()).unwrap();
    let on_device = x.to_dtype(dtype).unwrap().to_device(&device).unwrap();
    let out_dtype = if float_out { DType::F32 } else { dtype };
    let out = Tensor::zeros(expected.shape(), out_dtype, &device).unwrap();
    let activations = Activations {
        dtype,
        device: &device,
        stream: &stream,
    };
    let matrix = Quantized::new(parts, INPUTS);
    // SAFETY: both tensors are whole and of these sizes.
    unsafe {
        let (from, to) = (address(&on_device).unwrap(), address(&out).unwrap());
        matrix.multiply(&activations, rows, from, to, float_out).unwrap();
    }
    let found = out.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (found, expected) = (flat(&found), flat(&expected));
    // Activations are rounded to 8 bits.
    let scale = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    for (found, expected) in found.iter().zip(&expected) {
        assert!(
            (found - expected).abs() < 0.02 * scale,
            "{dtype:?}, {rows} rows: {found} is not {expected}"
        );
    }
}

#[test]
fn a_quantized_product_is_that_of_the_numbers_it_stands_for() {
    if std::env::var("SCONCE_TEST_DEVICE").as_deref() != Ok("cuda") {
        return;
    }
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        // Few rows and many go through different kernels.
        for rows in [1, 5, 8, 9, 70] {
            product(dtype, rows, false);
            product(dtype, rows, true);
        }
    }
}

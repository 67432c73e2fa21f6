//! Each kernel against the plain arithmetic it stands for, on small odd shapes.
//!
//! Without a GPU a launch runs on the host: the same source, compiled with a C++ compiler and `kernels/emulate.h`. With
//! the `cuda` feature and `SCONCE_TEST_DEVICE=cuda` in the environment it runs on the first GPU.

mod attention;
mod elementwise;
#[cfg(feature = "cuda")]
mod model;
#[cfg(feature = "cuda")]
mod quantized;
mod sampling;

use half::{bf16, f16};

use crate::cpu::numbers;

/// What a kernel is launched with.
#[derive(Debug, Clone)]
pub enum Argument {
    Int(u32),
    Float(f32),
    Null,
    Buffer(Vec<u8>),
}

/// One launch of one kernel.
pub struct Launch<'a> {
    pub kernel: &'a str,
    pub grid: [u32; 3],
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Launch<'_> {
    /// Runs the kernel and gives its buffers as they are afterwards, in order.
    pub fn run(&self, arguments: &[Argument]) -> Vec<Vec<u8>> {
        #[cfg(feature = "cuda")]
        if std::env::var("SCONCE_TEST_DEVICE").as_deref() == Ok("cuda") {
            return device::run(self, arguments);
        }
        emulator::run(self, arguments)
    }
}

/// A number type of the kernels.
pub trait Element: Copy {
    const NAME: &'static str;
    /// Relative error of one rounding.
    const EPSILON: f32;
    fn bytes(value: f32) -> Vec<u8>;
    fn value(bytes: &[u8]) -> f32;
}

macro_rules! element {
    ($type:ty, $name:literal, $epsilon:expr, $from:expr, $to:expr) => {
        impl Element for $type {
            const NAME: &'static str = $name;
            const EPSILON: f32 = $epsilon;
            fn bytes(value: f32) -> Vec<u8> {
                let stored: $type = $from(value);
                stored.to_le_bytes().to_vec()
            }
            fn value(bytes: &[u8]) -> f32 {
                $to(<$type>::from_le_bytes(bytes.try_into().unwrap()))
            }
        }
    };
}
element!(f32, "float", 1.2e-7, |v: f32| v, |v: f32| v);
element!(bf16, "bf16", 4e-3, bf16::from_f32, bf16::to_f32);
element!(f16, "f16", 5e-4, f16::from_f32, f16::to_f32);

pub fn store<T: Element>(values: &[f32]) -> Argument {
    Argument::Buffer(values.iter().flat_map(|&value| T::bytes(value)).collect())
}

pub fn words(values: &[u32]) -> Argument {
    Argument::Buffer(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

pub fn int(value: usize) -> Argument {
    Argument::Int(value as u32)
}

pub fn load<T: Element>(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(size_of::<T>()).map(T::value).collect()
}

pub fn load_words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|&word| u32::from_le_bytes(word))
        .collect()
}

/// What a type keeps of numbers.
pub fn rounded<T: Element>(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| T::value(&T::bytes(value))).collect()
}

/// Fails unless the numbers agree to `tolerance`, relative to 1 or to the number.
pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(close, "element {index}: {found} is not {expected}");
    }
}

/// Launches on the host, through a program that is compiled once.
mod emulator {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::OnceLock;

    use super::{Argument, Launch};

    pub fn run(launch: &Launch, arguments: &[Argument]) -> Vec<Vec<u8>> {
        static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
        let (_, program) = PROGRAM.get_or_init(compile);
        let folder = tempfile::tempdir().unwrap();
        let (request, answer) = (folder.path().join("request"), folder.path().join("answer"));
        std::fs::write(&request, encode(launch, arguments)).unwrap();
        let output = Command::new(program).args([&request, &answer]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {said}", launch.kernel);
        let mut rest = std::fs::read(answer).unwrap();
        let buffers = arguments.iter().filter_map(|argument| match argument {
            Argument::Buffer(bytes) => {
                let after = rest.split_off(bytes.len());
                Some(std::mem::replace(&mut rest, after))
            }
            _ => None,
        });
        buffers.collect()
    }

    /// Compiles with the sanitizer for undefined behaviour; reading behind a buffer ends the program too.
    fn compile() -> (tempfile::TempDir, PathBuf) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/emulate.cpp");
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("emulate");
        let output = Command::new("c++")
            .args(["-std=c++20", "-O1", "-Wno-unknown-pragmas", "-fsanitize=undefined"])
            .args(["-fno-sanitize-recover=all", "-o"])
            .args([&program, &source])
            .output()
            .expect("the kernels' tests need a C++ compiler");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (folder, program)
    }

    fn encode(launch: &Launch, arguments: &[Argument]) -> Vec<u8> {
        let mut request = Vec::new();
        let mut word = |word: u32| request.extend(word.to_le_bytes());
        word(launch.kernel.len() as u32);
        request.extend(launch.kernel.as_bytes());
        let mut word = |word: u32| request.extend(word.to_le_bytes());
        launch.grid.iter().for_each(|&size| word(size));
        word(launch.block);
        word(launch.shared);
        word(arguments.len() as u32);
        for argument in arguments {
            match argument {
                Argument::Int(value) => request.extend([0, *value].map(u32::to_le_bytes).as_flattened()),
                Argument::Float(value) => request.extend([0, value.to_bits()].map(u32::to_le_bytes).as_flattened()),
                Argument::Buffer(bytes) => {
                    request.extend([1, bytes.len() as u32].map(u32::to_le_bytes).as_flattened());
                    request.extend(bytes);
                }
                Argument::Null => request.extend(2u32.to_le_bytes()),
            }
        }
        request
    }
}

/// Launches on the first GPU.
#[cfg(feature = "cuda")]
mod device {
    use candle_core::cuda_backend::cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg};

    use super::{Argument, Launch};
    use crate::cuda::kernels::find;

    /// An argument on the device.
    enum Held {
        Word(u32),
        Float(f32),
        Pointer(u64),
    }

    pub fn run(launch: &Launch, arguments: &[Argument]) -> Vec<Vec<u8>> {
        let context = CudaContext::new(0).unwrap();
        let stream = context.new_stream().unwrap();
        let function = find(&context, launch.kernel, launch.shared).unwrap();
        let mut buffers = Vec::new();
        let held: Vec<_> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Int(value) => Held::Word(*value),
                Argument::Float(value) => Held::Float(*value),
                Argument::Null => Held::Pointer(0),
                Argument::Buffer(bytes) => {
                    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
                    // No memory of no bytes can be had.
                    let bytes: &[u8] = if bytes.is_empty() { &[0] } else { bytes };
                    let buffer = stream.clone_htod(bytes).unwrap();
                    let pointer = buffer.device_ptr(&stream).0;
                    buffers.push(buffer);
                    Held::Pointer(pointer)
                }
            })
            .collect();
        let mut builder = stream.launch_builder(&function);
        for argument in &held {
            match argument {
                Held::Word(value) => builder.arg(value),
                Held::Float(value) => builder.arg(value),
                Held::Pointer(value) => builder.arg(value),
            };
        }
        let [x, y, z] = launch.grid;
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (launch.block, 1, 1),
            shared_mem_bytes: launch.shared,
        };
        // SAFETY: the same launch runs on the host, where touching what lies behind a buffer ends the program.
        unsafe { builder.launch(config) }.unwrap();
        buffers
            .iter()
            .map(|buffer| stream.clone_dtoh(buffer).unwrap())
            .collect()
    }
}

//! Tensors of a folder of safetensors files, single or sharded, read one at a time.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Deserialize;

use super::check_shape;
use crate::ModelError;

const SINGLE: &str = "model.safetensors";
/// The format's own bound of a header, in bytes.
const MOST_HEADER: u64 = 100_000_000;
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of all files of a folder, by name.
pub(crate) struct Folder {
    path: PathBuf,
    tensors: HashMap<String, Location>,
}

/// Where a tensor lies.
struct Location {
    file: PathBuf,
    /// Absolute offset in the file, in bytes.
    start: u64,
    info: TensorInfo,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Folder {
    /// Reads the headers of `model.safetensors`, or of every file that `model.safetensors.index.json` names.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let index = path.join(INDEX);
        let mut files = BTreeSet::new();
        if index.exists() {
            let text = std::fs::read_to_string(&index).map_err(|source| io(&index, source))?;
            let parsed: Index = serde_json::from_str(&text).map_err(|e| corrupt(&index, e))?;
            files.extend(parsed.weight_map.into_values());
        } else {
            files.insert(SINGLE.to_string());
        }
        let mut tensors = HashMap::new();
        for file in files {
            read_header(&path.join(file), &mut tensors)?;
        }
        Ok(Self {
            path: path.into(),
            tensors,
        })
    }

    /// See [`super::Weights::read`].
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        let missing = || ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.into(),
        };
        let Location {
            file: path,
            start,
            info,
        } = self.tensors.get(name).ok_or_else(missing)?;
        check_shape(path, name, shape, &info.shape)?;
        let decode = decoder(info.dtype).ok_or_else(|| ModelError::Unsupported {
            path: path.clone(),
            what: format!("type {} of tensor {name}", info.dtype),
            supported: "F32, F16 and BF16".into(),
        })?;
        // The header was checked: the range is as long as the type and shape say.
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        let mut file = File::open(path).map_err(|source| io(path, source))?;
        file.seek(SeekFrom::Start(*start)).map_err(|source| io(path, source))?;
        file.read_exact(&mut bytes)
            .map_err(|e| corrupt(path, format!("tensor {name}: {e}")))?;
        Ok(decode(&bytes))
    }
}

/// Adds one file's tensors. A header is its length in 8 bytes, then that many bytes of JSON, whose ranges the
/// `safetensors` crate checks against types and shapes. (The crate would have the whole file in memory.)
fn read_header(path: &Path, tensors: &mut HashMap<String, Location>) -> Result<(), ModelError> {
    let mut file = File::open(path).map_err(|source| io(path, source))?;
    let size = file.metadata().map_err(|source| io(path, source))?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|e| corrupt(path, e))?;
    let length = u64::from_le_bytes(length);
    if length > size.saturating_sub(8) {
        return Err(corrupt(
            path,
            format!("its header of {length} bytes is longer than the file"),
        ));
    }
    if length > MOST_HEADER {
        return Err(corrupt(
            path,
            format!("its header of {length} bytes is longer than the format's {MOST_HEADER}"),
        ));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|e| corrupt(path, e))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| corrupt(path, e))?;
    let data = 8 + length;
    if data.saturating_add(header.data_len() as u64) > size {
        return Err(corrupt(path, "its tensors end behind the end of the file"));
    }
    for (name, info) in header.tensors() {
        let location = Location {
            file: path.into(),
            start: data + info.data_offsets.0 as u64,
            info: info.clone(),
        };
        tensors.insert(name, location);
    }
    Ok(())
}

type Decode = fn(&[u8]) -> Vec<f32>;

/// How elements of a safetensors type become float32.
fn decoder(dtype: Dtype) -> Option<Decode> {
    fn elements<const N: usize>(bytes: &[u8], decode: fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|&chunk| decode(chunk)).collect()
    }
    match dtype {
        Dtype::F32 => Some(|bytes| elements(bytes, f32::from_le_bytes)),
        Dtype::F16 => Some(|bytes| elements(bytes, |b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Some(|bytes| elements(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        _ => None,
    }
}

fn io(path: &Path, source: std::io::Error) -> ModelError {
    ModelError::Io {
        path: path.into(),
        source,
    }
}

fn corrupt(path: &Path, reason: impl ToString) -> ModelError {
    ModelError::Corrupt {
        path: path.into(),
        reason: reason.to_string(),
    }
}

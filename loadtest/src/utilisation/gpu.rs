//! A GPU's load, through NVIDIA's management library, which is opened at run time where it is there: for servers on this
//! machine that do not tell of it themselves.

use nvml_wrapper::Nvml;

/// The management library, opened, and which GPU is meant.
#[derive(Debug)]
pub struct Gpu {
    nvml: Nvml,
    /// A number, or a GPU's unique name.
    name: String,
}

impl Gpu {
    /// The first of `CUDA_VISIBLE_DEVICES`, which is taken for the server's too, or else the machine's first; numbers are
    /// taken to count by PCI address, as CUDA's do with `CUDA_DEVICE_ORDER=PCI_BUS_ID` or where all GPUs are alike.
    pub fn open() -> Option<Self> {
        let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or("0".to_owned());
        Some(Self {
            nvml: Nvml::init().ok()?,
            name: visible.split(',').next()?.trim().to_owned(),
        })
    }

    /// The share of recent time in which a kernel ran, and the bytes in use.
    pub fn read(&self) -> Option<(f64, u64)> {
        let device = match self.name.parse() {
            Ok(index) => self.nvml.device_by_index(index),
            Err(_) => self.nvml.device_by_uuid(&*self.name),
        };
        let device = device.ok()?;
        let busy = device.utilization_rates().ok()?.gpu;
        Some((f64::from(busy) / 100.0, device.memory_info().ok()?.used))
    }
}

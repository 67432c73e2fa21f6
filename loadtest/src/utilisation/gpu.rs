//! The first GPU's load, through NVIDIA's management library, which is opened at run time where it is there.

use nvml_wrapper::Nvml;

/// The management library, opened.
#[derive(Debug)]
pub struct Gpu(Nvml);

impl Gpu {
    pub fn open() -> Option<Self> {
        Nvml::init().ok().map(Self)
    }

    /// The share of recent time in which a kernel ran, and the bytes in use.
    pub fn read(&self) -> Option<(f64, u64)> {
        let device = self.0.device_by_index(0).ok()?;
        let busy = device.utilization_rates().ok()?.gpu;
        Some((f64::from(busy) / 100.0, device.memory_info().ok()?.used))
    }
}

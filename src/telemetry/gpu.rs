//! An NVIDIA GPU's load, through NVIDIA's management library, which is opened at run time where it is there.

use nvml_wrapper::enum_wrappers::device::Clock;
use nvml_wrapper::{Device, Nvml};
use prometheus::core::{Collector, Desc};
use prometheus::{Gauge, Registry, proto::MetricFamily};

type Read = fn(&Device) -> Option<f64>;

/// What is read: name, meaning, and how.
const GAUGES: [(&str, &str, Read); 7] = [
    (
        "sconce_gpu_utilisation_ratio",
        "Share of recent time in which a kernel ran",
        |gpu| Some(f64::from(gpu.utilization_rates().ok()?.gpu) / 100.0),
    ),
    (
        "sconce_gpu_memory_utilisation_ratio",
        "Share of recent time in which the GPU's memory was read or written",
        |gpu| Some(f64::from(gpu.utilization_rates().ok()?.memory) / 100.0),
    ),
    (
        "sconce_gpu_memory_used_bytes",
        "Memory of the GPU in use, by anyone",
        |gpu| Some(gpu.memory_info().ok()?.used as f64),
    ),
    ("sconce_gpu_memory_bytes", "Memory of the GPU", |gpu| {
        Some(gpu.memory_info().ok()?.total as f64)
    }),
    ("sconce_gpu_power_watts", "Power that the GPU draws", |gpu| {
        Some(f64::from(gpu.power_usage().ok()?) / 1e3)
    }),
    (
        "sconce_gpu_sm_clock_hertz",
        "Clock of the GPU's multiprocessors",
        |gpu| Some(f64::from(gpu.clock_info(Clock::SM).ok()?) * 1e6),
    ),
    ("sconce_gpu_memory_clock_hertz", "Clock of the GPU's memory", |gpu| {
        Some(f64::from(gpu.clock_info(Clock::Memory).ok()?) * 1e6)
    }),
];

/// Names and meanings of all that may be read.
pub fn described() -> impl Iterator<Item = (&'static str, &'static str)> {
    GAUGES.iter().map(|&(name, meaning, _)| (name, meaning))
}

/// Adds the load of the GPU at this place on the PCI bus ([`sconce_models::pci_bus_id`]) to what the registry gathers, read
/// whenever it is asked for. Without the library or the GPU nothing is added; what a GPU does not tell is left out.
///
/// # Errors
/// When metrics of these names are there already.
pub fn register(registry: &Registry, bus_id: String) -> Result<(), prometheus::Error> {
    let Ok(nvml) = Nvml::init() else { return Ok(()) };
    if nvml.device_by_pci_bus_id(&*bus_id).is_err() {
        return Ok(());
    }
    let gauges = GAUGES.map(|(name, help, read)| Gauge::new(name, help).map(|gauge| (gauge, read)));
    let gauges = gauges.into_iter().collect::<Result<_, _>>()?;
    registry.register(Box::new(Gpu { nvml, bus_id, gauges }))
}

struct Gpu {
    nvml: Nvml,
    bus_id: String,
    gauges: Vec<(Gauge, Read)>,
}

impl Collector for Gpu {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges.iter().flat_map(|(gauge, _)| gauge.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let Ok(device) = self.nvml.device_by_pci_bus_id(&*self.bus_id) else {
            return Vec::new();
        };
        let read = self.gauges.iter().filter_map(|(gauge, read)| {
            gauge.set(read(&device)?);
            Some(gauge.collect())
        });
        read.flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_gpu_or_the_library_nothing_is_said() {
        let registry = Registry::new();
        // No bus has such a number, whatever this machine has.
        register(&registry, "0000ffff:ff:1f.0".to_owned()).unwrap();
        assert!(registry.gather().is_empty());
    }
}

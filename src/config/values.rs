//! Values that clap cannot read by itself: devices, durations, sizes.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a value was refused; clap puts the setting's name and the value in front.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ValueError {
    #[error("a device is `auto`, `cpu`, `cuda` or `cuda:N`")]
    Device,
    #[error("this build computes on the CPU only: use `cpu`")]
    NoCuda,
    #[error("a duration is a number and a unit (us, ms, s, m, h), such as `20ms` or `1.5s`")]
    Duration,
    #[error("the duration must be from {least:?} to {most:?}")]
    DurationRange { least: Duration, most: Duration },
    #[error("a size is a whole number and a unit (B, KB, MB, GB, KiB, MiB, GiB), such as `640MiB`")]
    Bytes,
    #[error("the size must be from {least} to {most} bytes")]
    BytesRange { least: u64, most: u64 },
    #[error("a block holds a power of two of tokens, from 1 to 256")]
    BlockSize,
    #[error("a share is a number from 0 to 1, such as `0.25`")]
    Share,
    #[error("a share above 0 is needed, such as `0.25`")]
    NoShare,
    #[error("a share of the GPU's memory is a number from 0.1 to 0.98")]
    GpuMemory,
    #[error("{0}")]
    LogFilter(String),
    #[error("this build sends no spans: build it with `--features otlp`")]
    NoOtlp,
    #[error("an endpoint is a URL such as `http://127.0.0.1:4318`")]
    Endpoint,
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The first GPU if this build and machine have one, else the CPU.
    Auto,
    Cpu,
    /// The GPU with this ordinal.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").ok_or(ValueError::Device)?;
                ordinal.parse().map(Device::Cuda).map_err(|_| ValueError::Device)
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A device that this build can use.
pub(super) fn device(text: &str) -> Result<Device, ValueError> {
    let device = text.parse()?;
    if matches!(device, Device::Cuda(_)) && !candle_core::utils::cuda_is_available() {
        return Err(ValueError::NoCuda);
    }
    Ok(device)
}

/// A duration such as `20ms`, `1.5s` or `0`.
pub(super) fn duration(text: &str, least: Duration, most: Duration) -> Result<Duration, ValueError> {
    let (number, unit) = split_unit(text);
    let seconds = match unit {
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "" if number == "0" => 1.0,
        _ => return Err(ValueError::Duration),
    };
    let number: f64 = number.parse().map_err(|_| ValueError::Duration)?;
    // More seconds than a Duration holds lie outside of every range too.
    let duration = Duration::try_from_secs_f64(number * seconds).unwrap_or(Duration::MAX);
    if (least..=most).contains(&duration) {
        Ok(duration)
    } else {
        Err(ValueError::DurationRange { least, most })
    }
}

/// A size in bytes such as `640MiB`, `2GB` or `1048576`.
pub(super) fn bytes(text: &str, least: u64, most: u64) -> Result<u64, ValueError> {
    let (number, unit) = split_unit(text);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KB" | "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(ValueError::Bytes),
    };
    let number: u64 = number.parse().map_err(|_| ValueError::Bytes)?;
    let size = number.saturating_mul(factor);
    if (least..=most).contains(&size) {
        Ok(size)
    } else {
        Err(ValueError::BytesRange { least, most })
    }
}

/// A share of a GPU's memory.
pub(super) fn gpu_memory(text: &str) -> Result<f64, ValueError> {
    let share = text.parse().map_err(|_| ValueError::GpuMemory)?;
    (0.1..=0.98)
        .contains(&share)
        .then_some(share)
        .ok_or(ValueError::GpuMemory)
}

/// Tokens in a KV-cache block.
pub(super) fn block_size(text: &str) -> Result<usize, ValueError> {
    match text.parse::<usize>() {
        Ok(size) if size.is_power_of_two() && size <= 256 => Ok(size),
        _ => Err(ValueError::BlockSize),
    }
}

/// A part of a whole, 0 to 1.
pub(super) fn share(text: &str) -> Result<f64, ValueError> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(ValueError::Share),
    }
}

/// A part of a whole, and not nothing.
pub(super) fn some_share(text: &str) -> Result<f64, ValueError> {
    share(text).and_then(|share| {
        if share > 0.0 {
            Ok(share)
        } else {
            Err(ValueError::NoShare)
        }
    })
}

/// A filter that `tracing` understands.
pub(super) fn log_filter(text: &str) -> Result<String, ValueError> {
    match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(ValueError::LogFilter(error.to_string())),
    }
}

/// A collector's base address, if this build can send to one.
pub(super) fn otlp_endpoint(text: &str) -> Result<String, ValueError> {
    match text.split_once("://") {
        _ if !cfg!(feature = "otlp") => Err(ValueError::NoOtlp),
        Some(("http" | "https", host)) if !host.is_empty() => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err(ValueError::Endpoint),
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn durations() {
        let read = |text| duration(text, Duration::ZERO, DAY);
        assert_eq!(read("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(read("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(read("10 m"), Ok(Duration::from_secs(600)));
        assert_eq!(read("250us"), Ok(Duration::from_micros(250)));
        assert_eq!(read("24h"), Ok(DAY));
        assert_eq!(read("0"), Ok(Duration::ZERO));
        for bad in ["", "20", "ms", "-1s", "1.2.3s", "1 day", "NaNs", "infs"] {
            assert_eq!(read(bad), Err(ValueError::Duration), "{bad}");
        }
        for far in ["25h", "99999999999999999999999999h"] {
            assert!(matches!(read(far), Err(ValueError::DurationRange { .. })), "{far}");
        }
    }

    #[test]
    fn sizes() {
        let read = |text| bytes(text, 1, 1 << 40);
        assert_eq!(read("640MiB"), Ok(640 << 20));
        assert_eq!(read("2GB"), Ok(2_000_000_000));
        assert_eq!(read("4096"), Ok(4096));
        for bad in ["", "2G", "1.5GiB", "-1", "GiB", "2 gigabytes"] {
            assert_eq!(read(bad), Err(ValueError::Bytes), "{bad}");
        }
        for far in ["0", "99999999999GiB"] {
            assert!(matches!(read(far), Err(ValueError::BytesRange { .. })), "{far}");
        }
    }

    #[test]
    fn devices() {
        for device in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(3)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda0", "CPU"] {
            assert_eq!(bad.parse::<Device>(), Err(ValueError::Device), "{bad}");
        }
    }

    #[test]
    fn block_sizes_are_powers_of_two() {
        let good: Vec<usize> = (0..=600).filter(|n| block_size(&n.to_string()).is_ok()).collect();
        assert_eq!(good, [1, 2, 4, 8, 16, 32, 64, 128, 256]);
    }
}

//! How much memory there is.

#[cfg(target_os = "linux")]
use std::fs;
use std::{fmt, num::NonZeroUsize, thread};

use candle_core::Device;

use crate::{DeviceChoice, Error, Result};

/// Where memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Cuda,
    Metal,
}

impl DeviceKind {
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            Device::Cuda(_) => Self::Cuda,
            Device::Metal(_) => Self::Metal,
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        })
    }
}

/// The memory that an edit may take, in bytes, and what there is beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub kind: DeviceKind,
    /// Of the device that computes.
    pub device: u64,
    /// Of the host, where that is another.
    pub host: u64,
    /// Whether the device's is what somebody said, and not what is free.
    pub is_limit: bool,
    /// Of the CPU.
    pub cores: usize,
}

impl Budget {
    /// What is free now, less a twentieth for what nobody counts (pieces between tensors, other programs), or `limit` instead on
    /// the device that computes. Nothing is known of Metal's: there all memory counts as free without a limit.
    pub fn of(device: &Device, limit: Option<u64>) -> Self {
        let usable = |free: Option<u64>| free.map_or(u64::MAX, |free| free / 20 * 19);
        let (host, free) = (usable(free_of_host()), usable(free_of(device)));
        let (kind, device) = (DeviceKind::of(device), limit.unwrap_or(free));
        Self { kind, device, host, is_limit: limit.is_some(), cores: cores() }
    }
}

impl Budget {
    /// What this leaves to each if the host's memory, where it is known, is shared with as many others.
    pub fn beside(self, others: usize) -> Self {
        let host = if self.host == u64::MAX { self.host } else { self.host / (1 + others as u64) };
        Self { host, ..self }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Bytes that are free on a device now, where that is known.
pub(crate) fn free_of(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu => free_of_host(),
        Device::Cuda(_) => free_of_cuda(device),
        Device::Metal(_) => None,
    }
}

impl Budget {
    /// The same for a device that need not be here, if `limit` says how much memory it has.
    ///
    /// # Errors
    /// A device that is not here, without a limit.
    pub fn on(choice: DeviceChoice, limit: Option<u64>) -> Result<Self> {
        let kind = match choice {
            DeviceChoice::Auto | DeviceChoice::Cpu => DeviceKind::Cpu,
            DeviceChoice::Cuda(_) => DeviceKind::Cuda,
            DeviceChoice::Metal => DeviceKind::Metal,
        };
        match (choice.open(), limit) {
            (Ok((device, _)), limit) => Ok(Self::of(&device, limit)),
            (Err(_), Some(limit)) => {
                let host = free_of_host().unwrap_or(u64::MAX);
                Ok(Self { kind, device: limit, host, is_limit: true, cores: cores() })
            }
            (Err(_), None) => Err(Error::BadRequest(format!(
                "there is no {kind} device here; say by --vram-limit how much memory it has, e.g. --vram-limit 8G"
            ))),
        }
    }
}

#[cfg(feature = "cuda")]
fn free_of_cuda(device: &Device) -> Option<u64> {
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    context.mem_get_info().ok().map(|(free, _)| free as u64)
}

#[cfg(not(feature = "cuda"))]
fn free_of_cuda(_: &Device) -> Option<u64> {
    None
}

/// What the system can give without swapping, within the limit of the control group that this process is in.
#[cfg(target_os = "linux")]
fn free_of_host() -> Option<u64> {
    let field = |file: &str, name: &str| -> Option<u64> {
        let text = fs::read_to_string(file).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
    };
    let available = field("/proc/meminfo", "MemAvailable:")?.saturating_mul(1024);
    // Of version 2; where there is no limit the file says `max` or is not there.
    let group = || -> Option<u64> {
        let number = |file: &str| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
        let used = number("/sys/fs/cgroup/memory.current")?;
        let cached = field("/sys/fs/cgroup/memory.stat", "inactive_file ").unwrap_or(0);
        Some(number("/sys/fs/cgroup/memory.max")?.saturating_sub(used.saturating_sub(cached)))
    };
    Some(group().map_or(available, |group| group.min(available)))
}

#[cfg(not(target_os = "linux"))]
fn free_of_host() -> Option<u64> {
    None
}

/// Gives memory that was freed back to the system: the C library keeps pieces between those that are in use, which after a
/// stage can be a part of its weights.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(keep: usize) -> i32;
        }
        // SAFETY: as malloc_trim(3) has it: may be called at any time, by any thread.
        unsafe { malloc_trim(0) };
    }
}

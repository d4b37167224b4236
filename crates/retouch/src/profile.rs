//! Where the time of an edit went, for those who want it to be less.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    time::Duration,
};

use retouch_kernels::{Operation, Profiled, Total};
use retouch_weights::bytes_read;

/// The stages of all edits since the profile was last taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// In the order in which they are first done.
    pub stages: Vec<StageProfile>,
    /// The fastest that the device was seen to multiply matrices, in floating-point operations per second.
    pub peak_flops: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StageProfile {
    pub name: &'static str,
    /// All of it: operations, loading of weights, and what lies between.
    pub time: Duration,
    /// Bytes of weights read from their files.
    pub read: u64,
    /// Those that took longest first.
    pub operations: Vec<(Operation, Total)>,
}

impl StageProfile {
    /// Floating-point operations of the stage's matrix products.
    pub fn flops(&self) -> f64 {
        self.operations.iter().map(|(_, total)| total.flops).sum()
    }

    /// Time outside of operations.
    pub fn outside(&self) -> Duration {
        self.time.saturating_sub(self.operations.iter().map(|(_, total)| total.time).sum())
    }
}

/// A stage's name, its time, the bytes that it read and its operations.
type Recorded = (&'static str, Duration, u64, BTreeMap<Operation, Total>);

/// Assigns operations to stages.
#[derive(Debug)]
pub(crate) struct Recorder {
    profiled: &'static Profiled,
    peak_flops: f64,
    /// When the last stage ended.
    read: Cell<u64>,
    stages: RefCell<Vec<Recorded>>,
}

impl Recorder {
    pub fn new(profiled: &'static Profiled, peak_flops: f64) -> Self {
        Self { profiled, peak_flops, read: Cell::new(bytes_read()), stages: RefCell::default() }
    }

    /// What was done since the last call belongs to `name`, which took so long.
    pub fn end(&self, name: &'static str, time: Duration) {
        let done = self.profiled.take();
        let mut stages = self.stages.borrow_mut();
        let index = stages.iter().position(|stage| stage.0 == name).unwrap_or_else(|| {
            stages.push((name, Duration::ZERO, 0, BTreeMap::new()));
            stages.len() - 1
        });
        let (_, total_time, read, operations) = &mut stages[index];
        *total_time += time;
        let all_read = bytes_read();
        *read += all_read - self.read.replace(all_read);
        for (operation, more) in done {
            let total = operations.entry(operation).or_default();
            total.calls += more.calls;
            total.time += more.time;
            total.flops += more.flops;
            total.bytes += more.bytes;
        }
    }

    pub fn take(&self) -> Profile {
        let stages = self.stages.take().into_iter().map(|(name, time, read, operations)| {
            let mut operations: Vec<_> = operations.into_iter().collect();
            operations.sort_by_key(|(_, total)| std::cmp::Reverse(total.time));
            StageProfile { name, time, read, operations }
        });
        Profile { stages: stages.collect(), peak_flops: self.peak_flops }
    }
}

//! What the service counts, for Prometheus.

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};
use retouch::Timings;

use crate::jobs::job::Status;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabel {
    stage: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabel {
    device: String,
}

pub struct Metrics {
    registry: Registry,
    pub queue_depth: Gauge,
    pub running: Gauge,
    jobs: Family<StatusLabel, Counter>,
    errors: Family<KindLabel, Counter>,
    stages: Family<StageLabel, Histogram>,
    free_memory: Family<DeviceLabel, Gauge>,
    images: Counter,
}

/// From a hundredth of a second to twenty minutes.
fn stage_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.01, 2.0, 18))
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("retouch");
        let queue_depth = Gauge::default();
        registry.register("queue_depth", "Jobs that wait", queue_depth.clone());
        let running = Gauge::default();
        registry.register("jobs_running", "Jobs that are being done", running.clone());
        let jobs = Family::default();
        registry.register("jobs", "Jobs that have ended", jobs.clone());
        let images = Counter::default();
        registry.register("images", "Images made", images.clone());
        let errors = Family::default();
        registry.register("errors", "Requests refused and jobs failed", errors.clone());
        let stages = Family::new_with_constructor(stage_buckets as fn() -> Histogram);
        registry.register_with_unit("stage", "Time in each stage of a job", Unit::Seconds, stages.clone());
        let free_memory = Family::default();
        registry.register_with_unit(
            "device_memory_free",
            "Memory free on the device",
            Unit::Bytes,
            free_memory.clone(),
        );
        Self { registry, queue_depth, running, jobs, errors, stages, free_memory, images }
    }

    pub fn ended(&self, status: Status) {
        self.jobs.get_or_create(&StatusLabel { status: status.name() }).inc();
    }

    pub fn error(&self, kind: &'static str) {
        self.errors.get_or_create(&KindLabel { kind }).inc();
    }

    pub fn image(&self) {
        self.images.inc();
    }

    pub fn stages(&self, timings: &Timings) {
        let Timings { text_seconds, reference_seconds, load_seconds, steps_seconds, decode_seconds, .. } = *timings;
        for (stage, seconds) in [
            ("text", text_seconds),
            ("reference", reference_seconds),
            ("load", load_seconds),
            ("steps", steps_seconds),
            ("decode", decode_seconds),
        ] {
            self.stages.get_or_create(&StageLabel { stage }).observe(seconds);
        }
    }

    pub fn free_memory(&self, device: &str, bytes: u64) {
        self.free_memory.get_or_create(&DeviceLabel { device: device.into() }).set(bytes as i64);
    }

    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a text cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

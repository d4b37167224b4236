//! Noise and schedules against the reference implementation's, bit for bit.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{Device, Tensor};
use retouch_sampler::{Schedule, SchedulerConfig, TorchGenerator};
use serde::{Deserialize, de::DeserializeOwned};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/small").join(name)
}

fn json<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&fs::read(fixture(name)).unwrap()).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// FNV-1a, 64 bits, over the little-endian bytes.
fn fnv1a(values: &[f32]) -> String {
    let hash = values
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

#[test]
fn noise_has_the_bits_of_torch() {
    #[derive(Deserialize)]
    struct Case {
        name: String,
        seed: u64,
        n: usize,
        fnv1a: String,
    }
    let stored: HashMap<String, Tensor> =
        candle_core::safetensors::load(fixture("randn.safetensors"), &Device::Cpu).unwrap();
    let stored = |name: String| bits(&stored[&name].to_vec1::<f32>().unwrap());
    let cases: Vec<Case> = json("randn.json");
    assert!(cases.len() >= 20);
    for case in cases {
        let drawn = TorchGenerator::new(case.seed).normal(case.n);
        if case.n <= 1024 {
            assert_eq!(bits(&drawn), stored(case.name.clone()), "{}", case.name);
        } else {
            assert_eq!(bits(&drawn[..64]), stored(format!("{}.first", case.name)), "{}", case.name);
            assert_eq!(bits(&drawn[case.n - 64..]), stored(format!("{}.last", case.name)), "{}", case.name);
        }
        assert_eq!(fnv1a(&drawn), case.fnv1a, "{}", case.name);
    }
}

#[test]
fn sigmas_have_the_bits_of_the_reference_scheduler() {
    #[derive(Deserialize)]
    struct Case {
        steps: usize,
        tokens: usize,
        sigmas: Vec<String>,
    }
    let cases: Vec<Case> = json("sigmas.json");
    assert!(cases.len() >= 20);
    for case in cases {
        let schedule = Schedule::new(&SchedulerConfig::flux_dev(), case.steps, case.tokens);
        assert_eq!(bits(schedule.sigmas()), from_hex(&case.sigmas), "{} steps, {} tokens", case.steps, case.tokens);
    }
}

fn from_hex(values: &[String]) -> Vec<u32> {
    values.iter().map(|hex| u32::from_str_radix(hex, 16).unwrap()).collect()
}

#[test]
fn what_a_configuration_leaves_out_is_as_in_the_reference_scheduler() {
    #[derive(Deserialize)]
    struct Case {
        config: SchedulerConfig,
        steps: usize,
        tokens: usize,
        sigmas: Vec<String>,
    }
    let cases: Vec<Case> = json("sigmas_by_config.json");
    assert!(cases.len() >= 20);
    for Case { config, steps, tokens, sigmas } in cases {
        let schedule = Schedule::new(&config, steps, tokens);
        assert_eq!(bits(schedule.sigmas()), from_hex(&sigmas), "{config:?}, {steps} steps, {tokens} tokens");
    }
}

//! What can be known of cuDNN without a GPU: that its headers have our numbers, and that it makes plans for GPUs that are described
//! to it. `scripts/cudnn-check.sh` runs these tests, with a driver that has no GPU.

use std::time::Instant;

use candle_core::DType;

use super::{
    super::tasks::{Attention, Convolution, Task},
    descriptor::Address,
    graph::memory,
    library::library,
    numbers::{CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_BACKEND_ENGINE_DESCRIPTOR, described},
    plan::{Plan, Target, plan},
};

/// A GPU as cuDNN describes it itself: its own limits, and those that all of these share.
fn gpu(name: &str, [version, multiprocessors, shared_memory, threads, megabytes, l2, clock, bus]: [u64; 8]) -> String {
    let blocks = threads / 64;
    format!(
        r#"{{"deviceName": "{name}", "deviceVer": {version}, "driverVer": 13000, "cudaDeviceId": 0, "pciDeviceId": 0,
        "multiProcessorCount": {multiprocessors}, "smCountOrigin": 0, "totalGlobalMem": {memory}, "l2CacheSize": {l2},
        "smClockRateKHz": {clock}, "memClockRateKHz": 3000000, "memoryBusWidth": {bus}, "warpSize": 32, "regsPerBlock": 65536,
        "maxRegistersPerSM": 65536, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": {threads}, "maxCtasPerSM": {blocks},
        "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": {shared_memory}, "reservedSharedMemoryPerBlock": 1024,
        "oversizedSharedMemoryPerBlock": 0, "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
        "isTccDriver": 0, "supportCoopLaunch": 1}}"#,
        memory = megabytes << 20,
    )
}

/// By NVIDIA's data sheets and CUDA's table of compute capabilities.
fn gpus() -> [(&'static str, String); 4] {
    let of = |name, limits| (name, gpu(name, limits));
    [
        of("NVIDIA H200", [900, 132, 232_448, 2048, 143_000, 60 << 20, 1_980_000, 6144]),
        of("NVIDIA A100-SXM4-80GB", [800, 108, 166_912, 2048, 81_000, 40 << 20, 1_410_000, 5120]),
        of("NVIDIA GeForce RTX 4090", [890, 128, 101_376, 1536, 24_000, 72 << 20, 2_520_000, 384]),
        of("NVIDIA B200", [1000, 148, 232_448, 2048, 182_000, 126 << 20, 1_965_000, 8192]),
    ]
}

/// Of FLUX.1's shape, from a packed projection into rows of `width`.
fn attention(dtype: DType, [batch, heads, head_dim]: [usize; 3], [queries, keys]: [usize; 2], width: usize) -> Task {
    let (hidden, head) = ((heads * head_dim) as i64, head_dim as i64);
    let packed = [keys as i64 * 3 * hidden, 3 * hidden, head];
    let result = [(queries * width) as i64, width as i64, head];
    let (strides, scale) = ([packed, packed, packed, result], (head_dim as f32).powf(-0.5).to_bits());
    Task::Attention(Attention { dtype, batch, heads, queries, keys, head_dim, strides, scale })
}

fn convolution(dtype: DType, [channels, outputs]: [usize; 2], [height, width]: [usize; 2], kind: &str) -> Task {
    let (kernel, stride, rows, columns) = match kind {
        "point" => (1, 1, [0, 0], [0, 0]),
        "halving" => (3, 2, [0, 1], [0, 1]),
        "band" => (3, 1, [0, 0], [1, 1]),
        _ => (3, 1, [1, 1], [1, 1]),
    };
    Task::Convolution(Convolution { dtype, batch: 1, channels, height, width, outputs, kernel, stride, rows, columns })
}

fn tasks() -> Vec<(String, Task)> {
    let mut tasks = Vec::new();
    let flux = [1, 24, 128];
    for (dtype, shape, [queries, keys], width) in [
        (DType::BF16, flux, [8704, 8704], 3072),
        (DType::BF16, flux, [8704, 8704], 3072 + 12288),
        (DType::BF16, flux, [4096, 8704], 3072 + 12288),
        (DType::BF16, flux, [4608, 4608], 3072 + 12288),
        (DType::F16, flux, [4608, 4608], 3072),
        (DType::BF16, [2, 24, 128], [4129, 4129], 3072 + 12288),
        (DType::BF16, flux, [1, 8193], 3072),
        (DType::F16, flux, [1001, 777], 3072),
        (DType::BF16, [2, 3, 64], [130, 515], 192),
        (DType::BF16, [1, 1, 512], [16384, 16384], 512),
    ] {
        let [batch, heads, head_dim] = shape;
        let name = format!("attention {dtype:?} {batch}x{heads}x{head_dim}, {queries}x{keys}, rows of {width}");
        tasks.push((name, attention(dtype, shape, [queries, keys], width)));
    }
    for (dtype, channels, size, kind) in [
        (DType::BF16, [16, 512], [128, 128], "same"),
        (DType::BF16, [512, 512], [128, 128], "same"),
        (DType::BF16, [512, 512], [128, 128], "point"),
        (DType::BF16, [512, 512], [512, 512], "same"),
        (DType::BF16, [256, 256], [258, 1024], "band"),
        (DType::BF16, [128, 128], [1024, 1024], "same"),
        (DType::BF16, [128, 128], [1024, 1024], "halving"),
        (DType::BF16, [128, 3], [1024, 1024], "same"),
        (DType::BF16, [3, 128], [1024, 1024], "same"),
        (DType::F16, [512, 512], [94, 174], "same"),
        (DType::F32, [512, 512], [128, 128], "same"),
        (DType::F32, [128, 128], [130, 1024], "band"),
        (DType::F32, [256, 256], [512, 512], "halving"),
    ] {
        let name = format!("{kind} {dtype:?} {}->{} {}x{}", channels[0], channels[1], size[0], size[1]);
        tasks.push((name, convolution(dtype, channels, size, kind)));
    }
    tasks
}

/// cuDNN's number of the engine that a plan was made of.
fn engine(plan: &Plan) -> Result<i64, String> {
    let choice = plan.descriptor.parts().first().ok_or("a plan without a choice")?;
    let engines = choice.descriptors(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_BACKEND_ENGINE_DESCRIPTOR, 1)?;
    engines[0].number(described::CUDNN_ATTR_ENGINE_GLOBAL_INDEX)
}

#[test]
#[ignore = "needs cuDNN: scripts/cudnn-check.sh"]
fn the_numbers_are_those_of_the_header() {
    let header = std::env::var("CUDNN_HEADER").expect("CUDNN_HEADER: the path of cudnn_graph.h");
    let header = std::fs::read_to_string(header).unwrap();
    let mut declared = std::collections::HashMap::new();
    for line in header.lines() {
        let Some((names, value)) = line.split_once('=') else { continue };
        // Before the number the name, perhaps with a mark that it is an old one; what comes after is a comma or a comment.
        let digits: String = value.trim().chars().take_while(|c| c.is_ascii_digit() || *c == '-').collect();
        let Some(name) = names.split_whitespace().find(|word| word.starts_with("CUDNN_")) else { continue };
        if let Ok(number) = digits.parse::<i32>() {
            declared.insert(name, number);
        }
    }
    for (name, number) in described::all() {
        if *name == "CUDNN_CROSS_CORRELATION" {
            // Both modes are on one line.
            assert!(header.contains("CUDNN_CROSS_CORRELATION = 1"));
            continue;
        }
        assert_eq!(declared.get(name), Some(number), "{name}");
    }
}

#[test]
#[ignore = "needs cuDNN: scripts/cudnn-check.sh"]
fn plans_are_made_for_gpus_that_are_not_here() {
    let library = library().unwrap_or_else(|reason| panic!("cuDNN: {reason}"));
    println!("cuDNN {}\n\n| GPU | task | engine | workspace | made in |\n|---|---|---|---|---|", library.version());
    let mut refused = Vec::new();
    for (name, description) in gpus() {
        for (what, task) in tasks() {
            let start = Instant::now();
            match plan(library, &Target::Described(&description), &task) {
                Ok(plan) => {
                    let (time, kib) = (start.elapsed().as_millis(), plan.workspace.div_ceil(1024));
                    println!("| {name} | {what} | {} | {kib} KiB | {time} ms |", engine(&plan).unwrap());
                }
                Err(reason) => {
                    println!("| {name} | {what} | none: {reason} | | |");
                    // In f32 not all versions have an engine that does not round to TF32; ours are used then.
                    if task.dtype() != DType::F32 {
                        refused.push(format!("{what} on {name}: {reason}"));
                    }
                }
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    for tensors in [3, 5] {
        let addresses: Vec<Address> = (1..=tensors).map(|i| Address(i << 20)).collect();
        memory(library, &addresses, Address(0)).unwrap();
    }
}

#![no_main]

use libfuzzer_sys::fuzz_target;
use retouch_fuzz::{bounded, file, read_weights};

fuzz_target!(|input: &[u8]| {
    let path = file("weights.gguf", input);
    bounded(input, 16, 1 << 18, || read_weights(&path));
});

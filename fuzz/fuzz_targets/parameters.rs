#![no_main]

use libfuzzer_sys::fuzz_target;
use retouch::{Lora, ModelSource, image::read_parameters};
use retouch_fuzz::{bounded, unless_refused};

fuzz_target!(|input: &[u8]| {
    // Text in a PNG may be compressed, and is read up to 4 MiB.
    bounded(input, 64, 16 << 20, || {
        if let Some(Some(parameters)) = unless_refused(read_parameters(input, "input")) {
            ModelSource::of(&parameters);
            parameters.loras.iter().map(Lora::from).for_each(drop);
        }
    });
});

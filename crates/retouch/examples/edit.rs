//! Edits a picture with the embedded model, showing each step.
//!
//! `cargo run --release -p retouch-lib --example edit -- photo.jpg "make it black and white" edited.png`

use std::{env, error::Error, fs, path::Path};

use retouch::{Control, EditRequest, Engine, EngineOptions, Event, ModelSource, NoProgress, Seeds, image};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [source, prompt, output] = arguments.as_slice() else {
        return Err("give an image, a prompt and an output".into());
    };

    let request = EditRequest {
        prompt: prompt.clone(),
        image: Some(image::read_image(&fs::read(source)?, source)?),
        seeds: Seeds::Each(vec![42]),
        ..Default::default()
    };
    let mut engine = Engine::open(&ModelSource::default(), EngineOptions::default(), &mut NoProgress)?;
    let mut observer = |event: Event<'_>| {
        if let Event::Step { step, steps, sigma, .. } = event {
            eprintln!("step {} of {steps}, noise level {sigma:.3}", step + 1);
        }
        Control::Continue // Control::Cancel would end the edit here
    };
    for edited in engine.edit(&request, &mut observer)?.images {
        let png = image::encode(&edited.pixels, image::OutputFormat::Png, None, Some(&edited.parameters))?;
        image::write_atomically(Path::new(output), &png, true)?;
    }
    Ok(())
}

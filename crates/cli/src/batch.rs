//! `retouch edit --batch`: one engine, many edits.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{
    args::CommonArgs,
    console::Console,
    edit::{Job, Session, Source, open},
    failure::{Failure, Result},
    files::{self, Output, display},
    settings::SettingsArgs,
};

/// Does the edits of a JSON Lines file one after the other. One that fails is reported and does not keep the rest.
pub fn run(list: &Path, common: &CommonArgs, console: &Console) -> Result<()> {
    let text = String::from_utf8(files::read(list)?)
        .map_err(|_| Failure::Failed(format!("{}: not a text file in UTF-8", display(list))))?;
    let lines: Vec<_> = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return Err(Failure::Failed(format!("{}: no edit is in it; give one JSON object per line", display(list))));
    }
    console.catch_interrupts()?;
    let mut engine = open(&common.model.source(None), &common.run, console)?;
    let keep_loaded = common.run.keep_loaded;
    let mut session = Session { engine: &mut engine, console, json: common.output.json, keep_loaded };
    let mut failed = false;
    for (number, line) in lines {
        match Line::parse(line).and_then(|line| line.job(common)).and_then(|job| session.run(job, None)) {
            Ok(()) => {}
            Err(Failure::Interrupted) => return Err(Failure::Interrupted),
            Err(failure) => {
                let message = failure.message().unwrap_or_default();
                console.failure(&Failure::Failed(format!("{} line {}: {message}", display(list), number + 1)));
                failed = true;
            }
        }
    }
    if failed { Err(Failure::Reported) } else { Ok(()) }
}

/// A line of the file.
#[derive(Debug)]
struct Line {
    image: Option<PathBuf>,
    prompt: String,
    output: Option<PathBuf>,
    settings: SettingsArgs,
}

impl Line {
    fn parse(line: &str) -> Result<Self> {
        let bad = |reason: String| Failure::Usage(format!("not a usable edit: {reason}"));
        let mut object: Map<String, Value> = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        let mut text = |key: &str| match object.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(bad(format!("`{key}` must be a text"))),
        };
        let (image, prompt, output) = (text("image")?, text("prompt")?, text("output")?);
        Ok(Self {
            image: image.map(PathBuf::from),
            prompt: prompt.ok_or_else(|| bad("`prompt` is missing".to_string()))?,
            output: output.map(PathBuf::from),
            settings: serde_json::from_value(Value::Object(object)).map_err(|e| bad(e.to_string()))?,
        })
    }

    /// With what the line leaves out taken from the flags.
    fn job(self, common: &CommonArgs) -> Result<Job> {
        let request = self.settings.or(&common.settings).request(self.prompt)?;
        if self.output.as_deref().is_some_and(files::is_stdio) || self.image.as_deref().is_some_and(files::is_stdio) {
            return Failure::usage("a batch reads and writes files, not standard input and output");
        }
        let source = match self.image {
            Some(path) => Some(Source { picture: files::read_picture(&path)?, path }),
            None => None,
        };
        let path = source.as_ref().map(|source| source.path.as_path());
        let output = Output::plan(&common.output, self.output.as_deref(), path, request.seeds.images())?;
        Job::new(request, source, output, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_image_prompt_output_and_options() {
        let line = Line::parse(r#"{"image": "a.png", "prompt": "bluer", "output": "b.png", "seed": [1, 2]}"#).unwrap();
        assert_eq!((line.image, line.output), (Some("a.png".into()), Some("b.png".into())));
        assert_eq!((line.prompt.as_str(), line.settings.seed), ("bluer", vec![1, 2]));
    }

    #[test]
    fn lines_that_are_no_edits_are_refused() {
        for line in ["", "7", "{}", r#"{"prompt": 3}"#, r#"{"prompt": "x", "colour": "blue"}"#, r#"{"prompt": "x""#] {
            assert!(matches!(Line::parse(line), Err(Failure::Usage(_))), "{line}");
        }
    }
}

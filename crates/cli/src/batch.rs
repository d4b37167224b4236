//! `retouch edit --batch`: one engine, many edits.

use std::path::{Path, PathBuf};

use retouch::{EditRequest, ModelSource};
use serde_json::{Map, Value};

use crate::{
    args::CommonArgs,
    console::Console,
    edit::{Job, Session, Source, note_profile, open},
    failure::{Failure, Result},
    files::{self, Output, display},
    settings::SettingsArgs,
};

/// Does the edits of a JSON Lines file one after the other. A line that is none ends it before the first; an edit that
/// fails is reported and does not keep the rest.
pub fn run(list: &Path, common: &CommonArgs, console: &Console) -> Result<()> {
    let at = |number: usize, failure: Failure| {
        format!("{} line {number}: {}", display(list), failure.message().unwrap_or_default())
    };
    let text = String::from_utf8(files::read(list)?)
        .map_err(|_| Failure::Failed(format!("{}: not a text file in UTF-8", display(list))))?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let edit = |(number, line)| match Edit::parse(line, common) {
        Ok(edit) => Ok((number, edit)),
        Err(failure) => Err(Failure::Usage(at(number, failure))),
    };
    let edits = lines.map(edit).collect::<Result<Vec<_>>>()?;
    if edits.is_empty() {
        return Err(Failure::Failed(format!("{}: no edit is in it; give one JSON object per line", display(list))));
    }
    console.catch_signals()?;
    let mut engine = open(&common.model.source(ModelSource::default()), &common.run, console)?;
    let keep_loaded = common.run.keep_loaded;
    let mut session = Session { engine: &mut engine, console, json: common.output.json, keep_loaded };
    let mut failed = false;
    for (number, edit) in edits {
        match edit.job(common).and_then(|job| session.run(job, None)) {
            Ok(()) => {}
            Err(interrupted @ Failure::Interrupted { .. }) => return Err(interrupted),
            Err(failure) => {
                console.failure(&Failure::Failed(at(number, failure)));
                failed = true;
            }
        }
    }
    note_profile(&engine, console);
    console.note_peak_memory();
    if failed { Err(Failure::Reported) } else { Ok(()) }
}

/// A line of the file, with what it leaves out taken from the flags.
#[derive(Debug)]
struct Edit {
    request: EditRequest,
    image: Option<PathBuf>,
    output: Option<PathBuf>,
}

impl Edit {
    fn parse(line: &str, common: &CommonArgs) -> Result<Self> {
        let bad = |reason: String| Failure::Usage(format!("not a usable edit: {reason}"));
        // The parser sees one line only, which is not the first of the file.
        let malformed = |e: serde_json::Error| bad(e.to_string().replace(" at line 1 column ", " at column "));
        let mut object: Map<String, Value> = serde_json::from_str(line).map_err(malformed)?;
        let mut text = |key: &str| match object.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(bad(format!("`{key}` must be a text"))),
        };
        let (image, prompt, output) = (text("image")?, text("prompt")?, text("output")?);
        let prompt = prompt.ok_or_else(|| bad("`prompt` is missing".to_string()))?;
        let settings: SettingsArgs = serde_json::from_value(Value::Object(object)).map_err(malformed)?;
        let [image, output] = [image, output].map(|path| path.map(PathBuf::from));
        if [&image, &output].into_iter().flatten().any(|path| files::is_stdio(path)) {
            return Failure::usage("a batch reads and writes files, not standard input and output");
        }
        Ok(Self { request: settings.or(&common.settings).request(prompt)?, image, output })
    }

    /// Only now are files looked at: an edit can start from the result of one before it.
    fn job(self, common: &CommonArgs) -> Result<Job> {
        let Self { request, image, output } = self;
        let output = Output::plan(&common.output, output.as_deref(), image.as_deref(), request.seeds.images())?;
        let source = match image {
            Some(path) => Some(Source { picture: files::read_picture(&path)?, path }),
            None => None,
        };
        Job::new(request, source, output, None)
    }
}

#[cfg(test)]
mod tests {
    use retouch::Seeds;

    use super::*;
    use crate::args::EDIT_EXAMPLES;

    fn parse(line: &str) -> Result<Edit> {
        Edit::parse(line, &CommonArgs::default())
    }

    #[test]
    fn a_line_has_image_prompt_output_and_options() {
        let edit = parse(r#"{"image": "a.png", "prompt": "bluer", "output": "b.png", "seed": [1, 2]}"#).unwrap();
        assert_eq!((edit.image, edit.output), (Some("a.png".into()), Some("b.png".into())));
        assert_eq!((edit.request.prompt.as_str(), edit.request.seeds), ("bluer", Seeds::Each(vec![1, 2])));
    }

    #[test]
    fn a_line_wins_over_the_flags() {
        let settings = SettingsArgs { num_images: Some(3), steps: Some(4), ..Default::default() };
        let common = CommonArgs { settings, ..Default::default() };
        let edit = Edit::parse(r#"{"prompt": "bluer", "seed": [5, 9], "steps": 8}"#, &common).unwrap();
        assert_eq!((edit.request.seeds, edit.request.steps), (Seeds::Each(vec![5, 9]), Some(8)));
        let edit = Edit::parse(r#"{"prompt": "bluer", "seed": 5}"#, &common).unwrap();
        assert_eq!((edit.request.seeds, edit.request.steps), (Seeds::Each(vec![5, 6, 7]), Some(4)));
    }

    #[test]
    fn the_example_of_the_help_is_an_edit() {
        let example = EDIT_EXAMPLES.lines().map(str::trim).find(|line| line.starts_with('{')).unwrap();
        assert_eq!(parse(example).unwrap().request.steps, Some(20));
        // serde lists the fields that it takes.
        let refused = parse(r#"{"prompt": "x", "colour": "blue"}"#).unwrap_err();
        let (_, fields) = refused.message().unwrap().split_once("expected one of").unwrap();
        let fields: Vec<_> = fields.split('`').skip(1).step_by(2).collect();
        assert!(fields.len() > 8, "{fields:?}");
        for field in fields {
            assert!(EDIT_EXAMPLES.contains(field), "{field}");
        }
    }

    #[test]
    fn lines_that_are_no_edits_are_refused() {
        for line in [
            "",
            "7",
            "{}",
            r#"{"prompt": 3}"#,
            r#"{"prompt": "x", "colour": "blue"}"#,
            r#"{"prompt": "x""#,
            r#"{"prompt": "x", "steps": 0}"#,
            r#"{"prompt": "x", "image": "-"}"#,
        ] {
            assert!(matches!(parse(line), Err(Failure::Usage(_))), "{line}");
        }
    }
}

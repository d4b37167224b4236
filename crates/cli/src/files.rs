//! Files in and out: reading with a bound, naming results, writing them whole.

use std::{
    fs::File,
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
};

use retouch::{
    EditedImage, Error,
    image::{OutputFormat, RgbImage, check_writable, encode, read_image, write_atomically},
};

use crate::{
    args::OutputArgs,
    console::Console,
    failure::{Failure, Result},
};

/// Stands for standard input or output.
pub const STDIO: &str = "-";

/// The largest file that is read as an image: [`retouch::image::MAX_PIXELS`] of 16-bit RGBA, uncompressed.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// How messages name `path`.
pub fn display(path: &Path) -> String {
    if is_stdio(path) { "standard input".to_string() } else { path.display().to_string() }
}

pub fn is_stdio(path: &Path) -> bool {
    path.as_os_str() == STDIO
}

/// The bytes of a file, or of standard input for `-`.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = |source: io::Error| Failure::from(Error::Io { file: display(path), source });
    let mut bytes = Vec::new();
    let reader: Box<dyn Read> =
        if is_stdio(path) { Box::new(io::stdin().lock()) } else { Box::new(File::open(path).map_err(failed)?) };
    reader.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(Failure::Failed(format!("{}: larger than 1 GiB, which is no usable image", display(path))));
    }
    Ok(bytes)
}

/// The picture in a file, or on standard input for `-`.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    Ok(read_image(&read(path)?, &display(path))?)
}

/// Where the results of one request go.
#[derive(Debug, Clone)]
pub struct Output {
    place: Place,
    format: OutputFormat,
    quality: Option<u8>,
    force: bool,
    metadata: bool,
    /// How many images there will be, which the names depend on.
    images: usize,
}

#[derive(Debug, Clone)]
enum Place {
    Stdout,
    /// Exactly this name, but for a number where there are several images.
    Named(PathBuf),
    /// This stem in a folder, with a number where the name is taken.
    Free {
        folder: PathBuf,
        stem: String,
    },
}

impl Output {
    /// Settles the place for `images` results, and makes sure that they can be written there.
    ///
    /// `source` is the file that is edited, if there is one: default names start with its name.
    pub fn plan(args: &OutputArgs, output: Option<&Path>, source: Option<&Path>, images: usize) -> Result<Self> {
        let place = match output {
            Some(path) if is_stdio(path) => Place::Stdout,
            Some(path) if path.is_dir() => Place::Free { folder: path.to_path_buf(), stem: default_stem(source) },
            Some(path) => Place::Named(path.to_path_buf()),
            None => Place::Free { folder: PathBuf::new(), stem: default_stem(source) },
        };
        let format = format(args, &place)?;
        format.check_quality(args.quality)?;
        let plan =
            Self { place, format, quality: args.quality, force: args.force, metadata: !args.no_metadata, images };
        if let Some(dump) = &args.dump {
            plan.check_dump(dump)?;
        }
        plan.check(args.json)?;
        if let Some(dump) = &args.dump {
            check_writable(dump, args.force)?;
        }
        Ok(plan)
    }

    /// Refuses intermediates in the place of a result.
    fn check_dump(&self, dump: &Path) -> Result<()> {
        if is_stdio(dump) {
            return Failure::usage("--dump writes a file, not standard output; give a file name");
        }
        let taken = match &self.place {
            Place::Stdout => false,
            Place::Named(path) => (1..=self.images).any(|number| same_place(&self.numbered(path, number), dump)),
            Place::Free { .. } => self.free_names().take(self.images).any(|path| same_place(&path, dump)),
        };
        if taken {
            return Failure::usage(format!("{}: a result goes there; give --dump another name", dump.display()));
        }
        Ok(())
    }

    fn check(&self, json: bool) -> Result<()> {
        match &self.place {
            Place::Stdout if self.images > 1 => {
                Failure::usage("standard output takes one image; give a file name for several")
            }
            Place::Stdout if json => {
                Failure::usage("--json prints on standard output, where the image goes; give a file name")
            }
            Place::Stdout if io::stdout().is_terminal() => {
                Failure::usage("an image cannot be shown on a terminal; redirect standard output or give a file name")
            }
            Place::Stdout => Ok(()),
            Place::Named(path) => {
                (1..=self.images).try_for_each(|number| Ok(check_writable(&self.numbered(path, number), self.force)?))
            }
            Place::Free { .. } => Ok(check_writable(&self.free_name(), self.force)?),
        }
    }

    /// Writes image `number` (from 1) and says where it is now; nothing for standard output.
    pub fn write(&self, image: &EditedImage, number: usize, console: &Console) -> Result<Option<PathBuf>> {
        let parameters = self.metadata.then_some(&image.parameters);
        let bytes = encode(&image.pixels, self.format, self.quality, parameters)?;
        match &self.place {
            Place::Stdout => console.write(&bytes).map(|()| None),
            Place::Named(path) => {
                let path = self.numbered(path, number);
                write_atomically(&path, &bytes, self.force)?;
                Ok(Some(path))
            }
            Place::Free { .. } if self.force => {
                let path = self.candidate(number);
                write_atomically(&path, &bytes, true)?;
                Ok(Some(path))
            }
            // Somebody may take the name while we compute: the result goes to the next one then.
            Place::Free { .. } => loop {
                let path = self.free_name();
                match write_atomically(&path, &bytes, false) {
                    Err(_) if path.exists() => {}
                    written => return written.map(|()| Some(path)).map_err(Failure::from),
                }
            },
        }
    }

    /// `photo.png`, or `photo-2.png` for the second of several.
    fn numbered(&self, path: &Path, number: usize) -> PathBuf {
        if self.images == 1 {
            return path.to_path_buf();
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
        path.with_file_name(format!("{stem}-{number}{extension}"))
    }

    /// The default name of image `number`: only the first of one image goes without its number.
    fn candidate(&self, number: usize) -> PathBuf {
        let Place::Free { folder, stem } = &self.place else { return PathBuf::new() };
        let number = if self.images == 1 && number == 1 { String::new() } else { format!("-{number}") };
        folder.join(format!("{stem}{number}.{}", self.format.extension()))
    }

    /// The default names that no file has.
    fn free_names(&self) -> impl Iterator<Item = PathBuf> {
        let taken = |path: &PathBuf| !self.force && path.symlink_metadata().is_ok();
        (1..).map(|number| self.candidate(number)).filter(move |path| !taken(path))
    }

    fn free_name(&self) -> PathBuf {
        self.free_names().next().unwrap_or_default()
    }
}

/// Whether two names, of files that need not exist, are of one place.
fn same_place(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let absent = || Some(folder.canonicalize().ok()?.join(path.file_name()?));
        path.canonicalize().ok().or_else(absent)
    };
    place(a).is_some_and(|a| place(b) == Some(a))
}

fn default_stem(source: Option<&Path>) -> String {
    match source {
        None => "generated".to_string(),
        Some(path) if is_stdio(path) => "image-edited".to_string(),
        Some(path) => format!("{}-edited", path.file_stem().unwrap_or_default().to_string_lossy()),
    }
}

/// The format asked for by flag or by name; the two must agree.
fn format(args: &OutputArgs, place: &Place) -> Result<OutputFormat> {
    let Place::Named(path) = place else { return Ok(args.format.unwrap_or_default()) };
    match (args.format, OutputFormat::from_path(path), path.extension()) {
        (Some(flag), Some(named), _) if flag != named => Failure::usage(format!(
            "{}: the name asks for {}, --format for {}; make them agree",
            path.display(),
            named.extension(),
            flag.extension()
        )),
        (Some(format), ..) | (None, Some(format), _) => Ok(format),
        (None, None, None) => Ok(OutputFormat::default()),
        (None, None, Some(extension)) => Failure::usage(format!(
            "{}: cannot write `.{}`; use .png, .jpg or .webp, or say which by --format",
            path.display(),
            extension.to_string_lossy()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn args() -> OutputArgs {
        OutputArgs::default()
    }

    fn plan(output: &Path, images: usize) -> Result<Output> {
        Output::plan(&args(), Some(output), Some(Path::new("holiday/photo.jpg")), images)
    }

    /// The default names of the next images in `folder`, made one after the other.
    fn next_names(folder: &Path, images: usize) -> Vec<String> {
        let plan = plan(folder, images).unwrap();
        let name = |_| {
            let path = plan.free_name();
            fs::write(&path, b"").unwrap();
            path.file_name().unwrap().to_string_lossy().into_owned()
        };
        (0..images).map(name).collect()
    }

    #[test]
    fn default_names_are_numbered_rather_than_taken() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(next_names(folder.path(), 1), ["photo-edited.png"]);
        assert_eq!(next_names(folder.path(), 1), ["photo-edited-2.png"]);
        assert_eq!(next_names(folder.path(), 2), ["photo-edited-1.png", "photo-edited-3.png"]);
        assert_eq!(next_names(folder.path(), 1), ["photo-edited-4.png"]);
    }

    #[test]
    fn default_names_come_from_the_source() {
        assert_eq!(default_stem(Some(Path::new("a/b.c.jpg"))), "b.c-edited");
        assert_eq!(default_stem(Some(Path::new(STDIO))), "image-edited");
        assert_eq!(default_stem(None), "generated");
    }

    #[test]
    fn a_given_name_is_kept_and_several_images_number_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.webp");
        let one = plan(&path, 1).unwrap();
        assert_eq!((one.numbered(&path, 1), one.format), (path.clone(), OutputFormat::Webp));
        let several = plan(&path, 3).unwrap();
        assert_eq!(several.numbered(&path, 3), folder.path().join("out-3.webp"));
        fs::write(folder.path().join("out-2.webp"), b"").unwrap();
        assert!(plan(&path, 3).is_err());
        assert!(plan(&path, 1).is_ok());
        let force = OutputArgs { force: true, ..args() };
        assert!(Output::plan(&force, Some(&path), None, 3).is_ok());
    }

    #[test]
    fn the_format_is_that_of_name_or_flag_and_they_must_agree() {
        let folder = tempfile::tempdir().unwrap();
        let format = |name: &str, flag: Option<OutputFormat>| {
            let args = OutputArgs { format: flag, ..args() };
            Output::plan(&args, Some(&folder.path().join(name)), None, 1).map(|plan| plan.format).ok()
        };
        use OutputFormat::*;
        assert_eq!(format("a.JPG", None), Some(Jpeg));
        assert_eq!(format("a.jpeg", Some(Jpeg)), Some(Jpeg));
        assert_eq!(format("a", None), Some(Png));
        assert_eq!(format("a", Some(Webp)), Some(Webp));
        assert_eq!(format("a.gif", Some(Png)), Some(Png));
        assert_eq!(format("a.gif", None), None);
        assert_eq!(format("a.png", Some(Jpeg)), None);
        let jpeg = OutputArgs { quality: Some(80), format: Some(Jpeg), ..args() };
        assert!(Output::plan(&jpeg, Some(folder.path()), None, 1).is_ok());
        let png = OutputArgs { quality: Some(80), ..args() };
        assert!(Output::plan(&png, Some(folder.path()), None, 1).is_err());
    }

    #[test]
    fn standard_output_takes_one_image_and_nothing_beside_it() {
        assert!(matches!(plan(Path::new(STDIO), 2), Err(Failure::Usage(_))));
        let json = OutputArgs { json: true, ..args() };
        assert!(matches!(Output::plan(&json, Some(Path::new(STDIO)), None, 1), Err(Failure::Usage(_))));
    }

    #[test]
    fn places_that_cannot_be_written_are_found_out_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        assert!(plan(&folder.path().join("missing/out.png"), 1).is_err());
        let file = folder.path().join("file.png");
        fs::write(&file, b"").unwrap();
        assert!(plan(&file, 1).is_err());
        assert!(plan(&file.join("out.png"), 1).is_err());
    }
}

//! Files in and out: reading with a bound, naming results, writing them whole.

use std::{
    fs::File,
    io::{self, IsTerminal, Read},
    path::{Path, PathBuf},
};

use image::RgbImage;
use retouch::{
    EditedImage, Error,
    image::{OutputFormat, check_writable, encode, read_image, write_atomically},
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
    Free { folder: PathBuf, stem: String },
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
        let plan = Self { place, format, quality: args.quality, force: args.force, metadata: !args.no_metadata, images };
        plan.check(args.json)?;
        Ok(plan)
    }

    fn check(&self, json: bool) -> Result<()> {
        match &self.place {
            Place::Stdout if self.images > 1 => {
                Failure::usage("standard output takes one image; give a file name for several")
            }
            Place::Stdout if json => Failure::usage("--json prints on standard output, where the image goes; give a file name"),
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

    /// The first default name that no file has.
    fn free_name(&self) -> PathBuf {
        let taken = |path: &PathBuf| !self.force && path.symlink_metadata().is_ok();
        (1..).map(|number| self.candidate(number)).find(|path| !taken(path)).unwrap_or_default()
    }
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

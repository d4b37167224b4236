//! The real binary, run in a folder of its own.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    ffi::OsStr,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use image::RgbImage;
use tempfile::TempDir;

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The random model of the fixtures, at sizes and steps that take no time.
pub fn tiny() -> Vec<String> {
    let model = fixtures().join("tiny-kontext").display().to_string();
    ["--model", &model, "--steps", "2", "--reference-size", "keep"].map(String::from).to_vec()
}

/// A working directory that disappears with the test.
pub struct Place(TempDir);

/// What a run left.
pub struct Ran {
    /// `None` where a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    /// The lines of standard output, after a success.
    pub fn lines(&self) -> Vec<&str> {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.text().lines().collect()
    }

    /// The one sentence by which it failed with `code`.
    pub fn sentence(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert!(self.stdout.is_empty(), "{:?}", self.text());
        let sentence = self.stderr.strip_prefix("error: ").unwrap_or_else(|| panic!("no error: {}", self.stderr));
        assert_eq!(sentence.trim_end().lines().count(), 1, "{sentence}");
        assert!(!sentence.contains("panicked") && !sentence.contains("bug in retouch"), "{sentence}");
        sentence.trim_end()
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let stderr = String::from_utf8(output.stderr).unwrap();
        Self { code: output.status.code(), stdout: output.stdout, stderr }
    }
}

impl Place {
    /// With `photo.png`, 64x48 pixels, in it.
    pub fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        photo().save(place.path("photo.png")).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The names of all files, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn pixels(&self, name: &str) -> RgbImage {
        image::open(self.path(name)).unwrap().into_rgb8()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The binary with this as its working directory, and without a hub or anything of the user's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.0.path())
            .env("HF_HOME", self.0.path().join("no-such-cache"))
            .env("HF_HUB_OFFLINE", "1")
            // No trace may show up even where one is asked for.
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn start(&self, args: &[&str]) -> Child {
        self.command(BINARY).args(args).spawn().unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        self.command(BINARY).args(args).output().unwrap().into()
    }

    pub fn run_with_input(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.command(BINARY).args(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap().into()
    }

    /// With the tiny model's options after `args`.
    pub fn tiny(&self, args: &[&str]) -> Ran {
        let tiny = tiny();
        self.run(&args.iter().copied().chain(tiny.iter().map(String::as_str)).collect::<Vec<_>>())
    }
}

pub const BINARY: &str = env!("CARGO_BIN_EXE_retouch");

pub fn photo() -> RgbImage {
    RgbImage::from_fn(64, 48, |x, y| image::Rgb([x as u8 * 4, y as u8 * 5, (x * y / 12) as u8]))
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

//! What the targets share: files to be read by path, as users give them, and a bound on what reading them may allocate.

mod bound;
mod weights;

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use tempfile::TempDir;

pub use bound::bounded;
pub use weights::read_weights;

/// A folder that is gone when the fuzzer ends; `TMPDIR=/dev/shm` keeps it in memory.
pub fn scratch() -> &'static Path {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().unwrap());
    FOLDER.path()
}

/// The input as a file of that name.
pub fn file(name: &str, input: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    fs::write(&path, input).unwrap();
    path
}

/// What was made of the input, if anything: a refusal must be one line that can be read.
pub fn unless_refused<T, E: Display>(result: Result<T, E>) -> Option<T> {
    result
        .map_err(|error| {
            let sentence = error.to_string();
            assert!(sentence.chars().count() < 4000 && !sentence.contains(char::is_control), "{sentence:?}");
        })
        .ok()
}

/// A file or a folder of the fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

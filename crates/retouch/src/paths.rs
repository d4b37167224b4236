//! How an image's parameters name files on disk: so that they are found from any folder, and without the user's name.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Stands for the home folder, at the beginning of a stored path.
const HOME: &str = "~";

/// The absolute path, from `~` where it is in the home folder.
pub fn to_stored(path: &Path) -> String {
    let absolute = fs::canonicalize(path).or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_path_buf());
    let in_home = home().and_then(|home| Some(Path::new(HOME).join(absolute.strip_prefix(home).ok()?)));
    in_home.unwrap_or(absolute).to_string_lossy().into_owned()
}

/// The path that was stored.
pub fn from_stored(stored: &str) -> PathBuf {
    let path = Path::new(stored);
    match (path.strip_prefix(HOME), home()) {
        (Ok(inside), Some(home)) => home.join(inside),
        _ => path.to_path_buf(),
    }
}

fn home() -> Option<PathBuf> {
    fs::canonicalize(env::home_dir()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_paths_are_absolute_and_lead_back() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        for path in [folder.path(), Path::new("src"), Path::new("../retouch")] {
            let stored = to_stored(path);
            assert!(stored.starts_with(HOME) || Path::new(&stored).is_absolute(), "{stored}");
            assert_eq!(from_stored(&stored), fs::canonicalize(path)?);
        }
        Ok(())
    }

    #[test]
    fn the_home_folder_is_not_named() {
        let Some(home) = home() else { return };
        assert_eq!(
            to_stored(&home.join("no-such-folder/model")),
            Path::new(HOME).join("no-such-folder/model").display().to_string()
        );
        assert_eq!(from_stored("owner/name"), Path::new("owner/name"));
    }
}

//! The files of results.

use std::{fs, io, path::PathBuf};

use super::{Result, Store, StoreError};

impl Store {
    /// The folder of a job's results.
    pub(super) fn images(&self, id: &str) -> PathBuf {
        self.folder.join("images").join(id)
    }

    /// The file of a result; `name` is one that [`crate::jobs::files`] makes.
    pub fn image_file(&self, id: &str, name: &str) -> PathBuf {
        self.images(id).join(name)
    }

    /// Writes a file of a job's results, whole or not at all.
    pub fn write_image(&self, id: &str, name: &str, bytes: &[u8]) -> Result<()> {
        let folder = self.images(id);
        let create = || match fs::create_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error),
            // The folder's own name is durable once that of all jobs is.
            Ok(()) => fs::File::open(self.folder.join("images"))?.sync_all(),
        };
        create().map_err(|e| StoreError::io(&folder, &e))?;
        let path = folder.join(name);
        let write = || -> io::Result<()> {
            let mut file = tempfile::NamedTempFile::new_in(&folder)?;
            io::Write::write_all(&mut file, bytes)?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            // The name itself is durable once its folder is.
            fs::File::open(&folder)?.sync_all()
        };
        write().map_err(|e| StoreError::io(&path, &e))
    }

    /// Removes the pictures of jobs that are gone: what a removal left that was interrupted.
    pub fn remove_orphans(&self) -> Result<()> {
        let images = self.folder.join("images");
        let failed = |e: io::Error| StoreError::io(&images, &e);
        for entry in fs::read_dir(&images).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(id) = name.to_str()
                && self.job(id)?.is_none()
            {
                self.remove(id)?;
            }
        }
        Ok(())
    }
}

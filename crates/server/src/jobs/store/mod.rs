//! Jobs on disk: a database for what was asked and what came of it, files for the results.
//!
//! `STATE/jobs.sqlite` holds the jobs with their source images; a job is durable when [`Store::accept`] returns.
//! `STATE/images/ID/` holds a job's results, each written under another name first.

mod images;
mod records;
mod webhooks;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OptionalExtension, named_params, params};

pub use records::{Acceptance, Accepted, Input, Record, Webhook};
pub use webhooks::DueWebhook;

use super::job::Status;
use records::{COLUMNS, record, with_images};

/// Why something cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the disk of the service is full")]
    Full,
    #[error("{0}")]
    Failed(String),
}

pub type Result<T> = std::result::Result<T, StoreError>;

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            _ => Self::Failed(format!("the database of jobs: {error}")),
        }
    }
}

impl StoreError {
    fn io(path: &Path, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Failed(format!("{}: {error}", path.display())),
        }
    }
}

pub struct Store {
    folder: PathBuf,
    write: Mutex<Connection>,
    /// A reader does not wait for writers.
    read: Mutex<Connection>,
    /// Held as long as the service runs: two must not share a folder.
    _lock: fs::File,
}

const SCHEMA: &str = include_str!("schema.sql");

impl Store {
    /// Opens the folder, making it if needed.
    ///
    /// # Errors
    /// A folder that cannot be used, or that another service uses.
    pub fn open(folder: &Path) -> Result<Self> {
        let images = folder.join("images");
        let is_new = !folder.exists();
        fs::create_dir_all(&images).map_err(|e| StoreError::io(&images, &e))?;
        // A folder that was there keeps its rights, in which others may have a share.
        restrict(if is_new { folder } else { &images }).map_err(|e| StoreError::io(folder, &e))?;
        let lock_path = folder.join("lock");
        let lock = fs::File::create(&lock_path).map_err(|e| StoreError::io(&lock_path, &e))?;
        lock.try_lock().map_err(|_| {
            StoreError::Failed(format!(
                "{}: another `retouch serve` uses this folder; stop it, or give another by --state",
                folder.display()
            ))
        })?;
        let path = folder.join("jobs.sqlite");
        create_private(&path).map_err(|e| StoreError::io(&path, &e))?;
        let connect = || -> rusqlite::Result<Connection> {
            let connection = Connection::open(&path)?;
            connection.busy_timeout(Duration::from_secs(10))?;
            // Set before the first table, it lets the file shrink when old jobs go.
            connection.pragma_update(None, "auto_vacuum", "INCREMENTAL")?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            // A commit is on the disk when it returns: also a power cut loses no accepted job.
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.pragma_update(None, "foreign_keys", true)?;
            Ok(connection)
        };
        let write = connect()?;
        match write.pragma_query_value(None, "user_version", |row| row.get(0))? {
            0 => write.execute_batch(&format!("BEGIN; {SCHEMA} COMMIT;"))?,
            1 => {}
            newer => {
                return Err(StoreError::Failed(format!(
                    "{}: was made by a newer retouch (layout {newer}); use that, or give another folder by --state",
                    path.display()
                )));
            }
        }
        let read = connect()?;
        Ok(Self { folder: folder.to_path_buf(), write: Mutex::new(write), read: Mutex::new(read), _lock: lock })
    }

    fn write(&self) -> MutexGuard<'_, Connection> {
        // A panic elsewhere leaves the connection as it was: transactions end by being dropped.
        self.write.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> MutexGuard<'_, Connection> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a job. When this returns it is on the disk, with its source image.
    pub fn accept(&self, job: &Accepted, now: i64) -> Result<Acceptance> {
        let mut connection = self.write();
        let transaction = connection.transaction()?;
        if let Some((key, hash)) = &job.idempotency
            && let Some(known) = known(&transaction, &job.owner, key, hash)?
        {
            return Ok(known);
        }
        let request = serde_json::to_string(&job.request).map_err(|e| StoreError::Failed(format!("a request: {e}")))?;
        let (key, hash) = job.idempotency.as_ref().map(|(key, hash)| (key, hash)).unzip();
        let input = job.input.as_ref();
        transaction.execute(
            "INSERT INTO jobs (id, owner, status, request, model, created_at, idempotency_key, request_hash, \
                               input_width, input_height, input_name) \
             VALUES (:id, :owner, 'queued', :request, :model, :now, :key, :hash, :width, :height, :name)",
            named_params! {
                ":id": job.id, ":owner": job.owner, ":request": request, ":model": job.model, ":now": now,
                ":key": key, ":hash": hash, ":width": input.map(|input| input.width),
                ":height": input.map(|input| input.height), ":name": input.and_then(|input| input.name.as_ref()),
            },
        )?;
        if let Some(input) = input {
            transaction.execute(
                "INSERT INTO inputs (job, bytes, thumbnail) VALUES (?1, ?2, ?3)",
                params![job.id, input.bytes, input.thumbnail],
            )?;
        }
        if let Some(webhook) = &job.webhook {
            transaction.execute(
                "INSERT INTO webhooks (job, url, secret) VALUES (?1, ?2, ?3)",
                params![job.id, webhook.url, webhook.secret],
            )?;
        }
        transaction.commit()?;
        Ok(Acceptance::New)
    }

    /// What was made of an earlier request of that key, if there was one.
    pub fn known(&self, owner: &str, key: &str, hash: &str) -> Result<Option<Acceptance>> {
        known(&self.read(), owner, key, hash)
    }

    /// The job of that id, whoever's it is.
    pub fn job(&self, id: &str) -> Result<Option<Record>> {
        let connection = self.read();
        let query = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1");
        let record = connection.prepare_cached(&query)?.query_row([id], record).optional()?;
        record.map(|record| with_images(&connection, record)).transpose()
    }

    /// An owner's jobs, the newest first, those before the job `before`.
    pub fn jobs(&self, owner: &str, before: Option<&str>, limit: usize) -> Result<Vec<Record>> {
        let connection = self.read();
        let query = format!(
            "SELECT {COLUMNS} FROM jobs WHERE owner = ?1 \
             AND number < coalesce((SELECT number FROM jobs WHERE id = ?2), 9223372036854775807) \
             ORDER BY number DESC LIMIT ?3"
        );
        let mut statement = connection.prepare_cached(&query)?;
        let records: Vec<_> =
            statement.query_map(params![owner, before, limit as i64], record)?.collect::<rusqlite::Result<_>>()?;
        records.into_iter().map(|record| with_images(&connection, record)).collect()
    }

    /// The ids of the jobs that have not ended, in the order of acceptance.
    pub fn unfinished(&self) -> Result<Vec<String>> {
        let connection = self.read();
        let mut statement =
            connection.prepare("SELECT id FROM jobs WHERE status IN ('queued', 'running') ORDER BY number")?;
        Ok(statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// The source image of a job, as it was sent.
    pub fn input(&self, id: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.read().query_row("SELECT bytes FROM inputs WHERE job = ?1", [id], |row| row.get(0)).optional()?)
    }

    pub fn input_thumbnail(&self, id: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.read().query_row("SELECT thumbnail FROM inputs WHERE job = ?1", [id], |row| row.get(0)).optional()?)
    }

    /// Notes that a job is begun; how often it has been begun with this time, or none if it has ended.
    pub fn start(&self, id: &str, now: i64) -> Result<Option<u32>> {
        let query = "UPDATE jobs SET status = 'running', started_at = ?2, attempts = attempts + 1 \
                     WHERE id = ?1 AND status IN ('queued', 'running') RETURNING attempts";
        Ok(self.write().query_row(query, params![id, now], |row| row.get(0)).optional()?)
    }

    /// Puts a job back that was begun in vain through no fault of its own.
    pub fn requeue(&self, id: &str) -> Result<()> {
        let query = "UPDATE jobs SET status = 'queued', started_at = NULL, attempts = attempts - 1 \
                     WHERE id = ?1 AND status = 'running'";
        self.write().execute(query, [id])?;
        Ok(())
    }

    /// The image of the seed at `position` is done and in its file.
    pub fn add_image(&self, id: &str, position: usize, (width, height): (u32, u32)) -> Result<()> {
        self.write().execute(
            "INSERT OR REPLACE INTO images (job, position, width, height) VALUES (?1, ?2, ?3, ?4)",
            params![id, position as i64, width, height],
        )?;
        Ok(())
    }

    /// Ends a job that has not ended yet; its webhook becomes due.
    pub fn finish(&self, id: &str, status: Status, error: Option<&str>, now: i64) -> Result<()> {
        let mut connection = self.write();
        let transaction = connection.transaction()?;
        let ended = transaction.execute(
            "UPDATE jobs SET status = ?2, error = ?3, finished_at = ?4 WHERE id = ?1 AND status IN ('queued', 'running')",
            params![id, status.name(), error, now],
        )?;
        if ended > 0 {
            transaction.execute("UPDATE webhooks SET due_at = ?2 WHERE job = ?1", params![id, now])?;
        }
        Ok(transaction.commit()?)
    }

    /// Removes a job with its images.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.write().execute("DELETE FROM jobs WHERE id = ?1", [id])?;
        let folder = self.images(id);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io(&folder, &error)),
            _ => Ok(()),
        }
    }

    /// The ids of the jobs that ended before `time`, and whose webhooks are settled.
    pub fn ended_before(&self, time: i64) -> Result<Vec<String>> {
        let connection = self.read();
        let mut statement = connection.prepare(
            "SELECT id FROM jobs WHERE finished_at < ?1 \
             AND NOT EXISTS (SELECT 1 FROM webhooks WHERE job = jobs.id AND due_at IS NOT NULL)",
        )?;
        Ok(statement.query_map([time], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// Gives the room of removed jobs back to the disk.
    pub fn shrink(&self) -> Result<()> {
        let connection = self.write();
        if connection.pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0))? == 0 {
            return Ok(());
        }
        // Each row is a page that was given back.
        let mut vacuum = connection.prepare("PRAGMA incremental_vacuum")?;
        let mut pages = vacuum.query([])?;
        while pages.next()?.is_some() {}
        Ok(connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?)
    }

    /// Random bytes that stay the same for this folder.
    pub fn secret(&self, name: &str) -> Result<[u8; 32]> {
        let connection = self.write();
        let fresh: [u8; 32] = rand::random();
        connection.execute("INSERT OR IGNORE INTO secrets (name, value) VALUES (?1, ?2)", params![name, fresh])?;
        Ok(connection.query_row("SELECT value FROM secrets WHERE name = ?1", [name], |row| row.get(0))?)
    }
}

/// Pictures and prompts are their owner's business: nobody else on the machine may look.
#[cfg(unix)]
fn restrict(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
}

/// Makes the file if it is not there; what SQLite puts beside it gets the same rights.
#[cfg(unix)]
fn create_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path).map(drop)
}

#[cfg(not(unix))]
fn create_private(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(not(unix))]
fn restrict(_: &Path) -> io::Result<()> {
    Ok(())
}

fn known(connection: &Connection, owner: &str, key: &str, hash: &str) -> Result<Option<Acceptance>> {
    let query = "SELECT id, request_hash FROM jobs WHERE owner = ?1 AND idempotency_key = ?2";
    let found = connection
        .query_row(query, params![owner, key], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
        .optional()?;
    Ok(found.map(|(id, same)| if same == hash { Acceptance::Known(id) } else { Acceptance::Conflict }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::job::NewJob;

    fn job(id: &str, idempotency: Option<(&str, &str)>) -> Accepted {
        let request = NewJob { prompt: "bluer".into(), ..Default::default() };
        Accepted {
            id: id.into(),
            owner: String::new(),
            request: request.resolve(1).unwrap(),
            model: "nano-kontext".into(),
            input: Some(Input { bytes: vec![7; 5000], thumbnail: vec![1], width: 4, height: 2, name: None }),
            idempotency: idempotency.map(|(key, hash)| (key.into(), hash.into())),
            webhook: Some(Webhook { url: "http://example.org".into(), secret: None }),
        }
    }

    #[test]
    fn jobs_are_there_after_a_restart_in_their_order() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        for id in ["a", "b", "c"] {
            assert_eq!(store.accept(&job(id, None), 1).unwrap(), Acceptance::New);
        }
        assert_eq!(store.start("a", 2).unwrap(), Some(1));
        store.finish("b", Status::Failed, Some("why"), 3).unwrap();
        store.add_image("a", 0, (64, 32)).unwrap();
        let secret = store.secret("urls").unwrap();
        drop(store);
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.unfinished().unwrap(), ["a", "c"]);
        assert_eq!(store.secret("urls").unwrap(), secret);
        assert_eq!(store.start("a", 4).unwrap(), Some(2));
        assert_eq!(store.start("b", 4).unwrap(), None, "it has ended");
        let a = store.job("a").unwrap().unwrap();
        assert_eq!((a.status, a.images.as_slice()), (Status::Running, &[(64, 32)][..]));
        assert_eq!(store.input("a").unwrap().unwrap(), vec![7; 5000]);
        store.finish("b", Status::Done, None, 5).unwrap();
        let b = store.job("b").unwrap().unwrap();
        assert_eq!((b.status, b.error.as_deref()), (Status::Failed, Some("why")));
        let ids = |before| store.jobs("", before, 2).unwrap().into_iter().map(|job| job.id).collect::<Vec<_>>();
        assert_eq!(ids(None), ["c", "b"]);
        assert_eq!(ids(Some("b")), ["a"]);
        assert!(store.jobs("another", None, 2).unwrap().is_empty());
    }

    #[test]
    fn a_folder_serves_one_service_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert!(Store::open(folder.path()).err().unwrap().to_string().contains("--state"));
        drop(store);
        assert!(Store::open(folder.path()).is_ok());
    }

    #[test]
    fn a_request_sent_twice_is_one_job() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.accept(&job("a", Some(("key", "1"))), 1).unwrap(), Acceptance::New);
        assert_eq!(store.accept(&job("b", Some(("key", "1"))), 1).unwrap(), Acceptance::Known("a".into()));
        assert_eq!(store.accept(&job("b", Some(("key", "2"))), 1).unwrap(), Acceptance::Conflict);
        let others = Accepted { owner: "other".into(), ..job("b", Some(("key", "2"))) };
        assert_eq!(store.accept(&others, 1).unwrap(), Acceptance::New);
    }

    #[test]
    fn a_removed_job_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.accept(&job("a", None), 1).unwrap();
        store.write_image("a", "0.png", b"png").unwrap();
        assert_eq!(fs::read(store.image_file("a", "0.png")).unwrap(), b"png");
        store.finish("a", Status::Done, None, 5).unwrap();
        assert!(store.ended_before(6).unwrap().is_empty(), "its webhook was not called yet");
        assert_eq!(store.due_webhooks(5).unwrap().len(), 1);
        store.put_off_webhook("a", None).unwrap();
        assert_eq!(store.ended_before(6).unwrap(), ["a"]);
        assert!(store.ended_before(5).unwrap().is_empty());
        store.remove("a").unwrap();
        store.shrink().unwrap();
        assert_eq!(store.read().pragma_query_value(None, "freelist_count", |row| row.get::<_, i64>(0)).unwrap(), 0);
        assert!(store.job("a").unwrap().is_none() && store.input("a").unwrap().is_none());
        assert!(!folder.path().join("images/a").exists());
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let pages: i64 = store.write().pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
        store.write().pragma_update(None, "max_page_count", pages + 2).unwrap();
        let mut large = job("a", None);
        large.input.as_mut().unwrap().bytes = vec![0; 1 << 20];
        assert!(matches!(store.accept(&large, 1), Err(StoreError::Full)));
        assert!(store.job("a").unwrap().is_none());
        store.write().pragma_update(None, "max_page_count", 1 << 20).unwrap();
        assert_eq!(store.accept(&large, 1).unwrap(), Acceptance::New);
    }
}

//! From the hub into the cache, continuing where an earlier attempt stopped.
//!
//! hf-hub's own downloads begin anew each time, and keep whatever came, be it short or an error page.

use std::{
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    ops::ControlFlow,
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};

use super::{
    HubError,
    remote::{ANSWER_WITHIN, About, Remote, short},
};
use crate::Result;

/// A transfer that brought nothing for so long is dropped and begun anew from where it was.
const STALLED_AFTER: Duration = Duration::from_secs(60);
/// Attempts in a row that bring nothing before a transfer is given up.
const ATTEMPTS: u32 = 4;

impl Remote<'_> {
    /// Brings one file into the cache's blobs, and from there into the snapshot.
    pub(super) fn bring(&mut self, about: &About) -> Result<()> {
        let blob = self.cache.blob(&about.etag);
        let lock = self.cache.lock(&about.etag);
        let io = |path: &std::path::Path| {
            let file = path.display().to_string();
            move |source| HubError::Io { file, source }
        };
        for folder in [blob.parent(), lock.parent()].into_iter().flatten() {
            fs::create_dir_all(folder).map_err(io(folder))?;
        }
        // Another process may be at the same file: wait, and find it done.
        let lock_file = File::create(&lock).map_err(io(&lock))?;
        lock_file.lock().map_err(io(&lock))?;
        if !blob.is_file() {
            let incomplete = self.cache.incomplete(&about.etag);
            let mut out = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&incomplete)
                .map_err(io(&incomplete))?;
            self.transfer(about, &mut out, &incomplete.display().to_string())?;
            drop(out);
            fs::rename(&incomplete, &blob).map_err(io(&blob))?;
        }
        Ok(self.cache.add_to_snapshot(&self.commit, &about.file, &about.etag)?)
    }

    /// Completes `out`, which may hold the file's beginning.
    fn transfer(&mut self, about: &About, out: &mut File, name: &str) -> std::result::Result<(), HubError> {
        let io = |source| HubError::Io { file: name.to_string(), source };
        let mut done = out.metadata().map_err(io)?.len();
        let (mut failures, mut furthest) = (0, done);
        loop {
            if done > about.bytes {
                // Not what it should be: begin anew.
                out.set_len(0).map_err(io)?;
                done = 0;
            }
            out.seek(SeekFrom::Start(done)).map_err(io)?;
            self.report(about, done)?;
            if done == about.bytes {
                return out.sync_all().map_err(io);
            }
            let reason = match self.pull(about, out, name, &mut done) {
                Ok(()) if done >= about.bytes => continue,
                Ok(()) => "the connection ended".to_string(),
                Err(Pull::Failed(reason)) => reason,
                Err(Pull::Final(error)) => return Err(error),
            };
            failures = if done > furthest { 1 } else { failures + 1 };
            furthest = furthest.max(done);
            if failures >= ATTEMPTS {
                return Err(HubError::Interrupted {
                    id: self.id.to_string(),
                    file: about.file.clone(),
                    done,
                    total: about.bytes,
                    reason,
                });
            }
            tracing::debug!("{}: {reason} at byte {done}; trying again", about.file);
            self.runtime.block_on(async { sleep(Duration::from_millis(250 << failures)).await });
        }
    }

    /// One request for all that is missing of the file.
    fn pull(&mut self, about: &About, out: &mut File, name: &str, done: &mut u64) -> std::result::Result<(), Pull> {
        let missing = about.bytes - *done;
        let range = (*done > 0).then_some(*done..about.bytes);
        let request = self
            .repo
            .download_file_stream()
            .filename(about.file.clone())
            .revision(self.commit.clone())
            .maybe_range(range)
            .send();
        let (_, mut stream) = match self.runtime.block_on(async { timeout(ANSWER_WITHIN, request).await }) {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                return Err(match self.explain(error, Some(&about.file)) {
                    HubError::Unreachable { reason, .. } | HubError::Other { reason, .. } => Pull::Failed(reason),
                    refused => Pull::Final(refused),
                });
            }
            Err(_) => return Err(Pull::Failed("no answer".to_string())),
        };
        let mut received = 0;
        loop {
            let chunk = match self.runtime.block_on(async { timeout(STALLED_AFTER, stream.next()).await }) {
                Ok(None) => return Ok(()),
                Ok(Some(Ok(chunk))) => chunk,
                Ok(Some(Err(error))) => return Err(Pull::Failed(short(&error))),
                Err(_) => return Err(Pull::Failed("the connection stalled".to_string())),
            };
            received += chunk.len() as u64;
            if received > missing {
                // A server without ranges sends the file from its beginning: what was written is wrong.
                *done = 0;
                let emptied = out.set_len(0).and_then(|()| out.seek(SeekFrom::Start(0)));
                emptied.map_err(|source| Pull::Final(HubError::Io { file: name.to_string(), source }))?;
                return Err(Pull::Failed("the server sent more than was asked for".to_string()));
            }
            let written = out.write_all(&chunk);
            written.map_err(|source| Pull::Final(HubError::Io { file: name.to_string(), source }))?;
            *done += chunk.len() as u64;
            self.report(about, *done).map_err(Pull::Final)?;
        }
    }

    fn report(&mut self, about: &About, done: u64) -> std::result::Result<(), HubError> {
        match self.progress.on(&about.file, done, about.bytes) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(HubError::Cancelled { id: self.id.to_string() }),
        }
    }
}

/// How a request for contents ended badly.
enum Pull {
    /// It is worth another attempt.
    Failed(String),
    Final(HubError),
}

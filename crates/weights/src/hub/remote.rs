//! The conversation with the hub about one model.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    future::Future,
    io::{Seek, SeekFrom, Write},
    ops::ControlFlow,
    time::Duration,
};

use futures_util::{StreamExt, pin_mut};
use hf_hub::{
    HFClient, HFError,
    repository::{HFRepository, RepoTreeEntry, RepoTypeModel},
};
use reqwest::{Client, header::HeaderMap, redirect::Policy};
use tokio::{
    runtime::Runtime,
    time::{sleep, timeout},
};

use super::{HubError, HubId, HubOptions, Progress, cache::Cache};
use crate::{Folder, Result};

/// A question that has no answer by then will not get one.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// A transfer that brought nothing for so long is dropped and begun anew from where it was.
const STALLED_AFTER: Duration = Duration::from_secs(60);
/// Attempts in a row that bring nothing before a transfer is given up.
const ATTEMPTS: u32 = 4;

/// One model on the hub, at the commit that its revision stands for now.
pub struct Remote<'a> {
    pub commit: String,
    options: &'a HubOptions,
    id: &'a HubId,
    cache: &'a Cache,
    progress: &'a mut dyn Progress,
    repo: HFRepository<RepoTypeModel>,
    /// For questions about a file: it stays on the hub when the hub would send it on to where the contents are.
    heads: Client,
    runtime: Runtime,
}

/// What the hub says about a file.
struct About {
    file: String,
    /// Names the contents; the name of the blob in the cache.
    etag: String,
    bytes: u64,
}

impl<'a> Remote<'a> {
    /// Finds the model and lets `work` download what it wants of it; the snapshot's folder then.
    pub fn run(
        options: &'a HubOptions,
        id: &'a HubId,
        cache: &'a Cache,
        progress: &'a mut dyn Progress,
        work: impl FnOnce(&mut Self) -> Result<()> + Send,
    ) -> Result<Folder> {
        let all = move || {
            let mut remote = Self::connect(options, id, cache, progress)?;
            work(&mut remote)?;
            cache.set_revision(&remote.commit)?;
            Ok(cache.folder(&remote.commit))
        };
        // On a thread of its own, because a caller may be inside of an async runtime, where no other one may run.
        std::thread::scope(|scope| {
            let thread = scope.spawn(all);
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn connect(options: &'a HubOptions, id: &'a HubId, cache: &'a Cache, progress: &'a mut dyn Progress) -> Result<Self> {
        let other = |reason: String| HubError::Other {
            id: id.to_string(),
            endpoint: options.endpoint.clone(),
            reason,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| HubError::Io { file: "download".to_string(), source })?;
        let client = HFClient::builder()
            .endpoint(&options.endpoint)
            // Without a token hf-hub looks for one itself; one that cannot stand in a header is never sent.
            .token(options.token.as_deref().unwrap_or("\n"))
            .cache_dir(&options.cache)
            .user_agent(concat!("retouch/", env!("CARGO_PKG_VERSION")))
            .retry_max_attempts(2)
            .build()
            .map_err(|e| other(e.to_string()))?;
        let on_same_host = Policy::custom(|attempt| {
            let same = attempt.previous().last().is_some_and(|last| last.host_str() == attempt.url().host_str());
            if same && attempt.previous().len() < 10 { attempt.follow() } else { attempt.stop() }
        });
        let heads = Client::builder()
            .redirect(on_same_host)
            .timeout(ANSWER_WITHIN)
            .user_agent(concat!("retouch/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| other(e.to_string()))?;
        let repo = client.model(&id.owner, &id.name);
        let mut remote = Self { commit: String::new(), options, id, cache, progress, repo, heads, runtime };
        let revision = id.revision.clone();
        let info = remote.ask(remote.repo.info().revision(revision).send())?;
        let commit = info.sha.filter(|sha| !sha.is_empty() && sha.bytes().all(|b| b.is_ascii_alphanumeric()));
        remote.commit = commit.ok_or_else(|| other("it names no commit".to_string()))?;
        Ok(remote)
    }

    /// The paths of all files.
    pub fn list(&self) -> Result<BTreeSet<String>> {
        let files = async {
            let entries = self.repo.list_tree().revision(self.commit.clone()).recursive(true).send()?;
            pin_mut!(entries);
            let mut files = BTreeSet::new();
            while let Some(entry) = entries.next().await {
                if let RepoTreeEntry::File { path, .. } = entry? {
                    files.insert(path);
                }
            }
            Ok(files)
        };
        Ok(self.ask(files)?)
    }

    /// Refuses a model that has no such file.
    pub fn require(&self, there: &BTreeSet<String>, file: &str) -> Result<()> {
        if there.contains(file) {
            return Ok(());
        }
        Err(HubError::NoSuchFile { id: self.id.to_string(), file: file.to_string() }.into())
    }

    /// Brings `files` into the snapshot, as far as they are not there.
    pub fn download(&mut self, files: &[String]) -> Result<()> {
        let absent = files.iter().filter(|file| !self.cache.has(&self.commit, file));
        let abouts = absent.map(|file| self.about(file)).collect::<std::result::Result<Vec<_>, _>>()?;
        if !abouts.is_empty() {
            self.progress.begin(abouts.len(), abouts.iter().map(|about| about.bytes).sum());
        }
        for about in &abouts {
            self.bring(about)?;
        }
        Ok(())
    }

    /// Asks for a file's etag and size. hf-hub's own question follows the hub's answer to the place of the contents,
    /// where neither is known.
    fn about(&self, file: &str) -> std::result::Result<About, HubError> {
        let url = format!("{}/{}/resolve/{}/{file}", self.options.endpoint, self.id, self.commit);
        let mut question = self.heads.head(url);
        if let Some(token) = &self.options.token {
            question = question.bearer_auth(token);
        }
        let answer = self.runtime.block_on(question.send()).map_err(|e| self.unreachable(&e))?;
        let status = answer.status();
        if !status.is_success() && !status.is_redirection() {
            let text = |name: &str| header(answer.headers(), name);
            let (code, message) = (text("x-error-code"), text("x-error-message"));
            return Err(self.refused(status.as_u16(), code.as_deref(), message.as_deref(), Some(file)));
        }
        let first = |names: [&str; 2]| names.iter().find_map(|name| header(answer.headers(), name));
        let etag = first(["x-linked-etag", "etag"]).map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_string());
        let bytes = first(["x-linked-size", "content-length"]).and_then(|bytes| bytes.parse().ok());
        match (etag, bytes) {
            // It becomes a file's name.
            (Some(etag), Some(bytes)) if !etag.is_empty() && etag.bytes().all(|b| b.is_ascii_alphanumeric()) => {
                Ok(About { file: file.to_string(), etag, bytes })
            }
            _ => Err(self.other(format!("it gives no usable etag and size of {file}"))),
        }
    }

    /// Brings one file into the cache's blobs, and from there into the snapshot.
    fn bring(&mut self, about: &About) -> Result<()> {
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
        let mut failures = 0;
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
            let before = done;
            let reason = match self.pull(about, out, name, &mut done) {
                Ok(()) if done >= about.bytes => continue,
                Ok(()) => "the connection ended".to_string(),
                Err(Pull::Failed(reason)) => reason,
                Err(Pull::Final(error)) => return Err(error),
            };
            failures = if done > before { 1 } else { failures + 1 };
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
            self.runtime.block_on(sleep(Duration::from_millis(250 << failures)));
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
        let (_, mut stream) = match self.runtime.block_on(timeout(ANSWER_WITHIN, request)) {
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

    fn ask<T>(&self, question: impl Future<Output = std::result::Result<T, HFError>>) -> std::result::Result<T, HubError> {
        match self.runtime.block_on(async { timeout(ANSWER_WITHIN, question).await }) {
            Ok(answer) => answer.map_err(|error| self.explain(error, None)),
            Err(_) => Err(self.unreachable_because("no answer".to_string())),
        }
    }

    /// From hf-hub's error to ours; `file` where one was asked for.
    fn explain(&self, error: HFError, file: Option<&str>) -> HubError {
        let context = match &error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::RateLimited { context, .. }
            | HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => context,
            HFError::Request { source, .. } => return self.unreachable(source),
            _ => return self.other(error.to_string()),
        };
        let (code, message) = (context.error_code.as_deref(), context.server_message.as_deref());
        self.refused(context.status.as_u16(), code, message, file)
    }

    /// What an error status means, by the rules of the `huggingface_hub` Python package (`hf_raise_for_status`).
    fn refused(&self, status: u16, code: Option<&str>, message: Option<&str>, file: Option<&str>) -> HubError {
        let (id, endpoint) = (self.id.to_string(), self.options.endpoint.clone());
        let url = format!("{endpoint}/{id}");
        let said = message.unwrap_or_default();
        match (status, code, file) {
            (401, _, _) if said.contains("Invalid credentials") && self.options.token.is_some() => {
                HubError::BadToken { endpoint }
            }
            (404, Some("EntryNotFound"), Some(file)) | (404, None, Some(file)) => {
                HubError::NoSuchFile { id, file: file.to_string() }
            }
            (_, Some("RepoNotFound" | "RevisionNotFound"), _) | (404, _, _) => self.not_found(),
            // The hub does not tell strangers whether a private model exists.
            (401, None, None) => self.not_found(),
            (401 | 403, _, _) if self.options.token.is_none() => HubError::LicenceNotAccepted { id, url, endpoint },
            (401 | 403, _, _) => {
                let detail = if said.is_empty() { String::new() } else { format!(" ({said})") };
                HubError::NoAccess { id, url, detail }
            }
            (429, _, _) => self.other("too many requests; wait a while, or log in".to_string()),
            _ => self.other(format!("status {status} {said}").trim_end().to_string()),
        }
    }

    fn not_found(&self) -> HubError {
        let revision = &self.id.revision;
        let id = if revision == "main" { self.id.to_string() } else { format!("{}@{revision}", self.id) };
        HubError::NotFound { id, endpoint: self.options.endpoint.clone() }
    }

    fn other(&self, reason: String) -> HubError {
        HubError::Other { id: self.id.to_string(), endpoint: self.options.endpoint.clone(), reason }
    }

    fn unreachable(&self, error: &reqwest::Error) -> HubError {
        self.unreachable_because(short(error))
    }

    fn unreachable_because(&self, reason: String) -> HubError {
        HubError::Unreachable {
            id: self.id.to_string(),
            endpoint: self.options.endpoint.clone(),
            cache: self.options.cache.clone(),
            reason,
        }
    }
}

/// How a request for contents ended badly.
enum Pull {
    /// It is worth another attempt.
    Failed(String),
    Final(HubError),
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_string)
}

/// The innermost cause: the outer ones repeat the address.
fn short(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

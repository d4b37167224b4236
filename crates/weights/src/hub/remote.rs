//! The conversation with the hub about one model.

use std::{collections::BTreeSet, future::Future, time::Duration};

use futures_util::{StreamExt, pin_mut};
use hf_hub::{
    HFClient, HFError,
    repository::{HFRepository, RepoTreeEntry, RepoTypeModel},
};
use reqwest::{Client, RequestBuilder, Response, header::HeaderMap, redirect::Policy};
use tokio::{runtime::Runtime, time::timeout};

use super::{DownloadProgress, HubError, HubId, HubOptions, cache::Cache};
use crate::{Folder, Result};

/// A question that has no answer by then will not get one.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// How often a repository may have been renamed.
const MOVES: usize = 5;

/// One model on the hub, at the commit that its revision stands for now.
pub struct Remote<'a> {
    pub commit: String,
    options: &'a HubOptions,
    pub(super) id: &'a HubId,
    pub(super) cache: &'a Cache,
    pub(super) progress: &'a mut dyn DownloadProgress,
    pub(super) repo: HFRepository<RepoTypeModel>,
    /// For questions about a file: it stays on the hub when the hub would send it on to where the contents are.
    heads: Client,
    pub(super) runtime: Runtime,
}

/// What the hub says about a file.
pub(super) struct About {
    pub file: String,
    /// Names the contents; the name of the blob in the cache.
    pub etag: String,
    pub bytes: u64,
}

impl<'a> Remote<'a> {
    /// Finds the model and lets `work` download what it wants of it; the snapshot's folder then.
    pub fn run(
        options: &'a HubOptions,
        id: &'a HubId,
        cache: &'a Cache,
        progress: &'a mut dyn DownloadProgress,
        work: impl FnOnce(&mut Self) -> Result<()> + Send,
    ) -> Result<Folder> {
        let all = move || {
            let mut remote = Self::connect(options, id, cache, progress)?;
            work(&mut remote)?;
            cache.set_revision(&remote.commit)?;
            Ok(remote.folder())
        };
        // On a thread of its own, because a caller may be inside of an async runtime, where no other one may run.
        std::thread::scope(|scope| {
            let thread = scope.spawn(all);
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn connect(
        options: &'a HubOptions,
        id: &'a HubId,
        cache: &'a Cache,
        progress: &'a mut dyn DownloadProgress,
    ) -> Result<Self> {
        let other = |reason: String| HubError::Other { id: id.to_string(), endpoint: options.endpoint.clone(), reason };
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
        let heads = Client::builder()
            .redirect(Policy::none())
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

    /// The snapshot, as far as it is downloaded.
    pub fn folder(&self) -> Folder {
        self.cache.folder(&self.commit)
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
        let answer = self.runtime.block_on(self.head(&url)).map_err(|e| self.unreachable(&e))?;
        let status = answer.status();
        if !status.is_success() && !status.is_redirection() {
            let text = |name: &str| header(answer.headers(), name);
            let (code, message) = (text("x-error-code"), text("x-error-message"));
            return Err(self.refused(status.as_u16(), code.as_deref(), message.as_deref(), Some(file)));
        }
        let own = |name: &str| header(answer.headers(), name).filter(|_| status.is_success());
        let linked = |name: &str| header(answer.headers(), name);
        let etag = linked("x-linked-etag").or_else(|| own("etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_string());
        let bytes = linked("x-linked-size").or_else(|| own("content-length")).and_then(|bytes| bytes.parse().ok());
        match (etag, bytes) {
            (Some(etag), Some(bytes)) if is_file_name(&etag) => Ok(About { file: file.to_string(), etag, bytes }),
            _ => Err(self.other(format!("it gives no usable etag and size of {file}"))),
        }
    }

    /// The answer that knows of the contents: the hub's own, before it sends on to where they are. Only from a
    /// repository's old name to its new one, on the hub itself, it is followed.
    async fn head(&self, url: &str) -> reqwest::Result<Response> {
        let mut url = url.to_string();
        for _ in 0..MOVES {
            let answer = self.question(&url).send().await?;
            let knows = ["x-linked-etag", "x-linked-size"].iter().all(|name| answer.headers().contains_key(*name));
            let moved = answer.status().is_redirection() && !knows;
            let target = header(answer.headers(), "location").and_then(|place| answer.url().join(&place).ok());
            match target {
                Some(target) if moved && target.host_str() == answer.url().host_str() => url = target.to_string(),
                _ => return Ok(answer),
            }
        }
        self.question(&url).send().await
    }

    fn question(&self, url: &str) -> RequestBuilder {
        // Compressed, the contents would have another length.
        let question = self.heads.head(url).header("accept-encoding", "identity");
        match &self.options.token {
            Some(token) => question.bearer_auth(token),
            None => question,
        }
    }

    fn ask<T>(
        &self,
        question: impl Future<Output = std::result::Result<T, HFError>>,
    ) -> std::result::Result<T, HubError> {
        match self.runtime.block_on(async { timeout(ANSWER_WITHIN, question).await }) {
            Ok(answer) => answer.map_err(|error| self.explain(error, None)),
            Err(_) => Err(self.unreachable_because("no answer".to_string())),
        }
    }

    /// From hf-hub's error to ours; `file` where one was asked for.
    pub(super) fn explain(&self, error: HFError, file: Option<&str>) -> HubError {
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

/// Whether an etag can be the name of a blob in the cache.
fn is_file_name(etag: &str) -> bool {
    !etag.is_empty() && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_string)
}

/// The innermost cause: the outer ones repeat the address.
pub(super) fn short(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

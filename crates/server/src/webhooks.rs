//! Tells others that a job has ended, again and again until they have heard.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use reqwest::header::CONTENT_TYPE;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::{
    api::hosted::HostedResult,
    app::App,
    fetch::{self, Reach},
    jobs::{now, store::DueWebhook},
    signature::hmac_hex,
};

/// After this many calls in vain, over half a day, nobody is told any more.
const MAX_ATTEMPTS: u32 = 14;
/// Pause after the first call in vain; each further is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// Calls at a time.
const MAX_CALLS: usize = 64;

/// Calls webhooks as they come due, for as long as it is polled.
pub async fn run(app: Arc<App>, base: String) {
    let (calls, under_way) = (Arc::new(Semaphore::new(MAX_CALLS)), Arc::new(Mutex::new(HashSet::new())));
    loop {
        let store = app.clone();
        let due = tokio::task::spawn_blocking(move || store.jobs.store.due_webhooks(now())).await;
        let due = match due {
            Ok(Ok(due)) => due,
            Ok(Err(error)) => {
                warn!("{error}");
                Vec::new()
            }
            Err(_) => Vec::new(),
        };
        for due in due {
            // One that is slow holds up nobody but itself.
            if !under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(due.job.clone()) {
                continue;
            }
            let Ok(permit) = calls.clone().acquire_owned().await else { return };
            let (app, base, under_way, job) = (app.clone(), base.clone(), under_way.clone(), due.job.clone());
            tokio::spawn(async move {
                tell(app, base, due).await;
                under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&job);
                drop(permit);
            });
        }
        tokio::select! {
            () = app.jobs.ended.notified() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}

async fn tell(app: Arc<App>, base: String, due: DueWebhook) {
    let DueWebhook { job, webhook, attempts } = due;
    let host =
        || url::Url::parse(&webhook.url).ok().and_then(|url| url.host_str().map(str::to_string)).unwrap_or_default();
    let next = match call(&app, &base, &job, &webhook.url, webhook.secret.as_deref()).await {
        Ok(()) => {
            debug!("the webhook of job {job} was told");
            None
        }
        Err(reason) if attempts + 1 >= MAX_ATTEMPTS => {
            warn!("the webhook of job {job} at {} is given up: {reason}", host());
            None
        }
        Err(reason) => {
            debug!("the webhook of job {job} at {}: {reason}", host());
            Some(now() + FIRST_PAUSE.as_millis() as i64 * (1 << attempts))
        }
    };
    let noted = tokio::task::spawn_blocking(move || app.jobs.store.put_off_webhook(&job, next)).await;
    if let Ok(Err(error)) = noted {
        warn!("{error}");
        // It stays due: not at once, as the receiver has done nothing wrong.
        tokio::time::sleep(FIRST_PAUSE).await;
    }
}

async fn call(app: &Arc<App>, base: &str, job: &str, url: &str, secret: Option<&str>) -> Result<(), String> {
    let (store, id) = (app.clone(), job.to_string());
    let record = tokio::task::spawn_blocking(move || store.jobs.store.job(&id)).await;
    let Ok(Ok(Some(record))) = record else { return Ok(()) };
    let body = serde_json::to_vec(&HostedResult::of(app, base, &record)).map_err(|e| e.to_string())?;
    let reach = if app.options.allow_local_webhooks { Reach::Anywhere } else { Reach::Public };
    let url = fetch::parse(url)?;
    let client = fetch::client_for(&url, reach).await?;
    let mut request = client.post(url).header(CONTENT_TYPE, "application/json").header("x-webhook-id", job);
    if let Some(secret) = secret {
        request = request.header("x-webhook-signature", format!("sha256={}", hmac_hex(secret.as_bytes(), &body)));
    }
    let response = request.body(body).send().await.map_err(|_| "it cannot be reached".to_string())?;
    if response.status().is_success() { Ok(()) } else { Err(format!("it answered {}", response.status())) }
}

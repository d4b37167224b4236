//! What all requests share.

use std::sync::Arc;

use retouch::ModelRules;
use tokio::sync::Semaphore;

use crate::{
    api::admission,
    jobs::{Jobs, store},
    options::ServerOptions,
    signature::{hmac_hex, same, sha256_hex},
};

/// Largest requests that are held in memory together.
const UPLOADS: usize = 16;

pub struct App {
    pub options: ServerOptions,
    pub rules: ModelRules,
    pub devices: Vec<String>,
    pub jobs: Arc<Jobs>,
    /// Room for the bodies of requests.
    pub uploads: Arc<Semaphore>,
    /// A permit for each picture that is being decoded.
    pub decoding: Arc<Semaphore>,
    keys: Vec<String>,
    url_secret: [u8; 32],
}

impl App {
    pub fn new(
        options: ServerOptions,
        rules: ModelRules,
        devices: Vec<String>,
        jobs: Arc<Jobs>,
    ) -> store::Result<Arc<Self>> {
        let url_secret = jobs.store.secret("urls")?;
        let keys = options.api_keys.iter().map(|key| sha256_hex(&[key.as_bytes()])).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Arc::new(Self {
            uploads: admission::room(options.max_upload.saturating_mul(UPLOADS)),
            options,
            rules,
            devices,
            jobs,
            decoding: Arc::new(Semaphore::new(cores)),
            keys,
            url_secret,
        }))
    }

    pub fn requires_key(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whose requests come with this key: none may come without where keys are required.
    pub fn owner(&self, key: Option<&str>) -> Option<String> {
        if !self.requires_key() {
            return Some(String::new());
        }
        // Hashes of one length are compared, each with all: the time says nothing about a key.
        let given = sha256_hex(&[key?.as_bytes()]);
        let found = self.keys.iter().fold(false, |found, key| same(key, &given) | found);
        found.then(|| given[..16].to_string())
    }

    /// The path of a job's picture, which opens it without a key.
    pub fn image_path(&self, job: &str, name: &str) -> String {
        format!("/images/{job}/{name}?signature={}", self.sign(job, name))
    }

    pub fn is_signed(&self, job: &str, name: &str, signature: &str) -> bool {
        same(&self.sign(job, name), signature)
    }

    fn sign(&self, job: &str, name: &str) -> String {
        let mut signature = hmac_hex(&self.url_secret, format!("{job}/{name}").as_bytes());
        signature.truncate(32);
        signature
    }
}

//! How the service runs.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use axum::http::HeaderValue;
use url::Url;

/// The settings of a service.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub address: SocketAddr,
    /// Where jobs and results are kept.
    pub state: PathBuf,
    /// Any of these opens the API; none: whoever reaches the port may use it.
    pub api_keys: Vec<String>,
    /// Serve others than this machine without a key.
    pub insecure: bool,
    /// Origins of other web pages that may call the API.
    pub cors: Vec<HeaderValue>,
    /// Under which address clients see the service, where a proxy stands before it.
    pub public_url: Option<Url>,
    /// Jobs that may wait.
    pub max_queue: usize,
    /// Images of one request.
    pub max_images: usize,
    /// Denoise steps of one image.
    pub max_steps: usize,
    /// Largest picture that is taken or made.
    pub max_pixels: u64,
    /// Largest body of a request, in bytes.
    pub max_upload: usize,
    /// How long ended jobs stay.
    pub keep: Duration,
    /// Fetch source images from URLs.
    pub allow_url_inputs: bool,
    /// Call webhooks on this machine and in private networks.
    pub allow_local_webhooks: bool,
}

impl ServerOptions {
    /// Refuses what would let others in by mistake.
    ///
    /// # Errors
    /// A sentence that says what to do.
    pub fn check(&self) -> Result<(), String> {
        if self.api_keys.iter().any(|key| key.len() < 8 || !key.bytes().all(|b| b.is_ascii_graphic())) {
            return Err("an API key has at least 8 characters, all of them visible ASCII".into());
        }
        if !self.address.ip().is_loopback() && self.api_keys.is_empty() && !self.insecure {
            return Err(format!(
                "{} can be reached from other machines: give an --api-key, or --insecure to serve whoever comes",
                self.address.ip()
            ));
        }
        Ok(())
    }
}

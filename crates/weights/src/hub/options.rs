//! Where the hub is, who asks, and where its files are kept.

use std::path::{Path, PathBuf};

/// The settings that all tools of the hub share.
#[derive(Clone)]
pub struct HubOptions {
    /// Address of the hub, without a slash at the end (HF_ENDPOINT).
    pub endpoint: String,
    /// Who asks (HF_TOKEN, or the file that `hf auth login` writes).
    pub token: Option<String>,
    /// The folder of downloaded models (HF_HUB_CACHE, or `hub` in HF_HOME).
    pub cache: PathBuf,
    /// Use only what is in the cache (HF_HUB_OFFLINE).
    pub offline: bool,
}

impl HubOptions {
    /// The settings of the environment, by the rules of the `huggingface_hub` Python package.
    ///
    /// <https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As [`from_env`](Self::from_env), with the variables from elsewhere.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let user = variable("HOME").or_else(|| variable("USERPROFILE")).map(PathBuf::from).unwrap_or_default();
        let path = |name: &str| variable(name).map(|value| expand(&value, &user));
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .unwrap_or_else(|| user.join(".cache").join("huggingface"));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub"));
        let token = || {
            let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(|| {
                let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
                std::fs::read_to_string(file).ok()
            });
            token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty())
        };
        let is_on = |name: &str| {
            variable(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.trim().to_ascii_lowercase().as_str()))
        };
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        Self {
            endpoint: endpoint.trim().trim_end_matches('/').to_string(),
            token: if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token() },
            cache,
            offline: is_on("HF_HUB_OFFLINE"),
        }
    }
}

/// The token stays out of logs.
impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubOptions")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "set"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish()
    }
}

fn expand(path: &str, user: &Path) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => user.join(rest),
        None => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> HubOptions {
        HubOptions::from_variables(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn an_empty_environment_gives_the_public_hub() {
        let options = with(&[("HOME", "/home/ada")]);
        assert_eq!(options.endpoint, "https://huggingface.co");
        assert_eq!(options.cache, Path::new("/home/ada/.cache/huggingface/hub"));
        assert!(options.token.is_none() && !options.offline);
    }

    #[test]
    fn variables_are_honoured() {
        let options = with(&[
            ("HOME", "/home/ada"),
            ("HF_HOME", "~/models"),
            ("HF_ENDPOINT", "http://mirror:8080/"),
            ("HF_TOKEN", " hf_secret\n"),
            ("HF_HUB_OFFLINE", "TRUE"),
        ]);
        assert_eq!(options.cache, Path::new("/home/ada/models/hub"));
        assert_eq!(options.endpoint, "http://mirror:8080");
        assert_eq!(options.token.as_deref(), Some("hf_secret"));
        assert!(options.offline);
        assert!(!format!("{options:?}").contains("secret"));
    }

    #[test]
    fn the_login_file_gives_the_token() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_from_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(with(&[("HF_HOME", home)]).token.as_deref(), Some("hf_from_file"));
        assert_eq!(with(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token, None);
    }
}

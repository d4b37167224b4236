//! The command `serve`: from arguments to a service.

use std::{
    env, fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{Args, ValueHint};
use retouch::{DeviceChoice, Encoders, Engine, EngineOptions, KeepLoaded, ModelSource, NoProgress, Precision, Target};
use retouch_server::{OpenEngine, ServerOptions, api_description};

use crate::{
    args::{Bytes, ModelArgs},
    console::Console,
    failure::{Failure, Result},
    progress::DownloadProgress,
};

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// auto, cpu, cuda, cuda:N or metal; several (repeated or after commas) work on different jobs [default: auto]
    #[arg(long, value_name = "DEVICE", value_delimiter = ',', help_heading = "Computing")]
    pub device: Vec<DeviceChoice>,
    /// Precision of the computation: f32, bf16, f16 or fp8, as of `retouch edit` [default: bf16 on a GPU, f32 on the CPU]
    #[arg(long, visible_alias = "precision", value_name = "DTYPE", help_heading = "Computing")]
    pub dtype: Option<Precision>,
    /// Hold the large matrices of the transformer and of T5 in fewer bits: a type of `retouch convert`
    #[arg(long, value_name = "TYPE", help_heading = "Computing")]
    pub quantize: Option<Target>,
    /// Where the text encoders compute, as of `retouch edit` [default: as the memory allows]
    #[arg(long, value_name = "PLACE", help_heading = "Computing")]
    pub encoders: Option<Encoders>,
    /// Stay within this much of each device's memory, e.g. 8G [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "Computing")]
    pub vram_limit: Option<Bytes>,
    #[command(flatten)]
    pub service: ServiceArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Service")]
pub struct ServiceArgs {
    /// Address to serve at; any but this machine's own needs an --api-key
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub host: IpAddr,
    /// Port to serve at; 0 takes one that is free
    #[arg(long, value_name = "PORT", default_value_t = 8090)]
    pub port: u16,
    /// A key that opens the API, repeatable; jobs are seen by the key alone that made them. Other users of this machine can
    /// read it from the list of processes: --api-key-file and RETOUCH_API_KEY keep it to yourself
    #[arg(long, value_name = "KEY", env = "RETOUCH_API_KEY", hide_env_values = true)]
    pub api_key: Vec<String>,
    /// A file of such keys, one on each line
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub api_key_file: Option<PathBuf>,
    /// Serve other machines without a key
    #[arg(long)]
    pub insecure: bool,
    /// Let the web pages of this origin call the API, e.g. https://studio.example; repeatable
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
    /// The address at which clients see the service, where a proxy stands before it
    #[arg(long, value_name = "URL")]
    pub public_url: Option<String>,
    /// Where jobs and results are kept [default: retouch in the user's folder for states]
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub state: Option<PathBuf>,
    /// How long ended jobs stay, e.g. 30m, 24h or 7d
    #[arg(long, value_name = "TIME", default_value = "24h")]
    pub keep: Span,
    /// Jobs that may wait; further ones are refused with 429
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_queue: u32,
    /// Images of one request
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub max_images: u32,
    /// Denoise steps of one image
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_steps: u32,
    /// Largest picture that is taken or made, in pixels
    #[arg(long, value_name = "N", default_value_t = 50_000_000, value_parser = clap::value_parser!(u64).range(256..=100_000_000))]
    pub max_pixels: u64,
    /// Largest request, with its image
    #[arg(long, value_name = "SIZE", default_value = "32MiB")]
    pub max_upload: Bytes,
    /// Fetch source images from the addresses that requests name, of the public internet alone
    #[arg(long)]
    pub allow_url_inputs: bool,
    /// Call webhooks on this machine and in private networks as well
    #[arg(long)]
    pub allow_local_webhooks: bool,
    /// Print the description of the API (OpenAPI, JSON) and end
    #[arg(long)]
    pub openapi: bool,
}

/// A length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refused = || format!("`{text}` is no length of time; give one like 30m, 24h or 7d");
        let unit = text.chars().last().ok_or_else(refused)?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86400,
            _ => return Err(refused()),
        };
        let number: u32 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| refused())?;
        Ok(Self(Duration::from_secs(u64::from(number) * seconds)))
    }
}

/// `retouch serve`.
pub fn run(args: Box<ServeArgs>, console: &Console) -> Result<()> {
    if args.service.openapi {
        return console.write(format!("{}\n", api_description()).as_bytes());
    }
    let options = args.service.options()?;
    options.check().map_err(Failure::Usage)?;
    let source = args.model.source(ModelSource::default());
    let devices = if args.device.is_empty() { vec![DeviceChoice::Auto] } else { args.device.clone() };
    let mut engines = Vec::with_capacity(devices.len());
    let beside = devices.len() - 1;
    for device in devices {
        let engine_options = EngineOptions {
            device,
            precision: args.dtype,
            quantize: args.quantize,
            keep_loaded: KeepLoaded::WhereItFits,
            encoders: args.encoders,
            beside,
            reuse: true,
            previews: true,
            vram_limit: args.vram_limit.map(|limit| limit.0),
            profile: false,
        };
        let engine = Engine::open(&source, engine_options, &mut DownloadProgress::new(console))?;
        let source = source.clone();
        let open: OpenEngine = Box::new(move || Engine::open(&source, engine_options, &mut NoProgress));
        engines.push((engine, open));
    }
    let model = engines.first().map(|(engine, _)| engine.rules().name).unwrap_or_default();
    let served = retouch_server::serve(options, engines, |address| {
        console.note(&format!("{model} is served at http://{address}"));
    });
    served.map_err(|e| Failure::Failed(e.to_string()))
}

impl ServiceArgs {
    fn options(&self) -> Result<ServerOptions> {
        let mut api_keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = fs::read_to_string(path).map_err(|e| Failure::Failed(format!("{}: {e}", path.display())))?;
            if text.trim().is_empty() {
                return Err(Failure::Failed(format!(
                    "{}: there is no key in it; write one on each line",
                    path.display()
                )));
            }
            api_keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string));
        }
        let cors = self.cors.iter().map(|origin| {
            let usable = origin.split_once("://").is_some_and(|(_, host)| !host.is_empty() && !host.contains('/'));
            let value = origin.parse().ok().filter(|_| usable);
            value
                .ok_or_else(|| Failure::Usage(format!("`{origin}` is no origin; give one like https://studio.example")))
        });
        let public_url = self.public_url.as_ref().map(|url| {
            let parsed = url.parse().ok().filter(|url: &url::Url| url.has_host() && url.scheme().starts_with("http"));
            parsed
                .ok_or_else(|| Failure::Usage(format!("`{url}` is no address; give one like https://retouch.example")))
        });
        Ok(ServerOptions {
            address: SocketAddr::new(self.host, self.port),
            state: match &self.state {
                Some(folder) => folder.clone(),
                None => default_state()?,
            },
            api_keys,
            insecure: self.insecure,
            cors: cors.collect::<Result<_>>()?,
            public_url: public_url.transpose()?,
            max_queue: self.max_queue as usize,
            max_images: self.max_images as usize,
            max_steps: self.max_steps as usize,
            max_pixels: self.max_pixels,
            max_upload: self.max_upload.0 as usize,
            keep: self.keep.0,
            allow_url_inputs: self.allow_url_inputs,
            allow_local_webhooks: self.allow_local_webhooks,
        })
    }
}

/// Where programs keep what is to outlast them, by the XDG base directory specification; on Windows as its programs do.
fn default_state() -> Result<PathBuf> {
    let folder = |variable: &str| env::var_os(variable).map(PathBuf::from).filter(|folder| folder.is_absolute());
    let state = folder("XDG_STATE_HOME")
        .or_else(|| folder("LOCALAPPDATA"))
        .or_else(|| folder("HOME").map(|home| home.join(Path::new(".local/state"))));
    let none = || Failure::Usage("there is no home folder to keep jobs in; give a folder by --state".into());
    Ok(state.ok_or_else(none)?.join("retouch"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let seconds = |text: &str| text.parse::<Span>().map(|Span(span)| span.as_secs());
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("24h"), Ok(86400));
        assert_eq!(seconds("7d"), Ok(604_800));
        for text in ["", "h", "24", "-1h", "1.5h", "1w", "1é"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}

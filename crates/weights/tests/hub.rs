//! Downloads from a stand-in for the hub.

use std::{ops::ControlFlow, path::Path};

use retouch_weights::{
    Component, WeightsError,
    hub::{self, HubError, HubOptions, NoProgress},
};
use tempfile::TempDir;

#[path = "support/hub.rs"]
mod support;
use support::{Hub, Script};

const ID: &str = "somebody/FLUX.1-tiny";
const SHARD: &str = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors";

/// A model in the layout of the real repository; contents matter only where they are looked at.
fn model() -> Script {
    let weights = |size: usize| (0..size).map(|i| (i % 251) as u8).collect::<Vec<_>>();
    let index = r#"{"weight_map":{
        "a":"diffusion_pytorch_model-00001-of-00002.safetensors",
        "b":"diffusion_pytorch_model-00002-of-00002.safetensors"}}"#;
    Script::new(ID)
        .file("model_index.json", r#"{"_class_name":"FluxKontextPipeline"}"#)
        .file("scheduler/scheduler_config.json", "{}")
        .file("text_encoder/config.json", "{\"a\":1}")
        .file("text_encoder/model.safetensors", weights(1000))
        .file("text_encoder/model.fp16.safetensors", weights(500))
        .file("text_encoder_2/config.json", "{\"a\":2}")
        .file("text_encoder_2/model.safetensors", weights(2000))
        .file("tokenizer/vocab.json", "{\"b\":1}")
        .file("tokenizer/merges.txt", "#version: 0.2\n")
        .file("tokenizer_2/spiece.model", "pieces")
        .file("transformer/config.json", "{\"a\":3}")
        .file("transformer/diffusion_pytorch_model.safetensors.index.json", index)
        .file("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", weights(3000))
        .file(SHARD, weights(100_000))
        .file("vae/config.json", "{\"a\":4}")
        .file("vae/diffusion_pytorch_model.safetensors", weights(1500))
        .file("README.md", "a card")
        .file("teaser.png", weights(300))
        .file("ae.safetensors", weights(700))
        .file("flux1-kontext-dev.safetensors", weights(4000))
}

fn needed() -> Vec<&'static str> {
    vec![
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_2/spiece.model",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        SHARD,
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
}

fn options(hub: &Hub, cache: &TempDir) -> HubOptions {
    HubOptions { endpoint: hub.url.clone(), token: None, cache: cache.path().to_path_buf(), offline: false }
}

fn fetch(options: &HubOptions) -> Result<retouch_weights::Folder, WeightsError> {
    hub::model(ID, &Component::ALL, options, &mut NoProgress)
}

/// What went wrong, as a hub error with its sentence.
fn refusal(options: &HubOptions) -> (HubError, String) {
    match fetch(options) {
        Err(WeightsError::Hub(error)) => {
            let sentence = error.to_string();
            assert!(!sentence.contains('\n'), "{sentence}");
            (error, sentence)
        }
        Err(other) => panic!("not a hub error: {other}"),
        Ok(folder) => panic!("downloaded to {folder}"),
    }
}

fn files_below(folder: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                files.push(path.strip_prefix(folder).unwrap().to_string_lossy().into_owned());
            }
        }
    }
    files.sort();
    files
}

#[test]
fn only_the_needed_files_are_downloaded() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let folder = fetch(&options(&hub, &cache)).unwrap();
    assert_eq!(hub.downloads(), needed());
    assert_eq!(files_below(folder.path().unwrap()), needed());
    assert_eq!(folder.open(SHARD).unwrap().bytes.len(), 100_000);
    // The layout that other tools read.
    let root = cache.path().join("models--somebody--FLUX.1-tiny");
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), support::COMMIT);
    assert_eq!(folder.path().unwrap(), root.join("snapshots").join(support::COMMIT));
    assert!(files_below(&root.join("blobs")).iter().all(|name| !name.ends_with(".incomplete")));
}

#[test]
fn contents_that_lie_elsewhere_are_followed() {
    let (hub, cache) = (Hub::start(Script { redirect: true, ..model() }), TempDir::new().unwrap());
    let folder = fetch(&options(&hub, &cache)).unwrap();
    let body = folder.open(SHARD).unwrap();
    assert_eq!(body.bytes.len(), 100_000);
    assert!(cache.path().join("models--somebody--FLUX.1-tiny/blobs").join(support::etag(&body.bytes)).is_file());
}

#[test]
fn parts_that_single_files_replace_are_left_out() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let options = options(&hub, &cache);
    hub::model(ID, &[Component::Vae, Component::Clip], &options, &mut NoProgress).unwrap();
    let downloads = hub.downloads();
    assert!(downloads.iter().any(|file| file == "vae/diffusion_pytorch_model.safetensors"));
    assert!(downloads.iter().any(|file| file == "transformer/config.json"));
    assert!(!downloads.iter().any(|file| file.contains("diffusion_pytorch_model-")));
    // The rest comes when it is asked for.
    fetch(&options).unwrap();
    assert!(hub.downloads().contains(&SHARD.to_string()));
}

#[test]
fn a_second_run_downloads_nothing() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let options = options(&hub, &cache);
    let first = fetch(&options).unwrap();
    hub.requests();
    assert_eq!(fetch(&options).unwrap().path(), first.path());
    let requests = hub.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].path.starts_with("/api/"));
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let script = Script { break_after: Some((SHARD.to_string(), 30_000)), breaks: 2, ..model() };
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    let folder = fetch(&options(&hub, &cache)).unwrap();
    let expected = &model().files[SHARD];
    assert_eq!(&*folder.open(SHARD).unwrap().bytes, expected.as_slice());
    let starts: Vec<_> = hub.requests().into_iter().filter(|r| r.method == "GET" && r.path.ends_with(SHARD)).collect();
    assert_eq!(starts.iter().map(|r| r.from.unwrap_or(0)).collect::<Vec<_>>(), [0, 30_000, 60_000]);
}

#[test]
fn a_later_run_continues_an_interrupted_download() {
    let script = Script { break_after: Some((SHARD.to_string(), 0)), breaks: 1000, ..model() };
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    let options = options(&hub, &cache);
    let blobs = cache.path().join("models--somebody--FLUX.1-tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let expected = model().files[SHARD].clone();
    std::fs::write(blobs.join(format!("{}.incomplete", support::etag(&expected))), &expected[..77_777]).unwrap();

    let (error, sentence) = refusal(&options);
    assert!(matches!(error, HubError::Interrupted { done: 77_777, total: 100_000, .. }), "{error:?}");
    assert!(sentence.contains("run again to continue"), "{sentence}");
    hub.requests();

    hub.change(|script| script.break_after = None);
    let folder = fetch(&options).unwrap();
    assert_eq!(&*folder.open(SHARD).unwrap().bytes, expected.as_slice());
    let starts: Vec<_> = hub.requests().into_iter().filter(|r| r.method == "GET" && r.path.ends_with(SHARD)).collect();
    assert_eq!(starts.iter().map(|r| r.from).collect::<Vec<_>>(), [Some(77_777)]);
}

#[test]
fn a_server_without_ranges_still_gives_whole_files() {
    let script = Script { break_after: Some((SHARD.to_string(), 30_000)), breaks: 1, ignore_ranges: true, ..model() };
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    let folder = fetch(&options(&hub, &cache)).unwrap();
    assert_eq!(&*folder.open(SHARD).unwrap().bytes, model().files[SHARD].as_slice());
}

#[test]
fn a_server_that_never_gets_further_is_given_up() {
    let script =
        Script { break_after: Some((SHARD.to_string(), 30_000)), breaks: 1000, ignore_ranges: true, ..model() };
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    assert!(matches!(refusal(&options(&hub, &cache)).0, HubError::Interrupted { .. }));
}

#[test]
fn a_cancelled_download_stays_for_the_next_run() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let mut until_the_shard =
        |file: &str, _: u64, _: u64| if file == SHARD { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let cancelled = hub::model(ID, &Component::ALL, &options(&hub, &cache), &mut until_the_shard);
    assert!(matches!(cancelled, Err(WeightsError::Hub(HubError::Cancelled { .. }))));
    hub.requests();
    fetch(&options(&hub, &cache)).unwrap();
    let downloads = hub.downloads();
    assert!(downloads.contains(&SHARD.to_string()));
    assert!(!downloads.iter().any(|file| file.contains("00001-of-00002")), "{downloads:?}");
}

#[test]
fn progress_reaches_the_end_of_every_file() {
    struct Ends(Vec<(String, u64, u64)>, Vec<(usize, u64)>);
    impl hub::DownloadProgress for Ends {
        fn begin(&mut self, files: usize, bytes: u64) {
            self.1.push((files, bytes));
        }
        fn on(&mut self, file: &str, done: u64, total: u64) -> ControlFlow<()> {
            self.0.retain(|(name, _, _)| name != file);
            self.0.push((file.to_string(), done, total));
            ControlFlow::Continue(())
        }
    }
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let mut ends = Ends(Vec::new(), Vec::new());
    hub::model(ID, &Component::ALL, &options(&hub, &cache), &mut ends).unwrap();
    assert_eq!(ends.0.len(), needed().len());
    assert!(ends.0.iter().all(|(_, done, total)| done == total));
    assert_eq!(ends.1[1], (5, 1000 + 2000 + 3000 + 100_000 + 1500));
}

#[test]
fn a_gated_model_names_its_licence_page_and_how_to_log_in() {
    let script = Script { gated_for: Some("hf_good".into()), ..model() };
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    let page = format!("{}/{ID}", hub.url);

    let (error, sentence) = refusal(&options(&hub, &cache));
    assert!(matches!(error, HubError::LicenceNotAccepted { .. }), "{error:?}");
    assert!(sentence.contains(&page) && sentence.contains("HF_TOKEN") && sentence.contains("hf auth login"));

    let stranger = HubOptions { token: Some("hf_stranger".into()), ..options(&hub, &cache) };
    let (error, sentence) = refusal(&stranger);
    assert!(matches!(error, HubError::NoAccess { .. }), "{error:?}");
    assert!(sentence.contains(&page), "{sentence}");

    let wrong = HubOptions { token: Some("hf_wrong".into()), ..options(&hub, &cache) };
    assert!(matches!(refusal(&wrong).0, HubError::BadToken { .. }));

    fetch(&HubOptions { token: Some("hf_good".into()), ..options(&hub, &cache) }).unwrap();
}

#[test]
fn an_unknown_model_is_said_to_be_unknown() {
    let (hub, cache) = (Hub::start(Script::new("somebody/else")), TempDir::new().unwrap());
    let (error, sentence) = refusal(&options(&hub, &cache));
    assert!(matches!(error, HubError::NotFound { .. }), "{error:?}");
    assert!(sentence.contains(ID), "{sentence}");
    let known = HubOptions { token: Some("hf_good".into()), ..options(&hub, &cache) };
    assert!(matches!(refusal(&known).0, HubError::NotFound { .. }));
}

#[test]
fn what_is_no_id_is_refused_before_any_request() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    for id in ["name", "../etc/passwd", "a/b/c", "a/..", "/b", "a/", "a/b c", "a/b@../x"] {
        let refused = hub::model(id, &Component::ALL, &options(&hub, &cache), &mut NoProgress);
        assert!(matches!(refused, Err(WeightsError::Hub(HubError::BadId(_)))), "{id}");
    }
    assert!(hub.requests().is_empty());
}

#[test]
fn another_architecture_is_refused_before_its_weights_come() {
    let script = model().file("model_index.json", r#"{"_class_name":"QwenImageEditPipeline"}"#);
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    let error = fetch(&options(&hub, &cache)).err().unwrap().to_string();
    assert!(error.contains("QwenImageEditPipeline") && error.contains("FluxKontextPipeline"), "{error}");
    assert!(!hub.downloads().iter().any(|file| file.ends_with(".safetensors")));
}

#[test]
fn offline_uses_the_cache_and_asks_nobody() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let offline = HubOptions { offline: true, ..options(&hub, &cache) };
    let (error, sentence) = refusal(&offline);
    assert!(matches!(error, HubError::Offline { .. }), "{error:?}");
    assert!(sentence.contains("HF_HUB_OFFLINE"), "{sentence}");
    assert!(hub.requests().is_empty());

    let folder = fetch(&options(&hub, &cache)).unwrap();
    hub.requests();
    assert_eq!(fetch(&offline).unwrap().path(), folder.path());
    assert!(hub.requests().is_empty());

    std::fs::remove_file(folder.path().unwrap().join(SHARD)).unwrap();
    let (error, _) = refusal(&offline);
    assert!(matches!(&error, HubError::Offline { missing, .. } if missing == SHARD), "{error:?}");
}

#[test]
fn without_a_connection_a_complete_model_is_used_and_another_is_explained() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    // A port on which nothing listens.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unreachable = HubOptions { endpoint: format!("http://{closed}"), ..options(&hub, &cache) };
    let (error, sentence) = refusal(&unreachable);
    assert!(matches!(error, HubError::Unreachable { .. }), "{error:?}");
    assert!(sentence.contains("cannot be reached"), "{sentence}");

    let folder = fetch(&options(&hub, &cache)).unwrap();
    assert_eq!(fetch(&unreachable).unwrap().path(), folder.path());
}

#[test]
fn tokenizers_come_without_the_rest_of_their_repository() {
    let script = Script::new("google/t5-v1_1-xxl")
        .file("spiece.model", "pieces")
        .file("tokenizer_config.json", "{}")
        .file("pytorch_model.bin", vec![0; 1000])
        .file("config.json", "{}");
    let (hub, cache) = (Hub::start(script), TempDir::new().unwrap());
    let folder = hub::t5_tokenizer(&options(&hub, &cache), &mut NoProgress).unwrap();
    assert!(folder.has("spiece.model"));
    assert_eq!(hub.downloads(), ["spiece.model", "tokenizer_config.json"]);

    let offline = HubOptions { offline: true, ..options(&hub, &cache) };
    assert!(hub::t5_tokenizer(&offline, &mut NoProgress).unwrap().has("spiece.model"));
    assert!(hub::clip_tokenizer(&offline, &mut NoProgress).is_err());
}

#[test]
fn downloaded_models_are_listed_with_their_sizes() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    assert!(hub::cached_models(&options(&hub, &cache)).is_empty());
    let folder = fetch(&options(&hub, &cache)).unwrap();
    std::fs::create_dir_all(cache.path().join("models--somebody--a-language-model/snapshots/x")).unwrap();

    let [listed] = hub::cached_models(&options(&hub, &cache)).try_into().unwrap();
    assert_eq!((listed.id.as_str(), listed.missing.as_deref()), (ID, None));
    let files = model().files;
    assert_eq!(listed.bytes, needed().iter().map(|file| files[*file].len() as u64).sum::<u64>());
    assert_eq!(Some(listed.folder.as_path()), folder.path());
}

#[test]
fn it_works_inside_of_an_async_runtime() {
    let (hub, cache) = (Hub::start(model()), TempDir::new().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { fetch(&options(&hub, &cache)).unwrap() });
}

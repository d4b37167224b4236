//! A service that is killed at any moment loses no job and delivers none twice as different images.
//!
//! `RETOUCH_KILLS=50 cargo test --test service_crash` kills it that often (5 times if nothing is said).

#[path = "support/service.rs"]
mod service;
mod support;

use std::{
    collections::BTreeMap,
    env,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rand::Rng;
use reqwest::{StatusCode, blocking::Client};
use serde_json::{Value, json};
use service::{Service, form};
use tempfile::tempdir;

/// Seeds from a few, so that the same picture is made in many places.
const SEEDS: u64 = 5;

fn request(number: u64) -> Value {
    json!({"prompt": "make the circle blue", "seed": number % SEEDS, "num_images": 1 + number % 2, "steps": 2})
}

/// The address of the service, which changes with each start; none while there is none.
type Address = Arc<Mutex<Option<String>>>;

/// Sends requests, each again under the same key until it is known to be accepted: ids by the number of the request.
fn send(address: &Address, numbers: &AtomicU64, stop: &AtomicBool) -> BTreeMap<u64, String> {
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
    let mut accepted = BTreeMap::new();
    'requests: while !stop.load(Ordering::Relaxed) {
        let number = numbers.fetch_add(1, Ordering::Relaxed);
        loop {
            let at = address.lock().unwrap().clone();
            if let Some(at) = at {
                let sent = client.post(format!("{at}/api/jobs")).header("Idempotency-Key", format!("request {number}"));
                match sent.multipart(form(request(number))).send() {
                    Ok(response) if response.status() == StatusCode::ACCEPTED => {
                        if let Ok(job) = response.json::<Value>() {
                            accepted.insert(number, job["id"].as_str().unwrap().to_string());
                            break;
                        }
                    }
                    Ok(response) if response.status() == StatusCode::TOO_MANY_REQUESTS => {}
                    Ok(response) => panic!("{}: {:?}", response.status(), response.text()),
                    // It was killed meanwhile.
                    Err(_) => {}
                }
            }
            // Only what was never answered is left undecided.
            if stop.load(Ordering::Relaxed) && address.lock().unwrap().is_none() {
                break 'requests;
            }
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(30));
    }
    accepted
}

/// The pixels of all images that a service shows, by job and place.
fn pictures(service: &Service) -> BTreeMap<(String, u64), (u64, Vec<u8>)> {
    let (mut pictures, mut path) = (BTreeMap::new(), "/api/jobs?limit=200".to_string());
    loop {
        let page = service.json(&path);
        for job in page["jobs"].as_array().unwrap() {
            for image in job["images"].as_array().unwrap() {
                let bytes = service.get(image["url"].as_str().unwrap()).bytes().unwrap();
                let pixels = retouch::image::read_image(&bytes, "a result").unwrap().into_raw();
                let key = (job["id"].as_str().unwrap().to_string(), image["index"].as_u64().unwrap());
                pictures.insert(key, (image["seed"].as_u64().unwrap(), pixels));
            }
        }
        match page["next"].as_str() {
            Some(next) => path = format!("/api/jobs?limit=200&before={next}"),
            None => return pictures,
        }
    }
}

#[test]
fn a_service_that_is_killed_loses_nothing() {
    let kills: usize = env::var("RETOUCH_KILLS").map_or(5, |kills| kills.parse().unwrap());
    let state = tempdir().unwrap();
    let (address, numbers, stop) = (Address::default(), AtomicU64::new(0), AtomicBool::new(false));
    let mut seen = BTreeMap::new();
    let mut killed_at_work = 0;
    let accepted = thread::scope(|scope| {
        let senders: Vec<_> = (0..4).map(|_| scope.spawn(|| send(&address, &numbers, &stop))).collect();
        for _ in 0..kills {
            let service = start(state.path());
            *address.lock().unwrap() = Some(service.address.clone());
            thread::sleep(Duration::from_millis(rand::rng().random_range(50..2500)));
            // What was delivered must stay what it is.
            seen.extend(pictures(&service));
            killed_at_work += usize::from(service.json("/health")["running"] == 1);
            *address.lock().unwrap() = None;
            service.kill();
        }
        stop.store(true, Ordering::Relaxed);
        senders.into_iter().flat_map(|sender| sender.join().unwrap()).collect::<BTreeMap<_, _>>()
    });

    let service = start(state.path());
    for (number, id) in &accepted {
        let job = service.ended(id);
        assert_eq!(job["status"], "done", "{job}");
        let images = 1 + number % 2;
        assert_eq!(job["images"].as_array().unwrap().len() as u64, images, "{job}");
        assert_eq!(job["request"]["seeds"][0], number % SEEDS);
        // The same request again is still the same job.
        let again = service.client.post(service.at("/api/jobs")).header("Idempotency-Key", format!("request {number}"));
        let again: Value = again.multipart(form(request(*number))).send().unwrap().json().unwrap();
        assert_eq!(again["id"], json!(id));
    }
    let last = pictures(&service);
    for (key, picture) in &seen {
        assert!(last.get(key) == Some(picture), "image {} of job {} was shown as another", key.1, key.0);
    }
    let mut by_seed = BTreeMap::new();
    for (key, (seed, pixels)) in &last {
        assert!(
            by_seed.entry(seed).or_insert(pixels) == &pixels,
            "image {} of job {} is not that of its seed",
            key.1,
            key.0
        );
    }
    assert!(accepted.len() >= kills, "{} jobs", accepted.len());
    println!("{kills} kills, {killed_at_work} of them while a job ran: {} jobs, {} images", accepted.len(), last.len());
}

fn start(state: &Path) -> Service {
    Service::start(state, &["--max-queue", "20"])
}

#[cfg(unix)]
#[test]
fn a_service_that_is_stopped_puts_back_what_it_cannot_end() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let jobs = [service.submit(service::long()), service.submit(service::blue())];
    let [long, short] = jobs.map(|job| job["id"].as_str().unwrap().to_string());
    while service.json(&format!("/api/jobs/{long}"))["progress"].as_f64() == Some(0.0) {}
    let took = service.stop();
    assert!(took < Duration::from_secs(20), "{took:?}");
    let service = Service::start(state.path(), &[]);
    let job = service.json(&format!("/api/jobs/{long}"));
    assert!(job["status"] == "queued" || job["status"] == "running", "{job}");
    while service.json(&format!("/api/jobs/{long}"))["progress"].as_f64() == Some(0.0) {}
    service.delete(&format!("/api/jobs/{long}"));
    assert_eq!(service.ended(&long)["status"], "cancelled");
    assert_eq!(service.ended(&short)["status"], "done");
}

/// A disk of two megabytes. Only who may mount one can run this; it says so and passes where that is not so.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_refuses_and_loses_nothing() {
    use std::process::Command;
    let folder = tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(folder.path()).output();
    if !mounted.is_ok_and(|mounted| mounted.status.success()) {
        eprintln!("not run: no disk can be mounted here");
        return;
    }
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(self.0).status();
        }
    }
    let _mounted = Mounted(folder.path());
    let service = Service::start(&folder.path().join("state"), &[]);
    let mut accepted = vec![service.submit(service::blue())["id"].as_str().unwrap().to_string()];
    // All but a few pages are taken by another.
    std::fs::write(folder.path().join("ballast"), vec![0; 4 << 20]).unwrap_err();
    let refused = loop {
        let sent = service.client.post(service.at("/api/jobs")).multipart(form(service::blue())).send().unwrap();
        if sent.status() != StatusCode::ACCEPTED {
            break sent;
        }
        accepted.push(sent.json::<Value>().unwrap()["id"].as_str().unwrap().to_string());
    };
    assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE);
    let refused: Value = refused.json().unwrap();
    assert_eq!(refused["error"]["type"], "insufficient_storage");
    // It still answers, and what waits for room goes on once there is some.
    assert_eq!(service.json("/health")["status"], "ok");
    std::fs::remove_file(folder.path().join("ballast")).unwrap();
    for id in accepted {
        assert_eq!(service.ended(&id)["status"], "done");
    }
    assert_eq!(service.ended(service.submit(service::blue())["id"].as_str().unwrap())["status"], "done");
}

//! The service under load: `cargo bench --bench service`.
//!
//! 200 clients (`--clients N`) post 2,000 jobs (`--jobs N`) for the embedded model in the hosted service's form, poll each twice
//! a second, and fetch the result. Prints what was lost, how long polls took while the engine computed, and what the memory did.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

/// Between two polls of a client.
const POLL_PAUSE: Duration = Duration::from_millis(500);
/// Denoise steps of a job: fewer than usual, as it is the service that is measured.
const STEPS: usize = 4;

#[derive(Default)]
struct Counts {
    begun: AtomicUsize,
    done: AtomicUsize,
    turned_away: AtomicUsize,
    errors: Mutex<Vec<String>>,
    /// Seconds of each poll, and of each accepted post.
    polls: Mutex<Vec<f64>>,
    posts: Mutex<Vec<f64>>,
}

fn main() {
    let argument = |name: &str, default: usize| {
        let value = env::args().skip_while(|argument| argument != name).nth(1);
        value.map_or(default, |value| value.parse().expect("a number"))
    };
    let (clients, jobs) = (argument("--clients", 200), argument("--jobs", 2000));
    let state = tempfile::tempdir().expect("a folder");
    let (process, address) = start(state.path());
    let pid = process.id();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let counts = Arc::new(Counts::default());
    let start = Instant::now();
    let memory = runtime.block_on(async {
        let scene =
            fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images/scene.png")).expect("the scene");
        let image = Arc::new(STANDARD.encode(scene));
        let tasks: Vec<_> =
            (0..clients).map(|_| tokio::spawn(client(address.clone(), image.clone(), counts.clone(), jobs))).collect();
        let mut memory = Vec::new();
        while counts.done.load(Ordering::Relaxed) + counts.errors.lock().unwrap().len() < jobs {
            let done = counts.done.load(Ordering::Relaxed);
            if memory.len() <= 20 * done / jobs {
                memory.push((done, resident(pid)));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        for task in tasks {
            task.await.expect("a client");
        }
        memory.push((jobs, resident(pid)));
        memory
    });
    let seconds = start.elapsed().as_secs_f64();
    drop(Ended(process));

    let errors = counts.errors.lock().unwrap();
    println!("clients {clients}, jobs {jobs}, {seconds:.0} s, {:.1} jobs/s", jobs as f64 / seconds);
    println!("done {}, errors {} {:?}", counts.done.load(Ordering::Relaxed), errors.len(), errors.first());
    println!("turned away by 429: {}", counts.turned_away.load(Ordering::Relaxed));
    for (what, times) in [("poll", &counts.polls), ("post", &counts.posts)] {
        let mut times = times.lock().unwrap();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| 1e3 * times[((times.len() - 1) as f64 * share) as usize];
        println!(
            "{what}: {} of them, median {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
            times.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
    for (done, bytes) in memory {
        println!("after {done} jobs: {:.1} MB resident", bytes as f64 / 1e6);
    }
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(state: &std::path::Path) -> (Child, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retouch"));
    command.args(["serve", "--port", "0", "--device", "cpu", "--state"]).arg(state);
    let mut process = command.stderr(Stdio::piped()).spawn().expect("the service");
    let stderr = process.stderr.take().expect("its standard error");
    let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
    let address = lines.find_map(|line| Some(line.split_once(" is served at ")?.1.to_string())).expect("its address");
    std::thread::spawn(move || lines.for_each(drop));
    (process, address)
}

async fn client(address: String, image: Arc<String>, counts: Arc<Counts>, jobs: usize) {
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().expect("a client");
    loop {
        let number = counts.begun.fetch_add(1, Ordering::Relaxed);
        if number >= jobs {
            return;
        }
        match job(&client, &address, &image, number, &counts).await {
            Ok(()) => counts.done.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                counts.errors.lock().unwrap().push(error);
                0
            }
        };
    }
}

/// From a post to the image in hand.
async fn job(client: &Client, address: &str, image: &str, number: usize, counts: &Counts) -> Result<(), String> {
    let text = |e: reqwest::Error| format!("{e:?}");
    let asked = json!({"prompt": "make the circle blue", "input_image": image, "seed": number, "steps": STEPS});
    let submitted: Value = loop {
        let start = Instant::now();
        let response = client.post(format!("{address}/v1/flux-kontext-pro")).json(&asked).send().await.map_err(text)?;
        match response.status() {
            StatusCode::OK => {
                counts.posts.lock().unwrap().push(start.elapsed().as_secs_f64());
                break response.json().await.map_err(text)?;
            }
            StatusCode::TOO_MANY_REQUESTS => {
                counts.turned_away.fetch_add(1, Ordering::Relaxed);
                let wait = response.headers()["retry-after"].to_str().ok().and_then(|seconds| seconds.parse().ok());
                tokio::time::sleep(Duration::from_secs(wait.ok_or("no Retry-After")?)).await;
            }
            other => return Err(format!("{other}: {:?}", response.text().await)),
        }
    };
    let url = submitted["polling_url"].as_str().ok_or("no polling_url")?;
    let sample = loop {
        tokio::time::sleep(POLL_PAUSE).await;
        let start = Instant::now();
        let response = client.get(url).send().await.map_err(text)?;
        let result: Value = response.json().await.map_err(text)?;
        counts.polls.lock().unwrap().push(start.elapsed().as_secs_f64());
        match result["status"].as_str() {
            Some("Pending") => {}
            Some("Ready") => break result["result"]["sample"].as_str().ok_or("no sample")?.to_string(),
            _ => return Err(result.to_string()),
        }
    };
    let response = client.get(sample).send().await.map_err(text)?;
    let bytes = response.bytes().await.map_err(text)?;
    if bytes.starts_with(b"\x89PNG") { Ok(()) } else { Err("the result is no PNG".into()) }
}

/// Bytes of memory that a process holds; Linux only, 0 elsewhere.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

//! A running `retouch serve`.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{
    StatusCode,
    blocking::{Client, Response, multipart::Form},
};
use serde_json::{Value, json};

/// The process, ended with the test.
pub struct Service {
    process: Child,
    /// Without a slash at its end.
    pub address: String,
    pub client: Client,
    /// What it says on standard error after its start.
    log: mpsc::Receiver<String>,
}

impl Service {
    /// Starts the embedded model at a port that is free.
    pub fn start(state: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_retouch"));
        command.args(["serve", "--port", "0", "--device", "cpu", "-v", "--state"]).arg(state).args(arguments);
        command.env_remove("RETOUCH_API_KEY");
        let mut process = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let (sender, log) = mpsc::channel();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut said = Vec::new();
        let address = loop {
            let line =
                log.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("it did not start: {said:?}"));
            if let Some((_, address)) = line.split_once(" is served at ") {
                break address.to_string();
            }
            said.push(line);
        };
        let client = Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().unwrap();
        Self { process, address, client, log }
    }

    pub fn get(&self, path: &str) -> Response {
        self.client.get(self.at(path)).send().unwrap()
    }

    pub fn json(&self, path: &str) -> Value {
        let response = self.get(path);
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.json().unwrap()
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.client.post(self.at(path)).json(body).send().unwrap()
    }

    pub fn delete(&self, path: &str) -> Response {
        self.client.delete(self.at(path)).send().unwrap()
    }

    /// A full address is taken as it is.
    pub fn at(&self, path: &str) -> String {
        if path.starts_with("http") { path.to_string() } else { format!("{}{path}", self.address) }
    }

    /// Asks for an edit of the scene by the native API; the job.
    pub fn submit(&self, request: Value) -> Value {
        let response = self.client.post(self.at("/api/jobs")).multipart(form(request)).send().unwrap();
        assert_eq!(response.status(), StatusCode::ACCEPTED, "{:?}", response.text());
        response.json().unwrap()
    }

    /// The job once it has ended.
    pub fn ended(&self, id: &str) -> Value {
        let start = Instant::now();
        loop {
            let job = self.json(&format!("/api/jobs/{id}"));
            if !matches!(job["status"].as_str(), Some("queued" | "running")) {
                return job;
            }
            assert!(start.elapsed() < Duration::from_secs(120), "{job}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Everything said on standard error since the last call.
    pub fn said(&self) -> String {
        self.log.try_iter().collect::<Vec<_>>().join("\n")
    }

    /// Ends the process without a chance to do anything.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks it to stop, and waits until it has.
    #[cfg(unix)]
    pub fn stop(mut self) -> Duration {
        let start = Instant::now();
        let asked = Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status().unwrap();
        assert!(asked.success());
        assert!(self.process.wait().unwrap().success(), "{}", self.said());
        start.elapsed()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn scene() -> PathBuf {
    crate::support::fixtures().join("images/scene.png")
}

pub fn scene_base64() -> String {
    STANDARD.encode(std::fs::read(scene()).unwrap())
}

/// The native API's form.
pub fn form(request: Value) -> Form {
    Form::new().text("request", request.to_string()).file("image", scene()).unwrap()
}

/// A request for what the embedded model does in a moment.
pub fn blue() -> Value {
    json!({"prompt": "make the circle blue", "seed": 1})
}

/// The same for what takes it a while.
pub fn long() -> Value {
    json!({"prompt": "make the circle blue", "seed": 1, "steps": 1000})
}

//! A stand-in for the hub on the loopback interface: enough of its HTTP interface to download one model.
//!
//! Free of dependencies, so that tests of other packages can take it in with `#[path]`.

#![allow(dead_code)] // each test file uses its own part

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
};

/// The commit that the stand-in's `main` stands for.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the stand-in serves, and how.
#[derive(Clone, Default)]
pub struct Script {
    /// `owner/name`.
    pub id: String,
    pub files: BTreeMap<String, Vec<u8>>,
    /// Tokens that exist; a request with another one is refused.
    pub tokens: Vec<String>,
    /// The one token that has accepted the licence; with one, files are for it only.
    pub gated_for: Option<String>,
    /// Breaks the connection after so many bytes of this file, on each of its first `breaks` downloads.
    pub break_after: Option<(String, usize)>,
    pub breaks: usize,
    /// Sends whole files whatever range is asked for.
    pub ignore_ranges: bool,
    /// Sends weights on to another host for their contents, as the real hub does.
    pub redirect: bool,
    /// Where the stand-in listens; filled in when it starts.
    pub port: u16,
}

impl Script {
    pub fn new(id: &str) -> Self {
        Self { id: id.to_string(), tokens: vec!["hf_good".into(), "hf_stranger".into()], ..Self::default() }
    }

    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.to_string(), content.into());
        self
    }

    /// All files below `folder`.
    pub fn folder(mut self, folder: &Path) -> Self {
        let mut open = vec![folder.to_path_buf()];
        while let Some(at) = open.pop() {
            for entry in std::fs::read_dir(&at).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path);
                } else {
                    let parts = path.strip_prefix(folder).unwrap().components();
                    let name = parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
                    self.files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        self
    }
}

/// One request that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// First byte asked for.
    pub from: Option<usize>,
    pub token: Option<String>,
}

/// A running stand-in; it ends with the test's process.
pub struct Hub {
    pub url: String,
    script: Arc<Mutex<Script>>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    pub fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("http://127.0.0.1:{port}");
        let (script, requests) = (Arc::new(Mutex::new(Script { port, ..script })), Arc::default());
        let hub = Self { url, script, requests };
        let (script, requests) = (hub.script.clone(), hub.requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (script, requests) = (script.clone(), Arc::clone(&requests));
                // A client that hangs up is part of the tests.
                std::thread::spawn(move || drop(serve(stream, &script, &requests)));
            }
        });
        hub
    }

    /// Changes what is served from now on.
    pub fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    /// The names of the files whose contents were asked for since the last call, sorted.
    pub fn downloads(&self) -> Vec<String> {
        let marker = format!("/resolve/{COMMIT}/");
        let name = |request: Request| {
            let file = request.path.split_once(&marker).map(|(_, file)| file.to_string());
            file.filter(|_| request.method == "GET")
        };
        let mut files: Vec<String> = self.requests().into_iter().filter_map(name).collect();
        files.sort();
        files.dedup();
        files
    }
}

fn serve(mut stream: TcpStream, script: &Mutex<Script>, requests: &Mutex<Vec<Request>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, path: target, from: None, token: None };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let from = value.trim_start_matches("bytes=").split('-').next();
                request.from = from.and_then(|from| from.parse().ok());
            }
            "authorization" => request.token = Some(value.trim_start_matches("Bearer ").to_string()),
            _ => {}
        }
    }
    requests.lock().unwrap().push(request.clone());
    let answer = answer(&request, &mut script.lock().unwrap());
    let mut head = format!("HTTP/1.1 {}\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", answer.body.len()));
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        stream.write_all(&answer.body[..answer.sent.min(answer.body.len())])?;
    }
    stream.flush()
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// How much of the body is sent before the connection breaks.
    sent: usize,
}

impl Answer {
    fn new(status: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), sent: usize::MAX }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn refusal(status: &'static str, code: &str, message: &str) -> Self {
        let answer = Self::new(status, format!("{{\"error\":\"{message}\"}}")).header("X-Error-Message", message);
        if code.is_empty() { answer } else { answer.header("X-Error-Code", code) }
    }
}

fn answer(request: &Request, script: &mut Script) -> Answer {
    let path = request.path.split('?').next().unwrap_or_default();
    if let Some(token) = &request.token
        && !script.tokens.contains(token)
    {
        return Answer::refusal("401 Unauthorized", "", "Invalid credentials in Authorization header");
    }
    let api = format!("/api/models/{}", script.id);
    if let Some(rest) = path.strip_prefix(&api) {
        return match rest {
            "" | "/revision/main" => json(format!("{{\"id\":\"{}\",\"sha\":\"{COMMIT}\"}}", script.id)),
            rest if rest == format!("/revision/{COMMIT}") => {
                json(format!("{{\"id\":\"{}\",\"sha\":\"{COMMIT}\"}}", script.id))
            }
            rest if rest == format!("/tree/{COMMIT}") => json(tree(&script.files)),
            _ => Answer::refusal("404 Not Found", "RevisionNotFound", "no such revision"),
        };
    }
    if path.starts_with("/api/models/") {
        // To strangers the hub does not tell a private model from one that does not exist.
        return match request.token {
            None => Answer::refusal("401 Unauthorized", "", "Invalid username or password."),
            Some(_) => Answer::refusal("404 Not Found", "RepoNotFound", "Repository not found"),
        };
    }
    let contents = path.strip_prefix("/contents");
    let place = format!("/{}/resolve/{COMMIT}/", script.id);
    let Some(name) = contents.unwrap_or(path).strip_prefix(&place) else {
        return Answer::refusal("404 Not Found", "RepoNotFound", "Repository not found");
    };
    // The other address gives contents to those who were sent there, and says nothing about them.
    if contents.is_none()
        && let Some(reader) = &script.gated_for
        && request.token.as_ref() != Some(reader)
    {
        let status = if request.token.is_some() { "403 Forbidden" } else { "401 Unauthorized" };
        return Answer::refusal(status, "GatedRepo", "Access to model is restricted.");
    }
    let Some(body) = script.files.get(name).cloned() else {
        return Answer::refusal("404 Not Found", "EntryNotFound", "Entry not found");
    };
    if script.redirect && contents.is_none() && name.ends_with(".safetensors") {
        return Answer::new("302 Found", "")
            .header("Location", format!("http://localhost:{}/contents{path}", script.port))
            .header("X-Repo-Commit", COMMIT)
            .header("X-Linked-ETag", format!("\"{}\"", etag(&body)))
            .header("X-Linked-Size", body.len().to_string());
    }
    file_answer(request, script, name, body, contents.is_some())
}

fn file_answer(request: &Request, script: &mut Script, name: &str, body: Vec<u8>, bare: bool) -> Answer {
    let (total, etag) = (body.len(), etag(&body));
    let mut answer = match request.from {
        Some(from) if !script.ignore_ranges && from < total => Answer::new("206 Partial Content", &body[from..])
            .header("Content-Range", format!("bytes {from}-{}/{total}", total - 1)),
        _ => Answer::new("200 OK", body),
    };
    if !bare {
        answer = answer.header("ETag", format!("\"{etag}\"")).header("X-Repo-Commit", COMMIT);
    }
    if let Some((broken, after)) = &script.break_after
        && broken == name
        && request.method == "GET"
        && script.breaks > 0
    {
        answer.sent = *after;
        script.breaks -= 1;
    }
    answer
}

fn json(body: String) -> Answer {
    Answer::new("200 OK", body).header("Content-Type", "application/json")
}

fn tree(files: &BTreeMap<String, Vec<u8>>) -> String {
    let entry = |(path, body): (&String, &Vec<u8>)| {
        format!("{{\"type\":\"file\",\"oid\":\"{}\",\"size\":{},\"path\":\"{path}\"}}", etag(body), body.len())
    };
    format!("[{}]", files.iter().map(entry).collect::<Vec<_>>().join(","))
}

/// Names contents: FNV-1a.
pub fn etag(body: &[u8]) -> String {
    let hash = body.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

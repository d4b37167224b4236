//! `retouch serve` towards those who do not belong: keys, other origins, hostile paths, names and bodies.

#[path = "support/service.rs"]
mod service;
mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use reqwest::{
    StatusCode,
    blocking::multipart::{Form, Part},
};
use serde_json::{Value, json};
use service::{Service, blue, form, scene, scene_base64};
use support::Place;
use tempfile::tempdir;

const KEY: &str = "first-secret-key";
const OTHER: &str = "second-secret-key";

#[test]
fn every_address_but_those_said_to_needs_a_key() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--api-key", KEY]);
    let open = ["/health", "/ready", "/api/service", "/openapi.json", "/", "/images/{id}/{name}"];
    let description = service.json("/openapi.json");
    let mut closed = 0;
    for (path, methods) in description["paths"].as_object().unwrap() {
        if open.contains(&path.as_str()) {
            continue;
        }
        for method in methods.as_object().unwrap().keys() {
            let method = method.to_uppercase().parse().unwrap();
            let at = service.at(&path.replace("{id}", "5f1c4f8e-0000-4000-8000-000000000000"));
            for key in [None, Some("wrong-key"), Some("first-secret-ke"), Some("first-secret-key2"), Some("")] {
                let request = service.client.request(reqwest::Method::clone(&method), &at);
                let request =
                    key.map_or(service.client.request(method.clone(), &at), |key| request.header("x-key", key));
                let response = request.send().unwrap();
                assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{method} {path} with {key:?}");
                assert_eq!(response.headers()["www-authenticate"], "Bearer");
            }
            closed += 1;
        }
    }
    assert!(closed >= 11, "{closed}");
    let with = |name: &str, value: &str| {
        service.client.get(service.at("/api/jobs")).header(name, value).send().unwrap().status()
    };
    assert_eq!(with("x-key", KEY), StatusCode::OK);
    assert_eq!(with("authorization", &format!("Bearer {KEY}")), StatusCode::OK);
    assert_eq!(with("authorization", &format!("bearer  {KEY} ")), StatusCode::OK);
    assert_eq!(with("authorization", &format!("Basic {KEY}")), StatusCode::UNAUTHORIZED);
}

#[test]
fn a_key_sees_its_own_jobs_alone() {
    let place = Place::new();
    std::fs::write(place.path("keys"), format!("{KEY}\n\n  {OTHER}  \n")).unwrap();
    let service = Service::start(&place.path("state"), &["--api-key-file", &place.path("keys").display().to_string()]);
    let get = |path: &str, key: &str| service.client.get(service.at(path)).header("x-key", key).send().unwrap();
    let request = service.client.post(service.at("/api/jobs")).header("x-key", KEY).multipart(form(blue()));
    let job: Value = request.send().unwrap().json().unwrap();
    let id = job["id"].as_str().unwrap();
    let own = loop {
        let job: Value = get(&format!("/api/jobs/{id}"), KEY).json().unwrap();
        if job["status"] == "done" {
            break job;
        }
    };
    for path in [format!("/api/jobs/{id}"), format!("/api/jobs/{id}/events")] {
        assert_eq!(get(&path, OTHER).status(), StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(get("/api/jobs", OTHER).json::<Value>().unwrap()["jobs"], json!([]));
    assert_eq!(get(&format!("/v1/get_result?id={id}"), OTHER).json::<Value>().unwrap()["status"], "Task not found");
    let delete = service.client.delete(service.at(&format!("/api/jobs/{id}"))).header("x-key", OTHER).send().unwrap();
    assert_eq!(delete.status(), StatusCode::NOT_FOUND);
    // The address of a picture opens that picture, for whoever was given it.
    let url = own["images"][0]["url"].as_str().unwrap();
    assert_eq!(service.get(url).status(), StatusCode::OK);
    let (path, signature) = url.split_once("?signature=").unwrap();
    assert_eq!(service.get(path).status(), StatusCode::UNPROCESSABLE_ENTITY);
    for other in ["", "0", &signature.replace(&signature[..1], "x"), &signature[1..]] {
        assert_eq!(service.get(&format!("{path}?signature={other}")).status(), StatusCode::NOT_FOUND);
    }
    let neighbour = path.replace("0.png", "input");
    assert_eq!(service.get(&format!("{neighbour}?signature={signature}")).status(), StatusCode::NOT_FOUND);
}

#[test]
fn it_does_not_open_to_other_machines_by_mistake() {
    let place = Place::new();
    let state = place.path("state").display().to_string();
    place.write("empty", "\n \n");
    for (arguments, words) in [
        (&["--host", "0.0.0.0"][..], "--insecure"),
        (&["--host", "::"], "--insecure"),
        (&["--api-key", "short"], "8 characters"),
        (&["--cors", "example.org"], "https://studio.example"),
        (&["--public-url", "example"], "https://retouch.example"),
        (&["--api-key-file", "nowhere"], "nowhere"),
        (&["--api-key-file", "empty"], "no key in it"),
    ] {
        let ran = place.run(&[&["serve", "--port", "0", "--state", &state], arguments].concat());
        let code = if arguments[0] == "--api-key-file" { 1 } else { 2 };
        assert!(ran.sentence(code).contains(words), "{}", ran.stderr);
    }
}

#[test]
fn pages_of_other_origins_and_names_that_point_here_are_refused() {
    let state = tempdir().unwrap();
    let service =
        Service::start(state.path(), &["--cors", "https://studio.example", "--public-url", "https://edit.example"]);
    let host = service.address.trim_start_matches("http://").to_string();
    let get = |name: &str, value: &str| service.client.get(service.at("/api/jobs")).header(name, value).send().unwrap();
    let post = |origin: &str| {
        let request = service.client.post(service.at("/api/jobs")).header("origin", origin);
        request.multipart(form(blue())).send().unwrap()
    };
    for origin in ["https://evil.example", "null", "http://127.0.0.1:1", "http://studio.example"] {
        assert_eq!(post(origin).status(), StatusCode::FORBIDDEN, "{origin}");
    }
    for origin in ["https://studio.example", "https://edit.example", &service.address] {
        assert_eq!(post(origin).status(), StatusCode::ACCEPTED, "{origin}");
    }
    for name in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example"] {
        assert_eq!(get("host", name).status(), StatusCode::FORBIDDEN, "{name}");
    }
    // Names that cannot be read as one are nobody's.
    for name in ["a\"b.evil.example", "a{b}.evil.example", "a%22b.evil.example"] {
        assert_eq!(get("host", name).status(), StatusCode::FORBIDDEN, "{name}");
    }
    for name in [host.as_str(), "localhost:8090", "[::1]:8090", "edit.example"] {
        assert_eq!(get("host", name).status(), StatusCode::OK, "{name}");
    }
    let allowed = get("origin", "https://studio.example");
    assert_eq!(allowed.headers()["access-control-allow-origin"], "https://studio.example");
    for (name, value) in
        [("x-content-type-options", "nosniff"), ("x-frame-options", "DENY"), ("referrer-policy", "no-referrer")]
    {
        assert_eq!(service.get("/nowhere").headers()[name], value);
    }
}

#[test]
fn paths_lead_nowhere_else() {
    let state = tempdir().unwrap();
    std::fs::write(state.path().join("secret.txt"), "secret").unwrap();
    let service = Service::start(&state.path().join("jobs"), &[]);
    let host = service.address.trim_start_matches("http://").to_string();
    for path in [
        "/images/../../secret.txt",
        "/images/..%2f..%2fsecret.txt/x?signature=0",
        "/assets/../index.html",
        "/assets/..%2findex.html",
        "/assets/%2e%2e/Cargo.toml",
        "//etc/passwd",
        "/images/5f1c4f8e-0000-4000-8000-000000000000/..%2f..%2fjobs.sqlite?signature=0",
        "/api/jobs/..%2f..%2fsecret.txt",
        "/images/%00/%00?signature=0",
    ] {
        // As it stands: a client would tidy it first.
        let mut stream = TcpStream::connect(&host).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 4"), "{path}: {answer}");
        assert!(!answer.contains("secret\r\n") && !answer.contains("root:"), "{path}");
    }
}

#[test]
fn names_and_prompts_come_back_as_they_are_and_reach_no_header_or_log() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let prompt = "make the circle blue <img src=x onerror=alert(1)>\r\nSet-Cookie: a=b";
    let part = || Part::bytes(std::fs::read(scene()).unwrap());
    let form = Form::new().text("request", json!({"prompt": prompt}).to_string());
    let name = "../../etc/\"x\"; filename=y.png";
    let response = service
        .client
        .post(service.at("/api/jobs"))
        .multipart(form.part("image", part().file_name(name)))
        .send()
        .unwrap();
    assert!(response.headers().get("set-cookie").is_none());
    let job: Value = response.json().unwrap();
    assert_eq!(job["request"]["prompt"], prompt);
    assert!(!job["input"]["name"].as_str().unwrap().contains('/'), "{job}");
    let job = service.ended(job["id"].as_str().unwrap());
    assert_eq!(job["status"], "done");
    let picture = service.get(job["input"]["url"].as_str().unwrap());
    assert_eq!(picture.headers()["x-content-type-options"], "nosniff");
    assert_eq!(picture.headers()["content-type"], "image/png");
    // At the level that says the most but debug.
    let said = service.said();
    assert!(said.contains("done after") && !said.contains("circle") && !said.contains("filename"), "{said}");
}

#[test]
fn bodies_that_are_too_large_or_no_bodies_are_refused() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--max-upload", "1MiB", "--max-pixels", "20000"]);
    // The last is more than there is room for, were it counted.
    for megabytes in [2, 40] {
        let large = json!({"prompt": "bluer", "input_image": "A".repeat(megabytes << 20)});
        assert_eq!(service.post("/v1/flux-kontext-pro", &large).status(), StatusCode::PAYLOAD_TOO_LARGE);
    }
    let part = Part::bytes(vec![0; 2 << 20]).file_name("a.png");
    let form = Form::new().text("request", "{}").part("image", part);
    let response = service.client.post(service.at("/api/jobs")).multipart(form).send().unwrap();
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let send = |kind: &str, body: &str| {
        let request = service.client.post(service.at("/api/jobs")).header("content-type", kind.to_string());
        request.body(body.to_string()).send().unwrap().status()
    };
    assert_eq!(send("application/json", "{"), StatusCode::BAD_REQUEST);
    assert_eq!(send("application/json", "[]"), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(send("application/json", "{\"prompt\": 1}"), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(send("application/json", &"[".repeat(100_000)), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(send("text/plain", "{}"), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    assert_eq!(send("multipart/form-data", "x"), StatusCode::BAD_REQUEST);
    assert_eq!(send("multipart/form-data; boundary=x", "--x\r\n\r\n"), StatusCode::BAD_REQUEST);
    // A small file that promises a large picture.
    let bomb = super_large_png();
    let form = Form::new().text("request", blue().to_string()).part("image", Part::bytes(bomb));
    let refused = service.client.post(service.at("/api/jobs")).multipart(form).send().unwrap();
    assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert!(refused.text().unwrap().contains("0.02 megapixels"));
    assert_eq!(service.json("/api/jobs")["jobs"], json!([]));
}

fn super_large_png() -> Vec<u8> {
    std::fs::read(support::fixtures().join("images/huge_header.png")).unwrap()
}

#[test]
fn source_images_are_fetched_from_the_public_internet_alone() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--allow-url-inputs"]);
    let port = service.address.rsplit(':').next().unwrap();
    for url in [
        format!("http://127.0.0.1:{port}/health"),
        format!("http://localhost:{port}/health"),
        format!("http://[::ffff:127.0.0.1]:{port}/"),
        format!("http://0x7f000001:{port}/"),
        "http://169.254.169.254/latest/meta-data/".into(),
        "http://10.0.0.1/".into(),
        "http://[fd00::1]/".into(),
    ] {
        let refused = service.post("/v1/flux-kontext-pro", &json!({"prompt": "bluer", "input_image": url}));
        assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY, "{url}");
        let refused: Value = refused.json().unwrap();
        assert!(refused["detail"].as_str().unwrap().contains("public internet"), "{url}: {refused}");
    }
}

#[test]
fn a_slow_caller_holds_nobody_up() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let host = service.address.trim_start_matches("http://").to_string();
    let slow: Vec<_> = (0..100)
        .map(|number| {
            let mut stream = TcpStream::connect(&host).unwrap();
            write!(stream, "POST /api/jobs HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n").unwrap();
            // Half of them go on to a body, and stay there.
            if number % 2 == 0 {
                write!(stream, "Content-Length: 1000000\r\n\r\n{{").unwrap();
            }
            stream
        })
        .collect();
    let asked = json!({"prompt": "make the circle blue", "input_image": scene_base64()});
    let request = service.client.post(service.at("/api/jobs")).json(&asked).timeout(Duration::from_secs(10));
    let job: Value = request.send().unwrap().json().unwrap();
    assert_eq!(service.ended(job["id"].as_str().unwrap())["status"], "done");
    drop(slow);
}

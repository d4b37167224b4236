//! `retouch serve` over HTTP: each of its three APIs, with the embedded model.

#[path = "support/service.rs"]
mod service;
mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{StatusCode, blocking::multipart::Form};
use serde_json::{Value, json};
use service::{Service, blue, form, long, scene, scene_base64};
use tempfile::tempdir;

/// Whether these bytes are an image of that size whose middle, where the scene's circle is, is blue.
fn is_blue(bytes: &[u8], size: (u32, u32)) -> bool {
    let image = retouch::image::read_image(bytes, "the result").unwrap();
    let source = retouch::image::read_image(&std::fs::read(scene()).unwrap(), "scene").unwrap();
    let [r, _, b] = changed_colour(&source, &image);
    image.dimensions() == size && b > r + 60.0
}

/// The mean colour of what an edit has changed.
fn changed_colour(before: &image::RgbImage, after: &image::RgbImage) -> [f64; 3] {
    let before = retouch::image::resize(before, after.width(), after.height());
    let distance =
        |a: &image::Rgb<u8>, b: &image::Rgb<u8>| (0..3).map(|c| u32::from(a.0[c].abs_diff(b.0[c]))).sum::<u32>();
    let changed: Vec<_> =
        before.pixels().zip(after.pixels()).filter(|(a, b)| distance(a, b) > 120).map(|(_, b)| b.0).collect();
    assert!(changed.len() > 100, "nothing was changed");
    [0, 1, 2].map(|c| changed.iter().map(|pixel| f64::from(pixel[c])).sum::<f64>() / changed.len() as f64)
}

#[test]
fn callers_of_the_hosted_service_change_the_address_alone() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    for (route, image) in [
        ("pro", scene_base64()),
        ("max", format!("data:image/png;base64,{}", scene_base64())),
        ("dev", scene_base64().trim_end_matches('=').to_string()),
    ] {
        let asked = json!({
            "prompt": "make the circle blue", "input_image": image, "seed": 1, "output_format": "jpeg",
            "input_image_2": null, "prompt_upsampling": false, "safety_tolerance": 6, "aspect_ratio": "1:1",
        });
        let submitted: Value = service.post(&format!("/v1/flux-kontext-{route}"), &asked).json().unwrap();
        let polling_url = submitted["polling_url"].as_str().unwrap();
        assert!(polling_url.starts_with(&service.address), "{submitted}");
        let ready = loop {
            let result = service.json(polling_url);
            assert_eq!(result["id"], submitted["id"]);
            match result["status"].as_str().unwrap() {
                "Ready" => break result,
                status => assert_eq!(status, "Pending"),
            }
            assert!((0.0..=1.0).contains(&result["progress"].as_f64().unwrap()));
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!((&ready["result"]["seed"], &ready["result"]["prompt"]), (&json!(1), &asked["prompt"]));
        let sample = service.get(ready["result"]["sample"].as_str().unwrap());
        assert_eq!(sample.headers()["content-type"], "image/jpeg");
        let bytes = sample.bytes().unwrap();
        assert!(bytes.starts_with(b"\xff\xd8\xff") && is_blue(&bytes, (128, 128)));
    }
    let unknown = service.json("/v1/get_result?id=5f1c4f8e-0000-4000-8000-000000000000");
    assert_eq!(unknown["status"], "Task not found");
}

#[test]
fn what_the_hosted_routes_cannot_do_is_refused_by_name() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--max-pixels", "100000"]);
    for (field, value, words) in [
        ("input_image_2", json!(scene_base64()), "not supported yet"),
        ("prompt_upsampling", json!(true), "prompt_upsampling"),
        ("safety_tolerance", json!(2), "safety_tolerance"),
        ("aspect_ratio", json!("1:3"), "3:7 to 7:3"),
        ("aspect_ratio", json!("wide"), "16:9"),
        ("output_format", json!("webp"), "jpeg or png"),
        ("output_format", json!("gif"), "gif"),
        ("input_image", json!("http://127.0.0.1/a.png"), "--allow-url-inputs"),
        ("input_image", json!("data:image/png,abc"), "base64"),
        ("input_image", json!("***"), "base64"),
        ("input_image", json!(STANDARD.encode("no image")), "not an image"),
        ("seed", json!("x"), "expected u64"),
        ("steps", json!(0), "steps is 0"),
        ("guidance", json!(-1), "guidance"),
        ("num_images", json!(11), "1 to 10"),
        ("width", json!(64), "go together"),
        ("webhook_url", json!("ftp://example.org"), "http"),
        ("webhook_secret", json!("secret"), "webhook_url"),
        ("finetune_id", json!("x"), "finetune_id"),
        ("prompt", json!(" "), "empty"),
    ] {
        let mut asked = json!({"prompt": "bluer"});
        asked[field] = value.clone();
        let refused = service.post("/v1/flux-kontext-pro", &asked);
        assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY, "{field}: {value}");
        let refused: Value = refused.json().unwrap();
        let sentence = refused["detail"].as_str().unwrap();
        assert!(sentence.contains(words) && !sentence.contains('\n'), "{field}: {sentence}");
    }
    let too_large = json!({"prompt": "bluer", "width": 512, "height": 512});
    let refused: Value = service.post("/v1/flux-kontext-pro", &too_large).json().unwrap();
    assert!(refused["detail"].as_str().unwrap().contains("megapixels"), "{refused}");
    assert_eq!(service.json("/api/jobs")["jobs"], json!([]), "nothing that was refused is a job");
}

#[test]
fn callers_of_openai_get_the_result_in_the_answer() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let edit = |form: Form| service.client.post(service.at("/v1/images/edits")).multipart(form).send().unwrap();
    let form = || Form::new().text("prompt", "make the circle blue").text("model", "nano-kontext").text("seed", "1");

    let made: Value =
        edit(form().file("image[]", scene()).unwrap().text("n", "2").text("size", "auto")).json().unwrap();
    let data = made["data"].as_array().unwrap();
    assert_eq!((data.len(), &made["size"], &made["output_format"]), (2, &json!("128x128"), &json!("png")));
    let bytes = STANDARD.decode(data[0]["b64_json"].as_str().unwrap()).unwrap();
    assert!(is_blue(&bytes, (128, 128)));
    let parameters = retouch::image::read_parameters(&bytes, "the result").unwrap().unwrap();
    assert_eq!((parameters.seed, parameters.source_name.as_deref()), (1, Some("scene.png")));

    let by_url = form().file("image", scene()).unwrap().text("response_format", "url").text("size", "64x64");
    let made: Value = edit(by_url.text("output_format", "jpeg").text("output_compression", "50")).json().unwrap();
    let url = made["data"][0]["url"].as_str().unwrap();
    assert!(is_blue(&service.get(url).bytes().unwrap(), (64, 64)));

    let generated: Value = service
        .post("/v1/images/generations", &json!({"prompt": "a red circle", "response_format": "url"}))
        .json()
        .unwrap();
    assert!(generated["data"][0]["url"].is_string(), "{generated}");
    assert_eq!(service.json("/v1/models")["data"][0]["id"], "nano-kontext");

    for (field, value, words) in [
        ("model", "gpt-image-1", "runs nano-kontext"),
        ("quality", "high", "quality"),
        ("background", "transparent", "opaque"),
        ("stream", "true", "events"),
        ("size", "big", "1024x1024"),
        ("size", "100x100", "multiples of 16"),
        ("output_compression", "50", "jpeg"),
        ("n", "many", "many"),
        ("response_format", "xml", "xml"),
        ("mask", "x", "mask"),
    ] {
        let form = Form::new().text("prompt", "bluer").file("image", scene()).unwrap().text(field, value);
        let refused = edit(form);
        assert_eq!(refused.status(), StatusCode::UNPROCESSABLE_ENTITY, "{field}");
        let refused: Value = refused.json().unwrap();
        let error = &refused["error"];
        assert!(error["message"].as_str().unwrap().contains(words), "{field}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    assert_eq!(edit(Form::new().text("prompt", "bluer")).status(), StatusCode::UNPROCESSABLE_ENTITY);
}

/// The events of a job, in order.
fn events(service: &Service, id: &str) -> Vec<(String, Value)> {
    let response = service.get(&format!("/api/jobs/{id}/events"));
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let (mut events, mut name) = (Vec::new(), String::new());
    for line in BufReader::new(response).lines() {
        let line = line.unwrap();
        if let Some(event) = line.strip_prefix("event: ") {
            name = event.to_string();
        } else if let Some(data) = line.strip_prefix("data: ") {
            events.push((name.clone(), serde_json::from_str(data).unwrap()));
        }
    }
    events
}

#[test]
fn a_job_is_followed_from_the_queue_to_its_images() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let first = service.submit(json!({"prompt": "make the circle blue", "seed": 1, "steps": 200}));
    let second = service.submit(json!({"prompt": "make the circle blue", "seed": 5, "num_images": 2, "steps": 40}));
    assert!(second["position"].is_u64() || second["status"] == "running", "{second}");
    assert_eq!(second["request"]["seeds"], json!([5, 6]));
    assert_eq!(second["command"], "retouch edit scene.png 'make the circle blue' --seed 5,6 --steps 40");

    let events = events(&service, second["id"].as_str().unwrap());
    let jobs: Vec<_> = events.iter().filter(|(name, _)| name == "job").map(|(_, job)| job).collect();
    let steps: Vec<_> = events.iter().filter(|(name, _)| name == "step").map(|(_, step)| step).collect();
    let statuses: Vec<_> = jobs.iter().map(|job| job["status"].as_str().unwrap()).collect();
    assert!(
        statuses
            .windows(2)
            .all(|pair| pair[0] <= pair[1] || pair == ["queued", "running"] || pair == ["running", "done"])
    );
    let last = jobs.last().unwrap();
    assert_eq!((&last["status"], last["images"].as_array().unwrap().len()), (&json!("done"), 2));
    assert_eq!((last["progress"].as_f64(), &last["position"]), (Some(1.0), &Value::Null));
    let progress: Vec<_> = steps.iter().map(|step| step["progress"].as_f64().unwrap()).collect();
    assert!(!progress.is_empty() && progress.is_sorted(), "{progress:?}");
    let preview = steps.iter().find_map(|step| step["preview"].as_str()).expect("previews are made for who looks");
    let preview = STANDARD.decode(preview.strip_prefix("data:image/jpeg;base64,").unwrap()).unwrap();
    assert_eq!(retouch::image::read_image(&preview, "preview").unwrap().dimensions(), (16, 16));
    assert_eq!(service.ended(first["id"].as_str().unwrap())["status"], "done");

    for image in [&last["images"][1], &last["input"]] {
        for url in ["url", "thumbnail_url"] {
            let picture = service.get(image[url].as_str().unwrap());
            assert_eq!(picture.status(), StatusCode::OK);
            assert!(picture.headers()["cache-control"].to_str().unwrap().contains("immutable"));
            assert!(retouch::image::read_image(&picture.bytes().unwrap(), "picture").is_ok());
        }
    }
    // The newest first, a page at a time.
    let page = service.json("/api/jobs?limit=1");
    assert_eq!((&page["jobs"][0]["id"], &page["next"]), (&second["id"], &second["id"]));
    let page = service.json(&format!("/api/jobs?limit=1&before={}", second["id"].as_str().unwrap()));
    assert_eq!((&page["jobs"][0]["id"], &page["next"]), (&first["id"], &Value::Null));
    // Gone with its pictures.
    let path = format!("/api/jobs/{}", second["id"].as_str().unwrap());
    assert_eq!(service.delete(&path).status(), StatusCode::NO_CONTENT);
    assert_eq!(service.get(&path).status(), StatusCode::NOT_FOUND);
    assert_eq!(service.get(last["images"][0]["url"].as_str().unwrap()).status(), StatusCode::NOT_FOUND);
}

#[test]
fn running_and_waiting_jobs_are_cancelled() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let jobs = [service.submit(long()), service.submit(long()), service.submit(blue())];
    let [running, waiting, last] = jobs.map(|job| job["id"].as_str().unwrap().to_string());
    while service.json(&format!("/api/jobs/{running}"))["progress"].as_f64() == Some(0.0) {}
    for id in [&waiting, &running] {
        assert_eq!(service.delete(&format!("/api/jobs/{id}")).status(), StatusCode::OK);
        assert_eq!(service.ended(id)["status"], "cancelled");
    }
    assert_eq!(service.ended(&last)["status"], "done");
    // A wish outlasts a stop that comes at once.
    #[cfg(unix)]
    let service = {
        let id = service.submit(long())["id"].as_str().unwrap().to_string();
        while service.json(&format!("/api/jobs/{id}"))["progress"].as_f64() == Some(0.0) {}
        service.delete(&format!("/api/jobs/{id}"));
        service.stop();
        let service = Service::start(state.path(), &[]);
        assert_eq!(service.json(&format!("/api/jobs/{id}"))["status"], "cancelled");
        service
    };
    let result = service.json(&format!("/v1/get_result?id={running}"));
    assert_eq!((&result["status"], &result["details"]["message"]), (&json!("Error"), &json!("the job was cancelled")));
}

#[test]
fn a_caller_who_leaves_takes_the_job_along() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let form = Form::new().text("prompt", "make the circle blue").text("steps", "1000").file("image", scene()).unwrap();
    let request =
        service.client.post(service.at("/v1/images/edits")).multipart(form).timeout(Duration::from_millis(500));
    assert!(request.send().is_err_and(|e| e.is_timeout()));
    let job = service.json("/api/jobs")["jobs"][0].clone();
    assert_eq!(service.ended(job["id"].as_str().unwrap())["status"], "cancelled");
}

#[test]
fn a_request_that_is_sent_twice_is_one_job() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let send = |key: &str, prompt: &str| {
        let request = service.client.post(service.at("/api/jobs")).header("Idempotency-Key", key);
        request.multipart(form(json!({"prompt": prompt}))).send().unwrap()
    };
    let first: Value = send("a", "make the circle blue").json().unwrap();
    let again: Value = send("a", "make the circle blue").json().unwrap();
    assert_eq!((&first["id"], &first["request"]["seeds"]), (&again["id"], &again["request"]["seeds"]));
    let other = send("a", "make the circle red");
    assert_eq!(other.status(), StatusCode::CONFLICT);
    let new: Value = send("b", "make the circle blue").json().unwrap();
    assert_ne!(first["id"], new["id"]);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--max-queue", "1"]);
    // One runs, one waits.
    let first = service.submit(long());
    while service.json(&format!("/api/jobs/{}", first["id"].as_str().unwrap()))["status"] == "queued" {}
    service.submit(long());
    let refused = service.client.post(service.at("/api/jobs")).multipart(form(long())).send().unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let seconds: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=120).contains(&seconds));
    let body: Value = refused.json().unwrap();
    assert_eq!(body["error"]["type"], "rate_limit_error");
    let metrics = service.get("/metrics").text().unwrap();
    assert!(metrics.contains("retouch_queue_depth 1") && metrics.contains("rate_limit_error"), "{metrics}");
}

#[test]
fn a_webhook_is_told_until_it_has_heard() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/told?x=1", listener.local_addr().unwrap());
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--allow-local-webhooks"]);
    let asked = json!({"prompt": "make the circle blue", "input_image": scene_base64(), "webhook_url": url, "webhook_secret": "s3cret"});
    let submitted: Value = service.post("/v1/flux-kontext-pro", &asked).json().unwrap();
    // The first call is turned away.
    for (status, last) in [("503 Busy", false), ("200 OK", true)] {
        let (mut stream, _) = listener.accept().unwrap();
        let (head, body) = read_request(&mut stream);
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /told?x=1 HTTP/1.1"), "{head}");
        let told: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&told["id"], &told["status"]), (&submitted["id"], &json!("Ready")));
        let signature = format!("x-webhook-signature: sha256={}", hmac(b"s3cret", &body));
        assert!(head.to_lowercase().contains(&signature), "{head}");
        if last {
            assert!(is_blue(&service.get(told["result"]["sample"].as_str().unwrap()).bytes().unwrap(), (128, 128)));
        }
    }
}

fn read_request(stream: &mut TcpStream) -> (String, Vec<u8>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        reader.read_line(&mut head).unwrap();
    }
    let lower = head.to_lowercase();
    let length = lower.split("content-length: ").nth(1).unwrap().split("\r\n").next().unwrap().parse().unwrap();
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    (head, body)
}

/// HMAC-SHA256 by its definition (RFC 2104), for a key shorter than a block.
fn hmac(key: &[u8], message: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let pad = |byte: u8| (0..64).map(|i| key.get(i).copied().unwrap_or(0) ^ byte).collect::<Vec<_>>();
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    let outer = Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize();
    outer.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn old_jobs_go() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &["--keep", "2s"]);
    let job = service.submit(blue());
    let id = job["id"].as_str().unwrap();
    let done = service.ended(id);
    assert_eq!(done["status"], "done");
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(service.get(&format!("/api/jobs/{id}")).status(), StatusCode::NOT_FOUND);
    assert!(!state.path().join("images").join(id).exists());
}

#[test]
fn the_api_is_described_as_it_was_reviewed() {
    let state = tempdir().unwrap();
    let service = Service::start(state.path(), &[]);
    let served = service.json("/openapi.json");
    let reviewed: Value = serde_json::from_str(include_str!("../crates/server/openapi.json")).unwrap();
    assert!(
        served == reviewed,
        "the API has changed; look at what `cargo run -- serve --openapi > crates/server/openapi.json` changes, and commit it"
    );
    assert_eq!(served["openapi"], "3.1.0");
    let page = service.get("/");
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    for asset in ["/assets/index.js", "/assets/index.css"] {
        assert!(page.headers()["content-security-policy"].to_str().unwrap().contains("script-src 'self'"));
        assert_eq!(service.get(asset).status(), StatusCode::OK, "{asset}");
    }
    let html = page.text().unwrap();
    assert!(html.contains("/assets/index.js") && !html.contains("<script>") && !html.contains("style="), "{html}");
    assert_eq!(service.json("/health")["status"], "ok");
    assert_eq!(service.json("/ready")["status"], "ok");
    assert_eq!(service.json("/api/service")["model"], "nano-kontext");
}

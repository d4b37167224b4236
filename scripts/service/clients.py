"""Other people's clients against a running service: the `openai` package, a hosted-style client, and schemathesis.

usage: python scripts/service/clients.py BINARY

Needs what requirements.txt beside this names. Starts the service itself, with the embedded model. Ends with an error at the first
thing that is not as those clients expect it.
"""
import base64
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent.parent
SCENE = ROOT / "tests/fixtures/images/scene.png"
KEY = "a-key-for-the-test"
PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"


@contextlib.contextmanager
def service(binary, *arguments):
    """A running service: its address."""
    with tempfile.TemporaryDirectory() as state:
        command = [binary, "serve", "--port", "0", "--device", "cpu", "--state", state, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            said = []
            for line in process.stderr:
                if " is served at " in line:
                    yield line.split(" is served at ")[1].strip()
                    break
                said.append(line)
            else:
                sys.exit(f"the service did not start: {said}")
        finally:
            process.terminate()
            process.wait(30)
    if process.returncode != 0:
        sys.exit(f"the service ended with status {process.returncode}")


def refused(error, words, call):
    """`call` must raise `error` with `words` in its message."""
    try:
        call()
    except error as e:
        assert words in str(e), e
    else:
        sys.exit(f"not refused: {words}")


def check_openai(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    assert [m.id for m in client.models.list()] == ["nano-kontext"]
    with SCENE.open("rb") as image:
        made = client.images.edit(model="nano-kontext", image=image, prompt="make the circle blue", n=2, extra_body={"seed": 1})
    assert len(made.data) == 2 and all(base64.b64decode(d.b64_json).startswith(PNG) for d in made.data)
    assert made.size == "128x128" and made.output_format == "png" and made.created > 1_700_000_000
    made = client.images.edit(image=[SCENE.open("rb")], prompt="make the circle blue", size="auto", output_format="jpeg",
                              output_compression=60, response_format="url")
    assert urllib.request.urlopen(made.data[0].url).read().startswith(JPEG)
    made = client.images.generate(model="nano-kontext", prompt="a red circle", size="64x64", extra_body={"steps": 2})
    assert base64.b64decode(made.data[0].b64_json).startswith(PNG)

    edit = lambda **more: client.images.edit(**{"image": SCENE.open("rb"), "prompt": "bluer", **more})
    refused(openai.UnprocessableEntityError, "mask", lambda: edit(mask=SCENE.open("rb")))
    refused(openai.UnprocessableEntityError, "nano-kontext", lambda: edit(model="gpt-image-1"))
    refused(openai.UnprocessableEntityError, "several images", lambda: edit(image=[SCENE.open("rb"), SCENE.open("rb")]))
    refused(openai.UnprocessableEntityError, "not an image", lambda: edit(image=b"no image"))
    other = openai.OpenAI(base_url=f"{address}/v1", api_key="another", max_retries=0)
    refused(openai.AuthenticationError, "API key", lambda: other.models.list())
    print("openai", openai.__version__, "works")


def check_hosted(address):
    def call(path, body=None):
        url = path if path.startswith("http") else address + path
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, {"x-key": KEY, "Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))

    image = base64.b64encode(SCENE.read_bytes()).decode()
    submitted = call("/v1/flux-kontext-pro", {"prompt": "make the circle blue", "input_image": image, "output_format": "jpeg"})
    while (result := call(submitted["polling_url"]))["status"] == "Pending":
        time.sleep(0.1)
    assert result["status"] == "Ready", result
    assert urllib.request.urlopen(result["result"]["sample"]).read().startswith(JPEG)
    print("a hosted-style client works")


def check_schema(address, examples):
    """Requests made up from the description, right and wrong ones: none may be answered by a failure of the service."""
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{address}/openapi.json", "--checks", "all", "--exclude-checks", "positive_data_acceptance",
               "--max-examples", str(examples), "--seed", "1", "--request-timeout", "60", "--workers", "2", "--phases", "examples,coverage,fuzzing"]
    subprocess.run(command, check=True)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    binary, examples = sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 25
    with service(binary, "--api-key", KEY) as address:
        check_openai(address)
        check_hosted(address)
    # Small work, so that what is accepted is soon done.
    with service(binary, "--max-pixels", "20000", "--max-steps", "2", "--max-images", "2") as address:
        check_schema(address, examples)


if __name__ == "__main__":
    main()

"""Whole edits, diffusers' and ours, with the same random weights of the published model's size (compare.py without --blocks).

Each program makes an edit that does not count, for what is read, chosen and compiled, and then one with another prompt:
seconds of a step (the median; of ours the mean), seconds of the edit from text to pixels with the model in memory. The
time to the first step is that of the first edit, with reading the weights (from the page cache where they are in it)
and compiling, without the start of the program. Peak memory is the most that nvidia-smi reports over what was taken
before, and on the CPU the process's own. Latents are compared after the last step, relative to the largest.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from comparison.machine import about, built, first_line, processor, store
from comparison.pipeline import GUIDANCE, PROMPTS, SEED

PROGRAMS = {
    "diffusers": "diffusers, eager",
    "compiled": "diffusers + torch.compile",
    "retouch": "retouch",
    "retouch-fp8": "retouch, fp8",
}


def picture(path, width, height):
    """Something with edges and gradients."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:height, :width]
    values = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 37) * np.cos(y / 23)], -1)
    values[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2] = (200, 40, 30)
    Image.fromarray(values.astype(np.uint8)).save(path)


class Memory:
    """The most memory of the GPU that is taken, asked for ten times a second, over what was taken before."""

    def __init__(self, device):
        self.query = ["nvidia-smi", f"--id={device.partition(':')[2] or 0}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]

    def used(self):
        try:
            return int(first_line(*self.query)) * 2**20
        except ValueError:
            return 0

    def __enter__(self):
        self.before, self.most, self.over = self.used(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.1):
            self.most = max(self.most, self.used())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def peak(self):
        return max(self.most - self.before, 0)


def measured(command, device, threads):
    """Runs a program: the lines of JSON that it prints, and its peak memory."""
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads)) if device == "cpu" else os.environ
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, env=environment)
        if device == "cpu":
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            peak = usage.ru_maxrss * 1024
        else:
            with Memory(device) as memory:
                process.wait()
            peak = memory.peak()
        if process.returncode != 0:
            sys.exit(f"{command[0]} failed with status {process.returncode}; its messages are above")
        output.seek(0)
        return [json.loads(line) for line in output if line.startswith("{")], peak


def theirs(a, folder, model, size, compiled):
    latents = folder / "theirs.safetensors"
    task = {"model": str(model), "image": str(folder / "image.png"), "size": size, "steps": a.steps, "device": a.device, "threads": a.threads,
            "dtype": {"bf16": "bfloat16", "f32": "float32"}[a.dtype], "compile": a.compile if compiled else "none", "latents": str(latents)}
    lines, peak = measured([sys.executable, sys.argv[0], "--pipeline", json.dumps(task)], a.device, a.threads)
    result = lines[-1]
    return {"step_seconds": statistics.median(result["step_seconds"]), "edit_seconds": result["edit_seconds"],
            "first_step_seconds": result["first_step_seconds"], "peak_bytes": peak}, latents


def ours(a, folder, model, size, dtype):
    latents = folder / "ours.safetensors"
    width, height = size
    image = str(folder / "image.png")
    common = ["--model", str(model), "--device", a.device, "--dtype", dtype, "--steps", str(a.steps), "--guidance", str(GUIDANCE), "--seed", str(SEED),
              "--width", str(width), "--height", str(height), "--reference-size", f"{width}x{height}", "--force", "--json", "--quiet"]
    edits = [{"image": image, "prompt": prompt, "output": str(folder / f"{i}.png")} for i, prompt in enumerate(PROMPTS)]
    batch = folder / "batch.jsonl"
    batch.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    lines, peak = measured([a.binary, "edit", "--batch", str(batch), "--keep-loaded", *common], a.device, a.threads)
    measured([a.binary, "edit", image, PROMPTS[1], "-o", str(folder / "dumped.png"), "--dump", str(latents), *common], a.device, a.threads)
    first, second = (line["timings"] for line in lines)
    return {"step_seconds": second["steps_seconds"] / a.steps, "edit_seconds": lines[1]["seconds"],
            "first_step_seconds": first["first_step_seconds"], "peak_bytes": peak}, latents


def distance(found, expected):
    """The largest difference over the largest magnitude."""
    from safetensors.torch import load_file

    found, expected = (load_file(file)["latents"].float() for file in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def compare(a):
    from comparison import random_model

    a.binary = a.binary or built("--bin", "retouch", *([] if a.device == "cpu" else ["--features", "cuda"]))
    a.binary = str(Path(a.binary).resolve())
    rows = []
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder = Path(folder)
        if a.model:
            model = Path(a.model)
        else:
            start, model = time.perf_counter(), folder / "model"
            random_model.write(model, *a.layers, a.t5_layers)
            print(f"random weights written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for size in a.sizes:
            picture(folder / "image.png", *size)
            reference = folder / "reference.safetensors"
            for program in a.programs:
                if program.startswith("retouch"):
                    result, latents = ours(a, folder, model, size, "fp8" if program.endswith("fp8") else a.dtype)
                else:
                    result, latents = theirs(a, folder, model, size, program == "compiled")
                if not reference.exists():
                    latents.rename(reference)
                    latents = reference
                rows.append({"size": size, "program": program, **result, "latents_difference": distance(latents, reference)})
                print(table(rows[-1:])[-1], file=sys.stderr, flush=True)
            reference.unlink()
    gpu = a.device != "cpu"
    where = first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader") if gpu else processor()
    layers = "of the folder" if a.model else f"{a.layers[0]} + {a.layers[1]} blocks, {a.t5_layers} layers of T5"
    notes = about() | {"gpu" if gpu else "processor": where, "device": a.device, "dtype": a.dtype, "steps": a.steps, "model": a.model or "random weights",
                       "layers": layers, "compiled": a.compile, "two references": "not compared: retouch takes one so far"}
    name = "edits-" + ("cpu" if not gpu else where.partition(",")[0].lower().replace(" ", "-"))
    store(a.out, name, "edits beside diffusers", notes, table(rows), rows)


def table(rows):
    lines = ["| size | program | s/step | s/edit | to the first step, s | peak memory, GB | latents differ by |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['size'][0]}x{r['size'][1]} | {PROGRAMS[r['program']]} | {r['step_seconds']:.3f} | {r['edit_seconds']:.2f} "
                     f"| {r['first_step_seconds']:.1f} | {r['peak_bytes'] / 1e9:.2f} | {r['latents_difference']:.1e} |")
    return lines

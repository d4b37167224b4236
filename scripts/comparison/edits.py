"""Whole edits, diffusers' and ours, with the same random weights of the published model's size (compare.py without --blocks).

Each program makes an edit that does not count, for what is read, chosen and compiled, and then one with another prompt:
seconds of a step (the median; of ours the mean), seconds of the edit from text to pixels with the model in memory. The
time to the first step is that of the first edit, with reading the weights (from the page cache where they are in it)
and compiling, without the start of the program. Peak memory is the most that nvidia-smi reports over what was taken
before, and on the CPU the process's own. Latents are compared with the first program's after the last step, relative to
the largest. With retouch alone neither torch nor diffusers is needed.
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

from comparison import estimate, random_model
from comparison.machine import about, built, first_line, installed, processor, store
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
            "first_step_seconds": result["first_step_seconds"], "peak_bytes": peak}, lambda: latents


def ours(a, folder, model, size, dtype):
    """What is measured, and a function that makes the edit once more for its latents."""
    latents = folder / "ours.safetensors"
    width, height = size
    image = str(folder / "image.png")
    common = ["--model", str(model), "--device", a.device, "--dtype", dtype, "--steps", str(a.steps), "--guidance", str(GUIDANCE), "--seed", str(SEED),
              "--width", str(width), "--height", str(height), "--reference-size", f"{width}x{height}", "--force", "--json", "--quiet"]
    edits = [{"image": image, "prompt": prompt, "output": str(folder / f"{i}.png")} for i, prompt in enumerate(PROMPTS)]
    batch = folder / "batch.jsonl"
    batch.write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    lines, peak = measured([a.binary, "edit", "--batch", str(batch), "--keep-loaded", *common], a.device, a.threads)
    first, second = (line["timings"] for line in lines)

    def dump():
        measured([a.binary, "edit", image, PROMPTS[1], "-o", str(folder / "dumped.png"), "--dump", str(latents), *common], a.device, a.threads)
        return latents

    return {"step_seconds": second["steps_seconds"] / a.steps, "edit_seconds": lines[1]["seconds"],
            "first_step_seconds": first["first_step_seconds"], "peak_bytes": peak}, dump


def distance(found, expected):
    """The largest difference over the largest magnitude."""
    import numpy as np
    from safetensors import safe_open

    found, expected = (safe_open(file, "numpy").get_tensor("latents") for file in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def layers(model):
    """Numbers of double and single blocks and of T5's layers, by a folder's configurations."""
    transformer, t5 = (json.loads((model / part / "config.json").read_text()) for part in ("transformer", "text_encoder_2"))
    return transformer["num_layers"], transformer["num_single_layers"], t5["num_layers"]


def measure(a, folder, model, shallow, size, program):
    """A row of the table. The first program's latents of a size become folder/reference.safetensors."""
    row, reference = {"size": size, "program": program}, folder / "reference.safetensors"
    mine, dtype = program.startswith("retouch"), "fp8" if program.endswith("fp8") else a.dtype
    result, dump = ours(a, folder, model, size, dtype) if mine else theirs(a, folder, model, size, program == "compiled")
    if len(a.programs) > 1:
        latents = dump()
        if program == a.programs[0]:
            latents = latents.replace(reference)
        row["latents_difference"] = distance(latents, reference)
    if shallow and mine:
        row["shallow_step_seconds"] = ours(a, folder, shallow, size, dtype)[0]["step_seconds"]
    return row | result


def compare(a):
    peers = [program for program in a.programs if not program.startswith("retouch")]
    missing = {"torch", "diffusers", "transformers"} - dict(installed("torch", "diffusers", "transformers")).keys()
    if peers and missing:
        sys.exit(f"{', '.join(peers)}: not installed here: {', '.join(sorted(missing))}; install that, or give --programs retouch")
    depth = layers(Path(a.model)) if a.model else (*a.layers, a.t5_layers)
    if a.estimate:
        estimate.check(depth)
    a.binary = a.binary or built("--bin", "retouch", *([] if a.device == "cpu" else ["--features", "cuda"]))
    a.binary = str(Path(a.binary).resolve())
    gpu = a.device != "cpu"
    where = first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader") if gpu else processor()
    name = "edits-" + ("cpu" if not gpu else where.partition(",")[0].lower().replace(" ", "-"))
    notes = about(a.commit) | {"gpu" if gpu else "processor": where, "device": a.device, "dtype": a.dtype, "steps": a.steps,
                               "model": a.model or "random weights", "layers": "{} + {} blocks, {} layers of T5".format(*depth)}
    notes |= {"compiled": a.compile} if "compiled" in a.programs else {}
    notes |= {"two references": "not compared: retouch takes one so far"}
    rows, text = [], ""
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder = Path(folder)
        model = Path(a.model) if a.model else folder / "model"
        if not a.model:
            start = time.perf_counter()
            random_model.write(model, *depth)
            print(f"random weights written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        shallow = estimate.shallower(model, folder / "shallow", depth) if a.estimate else None
        for size in a.sizes:
            picture(folder / "image.png", *size)
            for program in a.programs:
                rows.append(measure(a, folder, model, shallow, size, program))
                print(table(rows[-1:])[-1], file=sys.stderr, flush=True)
                lines = table(rows) + (estimate.table(rows, depth, a.steps) if shallow else [])
                # stored each time: what was measured stays if something fails, or takes too long
                text = store(a.out, name, "edits beside diffusers" if peers else "edits", notes, lines, rows)
    print(text)


def table(rows):
    lines = ["| size | program | s/step | s/edit | to the first step, s | peak memory, GB | latents differ by |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        difference = f"{r['latents_difference']:.1e}" if "latents_difference" in r else "-"
        lines.append(f"| {r['size'][0]}x{r['size'][1]} | {PROGRAMS[r['program']]} | {r['step_seconds']:.3f} | {r['edit_seconds']:.2f} "
                     f"| {r['first_step_seconds']:.1f} | {r['peak_bytes'] / 1e9:.2f} | {difference} |")
    return lines

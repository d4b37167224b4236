"""The CPU's work at the real model's width, ours and PyTorch's, on one machine in one run.

usage: python scripts/compare.py --cpu --blocks [--rounds 2] [--threads 2] [--work blocks ...] [--out benches/results]

Needs torch, diffusers and transformers (scripts/reference/install.sh makes an environment with them) and cargo.
Each piece of work (benches/real_width.rs says what it is) runs in a process of its own, PyTorch's and ours in turn, so
that a machine that gets slower or faster meets both. Prints a table and stores it with every time as
OUT/<date>-cpu-blocks.{md,json}: seconds are medians over all rounds, memory is the process's peak (weights included)
while it computes; Linux only.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ["blocks", "vae_encode", "vae_decode", "t5"]
RUNS = 3
HIDDEN, HEADS, PIXELS, TEXT = 3072, 24, 512, 512


def reference(work):
    """The same modules in PyTorch with random weights: a function that runs `work` once."""
    import torch

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if work == "blocks":
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True).eval()
        side = PIXELS // 16
        image, text = torch.randn(1, 2 * side * side, 64), torch.randn(1, TEXT, 4096)
        ids = torch.zeros(2, side, side, 3)
        ids[1, ..., 0] = 1
        ids[..., 1] += torch.arange(side)[:, None]
        ids[..., 2] += torch.arange(side)
        one = torch.ones(1)
        return lambda: model(hidden_states=image, encoder_hidden_states=text, pooled_projections=torch.zeros(1, 768), timestep=0.5 * one,
                             guidance=2.5 * one, img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(TEXT, 3), return_dict=False)
    if work == "t5":
        from transformers import T5Config, T5EncoderModel

        model = T5EncoderModel(T5Config(vocab_size=64, d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64, feed_forward_proj="gated-gelu")).eval()
        ids = torch.arange(TEXT)[None] % 64
        return lambda: model(ids)
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        latent_channels=16, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False).eval()
    if work == "vae_encode":
        image = torch.randn(1, 3, PIXELS, PIXELS)
        return lambda: vae.encode(image)
    latents = torch.randn(1, 16, PIXELS // 8, PIXELS // 8)
    return lambda: vae.decode(latents)


def run_reference(work, threads):
    """In a process of its own: times `work` and prints a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    run = reference(work)
    Path("/proc/self/clear_refs").write_text("5")        # the peak counts anew: loading is no part of what is measured
    run()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    peak = next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM:"))
    print(json.dumps({"work": work, "seconds": seconds, "peak_bytes": peak}))


def measure(command, environment):
    """Runs a process: its last line of JSON."""
    process = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if process.returncode != 0:
        sys.exit(f"{command[0]} failed with status {process.returncode}; its messages are above")
    return json.loads(process.stdout.strip().splitlines()[-1])


def build():
    """Builds the bench; the path of its executable."""
    command = ["cargo", "build", "--release", "--bench", "real_width", "--message-format", "json"]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    messages = (json.loads(line) for line in output.splitlines())
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "real_width")


def first_line(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def compare(a):
    import diffusers
    import torch
    import transformers

    bench = a.binary or build()
    environment = dict(os.environ, RAYON_NUM_THREADS=str(a.threads), OMP_NUM_THREADS=str(a.threads))
    mine = lambda work: [bench, "--json", work]
    theirs = lambda work: [sys.executable, __file__, "--reference", work, "--threads", str(a.threads)]
    rows = []
    for work in a.work:
        results = {"retouch": ([], []), "pytorch": ([], [])}
        flop = None
        for round_ in range(a.rounds):
            order = [("pytorch", theirs), ("retouch", mine)]
            for name, command in order if round_ % 2 == 0 else order[::-1]:
                result = measure(command(work), environment)
                results[name][0].extend(result["seconds"])
                results[name][1].append(result["peak_bytes"])
                flop = result.get("flop", flop)
        rows.append({"work": work, "flop": flop, **{n: {"seconds": s, "peak_bytes": max(p)} for n, (s, p) in results.items()}})
        print(f"{work}: {table(rows[-1:])[-1]}", file=sys.stderr)
    about = {
        "date": datetime.date.today().isoformat(), "commit": first_line("git", "rev-parse", "--short", "HEAD"), "processor": processor(),
        "threads": a.threads, "rustc": first_line("rustc", "--version"), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "rounds": a.rounds, "runs_per_round": RUNS,
    }
    text = "\n".join([f"# {about['date']}: the CPU's work at real width, f32, beside PyTorch", "",
                      "`" + " ".join(["python", "scripts/compare.py", *sys.argv[1:]]) + "`", "",
                      *[f"- {k}: {v}" for k, v in about.items()], "", *table(rows), ""])
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    name = out / f"{about['date']}-cpu-blocks"
    name.with_suffix(".md").write_text(text)
    name.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(text)


def table(rows):
    lines = ["| work | TFLOP | retouch, median s | PyTorch, median s | ratio | ratio of the fastest | GFLOP/s | retouch, peak GiB | PyTorch, peak GiB |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        ours, theirs = r["retouch"], r["pytorch"]
        o, t = statistics.median(ours["seconds"]), statistics.median(theirs["seconds"])
        fastest = min(ours["seconds"]) / min(theirs["seconds"])
        lines.append(f"| {r['work']} | {r['flop'] / 1e12:.3f} | {o:.2f} | {t:.2f} | {o / t:.2f} | {fastest:.2f} | {r['flop'] / o / 1e9:.0f} "
                     f"| {ours['peak_bytes'] / 2**30:.2f} | {theirs['peak_bytes'] / 2**30:.2f} |")
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cpu", action="store_true", help="compare on the CPU")
    p.add_argument("--blocks", action="store_true", help="compare pieces of the work at real width")
    p.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    p.add_argument("--binary", help="the built bench, to leave out cargo")
    p.add_argument("--out", default=str(ROOT / "benches" / "results"))
    p.add_argument("--reference", choices=WORK, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.reference:
        return run_reference(a.reference, a.threads)
    if not (a.cpu and a.blocks):
        p.error("there is one comparison so far: --cpu --blocks")
    compare(a)


if __name__ == "__main__":
    main()

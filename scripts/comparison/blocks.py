"""The CPU's work at the real model's width, ours and PyTorch's (compare.py --cpu --blocks).

Each piece of work (benches/real_width.rs says what it is) runs in a process of its own, PyTorch's and ours in turn, so
that a machine that gets slower or faster meets both. Seconds are medians over all rounds, memory is the process's peak
(weights included) while it computes; Linux only.
"""
import json
import os
import statistics
import sys
import time
from pathlib import Path

from comparison.machine import about, built, last_json, processor, store

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


def compare(a):
    bench = a.binary or built("--bench", "real_width")
    environment = dict(os.environ, RAYON_NUM_THREADS=str(a.threads), OMP_NUM_THREADS=str(a.threads))
    mine = lambda work: [bench, "--json", work]
    theirs = lambda work: [sys.executable, sys.argv[0], "--reference", work, "--threads", str(a.threads)]
    rows = []
    for work in a.work:
        results = {"retouch": ([], []), "pytorch": ([], [])}
        flop = None
        for round_ in range(a.rounds):
            order = [("pytorch", theirs), ("retouch", mine)]
            for name, command in order if round_ % 2 == 0 else order[::-1]:
                result = last_json(command(work), environment)
                results[name][0].extend(result["seconds"])
                results[name][1].append(result["peak_bytes"])
                flop = result.get("flop", flop)
        rows.append({"work": work, "flop": flop, **{n: {"seconds": s, "peak_bytes": max(p)} for n, (s, p) in results.items()}})
        print(f"{work}: {table(rows[-1:])[-1]}", file=sys.stderr)
    notes = about() | {"processor": processor(), "threads": a.threads, "rounds": a.rounds, "runs_per_round": RUNS}
    print(store(a.out, "cpu-blocks", "the CPU's work at real width, f32, beside PyTorch", notes, table(rows), rows))


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

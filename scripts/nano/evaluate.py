"""Measure an exported model on scenes, sentences and photographs that training never saw.

usage: python evaluate.py MODEL_DIR [--n 24] [--steps N] [--out REPORT] [--sheet SHEET.png]
       python evaluate.py MODEL_DIR --binary PATH/TO/retouch        # drives the command-line program instead of diffusers
Writes REPORT.md and REPORT.json: per edit kind the number of cases, success in percent, PSNR of the untouched region
(median and 5th percentile). The measures are described in scoring.py. Everything is fixed by --seed.
"""
import argparse
import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import tempfile
import time

import numpy as np
import torch
from PIL import Image

import photos
import phrases
import scenes
import scoring

SIZES = [(128, 128), (192, 128), (256, 256)]
BATCH = {(128, 128): 8, (192, 128): 8, (256, 256): 4}


class Diffusers:
    """FluxKontextPipeline in float32 on weights stored as bfloat16."""

    def __init__(self, model, steps, device):
        from diffusers import FluxKontextPipeline
        from diffusers.utils import logging
        logging.set_verbosity_error()
        self.pipe = FluxKontextPipeline.from_pretrained(model, torch_dtype=torch.float32).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        with open(f"{model}/retouch.json") as f:
            self.conf = json.load(f)
        self.steps = steps or self.conf["steps"]
        encode = self.pipe.vae.encode
        # channels-last GroupNorm on the CPU is inaccurate; the pipeline hands the picture over in that layout
        self.pipe.vae.encode = lambda x, *a, **k: encode(x.contiguous(), *a, **k)

    def __call__(self, images, prompts, seeds):
        h, w = images[0].shape[:2]
        r = self.pipe(image=[Image.fromarray(i) for i in images], prompt=prompts, height=h, width=w, max_area=h * w, _auto_resize=False,
                      num_inference_steps=self.steps, guidance_scale=self.conf["guidance"], max_sequence_length=self.conf["max_sequence_length"],
                      generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="np")
        return list((r.images * 255).round().astype(np.uint8))

    @torch.no_grad()
    def roundtrip(self, image):
        v = self.pipe.vae
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().to(v.device) / 127.5 - 1
        y = v.decode(v.encode(x).latent_dist.mode()).sample
        return ((y[0].permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


class Binary:
    """The command-line program, one call an edit."""

    def __init__(self, binary, model, steps):
        self.cmd, self.model, self.steps = binary, model, steps

    def __call__(self, images, prompts, seeds):
        out = []
        with tempfile.TemporaryDirectory() as d:
            for im, p, s in zip(images, prompts, seeds):
                Image.fromarray(im).save(f"{d}/in.png")
                more = ["--steps", str(self.steps)] if self.steps else []
                subprocess.run([self.cmd, "edit", f"{d}/in.png", p, "-o", f"{d}/out.png", "--model", self.model, "--seed", str(s), "--force", "-q", *more], check=True, stdout=subprocess.DEVNULL)
                with Image.open(f"{d}/out.png") as o:
                    out.append(np.array(o.convert("RGB")))
        return out


def cases(n, seed):
    """Held-out cases: (kind, size, edit, sentence). Scene seeds start at 10 million, far from those of training."""
    for oi, op in enumerate(scenes.OPS):
        for si, size in enumerate(SIZES):
            rng = np.random.default_rng([10 ** 7 + seed, oi, si])
            for _ in range(n):
                e = scenes.sample_edit(rng, *size, op)
                yield op, size, e, phrases.say(rng, e["words"], "held")
    for oi, op in enumerate(scenes.GLOBAL_OPS):
        for si, size in enumerate(SIZES):
            rng = np.random.default_rng([2 * 10 ** 7 + seed, oi, si])
            for name in photos.HELD_OUT:
                for _ in range(max(1, n // 8)):
                    src = np.array(photos.held_out(name, *size))
                    tgt = scenes.apply_global(src, op)
                    e = dict(src=src, tgt=tgt, op=op, words={"op": op}, scene=None, after=None, index=None)
                    yield "photo " + op, size, e, phrases.say(rng, e["words"], "held")


def chunks(items):
    """Groups of one size."""
    for size in SIZES:
        own = [c for c in items if c[1] == size]
        for i in range(0, len(own), BATCH[size]):
            yield own[i:i + BATCH[size]]


def table(rows):
    kinds = [k for k in scenes.OPS + ["photo " + o for o in scenes.GLOBAL_OPS] if any(r["kind"] == k for r in rows)]
    lines = ["| edit | n | success | untouched PSNR, median | 5th percentile | share at 28 dB or more |", "|---|---|---|---|---|---|"]
    result = {}
    for k in kinds + (["all photo edits"] if any(k.startswith("photo") for k in kinds) else []) + ["all"]:
        own = [r for r in rows if r["kind"] == k or k == "all" or (k == "all photo edits" and r["kind"].startswith("photo"))]
        p = [r["untouched"] for r in own if r["untouched"] is not None]
        v = result[k] = dict(n=len(own), success=100 * float(np.mean([r["ok"] for r in own])) if own else 0.0,
                             median=float(np.median(p)) if p else None, p5=float(np.percentile(p, 5)) if p else None,
                             share28=100 * float(np.mean([x >= 28 for x in p])) if p else None)
        db = lambda x: "" if x is None else f"{x:.1f} dB"
        share = f"{v['share28']:.0f}%" if p else ""
        lines.append(f"| {k} | {v['n']} | {v['success']:.1f}% | {db(v['median'])} | {db(v['p5'])} | {share} |")
    return "\n".join(lines), result


def work(a, part):
    """Run every `jobs`-th group of cases: [(number, row, picture for the sheet or None)]."""
    torch.set_num_threads(a.threads)
    inproc = Diffusers(a.model, a.steps, a.device)
    run = Binary(a.binary, a.model, a.steps) if a.binary else inproc
    todo = [c for c in cases(a.n, a.seed) if (not a.only or c[0] in a.only) and (not a.size or f"{c[1][0]}x{c[1][1]}" == a.size)]
    number, out_rows = 0, []
    for g, group in enumerate(chunks(todo)):
        first, number = number, number + len(group)
        if g % a.jobs != part:
            continue
        outs = run([c[2]["src"] for c in group], [c[3] for c in group], [a.seed + 1000 + first + i for i in range(len(group))])
        for i, ((kind, size, e, say), out) in enumerate(zip(group, outs)):
            rt = inproc.roundtrip(e["src"]) if op_is_global(e) else None
            ok, untouched, detail = scoring.score(e, out, rt)
            row = dict(kind=kind, size=f"{size[0]}x{size[1]}", ok=bool(ok), untouched=untouched, detail=detail, exact_psnr=scoring.psnr(out, e["tgt"]), prompt=say)
            out_rows.append((first + i, row, np.concatenate([e["src"], out, e["tgt"]], 0) if size == SIZES[0] and a.sheet else None))
    return out_rows


def op_is_global(e):
    return e["op"] in scenes.GLOBAL_OPS


def write_sheet(shown, path, across=12):
    """Source, result and target above each other; the cases side by side, `across` to a band."""
    cells = [c for v in shown.values() for c in v]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % across)
    Image.fromarray(np.concatenate([np.concatenate(cells[i:i + across], 1) for i in range(0, len(cells), across)], 0)).save(path)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("model")
    a.add_argument("--n", type=int, default=24, help="cases per scene edit and size")
    a.add_argument("--steps", type=int, default=0, help="0 = the model's own default")
    a.add_argument("--binary")
    a.add_argument("--out")
    a.add_argument("--sheet", help="also write sources, results and targets of some cases as a picture")
    a.add_argument("--only", nargs="*", help="edit kinds to run")
    a.add_argument("--size", help="only this size, for example 128x128")
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--device", default="cpu")
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--jobs", type=int, default=1, help="processes")
    a = a.parse_args()
    start = time.time()
    if a.jobs > 1:
        with concurrent.futures.ProcessPoolExecutor(a.jobs, multiprocessing.get_context("spawn")) as ex:
            parts = list(ex.map(work, [a] * a.jobs, range(a.jobs)))
    else:
        parts = [work(a, 0)]
    done = sorted((x for p in parts for x in p), key=lambda x: x[0])
    rows, shown = [r for _, r, _ in done], {}
    for _, r, picture in done:
        if picture is not None and len(shown.setdefault(r["kind"], [])) < (2 if r["kind"].split()[-1] in scenes.GLOBAL_OPS else 6):
            shown[r["kind"]].append(picture)
    with open(f"{a.model}/retouch.json") as f:
        conf = json.load(f)
    text, result = table(rows)
    by_size = {s: 100 * float(np.mean([r["ok"] for r in rows if r["size"] == s])) for s in dict.fromkeys(r["size"] for r in rows)}
    photo = [r["exact_psnr"] for r in rows if r["kind"].startswith("photo")]
    text += "\n\nBy size: " + ", ".join(f"{k} {v:.1f}%" for k, v in by_size.items())
    if photo:
        text += f". Photographs against the exact operation on the original pixels: median {np.median(photo):.1f} dB (the autoencoder's own loss included)."
    print(text + f"\n{len(rows)} edits in {time.time() - start:.0f} s")
    if a.out:
        os.makedirs(os.path.dirname(os.path.abspath(a.out)), exist_ok=True)
        with open(a.out + ".md", "w") as f:
            f.write(text + "\n")
        with open(a.out + ".json", "w") as f:
            json.dump(dict(kinds=result, by_size=by_size, steps=a.steps or conf["steps"], n=a.n, seed=a.seed, cases=rows), f, indent=1)
    if a.sheet:
        write_sheet(shown, a.sheet)


if __name__ == "__main__":
    main()

"""Ours beside PyTorch's, on one machine in one run.

usage: python scripts/compare.py [--device cuda] [--sizes 512x512 1024x1024 1392x752] [--steps 28] [--layers 19 38] [--t5-layers 24]
           whole edits beside diffusers, eager and compiled, with the same random weights of the published model's size
           (34 GB, written once to --folder and removed), or with those of --model; comparison/edits.py says how
       python scripts/compare.py --write FOLDER [--layers 19 38] [--t5-layers 24]
           writes random weights, for --model here and in streaming.py
       python scripts/compare.py --programs retouch --sizes 1024x1024 --layers 3 6 --t5-layers 2 --steps 8 --estimate
           retouch alone, shortly: what the whole model would take is estimated; comparison/estimate.py says how
       python scripts/compare.py --device cpu --model tests/fixtures/tiny-kontext --dtype f32 --sizes 64x64 --steps 4
           the same on the CPU with a model in which nothing takes long
       python scripts/compare.py --cpu --blocks [--rounds 2] [--threads 2] [--work blocks ...]
           pieces of the work at real width on the CPU, beside PyTorch; comparison/blocks.py says how

Needs torch, diffusers and transformers (scripts/reference/install.sh makes an environment with them; for retouch alone numpy,
Pillow and safetensors do) and, without --binary, cargo. Prints a table and stores it with all that was measured as
OUT/<date>-*.{md,json}.
"""
import argparse
import json
import os
from pathlib import Path

from comparison import blocks, edits, pipeline, random_model
from comparison.machine import ROOT


def size(text):
    """WxH, both multiples of 16."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()) or int(width) % 16 or int(height) % 16 or not int(width) * int(height):
        raise argparse.ArgumentTypeError(f"`{text}` is no size; give one like 1024x768, of multiples of 16")
    return int(width), int(height)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cpu", action="store_true", help="with --blocks: on the CPU, the only place for them")
    p.add_argument("--blocks", action="store_true", help="compare pieces of the work at real width")
    p.add_argument("--work", nargs="+", choices=blocks.WORK, default=blocks.WORK)
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    p.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    p.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    p.add_argument("--sizes", nargs="+", type=size, default=[(512, 512), (1024, 1024), (1392, 752)], help="of the reference and of the result")
    p.add_argument("--steps", type=int, default=28)
    p.add_argument("--programs", nargs="+", choices=edits.PROGRAMS, default=["diffusers", "compiled", "retouch"])
    p.add_argument("--compile", choices=["whole", "blocks"], default="whole", help="what torch.compile takes at a time: blocks compile sooner")
    p.add_argument("--write", metavar="FOLDER", help="only write random weights there")
    p.add_argument("--model", help="a model folder in place of random weights")
    p.add_argument("--layers", nargs=2, type=int, default=[19, 38], metavar=("DOUBLE", "SINGLE"), help="blocks of the random transformer")
    p.add_argument("--t5-layers", type=int, default=24)
    p.add_argument("--estimate", action="store_true", help="estimate retouch's time with the published model from that with a part of its blocks")
    p.add_argument("--folder", help="where to put random weights [default: the system's folder for temporary files]")
    p.add_argument("--binary", help="the built bench or program, to leave out cargo")
    p.add_argument("--commit", help="what --binary was built from [default: this folder's commit]")
    p.add_argument("--out", default=str(ROOT / "benches" / "results"))
    p.add_argument("--reference", choices=blocks.WORK, help=argparse.SUPPRESS)
    p.add_argument("--pipeline", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.reference:
        blocks.run_reference(a.reference, a.threads)
    elif a.pipeline:
        pipeline.run(json.loads(a.pipeline))
    elif a.write:
        if Path(a.write).exists():
            p.error(f"{a.write} exists; give a new folder to --write")
        random_model.write(Path(a.write), *a.layers, a.t5_layers)
    elif a.cpu != a.blocks:
        p.error("--cpu and --blocks go together; whole edits on the CPU are --device cpu")
    elif a.blocks:
        blocks.compare(a)
    elif a.model and not (Path(a.model) / "transformer" / "config.json").exists():
        p.error(f"{a.model} is no model folder in diffusers' layout")
    elif a.steps < 2:
        p.error("of a single step there is no time between two; give --steps 2 or more")
    else:
        edits.compare(a)


if __name__ == "__main__":
    main()

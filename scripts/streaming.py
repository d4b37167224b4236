"""What blocks cost that do not stay on the GPU: seconds of a step with all of them there, beside those with as few as may be.

usage: python scripts/streaming.py [--binary RETOUCH] [--sizes 1024x1024 512x512] [--steps 6] [--layers 3 5] [--types bf16 q8_0]

The weights are random ones of the published model's width (--layers DOUBLE SINGLE), or those of --model (compare.py --write makes
one for several runs); needs numpy and Pillow. As few blocks as may be: under the smallest --vram-limit that `retouch plan` does
not refuse, to a quarter of a gigabyte, found by halving, as what is refused is refused below, too. The first step is left out:
what stays in the host's memory is read there. Prints a table and writes OUT/streaming.md, row by row.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from comparison.edits import picture
from comparison.machine import built, first_line

PROMPT = "make the circle blue"


def edit(a, model, image, size, kind, limit):
    """Seconds of a step after the first."""
    width, height = size.split("x")
    command = [a.binary, "edit", str(image), PROMPT, "-o", str(image.with_suffix(".edited.png")), "--model", str(model), "--device", a.device,
               "--steps", str(a.steps), "--seed", "1", "--width", width, "--height", height, "--reference-size", size, "--force", "--json", "-v"]
    command += ["--quantize", kind] if kind != "bf16" else []
    command += ["--vram-limit", limit] if limit else []
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if made.returncode != 0:
        sys.exit(f"`{' '.join(command)}` failed; its messages are above")
    timings = json.loads(made.stdout.splitlines()[-1])["timings"]
    first = timings["first_step_seconds"] - sum(timings[f"{stage}_seconds"] for stage in ("text", "reference", "load"))
    return (timings["steps_seconds"] - first) / (a.steps - 1)


def smallest_plan(a, model, size, kind):
    """The lowest limit that is not refused, and its plan."""
    width, height = size.split("x")
    command = [a.binary, "plan", "--model", str(model), "--device", a.device, "--width", width, "--height", height, "--reference-size", size,
               "--type", kind, "--json", "--vram-limit"]

    def planned(quarters):
        return subprocess.run([*command, f"{quarters / 4}G"], capture_output=True, text=True)

    refused, enough = 0, 4
    while (plan := planned(enough)).returncode != 0:
        if enough > 400:
            sys.exit(f"`{' '.join(command)} {enough / 4}G` is refused: {plan.stderr}")
        refused, enough = enough, 2 * enough
    while enough - refused > 1:
        middle = (refused + enough) // 2
        tried = planned(middle)
        if tried.returncode == 0:
            enough, plan = middle, tried
        else:
            refused = middle
    return f"{enough / 4}G", json.loads(plan.stdout)


def row(a, model, folder, size, kind):
    image = folder / f"{size}.png"
    picture(image, *map(int, size.split("x")))
    limit, plan = smallest_plan(a, model, size, kind)
    if not plan["transfer"]:
        return f"| {size} | {kind} | {limit} | all blocks stay | | | | |"
    resident, streamed = edit(a, model, image, size, kind, None), edit(a, model, image, size, kind, limit)
    gigabytes = plan["transfer"]["bytes"] / 1e9
    origin = "pinned" if plan["transfer"]["pinned"] else "files"
    return (f"| {size} | {kind} | {limit} | {gigabytes:.2f} GB, {origin} | {resident:.4f} | {streamed:.4f} | {streamed / resident:.3f} "
            f"| {gigabytes / streamed:.1f} GB/s |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", help="the built program, to leave out cargo")
    p.add_argument("--device", default="cuda")
    p.add_argument("--model", help="a model folder in place of random weights")
    p.add_argument("--layers", nargs=2, type=int, default=[3, 5], metavar=("DOUBLE", "SINGLE"))
    p.add_argument("--sizes", nargs="+", default=["1024x1024", "512x512"])
    p.add_argument("--types", nargs="+", default=["bf16", "q8_0"])
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--folder", help="where to put random weights [default: the system's folder for temporary files]")
    p.add_argument("--out", help="a folder for the table")
    a = p.parse_args()
    if a.steps < 2:
        p.error("the first step is not counted; give --steps 2 or more")
    a.binary = str(Path(a.binary or built("--bin", "retouch", "--features", "cuda")).resolve())
    gpu = first_line("nvidia-smi", "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current", "--format=csv,noheader")
    lines = [f"`python {' '.join(sys.argv)}` on {gpu} (name, driver, PCIe generation and lanes)", "",
             "| size | type | --vram-limit | sent at each step | s/step, all resident | s/step, sent | ratio | sent at |", "|---|---|---|---|---|---|---|---|"]
    if a.out:
        Path(a.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        folder = Path(folder)
        model = Path(a.model) if a.model else folder / "model"
        if not a.model:
            from comparison import random_model

            random_model.write(model, *a.layers, 2)
        for size in a.sizes:
            for kind in a.types:
                lines.append(row(a, model, folder, size, kind))
                print(lines[-1], file=sys.stderr, flush=True)
                if a.out:
                    (Path(a.out) / "streaming.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

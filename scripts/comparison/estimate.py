"""What an edit with the published model would take, by a straight line through the same edit at two depths (compare.py --estimate).

A step takes some time whatever the depth is, and the same again for each block of a kind. With one double block to two single
ones at both depths, as in the published model, that is a line in the number of double blocks, whatever each kind takes. It
is no measurement: a GPU that slows down under a longer load is not in it, nor are T5's layers that the model lacks.
"""
import json
import sys

DOUBLE, SINGLE, T5, STEPS = 19, 38, 24, 28   # the published model's


def third(double):
    return max(double // 3, 1)


def check(depth):
    double, single, _ = depth
    if single != 2 * double or double < 2:
        sys.exit(f"--estimate needs two double blocks or more and twice as many single ones, not {double} + {single}; give --layers 3 6")


def shallower(model, folder, depth):
    """The same model with a third of its blocks: links to its files, and other numbers in the transformer's configuration."""
    (folder / "transformer").mkdir(parents=True)
    for link in [*(x for x in model.iterdir() if x.name != "transformer"), *(model / "transformer").iterdir()]:
        (folder / link.relative_to(model)).symlink_to(link.resolve())
    config = folder / "transformer" / "config.json"
    changed = json.loads(config.read_text()) | {"num_layers": third(depth[0]), "num_single_layers": 2 * third(depth[0])}
    config.unlink()
    config.write_text(json.dumps(changed, indent=2) + "\n")
    return folder


def table(rows, depth, steps):
    """Lines after the table of what was measured."""
    deep, _, t5 = depth
    shallow = third(deep)
    lines = ["", f"Estimated for {DOUBLE} + {SINGLE} blocks and {STEPS} steps: extrapolated from two depths, not measured.",
             f"The rest of the edit, text and pixels, is as measured, with {t5} of {T5} layers of T5.", "",
             f"| size | program | s/step, {shallow} + {2 * shallow} blocks | s/step, {deep} + {2 * deep} blocks | s/step, estimated | s/edit, estimated |",
             "|---|---|---|---|---|---|"]
    for r in rows:
        if "shallow_step_seconds" in r:
            each = (r["step_seconds"] - r["shallow_step_seconds"]) / (deep - shallow)
            step = r["step_seconds"] + (DOUBLE - deep) * each
            edit = STEPS * step + r["edit_seconds"] - steps * r["step_seconds"]
            lines.append(f"| {r['size'][0]}x{r['size'][1]} | {r['program']} | {r['shallow_step_seconds']:.4f} | {r['step_seconds']:.4f} | {step:.3f} | {edit:.2f} |")
    return lines

"""Compare two dumps: what `retouch --dump` wrote with a fixture, or any two safetensors files.

usage: python compare.py ACTUAL EXPECTED [--limit 1e-4]

For each tensor of EXPECTED: the largest difference over the largest magnitude of the expected tensor. Integer tensors
(token ids, 8-bit pixels) show how many elements differ, and by how much at most. With --limit, exits with 1 when a float
tensor is farther than that or missing, or when ids or a shape differ; 8-bit pixels may differ by one level or be
missing. A fixture's `ref_latents_sub8` is compared with every 8th row and column of the dump's `ref_latents`.
"""
import argparse
import sys

import torch
from safetensors.torch import load_file


def compare(actual, expected):
    """(relative difference, text). A relative difference of infinity: not comparable."""
    if actual.shape != expected.shape:
        return float("inf"), f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    difference = (actual.double() - expected.double()).abs()
    largest = difference.max().item() if difference.numel() else 0.0
    if largest != largest:
        return float("inf"), "not a number"
    if not expected.is_floating_point():
        wrong = int((difference > 0).sum())
        allowed = 1 if expected.dtype == torch.uint8 else 0
        return (0.0 if largest <= allowed else float("inf")), f"{wrong} of {expected.numel()} differ, at most by {largest:.0f}"
    magnitude = expected.double().abs().max().item()
    relative = largest / magnitude if magnitude else largest
    return relative, f"{relative:.2e}  (largest difference {largest:.2e}, largest magnitude {magnitude:.3g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("actual")
    parser.add_argument("expected")
    parser.add_argument("--limit", type=float)
    options = parser.parse_args()
    actual, expected = load_file(options.actual), load_file(options.expected)
    if "ref_latents_sub8" in expected and "ref_latents" in actual:
        actual["ref_latents_sub8"] = actual["ref_latents"][:, :, ::8, ::8]
    failed = False
    for name in sorted(expected):
        if name not in actual:
            print(f"{name:28s} missing")
            failed |= options.limit is not None and expected[name].dtype != torch.uint8
            continue
        relative, text = compare(actual[name], expected[name])
        over = options.limit is not None and relative > options.limit
        failed |= over
        print(f"{name:28s} {text}{'  OVER THE LIMIT' if over else ''}")
    print("only in", options.actual + ":", ", ".join(sorted(set(actual) - set(expected))) or "nothing")
    sys.exit(failed)


if __name__ == "__main__":
    main()

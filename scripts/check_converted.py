"""Read a file that `retouch convert` wrote with other tools' libraries, and compare it with the file it was made from.

usage: python check_converted.py ORIGINAL.safetensors CONVERTED.gguf|CONVERTED.safetensors [PATTERN]

GGUF is read and widened by the package `gguf`, safetensors by `safetensors` and torch. Fails where a tensor is missing or of
another shape, where one that is not in fewer bits has another value, or an error is larger than the type's. Prints for each
type how many tensors have it, the largest relative error (root mean square), and whether `gguf`'s own quantisation gives
the same bytes, where it has one. A file too large for all of its values to be looked at has those of the tensors compared
whose names match the regular expression PATTERN, and of the others the shapes.
"""
import re
import sys
from collections import defaultdict

import gguf
import numpy as np
import torch
from safetensors import safe_open

# Of normally distributed weights, with room for unusual ones.
LIMITS = {
    "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_K": 0.1, "Q4_1": 0.12, "Q4_0": 0.12, "Q3_K": 0.25,
    "Q2_K": 0.5, "F8_E4M3": 0.06, "F16": 1e-3, "BF16": 4e-3, "F32": 0,
}  # fmt: skip


def read_gguf(path):
    """(name, shape, a function that makes f32 of its values, type, the bytes or None) of every tensor."""
    reader = gguf.GGUFReader(path)
    for key in ("general.architecture", "general.file_type", "general.quantization_version"):
        field = reader.get_field(key)   # stable-diffusion.cpp writes none
        print(f"{key}: {field.contents() if field else None}")
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = lambda: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        yield tensor.name, shape, values, tensor.tensor_type.name, tensor.data


def read_safetensors(path):
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name in sorted(names):
            if name.endswith("scale_weight") or name == "scaled_fp8":
                continue
            tensor = file.get_tensor(name)
            kind = {torch.float8_e4m3fn: "F8_E4M3", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
            scale = name.removesuffix("weight") + "scale_weight"
            scale = file.get_tensor(scale) if scale in names else torch.tensor(1.0)
            yield name, tuple(tensor.shape), lambda: (tensor.float() * scale).numpy(), kind, None


def main(original, converted, pattern=""):
    original = safe_open(original, "pt")
    expected = set(original.keys())
    rows, compared = defaultdict(lambda: [0, 0, 0.0, 0, 0]), re.compile(pattern)
    for name, shape, values, kind, data in (read_gguf if converted.endswith(".gguf") else read_safetensors)(converted):
        expected.remove(name)
        assert shape == tuple(original.get_slice(name).get_shape()), f"{name}: {shape}"
        row = rows[kind]
        row[0] += 1
        if not compared.search(name):
            continue
        exact, values = original.get_tensor(name).float().numpy(), values()
        error = float(np.sqrt(np.mean((values - exact) ** 2) / np.mean(exact**2)))
        assert error <= LIMITS[kind], f"{name} in {kind}: {error}"
        row[1] += 1
        row[2] = max(row[2], error)
        if data is not None:
            try:
                own = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[kind])
            except NotImplementedError:
                continue
            row[3] += 1
            row[4] += np.array_equal(own.view(np.uint8).ravel(), np.asarray(data).view(np.uint8).ravel())
    assert not expected, f"missing: {sorted(expected)}"
    for kind, (count, looked_at, error, requantised, same) in sorted(rows.items()):
        print(
            f"{kind:8} {count:4} tensors, {looked_at} compared, error at most {error:.5f}"
            + (f", {same} of {requantised} as gguf quantises" if requantised else "")
        )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])

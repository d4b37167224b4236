"""Read a file that `retouch convert` wrote with other tools' libraries, and compare it with the file it was made from.

usage: python check_converted.py ORIGINAL.safetensors CONVERTED.gguf|CONVERTED.safetensors

GGUF is read and widened by the package `gguf`, safetensors by `safetensors` and torch. Fails where a tensor is missing or of
another shape, where one that is not in fewer bits has another value, or an error is larger than the type's. Prints for each
type how many tensors have it, the largest relative error (root mean square), and whether `gguf`'s own quantisation gives
the same bytes, where it has one.
"""
import sys
from collections import defaultdict

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

# Of normally distributed weights, with room for unusual ones.
LIMITS = {
    "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_K": 0.1, "Q4_1": 0.12, "Q4_0": 0.12, "Q3_K": 0.25,
    "Q2_K": 0.5, "F8_E4M3": 0.06, "F16": 1e-3, "BF16": 4e-3, "F32": 0,
}  # fmt: skip


def read_gguf(path):
    """name -> (values in f32, type, the bytes or None)."""
    reader = gguf.GGUFReader(path)
    for key in ("general.architecture", "general.file_type", "general.quantization_version"):
        print(f"{key}: {reader.get_field(key).contents()}")
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        yield tensor.name, np.asarray(values, dtype=np.float32), tensor.tensor_type.name, tensor.data


def read_safetensors(path):
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("scale_weight") or name == "scaled_fp8":
            continue
        kind = {torch.float8_e4m3fn: "F8_E4M3", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
        scale = tensors.get(name.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
        yield name, (tensor.float() * scale).numpy(), kind, None


def main(original, converted):
    expected = {name: tensor.float().numpy() for name, tensor in load_file(original).items()}
    rows = defaultdict(lambda: [0, 0.0, 0, 0])
    for name, values, kind, data in (read_gguf if converted.endswith(".gguf") else read_safetensors)(converted):
        exact = expected.pop(name)
        assert values.shape == exact.shape, f"{name}: {values.shape} for {exact.shape}"
        error = float(np.sqrt(np.mean((values - exact) ** 2) / np.mean(exact**2)))
        assert error <= LIMITS[kind], f"{name} in {kind}: {error}"
        row = rows[kind]
        row[0] += 1
        row[1] = max(row[1], error)
        if data is not None:
            try:
                own = gguf.quants.quantize(exact, gguf.GGMLQuantizationType[kind])
            except NotImplementedError:
                continue
            row[2] += 1
            row[3] += np.array_equal(own.view(np.uint8).ravel(), np.asarray(data).view(np.uint8).ravel())
    assert not expected, f"missing: {sorted(expected)}"
    for kind, (count, error, compared, same) in sorted(rows.items()):
        print(f"{kind:8} {count:4} tensors, error at most {error:.5f}" + (f", {same} of {compared} as gguf quantises" if compared else ""))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

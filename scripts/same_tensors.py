"""Whether two files of weights, GGUF or safetensors, have the same tensors bit for bit.

usage: python same_tensors.py ONE OTHER

Names may have a prefix in one of them (`model.diffusion_model.`). Of GGUF, read by the package `gguf`, the stored blocks are compared;
where the types differ, the values in f32.
"""
import sys
from collections import Counter

import gguf
import numpy as np
from safetensors import safe_open

PREFIXES = ("model.diffusion_model.", "text_encoders.t5xxl.transformer.")


def plain(name):
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def read_gguf(path):
    """name -> (shape, type, stored bytes, a function that makes f32 of them)."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = lambda tensor=tensor, shape=shape: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        tensors[plain(tensor.name)] = (shape, tensor.tensor_type.name, np.asarray(tensor.data).view(np.uint8).ravel(), values)
    return tensors


def read_safetensors(path):
    import torch

    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            bits = tensor.view(torch.uint8).numpy().ravel() if tensor.dim() else tensor.reshape(1).view(torch.uint8).numpy()
            kind = str(tensor.dtype).removeprefix("torch.").replace("bfloat", "BF").replace("float", "F")
            tensors[plain(name)] = (tuple(tensor.shape), kind, bits, lambda tensor=tensor: tensor.float().numpy())
    return tensors


def main(one, other):
    one, other = ((read_gguf if path.endswith(".gguf") else read_safetensors)(path) for path in (one, other))
    counts, failed = Counter(), sorted(set(one) ^ set(other))
    for name in sorted(set(one) & set(other)):
        (shape, kind, bits, values), (other_shape, other_kind, other_bits, other_values) = one[name], other[name]
        same = shape == other_shape and (np.array_equal(bits, other_bits) if kind == other_kind else np.array_equal(values(), other_values()))
        counts[kind if kind == other_kind else f"{kind} and {other_kind}"] += same
        failed += [] if same else [name]
    print(", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items())), "are the same")
    if failed:
        sys.exit(f"{len(failed)} are in one alone or differ: {', '.join(failed[:5])}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

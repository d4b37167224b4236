"""small/randn.safetensors and randn.json: torch.randn on the CPU generator, in its AVX2 form (see torch_randn.py).

Up to 1024 values a tensor `seed_S.n_N` has them all; beyond, `.first` and `.last` have 64 each, and randn.json the hash
of all: 64-bit FNV-1a over the little-endian bytes of the f32 values (offset basis cbf29ce484222325, prime 100000001b3).
"""
import environment  # noqa: F401  (first: it sets up torch)

import json

import numpy as np
import torch
from safetensors.torch import save_file

from environment import FIXTURES
from torch_randn import randn

SEEDS = [0, 42, 2**40 + 7, 2**63 - 1]
SIZES = [16, 17, 31, 100, 1024, 4099, 16384]


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def main():
    tensors, index = {}, []
    for seed in SEEDS:
        for n in SIZES:
            values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
            assert np.array_equal(values.numpy(), randn(n, seed)), f"torch.randn is not in its AVX2 form (seed {seed}, {n} values)"
            name = f"seed_{seed}.n_{n}"
            index.append({"name": name, "seed": seed, "n": n, "fnv1a": fnv1a(values.numpy().astype("<f4").tobytes())})
            if n <= 1024:
                tensors[name] = values
            else:
                tensors[name + ".first"], tensors[name + ".last"] = values[:64].clone(), values[-64:].clone()
    save_file(tensors, FIXTURES / "small" / "randn.safetensors")
    rows = ",\n".join(json.dumps(row) for row in index)
    (FIXTURES / "small" / "randn.json").write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main()

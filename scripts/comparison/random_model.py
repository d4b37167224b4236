"""A random model in FLUX.1 Kontext's layout and sizes, written tensor by tensor: memory does not grow with it.

What a step costs does not depend on the values. Matrices are normal and scaled by their inputs, so that activations
stay near 1; values repeat, which nothing here can tell. The tokenizers are those of the fixtures' tiny model. Needs numpy alone.
"""
import json
import math
import shutil
import struct

import numpy as np

from comparison import shapes
from comparison.machine import ROOT

TINY = ROOT / "tests" / "fixtures" / "tiny-kontext"
POOL = 4_194_301   # different values; a prime, so that no two rows of a matrix begin at the same


def configs(double_blocks, single_blocks, t5_layers):
    """The published model's, with so many blocks and layers."""
    changes = {
        "transformer": dict(attention_head_dim=128, axes_dims_rope=(16, 56, 56), guidance_embeds=True, in_channels=64, joint_attention_dim=4096,
                            num_attention_heads=24, num_layers=double_blocks, num_single_layers=single_blocks, pooled_projection_dim=768),
        "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
                             vocab_size=49408),
        "text_encoder_2": dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=t5_layers, num_decoder_layers=t5_layers, num_heads=64, vocab_size=32128),
        "vae": dict(block_out_channels=(128, 256, 512, 512), norm_num_groups=32),
    }  # fmt: skip
    return {part: json.loads((TINY / part / "config.json").read_text()) | change for part, change in changes.items()}


def spread(name, shape):
    """Factor and offset of normal values for a parameter."""
    vector = math.prod(shape) == max(shape)
    if vector:
        return (0.1, 0.0) if name.endswith(".bias") else (0.2, 1.0)
    if "relative_attention_bias" in name or name.endswith(("embedding.weight", "shared.weight")):
        return 0.5, 0.0
    return math.prod(shape[1:]) ** -0.5, 0.0


def bf16(values):
    """The bits of f32 values in bf16: rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (bits >> 16 & 1) + 0x7FFF) >> 16).astype(np.uint16)


def write_tensors(path, tensors, pool):
    """A safetensors file in bf16."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(tensors.items()):
            factor, offset = (np.float32(x) for x in spread(name, shape))
            left, start = math.prod(shape), number * 7919 % POOL
            values = bf16(pool[start : start + min(left, POOL)] * factor + offset)
            while left > 0:
                file.write(values[:left])
                left -= len(values)


def write(folder, double_blocks, single_blocks, t5_layers):
    """The model's folder, in the layout of diffusers."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    pool = np.tile(np.random.default_rng(0).standard_normal(POOL, np.float32), 2)   # twice, so that it can begin anywhere
    for part, config in configs(double_blocks, single_blocks, t5_layers).items():
        (folder / part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        write_tensors(folder / part / f"{stem}.safetensors", shapes.PARTS[part](config), pool)

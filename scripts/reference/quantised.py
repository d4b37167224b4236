"""Write weights in few bits with other tools' libraries: tests/fixtures/quantised. Needs the package `gguf`.

usage: python quantised.py    (after tiny_model.py and single_files.py)

- blocks.gguf: random blocks of every type that is read, and blocks.safetensors: their values by `gguf`'s own dequantisation.
- fp8.safetensors: every code of both 8-bit floats, plain and with a scale under both names, and their values by torch.
- flux-q4_0.gguf: the tiny transformer's first double and single block as stable-diffusion.cpp's `convert` leaves them: every
  matrix quantised, names behind `model.diffusion_model.`, no architecture.
- t5-q8_0.gguf: the tiny T5 encoder as llama.cpp's converter names it.
"""
import environment  # noqa: F401  (first: it sets up torch)

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from environment import FIXTURES, TINY

OUT = FIXTURES / "quantised"
BLOCKS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
# Byte offsets of the f16 scales in a block: anything else in it may have any bits.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}  # fmt: skip
T5_NAMES = {
    "shared": "token_embd", "encoder.block": "enc.blk", "encoder.final_layer_norm": "enc.output_norm",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k", "layer.0.SelfAttention.v": "attn_v", "layer.0.SelfAttention.o": "attn_o",
    "layer.0.layer_norm": "attn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down", "layer.1.layer_norm": "ffn_norm",
}  # fmt: skip


def write(path, arch, tensors):
    """`tensors`: name -> (array, or bytes of blocks; type)."""
    writer = gguf.GGUFWriter(path, arch or "none")
    if arch is None:
        del writer.kv_data[0]["general.architecture"]
    else:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(random, kind, rows, columns):
    size, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows * columns // size, length), dtype=np.uint8)
    for offset in SCALES[kind]:
        scale = (random.standard_normal(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def blocks():
    random = np.random.default_rng(0)
    tensors, values = {}, {}
    for kind in BLOCKS:
        data = random_blocks(random, kind, 2, 512)
        tensors[kind.name] = (data, kind)
        values[kind.name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    dense = random.standard_normal((3, 5)).astype(np.float32)
    for kind in (Type.F32, Type.F16, Type.BF16):
        data = gguf.quants.quantize(dense, kind)
        tensors[kind.name] = (data, kind)
        values[kind.name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
    write(OUT / "blocks.gguf", "test", tensors)
    save_file(values, OUT / "blocks.safetensors")


def fp8():
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    tensors = {}
    for name, kind in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        values = codes.view(kind)
        # Not a number has no equal.
        values = torch.where(values.float().isfinite(), values.float(), torch.zeros(())).to(kind)
        tensors[f"{name}.weight"], tensors[f"{name}.values"] = values, values.float()
        for suffix, scale, inputs in (("scale_weight", 0.37, "scale_input"), ("weight_scale", 3.1, "input_scale")):
            scale = torch.tensor(scale)
            layer = f"{name}.{suffix}"
            tensors[f"{layer}.weight"], tensors[f"{layer}.{suffix}"] = values.clone(), scale
            tensors[f"{layer}.{inputs}"] = torch.tensor(0.5)
            tensors[f"{layer}.values"] = values.float() * scale
    tensors["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, OUT / "fp8.safetensors")


def quantised(value, kind):
    """Matrices in blocks, the rest in f32."""
    kind = kind if value.ndim == 2 else Type.F32
    return gguf.quants.quantize(value.float().numpy(), kind), kind


def transformer():
    tensors = load_file(TINY / "flux1-kontext-dev.safetensors")
    blocks = ("double_blocks.0.", "single_blocks.0.")
    kept = {name: value for name, value in tensors.items() if name.startswith(blocks) or "_blocks." not in name}
    write(OUT / "flux-q4_0.gguf", None, {"model.diffusion_model." + n: quantised(v, Type.Q4_0) for n, v in kept.items()})


def t5():
    tensors = {}
    for path in sorted((TINY / "text_encoder_2").glob("*.safetensors")):
        tensors.update(load_file(path))
    renamed = {}
    for name, value in tensors.items():
        if name == "encoder.embed_tokens.weight":
            continue
        for source, target in T5_NAMES.items():
            name = name.replace(source, target)
        # llama.cpp keeps the learned biases of positions in f16
        renamed[name] = quantised(value, Type.F16 if "attn_rel_b" in name else Type.Q8_0)
    write(OUT / "t5-q8_0.gguf", "t5encoder", renamed)


def main():
    OUT.mkdir(exist_ok=True)
    blocks()
    fp8()
    transformer()
    t5()


if __name__ == "__main__":
    main()

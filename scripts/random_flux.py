"""Make a model folder whose transformer has FLUX.1's full shape in 4 bits and random values: 6.8 GB, in a minute.

usage: python random_flux.py FOLDER

To measure memory and time where no weights are at hand: what is computed is noise. The text encoders have the real widths at
their ends and next to nothing between, the VAE and the tokenizers are those of tests/fixtures. Then:

    retouch edit PICTURE "anything" --model FOLDER --transformer FOLDER/transformer.gguf --steps 1 --width 256 --height 256 -v
"""
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TINY = Path(__file__).parents[1] / "tests/fixtures/tiny-kontext"
HIDDEN, MLP, HEAD, DOUBLE, SINGLE, T5_WIDTH, CLIP_WIDTH = 3072, 12288, 128, 19, 38, 4096, 768
F32, F16, Q4_0 = 0, 1, 2  # numbers of GGUF's types
RNG = np.random.default_rng(1)


def transformer_shapes():
    """(name, shape) of every tensor, in Black Forest Labs' naming."""

    def linear(name, outputs, inputs):
        return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]

    def norms(name):
        return [(f"{name}.{part}.scale", (HEAD,)) for part in ("query_norm", "key_norm")]

    shapes = linear("img_in", HIDDEN, 64) + linear("txt_in", HIDDEN, T5_WIDTH)
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", CLIP_WIDTH)):
        shapes += linear(f"{name}.in_layer", HIDDEN, width) + linear(f"{name}.out_layer", HIDDEN, HIDDEN)
    for i in range(DOUBLE):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes += linear(f"{stream}_mod.lin", 6 * HIDDEN, HIDDEN)
            shapes += linear(f"{stream}_attn.qkv", 3 * HIDDEN, HIDDEN) + linear(f"{stream}_attn.proj", HIDDEN, HIDDEN)
            shapes += linear(f"{stream}_mlp.0", MLP, HIDDEN) + linear(f"{stream}_mlp.2", HIDDEN, MLP)
            shapes += norms(f"{stream}_attn.norm")
    for i in range(SINGLE):
        block = f"single_blocks.{i}"
        shapes += linear(f"{block}.modulation.lin", 3 * HIDDEN, HIDDEN) + linear(f"{block}.linear1", 3 * HIDDEN + MLP, HIDDEN)
        shapes += linear(f"{block}.linear2", HIDDEN, HIDDEN + MLP) + norms(f"{block}.norm")
    return shapes + linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN) + linear("final_layer.linear", 64, HIDDEN)


def kind_of(name, shape):
    if len(shape) == 1:
        return F32
    return F16 if name.startswith(("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")) else Q4_0


def size_of(kind, shape):
    return int(np.prod(shape)) * {F32: 4, F16: 2}[kind] if kind != Q4_0 else int(np.prod(shape)) // 32 * 18


def q4_0_blocks(inputs, blocks=1 << 20):
    """Blocks of 32 values of a standard deviation of 1 / sqrt(inputs): a scale in f16, and 16 bytes of codes around 8."""
    raw = RNG.integers(0, 256, (blocks, 18), dtype=np.uint8)
    raw[:, :2] = np.frombuffer(np.float16(inputs**-0.5 / 4.6).tobytes(), np.uint8)
    return raw.tobytes()


def write_gguf(path, shapes):
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1) + text("general.architecture") + struct.pack("<I", 8) + text("flux")
    offset = 0
    for name, shape in shapes:
        kind = kind_of(name, shape)
        header += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        header += struct.pack("<IQ", kind, offset)
        offset += -(-size_of(kind, shape) // 32) * 32
    blocks = {}
    with open(path, "wb") as file:
        file.write(header.ljust(-(-len(header) // 32) * 32, b"\0"))
        for name, shape in shapes:
            kind, size = kind_of(name, shape), size_of(kind_of(name, shape), shape)
            if kind == Q4_0:
                if shape[1] not in blocks:
                    blocks[shape[1]] = q4_0_blocks(shape[1])
                block = blocks[shape[1]]
                for start in range(0, size, len(block)):
                    file.write(block[: size - start])
            else:
                values = RNG.standard_normal(shape) * (shape[1] ** -0.5 if kind == F16 else 0.02) + name.endswith("scale")
                file.write(values.astype(np.float32 if kind == F32 else np.float16).tobytes())
            file.write(b"\0" * (-size % 32))


def write_component(folder, config, shapes):
    """A text encoder: the configuration of the fixtures' with these changes, and a tensor for each shape."""
    folder.mkdir()
    config = json.loads((TINY / folder.name / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    values = {name: (RNG.standard_normal(shape) * 0.02 + ("norm" in name and "weight" in name)).astype(np.float32) for name, shape in shapes}
    save_file(values, folder / "model.safetensors")
    return config


def write_clip(folder):
    width, vocabulary = CLIP_WIDTH, json.loads((TINY / "text_encoder/config.json").read_text())["vocab_size"]
    model = "text_model"
    shapes = {f"{model}.embeddings.token_embedding.weight": (vocabulary, width), f"{model}.embeddings.position_embedding.weight": (77, width)}
    layer = f"{model}.encoder.layers.0"
    for name, outputs, inputs in [(f"self_attn.{p}_proj", width, width) for p in ("q", "k", "v", "out")] + [("mlp.fc1", 64, width), ("mlp.fc2", width, 64)]:
        shapes |= {f"{layer}.{name}.weight": (outputs, inputs), f"{layer}.{name}.bias": (outputs,)}
    for norm in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", f"{model}.final_layer_norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    write_component(folder, dict(hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12), shapes.items())


def write_t5(folder):
    config = json.loads((TINY / "text_encoder_2/config.json").read_text())
    inner, block = config["num_heads"] * config["d_kv"], "encoder.block.0.layer"
    shapes = {"shared.weight": (config["vocab_size"], T5_WIDTH), "encoder.final_layer_norm.weight": (T5_WIDTH,)}
    shapes |= {f"{block}.0.SelfAttention.{name}.weight": (inner, T5_WIDTH) for name in "qkv"}
    shapes |= {f"{block}.0.SelfAttention.o.weight": (T5_WIDTH, inner), f"{block}.0.layer_norm.weight": (T5_WIDTH,)}
    shapes |= {f"{block}.0.SelfAttention.relative_attention_bias.weight": (32, config["num_heads"])}
    shapes |= {f"{block}.1.DenseReluDense.{name}.weight": (config["d_ff"], T5_WIDTH) for name in ("wi_0", "wi_1")}
    shapes |= {f"{block}.1.DenseReluDense.wo.weight": (T5_WIDTH, config["d_ff"]), f"{block}.1.layer_norm.weight": (T5_WIDTH,)}
    write_component(folder, dict(d_model=T5_WIDTH, num_layers=1), shapes.items())


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    for name in ("model_index.json", "scheduler", "tokenizer", "tokenizer_2", "vae"):
        copy = shutil.copytree if (TINY / name).is_dir() else shutil.copy
        copy(TINY / name, folder / name)
    write_clip(folder / "text_encoder")
    write_t5(folder / "text_encoder_2")
    config = json.loads((TINY / "transformer/config.json").read_text()) | dict(
        attention_head_dim=HEAD, axes_dims_rope=[16, 56, 56], joint_attention_dim=T5_WIDTH, num_attention_heads=HIDDEN // HEAD,
        num_layers=DOUBLE, num_single_layers=SINGLE, pooled_projection_dim=CLIP_WIDTH,
    )  # fmt: skip
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(config, indent=2))
    write_gguf(folder / "transformer.gguf", transformer_shapes())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e9:.1f} GB, {sum(int(np.prod(shape)) for _, shape in transformer_shapes()) / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()

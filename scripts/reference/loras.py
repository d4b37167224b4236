"""Small random LoRAs in every format, and what the reference computes with them: tests/fixtures/lora.

usage: python loras.py    (after tiny_model.py)

Each case has two LoRAs at different scales: the one of the format, and `common.safetensors`, in diffusers' own format with
PEFT's configuration in its metadata. diffusers loads them through PEFT where it can. Its converters have the real model's
sizes written in them, which are replaced by the tiny one's. What it cannot load (LoKr, plain differences) is added to the
weights here, by the definition. cases.json lists the cases; expected.safetensors has of each `NAME.clip_pooled` and
`NAME.velocity.0`, and the same of `none`, without a LoRA.
"""
import environment  # noqa: F401  (first: it sets up torch)

import inspect
import json
import shutil
import tempfile
from pathlib import Path

import diffusers.loaders.lora_conversion_utils as conversion
import diffusers.loaders.lora_pipeline as lora_pipeline
import torch
from safetensors.torch import save_file

import kontext
from environment import FIXTURES

OUT = FIXTURES / "lora"
CASE = "min"
SCALE, COMMON_SCALE = 0.75, -0.5
WIDTH = 64  # of the tiny transformer; its MLP is four times as wide
CLIP = "text_model.encoder.layers"

# The tiny model's layers in Black Forest Labs' names: (rows, columns).
DOUBLE = {
    "img_mod.lin": (6, 1), "txt_mod.lin": (6, 1), "img_attn.qkv": (3, 1), "txt_attn.qkv": (3, 1), "img_attn.proj": (1, 1),
    "txt_attn.proj": (1, 1), "img_mlp.0": (4, 1), "img_mlp.2": (1, 4), "txt_mlp.0": (4, 1), "txt_mlp.2": (1, 4),
}  # fmt: skip
SINGLE = {"modulation.lin": (3, 1), "linear1": (7, 1), "linear2": (1, 5)}
# and in diffusers'
DOUBLE_SPLIT = {
    "norm1.linear": (6, 1), "norm1_context.linear": (6, 1), "attn.to_q": (1, 1), "attn.to_v": (1, 1), "attn.add_k_proj": (1, 1),
    "attn.to_out.0": (1, 1), "attn.to_add_out": (1, 1), "ff.net.0.proj": (4, 1), "ff.net.2": (1, 4), "ff_context.net.2": (1, 4),
}  # fmt: skip
SINGLE_SPLIT = {"norm.linear": (3, 1), "attn.to_q": (1, 1), "attn.to_k": (1, 1), "attn.to_v": (1, 1), "proj_mlp": (4, 1), "proj_out": (1, 5)}
OUTSIDE_SPLIT = {
    "x_embedder": (1, 1), "context_embedder": (1, 0.5), "time_text_embed.timestep_embedder.linear_1": (1, 4),
    "time_text_embed.guidance_embedder.linear_2": (1, 1), "time_text_embed.text_embedder.linear_1": (1, 0.5), "norm_out.linear": (2, 1),
    "proj_out": (1, 1),
}  # fmt: skip


class Random:
    """Values that bf16 holds exactly, so that a file in bf16 and the reference in f32 have the same."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, std=1.0):
        return (torch.randn(shape, generator=self.generator) * std).bfloat16()

    def pair(self, shape, rank):
        """(down, up) of a change about half as large as the tiny model's weights."""
        rows, columns = (int(WIDTH * n) for n in shape)
        return self(rank, columns, std=columns**-0.5), self(rows, rank, std=0.5 * rank**-0.5)


def layers(double, single, block=(0, 1), names=("double_blocks", "single_blocks")):
    yield from ((f"{names[0]}.{block[0]}.{name}", shape) for name, shape in double.items())
    yield from ((f"{names[1]}.{block[1]}.{name}", shape) for name, shape in single.items())


DIFFUSERS = ("transformer_blocks", "single_transformer_blocks")


def diffusers_names():
    random, out = Random(1), {}
    modules = [*layers(DOUBLE_SPLIT, SINGLE_SPLIT, names=DIFFUSERS), *OUTSIDE_SPLIT.items()]
    for name, shape in modules:
        rank = 3 if name.endswith("to_v") else 2
        down, up = random.pair(shape, rank)
        out |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        out[f"transformer.{name}.alpha"] = torch.tensor(1.0 if name.endswith("to_q") else 3.0)
    return out


def common():
    """ai-toolkit and diffusers' own training scripts write this."""
    random, out = Random(2), {}
    modules = [("transformer_blocks.1.attn.to_k", (1, 1)), ("transformer_blocks.0.attn.to_q", (1, 1)), ("single_transformer_blocks.1.proj_mlp", (4, 1))]
    for name, shape in modules:
        down, up = random.pair(shape, 3 if name.endswith("to_k") else 2)
        out |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    for layer, name, shape in ((0, "self_attn.q_proj", (0.5, 0.5)), (1, "mlp.fc1", (1, 0.5))):
        down, up = random.pair(shape, 2)
        module = f"text_encoder.{CLIP}.{layer}.{name}"
        out |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    config = {
        "transformer.r": 2, "transformer.lora_alpha": 4, "transformer.rank_pattern": {"attn.to_k": 3},
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_k": 1, "proj_mlp": 2},
        "transformer.target_modules": ["attn.to_k", "attn.to_q", "proj_mlp"],
        "text_encoder.r": 2, "text_encoder.lora_alpha": 3, "text_encoder.target_modules": ["q_proj", "fc1"],
    }  # fmt: skip
    return out, {"lora_adapter_metadata": json.dumps(config)}  # alone: several come in random order


def kohya_tensors(random, module, shape, rank, alpha):
    down, up = random.pair(shape, rank)
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(alpha)}


def kohya():
    random, out = Random(3), {}
    for name, shape in layers(DOUBLE, SINGLE):
        out |= kohya_tensors(random, "lora_unet_" + name.replace(".", "_"), shape, 2, 1.0)
    # The reference knows the encoder's layers by having `out_proj` among them, and else loses those of the attention.
    for name, shape in (("self_attn.v_proj", (0.5, 0.5)), ("self_attn.out_proj", (0.5, 0.5)), ("mlp.fc2", (0.5, 1))):
        out |= kohya_tensors(random, "lora_te1_" + f"{CLIP}.2.{name}".replace(".", "_"), shape, 2, 3.0)
    # The reference leaves these layers' alphas out of account: they are made to have no effect. See also `with_prefix`.
    for name, shape in (("final_layer.linear", (1, 1)), ("final_layer.adaLN_modulation.1", (2, 1))):
        out |= kohya_tensors(random, "lora_unet_" + name.replace(".", "_"), shape, 2, 2.0)
    return out


def kohya_split():
    random, out = Random(4), {}
    modules = [f"transformer_blocks_0_attn_{part}" for part in ("to_q", "to_k", "add_v_proj", "to_out_0", "to_add_out")]
    modules += [f"single_transformer_blocks_2_attn_{part}" for part in ("to_q", "to_v")]
    for module in modules:
        out |= kohya_tensors(random, f"lora_transformer_{module}", (1, 1), 3, 2.0)
    return out


def comfy():
    random, out = Random(5), {}
    for name, shape in (("double_blocks.1.img_attn.qkv", (3, 1)), ("single_blocks.0.linear1", (7, 1)), ("single_blocks.0.linear2", (1, 5))):
        out |= kohya_tensors(random, f"diffusion_model.{name}", shape, 4, 2.0)
    out |= kohya_tensors(random, f"text_encoders.clip_l.transformer.{CLIP}.1.self_attn.out_proj", (0.5, 0.5), 2, 2.0)
    return out


def fal():
    """All layers: the reference knows this format by having all."""
    random, out = Random(6), {}
    modules = [layer for block in range(2) for layer in layers(DOUBLE, {}, (block, 0))]
    modules += [layer for block in range(3) for layer in layers({}, SINGLE, (0, block))]
    for name, shape in [*modules, ("final_layer.linear", (1, 1))]:
        down, up = random.pair(shape, 1)
        out |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    return out


def xlabs():
    random, out = Random(7), {}
    modules = {"double_blocks.0.processor": {"qkv_lora1": (3, 1), "qkv_lora2": (3, 1), "proj_lora1": (1, 1), "proj_lora2": (1, 1)}}
    modules["single_blocks.2.processor"] = {"qkv_lora": (3, 1), "proj_lora": (1, 5)}
    for prefix, parts in modules.items():
        for name, shape in parts.items():
            down, up = random.pair(shape, 4)
            out |= {f"{prefix}.{name}.down.weight": down, f"{prefix}.{name}.up.weight": up}
    return out


def lokr():
    """LyCORIS' names on diffusers' layers, and kohya's on Black Forest Labs'. Returns also the differences, by diffusers' names."""
    random, out, deltas = Random(8), {}, {}
    t, name = "lycoris_", "transformer_blocks_0_attn_to_q"
    left, right = random(4, 4, std=0.5), random(16, 16, std=0.06)
    # Two whole factors: alpha has no effect.
    out |= {f"{t}{name}.lokr_w1": left, f"{t}{name}.lokr_w2": right, f"{t}{name}.alpha": torch.tensor(7.0)}
    deltas["transformer_blocks.0.attn.to_q.weight"] = torch.kron(left.float(), right.float())

    name = "lora_unet_double_blocks_1_txt_attn_qkv"
    left, a, b = random(6, 4, std=0.5), random(32, 2, std=0.2), random(2, 16, std=0.2)
    out |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b, f"{name}.alpha": torch.tensor(3.0)}
    delta = torch.kron(left.float(), a.float() @ b.float()) * 3 / 2
    for part, rows in zip("qkv", delta.chunk(3)):
        deltas[f"transformer_blocks.1.attn.add_{part}_proj.weight"] = rows

    name = "lora_unet_single_blocks_2_linear1"
    a1, b1, a, b = random(7, 2, std=0.5), random(2, 4, std=0.5), random(64, 2, std=0.2), random(2, 16, std=0.2)
    out |= {f"{name}.lokr_w1_a": a1, f"{name}.lokr_w1_b": b1, f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
    out[f"{name}.alpha"] = torch.tensor(1.0)
    delta = torch.kron(a1.float() @ b1.float(), a.float() @ b.float()) / 2
    for part, rows in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), delta.split([64, 64, 64, 256])):
        deltas[f"single_transformer_blocks.2.{part}.weight"] = rows

    name = "transformer.norm_out.linear"
    left, right = random(2, 4, std=0.3), random(64, 16, std=0.1)
    out |= {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right}
    deltas["norm_out.linear.weight"] = torch.kron(left.float(), right.float())
    return out, deltas


def differences():
    random, out, deltas = Random(9), {}, {}
    for name, target, shape in (
        ("lora_unet_double_blocks_0_img_attn_norm_query_norm.diff", "transformer_blocks.0.attn.norm_q.weight", (32,)),
        ("lora_unet_double_blocks_0_img_mlp_0.diff_b", "transformer_blocks.0.ff.net.0.proj.bias", (256,)),
        ("diffusion_model.single_blocks.1.modulation.lin.diff_b", "single_transformer_blocks.1.norm.linear.bias", (192,)),
        ("transformer.transformer_blocks.1.attn.to_k.diff_b", "transformer_blocks.1.attn.to_k.bias", (64,)),
        ("transformer.transformer_blocks.1.attn.to_out.0.diff", "transformer_blocks.1.attn.to_out.0.weight", (64, 64)),
        ("transformer.norm_out.linear.diff_b", "norm_out.linear.bias", (128,)),
    ):
        out[name] = random(*shape, std=0.1)
        deltas[target] = out[name].float()
    return out, deltas


def resized(function):
    """A converter of the reference for the tiny model's sizes."""
    source = inspect.getsource(function)
    for real, tiny in (
        ("num_layers = 19", "num_layers = 2"), ("num_single_layers = 38", "num_single_layers = 3"), ("inner_dim = 3072", f"inner_dim = {WIDTH}"),
        ("[3072, 3072, 3072, 12288]", f"[{WIDTH}, {WIDTH}, {WIDTH}, {4 * WIDTH}]"),
    ):  # fmt: skip
        source = source.replace(real, tiny)
    assert "3072" not in source
    scope = dict(vars(conversion))
    exec(source, scope)
    return scope[function.__name__]


def with_prefix(converter):
    """The reference's converter forgets `transformer.` before kohya's layers outside of blocks, which then are skipped."""

    def convert(state_dict):
        return {k if k.startswith(("transformer.", "text_encoder.")) else f"transformer.{k}": v for k, v in converter(state_dict).items()}

    return convert


def load(pipe, tensors, metadata, adapter):
    """From a file in f32: PEFT would compute in bf16 with a file in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: value.float() for name, value in tensors.items()}, Path(folder) / "lora.safetensors", metadata)
        pipe.load_lora_weights(folder, weight_name="lora.safetensors", adapter_name=adapter)


def add(pipe, deltas, scale):
    parameters = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name] += scale * delta


def run(pipe):
    tensors, _ = kontext.record(pipe, CASE)
    return {name: tensors[name].contiguous() for name in ("clip_pooled", "velocity.0")}


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    lora_pipeline._convert_kohya_flux_lora_to_diffusers = with_prefix(resized(conversion._convert_kohya_flux_lora_to_diffusers))
    lora_pipeline._convert_fal_kontext_lora_to_diffusers = resized(conversion._convert_fal_kontext_lora_to_diffusers)
    metadata = {"format": "pt"}
    formats = {
        "diffusers": diffusers_names(), "kohya": kohya(), "kohya_split": kohya_split(), "comfy": comfy(), "fal": fal(), "xlabs": xlabs(),
        "lokr": lokr(), "differences": differences(),
    }  # fmt: skip
    common_tensors, common_metadata = common()
    save_file(common_tensors, OUT / "common.safetensors", common_metadata)
    base = run(kontext.load(torch.float32))
    expected, cases = {f"none.{key}": value for key, value in base.items()}, []
    for name, made in formats.items():
        tensors, deltas = made if isinstance(made, tuple) else (made, None)
        save_file(tensors, OUT / f"{name}.safetensors", metadata)
        pipe = kontext.load(torch.float32)
        if deltas is None:
            load(pipe, tensors, metadata, name)
            load(pipe, common_tensors, common_metadata, "common")
            pipe.set_adapters([name, "common"], [SCALE, COMMON_SCALE])
        else:
            add(pipe, deltas, SCALE)
            load(pipe, common_tensors, common_metadata, "common")
            pipe.set_adapters(["common"], [COMMON_SCALE])
        found = run(pipe)
        expected |= {f"{name}.{key}": value for key, value in found.items()}
        cases.append({"name": name, "loras": [[f"{name}.safetensors", SCALE], ["common.safetensors", COMMON_SCALE]]})
        change = {key: ((value - base[key]).abs().max() / base[key].abs().max()).item() for key, value in found.items()}
        print(f"{name:12s}", ", ".join(f"{key} moves by {value:.2f}" for key, value in change.items()), flush=True)
    save_file(expected, OUT / "expected.safetensors", metadata)
    (OUT / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()

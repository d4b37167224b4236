"""Write the tiny model's weights once more in the other names they are published under, and check the way back.

usage: python single_files.py    (after tiny_model.py)

- tiny-kontext/flux1-kontext-dev.safetensors and ae.safetensors: the root files of the real repository, in Black Forest
  Labs' own key names (fused qkv, `double_blocks`, convolutions in the VAE's attention), bf16.
- comfy/clip_l.safetensors and comfy/t5xxl_fp16.safetensors: the text encoders as ComfyUI users have them, f16.
"""
import environment  # noqa: F401  (first: it sets up torch)

import inspect
import re

import diffusers.loaders.single_file_utils as single_file_utils
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from environment import FIXTURES, TINY


def load_sharded(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def block_count(tensors, prefix):
    return 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith(prefix + "."))


def bfl_transformer(t):
    """Diffusers' names -> Black Forest Labs' names. Every tensor of `t` must be used."""
    out, used = {}, set()

    def move(target, *sources, swap_halves=False):
        for part in ("weight", "bias"):
            keys = [f"{source}.{part}" for source in sources]
            if keys[0] not in t:
                continue
            used.update(keys)
            value = torch.cat([t[key] for key in keys])
            if swap_halves:
                value = torch.cat(value.chunk(2)[::-1])
            out[f"{target}.{part}"] = value.contiguous()

    def move_scale(target, source):
        used.add(source + ".weight")
        out[target + ".scale"] = t[source + ".weight"]

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for target, source in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder")):
        move(f"{target}.in_layer", f"time_text_embed.{source}.linear_1")
        move(f"{target}.out_layer", f"time_text_embed.{source}.linear_2")
    for i in range(block_count(t, "transformer_blocks")):
        s, d = f"transformer_blocks.{i}", f"double_blocks.{i}"
        move(f"{d}.img_mod.lin", f"{s}.norm1.linear")
        move(f"{d}.txt_mod.lin", f"{s}.norm1_context.linear")
        move(f"{d}.img_attn.qkv", *(f"{s}.attn.to_{c}" for c in "qkv"))
        move(f"{d}.txt_attn.qkv", *(f"{s}.attn.add_{c}_proj" for c in "qkv"))
        move(f"{d}.img_attn.proj", f"{s}.attn.to_out.0")
        move(f"{d}.txt_attn.proj", f"{s}.attn.to_add_out")
        for stream, norm in (("img", "norm_"), ("txt", "norm_added_")):
            move_scale(f"{d}.{stream}_attn.norm.query_norm", f"{s}.attn.{norm}q")
            move_scale(f"{d}.{stream}_attn.norm.key_norm", f"{s}.attn.{norm}k")
        for target, source in (("img_mlp", "ff"), ("txt_mlp", "ff_context")):
            move(f"{d}.{target}.0", f"{s}.{source}.net.0.proj")
            move(f"{d}.{target}.2", f"{s}.{source}.net.2")
    for i in range(block_count(t, "single_transformer_blocks")):
        s, d = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        move(f"{d}.modulation.lin", f"{s}.norm.linear")
        move(f"{d}.linear1", *(f"{s}.attn.to_{c}" for c in "qkv"), f"{s}.proj_mlp")
        move(f"{d}.linear2", f"{s}.proj_out")
        move_scale(f"{d}.norm.query_norm", f"{s}.attn.norm_q")
        move_scale(f"{d}.norm.key_norm", f"{s}.attn.norm_k")
    move("final_layer.linear", "proj_out")
    # diffusers keeps (scale, shift), Black Forest Labs (shift, scale)
    move("final_layer.adaLN_modulation.1", "norm_out.linear", swap_halves=True)
    assert used == set(t), set(t) - used
    return out


def bfl_vae(t):
    """Diffusers' names -> Black Forest Labs' names. Their decoder counts its levels from the other end."""
    levels = block_count({k.split("encoder.")[1]: v for k, v in t.items() if k.startswith("encoder.down_blocks")}, "down_blocks")
    rules = [
        (r"conv_norm_out", "norm_out"),
        (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
        (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv"),
        (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample.conv"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    ]
    out = {}
    for key, value in t.items():
        is_attention_matrix = "attentions" in key and value.ndim == 2
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        out[key] = (value[:, :, None, None] if is_attention_matrix else value).contiguous()
    return out


def half(tensors):
    """To f16; the tiny weights were made so that this loses nothing."""
    out = {key: value.half() for key, value in tensors.items()}
    assert all(torch.equal(out[key].float(), value.float()) for key, value in tensors.items())
    return out


def check_transformer(bfl, original):
    """Back through diffusers' own converter, whose source has the real width (3072) written in it."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {original['x_embedder.weight'].shape[0]}"), scope)
    back = scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(bfl))
    assert set(back) == set(original) and all(torch.equal(back[key], original[key]) for key in original)


def check_vae(path):
    single = AutoencoderKL.from_single_file(str(path), config=str(TINY), subfolder="vae", local_files_only=True, torch_dtype=torch.float32)
    folder = AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32).state_dict()
    assert all(torch.equal(value, folder[key]) for key, value in single.state_dict().items())


def main():
    transformer = load_sharded(TINY / "transformer")
    bfl = bfl_transformer(transformer)
    save_file(bfl, TINY / "flux1-kontext-dev.safetensors")
    check_transformer(bfl, transformer)
    save_file(bfl_vae(load_sharded(TINY / "vae")), TINY / "ae.safetensors")
    check_vae(TINY / "ae.safetensors")

    comfy = FIXTURES / "comfy"
    comfy.mkdir(exist_ok=True)
    save_file(half(load_sharded(TINY / "text_encoder")), comfy / "clip_l.safetensors", metadata={"format": "pt"})
    t5 = half(load_sharded(TINY / "text_encoder_2"))
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()  # some of the real files repeat the table under this name
    save_file(t5, comfy / "t5xxl_fp16.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()

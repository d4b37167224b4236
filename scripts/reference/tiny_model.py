"""Make a tiny random FLUX.1 Kontext in the on-disk layout of the real repository: tests/fixtures/tiny-kontext.

usage: python tiny_model.py

Every weight is random, none is left at a trivial value (biases, norm scales), and activations stay near 1: saturation
would hide real differences. Every value is exact in bf16 and in f16, so that the same model in another file or dtype
must give the same output.
"""
import environment  # noqa: F401  (first: it sets up torch)

import json
import shutil

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from environment import TINY
from tiny_tokenizers import make_clip_tokenizer, make_t5_tokenizer

# the real repository's scheduler
SCHEDULER = dict(
    base_image_seq_len=256, base_shift=0.5, invert_sigmas=False, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000,
    shift=3.0, shift_terminal=None, stochastic_sampling=False, time_shift_type="exponential", use_beta_sigmas=False,
    use_dynamic_shifting=True, use_exponential_sigmas=False, use_karras_sigmas=False,
)  # fmt: skip


@torch.no_grad()
def randomize(module, seed):
    """Fills every parameter: matrices scaled by their fan-in, biases around 0, norm scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_vector = p.numel() == max(p.shape)
        if is_vector and name.endswith(".bias"):
            value = 0.1 * noise
        elif is_vector:
            value = 1.0 + 0.2 * noise
        elif "relative_attention_bias" in name or name.endswith(("embedding.weight", "shared.weight", "embed_tokens.weight")):
            value = 0.5 * noise
        else:
            value = noise / p[0].numel() ** 0.5
        p.copy_(value.bfloat16().half().float())
    return module.eval()


def make_pipeline(folder):
    """The pipeline with the real architecture at a small width; the tokenizers are written to `folder` on the way."""
    clip_vocab = make_clip_tokenizer(folder / "tokenizer")
    t5_vocab = make_t5_tokenizer(folder / "tokenizer_2")
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=clip_vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77,
        hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=32,
        # the real config.json has these ids, though they are not the tokenizer's: eos_token_id 2 selects pooling at the largest id
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    ))  # fmt: skip
    t5 = T5EncoderModel(T5Config(
        # the real table is also larger than the tokenizer (32128 rows for 32100 ids)
        vocab_size=(t5_vocab + 63) // 64 * 64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6,
        dropout_rate=0.1, tie_word_embeddings=False, is_encoder_decoder=True, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ))  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 8, 8), layers_per_block=2, act_fn="silu", latent_channels=16, norm_num_groups=2, sample_size=1024,
        scaling_factor=0.3611, shift_factor=0.1159, force_upcast=True, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    for i, module in enumerate((clip, t5, transformer, vae)):
        randomize(module, 100 + i)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae=vae, transformer=transformer,
        text_encoder=clip, tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=t5, tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )  # fmt: skip


def edit_json(path, drop=(), **changes):
    value = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | changes
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def weight_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def save(pipe, folder):
    """Component by component, with the shards (transformer 3, T5 2), the key names and the config fields of the real repository."""
    pipe.to(dtype=torch.bfloat16)
    pipe.save_config(folder)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.vae.save_pretrained(folder / "vae")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
    pipe.text_encoder_2.save_pretrained(folder / "text_encoder_2", max_shard_size=int(weight_bytes(pipe.text_encoder_2) * 0.6))
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size=int(weight_bytes(pipe.transformer) * 0.4))
    # transformers 5 writes CLIP keys without "text_model."; every published repository has the prefix
    clip_file = folder / "text_encoder" / "model.safetensors"
    save_file({"text_model." + k: v for k, v in load_file(clip_file).items()}, clip_file, metadata={"format": "pt"})
    edit_json(folder / "text_encoder" / "config.json", drop=("dtype",), torch_dtype="bfloat16", dropout=0.0, transformers_version="4.43.3")
    edit_json(
        folder / "text_encoder_2" / "config.json", drop=("dtype", "is_decoder", "scale_decoder_outputs"), torch_dtype="bfloat16",
        is_encoder_decoder=True, tie_word_embeddings=False, use_cache=True, output_past=True, transformers_version="4.43.3",
    )  # fmt: skip
    edit_json(folder / "model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])


def main():
    shutil.rmtree(TINY, ignore_errors=True)
    TINY.mkdir(parents=True)
    pipe = make_pipeline(TINY)
    save(pipe, TINY)
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        print(name, sum(p.numel() for p in getattr(pipe, name).parameters()), "parameters")


if __name__ == "__main__":
    main()

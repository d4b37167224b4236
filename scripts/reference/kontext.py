"""Run the reference pipeline on the tiny model and write what it computes: kontext/, kontext_bf16/ and deep.safetensors.

usage: python kontext.py [case ...]     (default: all the cases of cases.py)

The tensors have the names of `retouch --dump`; README.md lists them with their shapes.
"""
import environment  # noqa: F401  (first: it sets up torch)

import itertools
import json
import sys

import diffusers.pipelines.flux.pipeline_flux_kontext as kontext
import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.utils import logging
from safetensors.torch import save_file

import deep
from cases import CASES
from environment import FIXTURES, TINY
from recorder import Recorder
from torch_randn import randn

logging.set_verbosity_error()
# what tests hold a bf16 run of ours to
BF16_TENSORS = ("clip_pooled", "t5_embeds", "velocity.0", "latents", "image")
DEEP_CASE = "min"


def load(dtype):
    pipe = FluxKontextPipeline.from_pretrained(TINY, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    # The image processor hands the VAE a channels-last tensor, the convolutions keep that layout, and torch's
    # channels-last GroupNorm on the CPU is good to 3e-4 only (6e-7 otherwise). Contiguous input: the accurate reference.
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x, *args, **kwargs: encode(x.contiguous(), *args, **kwargs)
    return pipe


def unpack(tokens, width, height):
    """[b, tokens, 64] -> [b, 16, height/8, width/8]"""
    return FluxKontextPipeline._unpack_latents(tokens, height, width, 8)


def generators(seeds):
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


def token_ids(tokenizer, text, length):
    return torch.tensor(tokenizer([text], padding="max_length", max_length=length, truncation=True).input_ids)


def watch_pipeline(pipe, recorder):
    """Records everything between the request and the result that only exists inside the call."""
    keep = recorder.keep

    def embeddings(result, *_):
        prefix = "negative_" if "t5_embeds" in recorder.tensors else ""
        keep(prefix + "t5_embeds", result[0][:1])
        keep(prefix + "clip_pooled", result[1][:1])

    steps = itertools.count()
    recorder.wrap(pipe, "encode_prompt", embeddings)
    recorder.wrap(pipe.image_processor, "resize", lambda result, *_: keep("image_resized_u8", torch.from_numpy(np.array(result))))
    recorder.wrap(pipe, "_encode_vae_image", lambda result, *_: keep("ref_latents", result))
    recorder.wrap(kontext, "randn_tensor", lambda result, *_: keep("noise", result))
    recorder.wrap(pipe.scheduler, "step", lambda _, args, __: keep(f"velocity.{next(steps)}", args[0]))


def run(pipe, case, recorder):
    """One call of the pipeline; returns every tensor of the fixture in the order of the data's way."""
    tensors = {
        "clip_ids": token_ids(pipe.tokenizer, case.prompt, 77),
        "t5_ids": token_ids(pipe.tokenizer_2, case.prompt, case.max_sequence_length),
    }
    if case.negative_prompt is not None:
        tensors["negative_clip_ids"] = token_ids(pipe.tokenizer, case.negative_prompt, 77)
        tensors["negative_t5_ids"] = token_ids(pipe.tokenizer_2, case.negative_prompt, case.max_sequence_length)
    image = case.image() if case.photo else None
    if image:
        tensors["image_in_u8"] = torch.from_numpy(np.array(image))
    watch_pipeline(pipe, recorder)
    recorder.wrap(pipe.scheduler, "step", lambda result, *_: tensors.update(latents=result[0]))  # the last one stays
    recorder.wrap(pipe.image_processor, "postprocess", lambda result, args, _: tensors.update(decoded=args[0]))
    result = pipe(
        image=image, prompt=case.prompt, negative_prompt=case.negative_prompt, true_cfg_scale=case.true_cfg_scale,
        width=case.width, height=case.height, max_area=case.width * case.height, _auto_resize=case.reference_size == "auto",
        num_inference_steps=case.steps, guidance_scale=case.guidance, max_sequence_length=case.max_sequence_length,
        num_images_per_prompt=case.num_images, generator=generators(case.seeds), output_type="np",
    )  # fmt: skip
    assert result.images.shape == (case.num_images, case.height, case.width, 3)
    tensors["sigmas"] = pipe.scheduler.sigmas
    tensors["latents"] = unpack(tensors["latents"], case.width, case.height)
    decoded = tensors.pop("decoded")
    tensors["image"] = (decoded * 0.5 + 0.5).clamp(0, 1)  # as the image processor does it, in the pipeline's dtype
    assert np.array_equal(tensors["image"].float().permute(0, 2, 3, 1).numpy(), result.images)
    tensors["image_u8"] = torch.from_numpy((result.images * 255).round().astype(np.uint8))
    return {**tensors, **recorder.tensors}


def check_noise(noise, seeds):
    """The fixtures' noise must be what our own description of torch.randn gives (its AVX2 form)."""
    parts = noise if len(seeds) > 1 else [noise]
    for part, seed in zip(parts, seeds):
        assert np.array_equal(part.numpy().reshape(-1), randn(part.numel(), seed)), "torch.randn is not in its AVX2 form"


def shrink(tensors, case):
    """Drops what no test needs, and all but a sample of what is large."""
    if case.only_result:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("velocity.")}
    if case.reference_size == "auto":  # a reference of a megapixel
        tensors["ref_latents_sub8"] = tensors.pop("ref_latents")[:, :, ::8, ::8]
        tensors["image_resized_u8_sub8"] = tensors.pop("image_resized_u8")[::8, ::8]
    return {k: v.contiguous() for k, v in tensors.items()}


def describe(name, case, tensors):
    """The entry of cases.json."""
    rows = tensors.get("image_resized_u8")
    return {
        "name": name, "prompt": case.prompt, "negative_prompt": case.negative_prompt, "true_cfg_scale": case.true_cfg_scale,
        "seeds": case.seeds, "num_images": case.num_images, "width": case.width, "height": case.height, "steps": case.steps,
        "guidance": case.guidance, "max_sequence_length": case.max_sequence_length,
        "reference": case.reference_size if case.photo else "none",
        "reference_width": None if rows is None else rows.shape[1], "reference_height": None if rows is None else rows.shape[0],
        "bf16": case.bf16,
    }  # fmt: skip


def record(pipe, name, watch_deep=False):
    """Runs one case; returns its tensors and, if asked, the intermediates of every block."""
    with Recorder() as recorder, Recorder() as inside:
        if watch_deep:
            deep.watch(pipe, inside)
        return run(pipe, CASES[name], recorder), inside.tensors


def main(names):
    out, out_bf16 = FIXTURES / "kontext", FIXTURES / "kontext_bf16"
    out.mkdir(exist_ok=True)
    out_bf16.mkdir(exist_ok=True)
    index_file = out / "cases.json"
    index = {entry["name"]: entry for entry in json.loads(index_file.read_text())} if index_file.exists() else {}
    pipe = load(torch.float32)
    for name in names:
        case = CASES[name]
        tensors, inside = record(pipe, name, watch_deep=name == DEEP_CASE)
        check_noise(tensors["noise"], case.seeds)
        index[name] = describe(name, case, tensors)
        save_file(shrink(tensors, case), out / f"{name}.safetensors")
        if inside:
            save_file(inside, FIXTURES / "deep.safetensors")
        image, latents = tensors["image"], tensors["latents"]
        unclamped = ((image > 0) & (image < 1)).float().mean()
        print(f"{name:22s} std of latents {latents.std():.3f}, of image {image.std():.3f}, {unclamped:.0%} of it unclamped", flush=True)
    index_file.write_text(json.dumps([index[name] for name in CASES if name in index], indent=1, ensure_ascii=False) + "\n")

    pipe = load(torch.bfloat16)
    for name in names:
        if CASES[name].bf16:
            tensors, _ = record(pipe, name)
            save_file({k: tensors[k] for k in BF16_TENSORS}, out_bf16 / f"{name}.safetensors")
            print(f"{name:22s} bf16", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))

"""Write the trained parts as a diffusers directory (bfloat16), with retouch.json and the model card.

usage: python export.py --text DIR --vae DIR/vae.pt --dit DIR/dit.pt --out models/nano-kontext [--steps 6] [--card CARD.md]
The directory loads with diffusers' FluxKontextPipeline.from_pretrained.
"""
import argparse
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

import dit
import text as text_module
import vae
from tokenizers_nano import MAX_T5


def edit_json(path, drop=(), **kw):
    with open(path) as f:
        j = json.load(f)
    j.update(kw)
    for k in ("_name_or_path", *drop):
        j.pop(k, None)
    with open(path, "w") as f:
        json.dump(j, f, indent=2, sort_keys=True)
        f.write("\n")


def quiet():
    import diffusers
    import transformers
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def export(text_dir, vae_path, dit_path, out, steps, guidance):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
    from transformers import CLIPTokenizer, T5TokenizerFast
    quiet()
    os.makedirs(out, exist_ok=True)
    for t in ("tokenizer", "tokenizer_2"):
        shutil.copytree(f"{text_dir}/{t}", f"{out}/{t}", dirs_exist_ok=True)
    te = text_module.load(text_dir)
    enc, dec, scaling, zero = vae.load(vae_path)
    # The pipeline computes (z - shift_factor) * scaling_factor, as training did.
    v = vae.to_diffusers(enc, dec, scaling, zero)
    m = dit.new_dit()
    m.load_state_dict(torch.load(dit_path, map_location="cpu", weights_only=False)["ema"])
    pipe = FluxKontextPipeline(scheduler=FlowMatchEulerDiscreteScheduler(**dit.SCHEDULER), vae=v, text_encoder=te.clip, text_encoder_2=te.t5,
                               tokenizer=CLIPTokenizer.from_pretrained(f"{out}/tokenizer"), tokenizer_2=T5TokenizerFast.from_pretrained(f"{out}/tokenizer_2"),
                               transformer=m, image_encoder=None, feature_extractor=None)
    for n in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        for p in getattr(pipe, n).parameters():
            p.data = p.data.to(torch.bfloat16)
    pipe.save_config(out)
    pipe.scheduler.save_pretrained(f"{out}/scheduler")
    for n in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        getattr(pipe, n).save_pretrained(f"{out}/{n}", safe_serialization=True)
    # transformers 5 drops the prefix that every published repository has.
    f = f"{out}/text_encoder/model.safetensors"
    save_file({k if k.startswith("text_model.") else "text_model." + k: t for k, t in load_file(f).items()}, f, metadata={"format": "pt"})
    edit_json(f"{out}/text_encoder/config.json", drop=("dtype",), torch_dtype="bfloat16", dropout=0.0, transformers_version="4.43.3")
    edit_json(f"{out}/text_encoder_2/config.json", drop=("dtype", "is_decoder", "scale_decoder_outputs"), torch_dtype="bfloat16",
              is_encoder_decoder=True, tie_word_embeddings=False, use_cache=True, output_past=True, transformers_version="4.43.3")
    for n in ("vae", "transformer"):
        edit_json(f"{out}/{n}/config.json")
    edit_json(f"{out}/scheduler/scheduler_config.json")
    edit_json(f"{out}/model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])
    with open(f"{out}/retouch.json", "w") as f:
        json.dump({"name": "nano-kontext", "license": "MIT OR Apache-2.0", "steps": steps, "guidance": guidance, "max_sequence_length": MAX_T5,
                   "sizes": {"keep_up_to_area": 262144}}, f, indent=2)
        f.write("\n")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--text", required=True), a.add_argument("--vae", required=True), a.add_argument("--dit", required=True), a.add_argument("--out", required=True)
    a.add_argument("--steps", type=int, default=4)
    a.add_argument("--guidance", type=float, default=2.5)
    a.add_argument("--card", help="a Markdown file to copy as README.md")
    a = a.parse_args()
    export(a.text, a.vae, a.dit, a.out, a.steps, a.guidance)
    if a.card:
        shutil.copy(a.card, f"{a.out}/README.md")
    total = 0
    for d, _, fs in sorted(os.walk(a.out)):
        for f in sorted(fs):
            n = os.path.getsize(os.path.join(d, f))
            total += n
            print(f"{os.path.relpath(os.path.join(d, f), a.out):60s} {n}")
    print(f"total {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

"""Turn an exported model back into what the training scripts read (no optimizer state).

usage: python restore.py MODEL_DIR --out DIR        # writes DIR/text, DIR/vae/vae.pt, DIR/dit/dit.pt
"""
import argparse
import json
import os
import shutil

import torch
from safetensors.torch import load_file

import text as text_module
import vae


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("model"), a.add_argument("--out", required=True)
    a = a.parse_args()
    for d in ("text", "vae", "dit"):
        os.makedirs(f"{a.out}/{d}", exist_ok=True)
    for t in ("tokenizer", "tokenizer_2"):
        shutil.copytree(f"{a.model}/{t}", f"{a.out}/text/{t}", dirs_exist_ok=True)
    read = lambda f: {k: v.float() for k, v in load_file(f"{a.model}/{f}").items()}

    e = text_module.Encoders(f"{a.out}/text")
    clip, mine = read("text_encoder/model.safetensors"), e.clip.state_dict()
    e.clip.load_state_dict({k: clip[k if k in clip else "text_model." + k] for k in mine})
    t5 = read("text_encoder_2/model.safetensors")
    e.t5.load_state_dict({k: t5[k if k in t5 else "shared.weight"] for k in e.t5.state_dict()})
    torch.save(e.state_dict(), f"{a.out}/text/text.pt")

    v = read("vae/diffusion_pytorch_model.safetensors")
    with open(f"{a.model}/vae/config.json") as f:
        conf = json.load(f)
    enc = vae.from_diffusers({k[8:]: t for k, t in v.items() if k.startswith("encoder.")})
    dec = {k[8:]: t for k, t in v.items() if k.startswith("decoder.")}
    torch.save(dict(enc=enc.state_dict(), dec=dec, ema=dec, step=0, scaling=conf["scaling_factor"], shift=conf["shift_factor"]), f"{a.out}/vae/vae.pt")

    m = read("transformer/diffusion_pytorch_model.safetensors")
    torch.save(dict(model=m, ema=m, step=0, seen=0), f"{a.out}/dit/dit.pt")
    print("restored to", a.out)


if __name__ == "__main__":
    main()

"""Are the names and shapes of shapes.py those of the reference's own modules?

usage: python scripts/comparison/shapes_check.py       (needs diffusers and transformers, and no memory for the weights)
"""
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from comparison import random_model, shapes

MODULES = {
    "transformer": FluxTransformer2DModel.from_config, "vae": AutoencoderKL.from_config,
    "text_encoder": lambda c: CLIPTextModel(CLIPTextConfig(**c)), "text_encoder_2": lambda c: T5EncoderModel(T5Config(**c)),
}  # fmt: skip


def expected(part, config):
    with torch.device("meta"):
        module = MODULES[part](config)
    found = {name: tuple(p.shape) for name, p in module.named_parameters()}   # shared ones once
    if part == "text_encoder":
        # published files have the prefix, which transformers 5 leaves out
        found = {name if name.startswith("text_model.") else "text_model." + name: shape for name, shape in found.items()}
    return found


def main():
    tiny = {part: json.loads((random_model.TINY / part / "config.json").read_text()) for part in MODULES}
    models = {"the tiny model": tiny}
    for depth in ((0, 1, 1), (1, 0, 1), (3, 6, 2), (19, 38, 24)):
        models["{} + {} blocks, {} layers of T5".format(*depth)] = random_model.configs(*depth)
    models["no guidance"] = {"transformer": tiny["transformer"] | {"guidance_embeds": False}}
    for model, configs in models.items():
        for part, config in configs.items():
            found, wanted = shapes.PARTS[part](config), expected(part, config)
            if found != wanted:
                differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
                sys.exit(f"{model}, {part}: {len(differ)} tensors differ, such as {differ[0]}: {found.get(differ[0])}, not {wanted.get(differ[0])}")
            print(f"{model}, {part}: {len(found)} tensors as in the reference")


if __name__ == "__main__":
    main()

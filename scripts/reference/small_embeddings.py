"""small/embeddings.safetensors: the sinusoid of timestep and guidance, and the rotary tables, of the reference modules.

- `timesteps` [n], `sinusoid` [n, 256]: cos | sin, arguments in f32.
- `rotary.ids` [n, 3] (i64), `rotary.cos`, `rotary.sin` [n, 128]: the real axes (16, 56, 56); each value stands twice, for
  the two members of its pair. `rotary_tiny.cos` and `.sin` [n, 32]: the same ids with the tiny model's axes (8, 12, 12).
"""
import environment  # noqa: F401  (first: it sets up torch)

import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from safetensors.torch import save_file

from environment import FIXTURES


def positions():
    """Text (all zero), a small grid of the output and of the reference, and single far positions up to 300."""
    ids = [(0, 0, 0)]
    ids += [(kind, row, column) for kind in (0, 1) for row in range(2) for column in range(3)]
    ids += [(0, row, 0) for row in (7, 63, 64, 128, 255, 256, 257, 300)]
    ids += [(1, 0, column) for column in (7, 63, 64, 128, 255, 256, 257, 300)]
    ids += [(1, 97, 41), (1, 41, 97), (2, 300, 299), (3, 1, 300)]
    return torch.tensor(ids)


def main():
    timesteps = torch.tensor([0.0, 1.0, 35.7142868, 500.0, 612.0, 612.869995, 999.5, 1000.0, 1500.0, 2496.0, 2500.0, 3500.0, 10000.0])
    ids = positions()
    sinusoid = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(timesteps)
    tensors = {"timesteps": timesteps, "sinusoid": sinusoid, "rotary.ids": ids}
    for name, axes in (("rotary", (16, 56, 56)), ("rotary_tiny", (8, 12, 12))):
        tensors[name + ".cos"], tensors[name + ".sin"] = FluxPosEmbed(theta=10000, axes_dim=axes)(ids.float())
    save_file({k: v.contiguous() for k, v in tensors.items()}, FIXTURES / "small" / "embeddings.safetensors")


if __name__ == "__main__":
    main()

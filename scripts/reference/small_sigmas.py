"""small/sigmas.json: the noise schedule, by steps and by OUTPUT tokens (the reference image's tokens do not count).

Each entry: steps, tokens, mu (f64) and the sigmas, final 0 included, as the hex bits of f32.
"""
import environment  # noqa: F401  (first: it sets up torch)

import json

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

from environment import FIXTURES, TINY

STEPS = [1, 2, 3, 4, 8, 20, 28, 50]
# 48x64, 64x64, 256x256, 512x512, 672x1568, 944x1104, 1024x1024, 1440x1440
TOKENS = [12, 16, 256, 1024, 4116, 4071, 4096, 8100]


def main():
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "scheduler")
    config = scheduler.config
    rows = []
    for steps in STEPS:
        for tokens in TOKENS:
            mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # as the pipeline does
            bits = scheduler.sigmas.numpy().view(np.uint32)
            assert len(bits) == steps + 1 and bits[-1] == 0
            rows.append(json.dumps({"steps": steps, "tokens": tokens, "mu": mu, "sigmas": [f"{b:08x}" for b in bits]}))
    (FIXTURES / "small" / "sigmas.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()

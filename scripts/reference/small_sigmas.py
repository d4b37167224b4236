"""small/sigmas.json: the noise schedule, by steps and by OUTPUT tokens (the reference image's tokens do not count).

Each entry: steps, tokens, mu (f64) and the sigmas, final 0 included, as the hex bits of f32.

small/sigmas_by_config.json: the same with other scheduler configurations, which leave out what is not said.
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


# With a constant shift, which the number of tokens does not change, and with the default dynamic one.
CONFIGS = [{}, {"shift": 3.0}, {"shift": 1.15}, {"shift": 0.3}, {"use_dynamic_shifting": True}]


def sigmas(scheduler, steps, mu):
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # as the pipeline does
    bits = scheduler.sigmas.numpy().view(np.uint32)
    assert len(bits) == steps + 1 and bits[-1] == 0
    return [f"{b:08x}" for b in bits]


def flux_mu(config, tokens):
    return calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)


def write(name, rows):
    (FIXTURES / "small" / name).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def main():
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "scheduler")
    rows = []
    for steps in STEPS:
        for tokens in TOKENS:
            mu = flux_mu(scheduler.config, tokens)
            rows.append({"steps": steps, "tokens": tokens, "mu": mu, "sigmas": sigmas(scheduler, steps, mu)})
    write("sigmas.json", rows)

    rows = []
    for config in CONFIGS:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        for steps in STEPS:
            mu = flux_mu(scheduler.config, 1024)
            rows.append({"config": config, "steps": steps, "tokens": 1024, "sigmas": sigmas(scheduler, steps, mu)})
    write("sigmas_by_config.json", rows)


if __name__ == "__main__":
    main()

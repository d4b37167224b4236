"""small/buckets.json: the reference size that is chosen for a photo, [width, height], by three rules.

- `diffusers`: the photo's sides are floored to multiples of 16, then the preferred size of the nearest aspect is taken.
- `bfl`: Black Forest Labs' own code takes the aspect of the photo as it is. Mostly the same, sometimes not.
- `keep`: no preferred size, only the floor to multiples of 16.
null: the rule fails (a side below 16 floors to 0).
"""
import environment  # noqa: F401  (first: it sets up torch)

import json

import PIL.Image
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

from environment import FIXTURES

SIZES = [
    (1024, 1024), (512, 512), (1000, 1000), (640, 480), (480, 640), (1920, 1080), (1080, 1920), (4032, 3024), (3024, 4032), (301, 203),
    (203, 301), (109, 77), (75, 50), (451, 300), (600, 400), (400, 600), (1568, 672), (672, 1568), (3000, 100), (100, 3000), (16, 16),
    (17, 17), (31, 33), (33, 31), (47, 32), (15, 64), (64, 15), (10, 10), (1, 1), (1360, 768), (768, 1360), (1344, 768), (850, 1100),
    (2048, 1152), (1284, 2778), (800, 1328), (801, 1327), (1023, 1025), (1025, 1023), (1039, 1024), (1040, 1024),
]  # fmt: skip


def nearest(aspect):
    """Ties go to the smaller width."""
    return list(min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)[1:])


def disagreements(count):
    """Ordinary photo sizes for which the two rules choose differently."""
    found = []
    for width in range(200, 700, 7):
        for height in range(200, 700, 11):
            if nearest(width / height) != nearest((width // 16) / (height // 16)):
                found.append((width, height))
    return found[:: max(1, len(found) // count)][:count]


def main():
    processor = VaeImageProcessor(vae_scale_factor=16)
    rows = []
    for width, height in SIZES + disagreements(12):
        floored_height, floored_width = processor.get_default_height_width(PIL.Image.new("RGB", (width, height)))
        assert (floored_width, floored_height) == (width // 16 * 16, height // 16 * 16)
        usable = floored_width and floored_height
        rows.append(json.dumps({
            "width": width, "height": height, "diffusers": nearest(floored_width / floored_height) if usable else None,
            "bfl": nearest(width / height), "keep": [floored_width, floored_height] if usable else None,
        }))  # fmt: skip
    (FIXTURES / "small" / "buckets.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()

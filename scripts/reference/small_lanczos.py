"""small/lanczos.safetensors: Pillow's LANCZOS resize of small RGB images, `NAME.in` -> `NAME.out`, u8 [height, width, 3].

The sizes are those of the tensors. Half of the inputs are photographs, half are noise of extreme values, which makes
the filter overshoot and clamp.
"""
import environment  # noqa: F401  (first: it sets up torch)

import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file

from environment import FIXTURES
from photos import photo

# name -> input (width, height), output (width, height)
SIZES = {
    "up": ((23, 17), (48, 32)),
    "up_by_a_whole_number": ((12, 9), (48, 36)),
    "down": ((64, 48), (16, 16)),
    "down_by_a_whole_number": ((64, 32), (16, 8)),
    "down_slightly": ((50, 37), (48, 32)),
    "wide_to_tall": ((60, 20), (16, 48)),
    "width_only": ((37, 16), (16, 16)),
    "height_only": ((16, 29), (16, 48)),
    "same_size": ((16, 16), (16, 16)),
    "from_one_pixel": ((1, 1), (16, 16)),
    "from_one_column": ((1, 21), (16, 16)),
    "to_one_pixel": ((33, 17), (1, 1)),
    "strong_down": ((160, 40), (16, 16)),
}


def main():
    random = np.random.default_rng(1)
    tensors = {}
    for name, (size_in, size_out) in SIZES.items():
        noise = random.choice(np.array([0, 0, 255, 255, 1, 254, 128], np.uint8), (size_in[1], size_in[0], 3))
        for kind, image in (("photo", photo("chelsea", size_in)), ("noise", PIL.Image.fromarray(noise))):
            out = image.resize(size_out, PIL.Image.Resampling.LANCZOS)
            tensors[f"{name}.{kind}.in"] = torch.from_numpy(np.array(image))
            tensors[f"{name}.{kind}.out"] = torch.from_numpy(np.array(out))
    save_file(tensors, FIXTURES / "small" / "lanczos.safetensors")


if __name__ == "__main__":
    main()

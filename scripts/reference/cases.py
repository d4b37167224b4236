"""The pipeline calls whose results are the fixtures. One entry, one behaviour."""
import functools
from dataclasses import dataclass, field

from corpus import CORPUS
from photos import photo


@dataclass
class Case:
    prompt: str
    width: int
    height: int
    photo: tuple | None = None  # arguments of photos.photo; None: text to image
    reference_size: str = "keep"  # "keep": the photo's own size floored to multiples of 16; "auto": diffusers' preferred size
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    seeds: list = field(default_factory=lambda: [0])  # one: a single generator draws the whole batch; more: one per image
    num_images: int = 1
    steps: int = 2
    guidance: float = 2.5
    max_sequence_length: int = 64
    only_result: bool = False  # leave the velocities out
    bf16: bool = False  # also run in bf16

    def image(self):
        name, size, *crop = self.photo
        return photo(name, size, *crop)


HAT = "Make the astronaut wear a red hat"
LONG = " ".join(CORPUS.split())

CASES = {
    "min": Case(HAT, 48, 64, ("astronaut", (64, 48)), max_sequence_length=20),
    "square": Case(HAT, 64, 64, ("astronaut", (64, 64)), seeds=[42], max_sequence_length=512, bf16=True),
    "wide": Case(
        "Replace the cat with a small brown dog", 112, 64, ("chelsea", (112, 64)), seeds=[2**40 + 7], steps=4, guidance=3.5
    ),
    "other_aspect": Case('Add a wooden sign that says "Open"', 80, 48, ("coffee", (48, 80)), seeds=[2**63 - 1]),
    "two_images_one_seed": Case("Make it night time", 48, 32, ("coffee", (48, 32)), seeds=[5], num_images=2),
    "two_images_two_seeds": Case("Make it night time", 48, 32, ("coffee", (48, 32)), seeds=[7, 8], num_images=2),
    "true_cfg": Case(
        "Make it night time", 64, 48, ("coffee", (64, 64)), seeds=[3], steps=3,
        negative_prompt="low quality, blurry", true_cfg_scale=2.0, bf16=True,
    ),
    "no_image": Case("A painting of a heron in the rain", 64, 48, seeds=[1], steps=4, guidance=3.5, bf16=True),
    # 1000 and 1000*2.56 are the same in bf16, and one step has no other timestep: bf16 differs from f32 by arithmetic alone
    "one_step": Case(HAT, 48, 48, ("astronaut", (48, 48)), seeds=[15], steps=1, guidance=2.56, bf16=True),
    # 133 CLIP ids, cut to 77; 178 of T5, cut to 128
    "long_prompt": Case(" ".join(LONG.split()[:80]), 48, 32, ("astronaut", (48, 32)), seeds=[9], max_sequence_length=128),
    # 719 CLIP ids; 991 of T5, cut to 512
    "very_long_prompt": Case(LONG, 48, 32, ("astronaut", (48, 32)), seeds=[10], max_sequence_length=512),
    "empty_prompt": Case("", 48, 32, ("astronaut", (48, 32)), seeds=[11]),
    "unicode_prompt": Case(
        "Un café crème à côté du 猫, s'il vous plaît 🙂 ｆｕｌｌ ﬁn e\u0301", 32, 48, ("chelsea", (32, 48)), seeds=[12]
    ),
    "auto_reference": Case("Turn this photo into a watercolor painting", 48, 48, ("chelsea", (75, 50)), "auto", seeds=[13]),
    "odd_photo": Case("Convert the picture to a pencil sketch", 64, 48, ("chelsea", None, (60, 40, 169, 117)), seeds=[14]),
    "steps_28": Case(HAT, 48, 48, ("astronaut", (48, 48)), seeds=[42], steps=28, only_result=True),
}

"""The example scene and the README's picture of its edits, made by the real program.

usage: python example.py ../../target/release/retouch
writes tests/fixtures/images/scene.png and models/nano-kontext/example.png
"""
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import scenes

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCENE = ROOT / "tests/fixtures/images/scene.png"
PHOTO = ROOT / "tests/fixtures/images/coffee.jpg"
EDITS = [(SCENE, "make the circle blue"), (SCENE, "get rid of the square"), (SCENE, "make the background yellow"), (PHOTO, "invert the colours")]
SIDE, GAP, TEXT = 192, 8, 22


def thing(shape, colour, x, y, r):
    return scenes.Obj(scenes.SHAPES.index(shape), scenes.COLOURS.index(colour), scenes.PALETTE[colour], x, y, r)


def scene():
    cyan, white = (scenes.PALETTE[name] for name in ("cyan", "white"))
    objects = [thing("circle", "red", 40, 44, 22), thing("square", "orange", 90, 84, 20)]
    return scenes.Scene(128, 128, "vertical", (scenes.COLOURS.index("cyan"), scenes.COLOURS.index("white")), (cyan, white), objects)


def main():
    binary = pathlib.Path(sys.argv[1]).resolve()
    pixels = np.clip(np.round(scenes.render(scene())), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(SCENE)
    sheet = Image.new("RGB", ((SIDE + GAP) * len(EDITS) - GAP, 2 * SIDE + GAP + TEXT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    with tempfile.TemporaryDirectory() as folder:
        for column, (source, prompt) in enumerate(EDITS):
            result = pathlib.Path(folder) / f"{column}.png"
            subprocess.run([binary, "edit", source, prompt, "-o", result, "--seed", "1", "-q"], check=True, stdout=subprocess.DEVNULL)
            x = column * (SIDE + GAP)
            for row, file in enumerate((source, result)):
                picture = Image.open(file).convert("RGB")
                # Both rows show the same square of the picture.
                side = min(picture.size)
                picture = picture.crop((0, 0, side, side)).resize((SIDE, SIDE), Image.Resampling.NEAREST if source == SCENE else Image.Resampling.LANCZOS)
                sheet.paste(picture, (x, row * (SIDE + TEXT + GAP // 2)))
            draw.text((x + SIDE // 2, SIDE + TEXT // 2), prompt, fill="black", font=font, anchor="mm")
    sheet.save(ROOT / "models/nano-kontext/example.png", optimize=True)


if __name__ == "__main__":
    main()

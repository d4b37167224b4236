"""images/: pictures in many encodings, some of them broken, and expected.json; plus the example photographs.

usage: python images.py

expected.json has two lists. `valid`: file, upright width and height, and a few points [x, y, r, g, b] of the upright
RGB picture, alpha composited over white, each channel within `tolerance`. `may_refuse` marks what a program may decline
instead, clearly. `invalid`: file and what is wrong with it.
"""
import environment  # noqa: F401  (first: it sets up torch)

import io
import json
import struct
import zlib

import numpy as np
import PIL.Image
from PIL import ImageOps
from PIL.Image import Transpose

from environment import FIXTURES
from photos import photo

OUT = FIXTURES / "images"
BLOCK = 8  # a JPEG block: flat colours survive it
COLOURS = [[(220, 30, 40), (30, 170, 60), (40, 60, 200)], [(240, 200, 40), (120, 40, 150), (20, 20, 20)]]
ALPHA = [[255, 128, 0], [64, 200, 1]]
# orientation -> how the upright picture is stored under it
STORED = {
    1: None, 2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_270,
}  # fmt: skip


def blocks(values, dtype=np.uint8):
    """A grid of values, each repeated to a block."""
    return np.array(values, dtype).repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bit_depth, colour_type, rows):
    """A PNG from raw rows, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def without_adobe_marker(jpeg):
    """Drops the APP14 segment, which says that the file follows Adobe's conventions."""
    at = jpeg.index(b"\xff\xee")
    assert jpeg[at + 4 : at + 9] == b"Adobe"
    return jpeg[:at] + jpeg[at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0] :]


class Expected:
    """Writes the files and collects expected.json."""

    def __init__(self):
        self.valid, self.invalid = [], []

    def add(self, name, content, rgb, tolerance=0, alpha=None, **notes):
        """`content`: bytes, or a PIL image with save options in `notes["save"]`; `rgb`: the picture [h, w, 3] before compositing."""
        options = notes.pop("save", {})
        if isinstance(content, bytes):
            (OUT / name).write_bytes(content)
        else:
            content.save(OUT / name, **options)
        rgb = rgb.astype(float)
        if alpha is not None:
            a = alpha.astype(float)[..., None] / 255
            rgb = rgb * a + 255 * (1 - a)
        height, width, _ = rgb.shape
        step = min(BLOCK, width)
        spots = [(x, y) for y in range(step // 2, height, step) for x in range(step // 2, width, step)]
        points = [[x, y, *(int(v) for v in np.rint(rgb[y, x]))] for x, y in spots]
        self.valid.append({"file": name, "width": width, "height": height, "tolerance": tolerance, **notes, "points": points})

    def bad(self, name, content, reason):
        (OUT / name).write_bytes(content)
        self.invalid.append({"file": name, "reason": reason})

    def write(self):
        lists = {"valid": self.valid, "invalid": self.invalid}
        text = ",\n".join(f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in lists.items())
        (OUT / "expected.json").write_text("{\n" + text + "\n}\n")


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gray(values):
    return np.stack([values] * 3, axis=-1)


def add_png_variants(expected, rgb, alpha):
    picture = PIL.Image.fromarray(rgb)
    luma = blocks([[10, 90, 250], [180, 128, 60]])
    height, width, _ = rgb.shape
    expected.add("rgb.png", picture, rgb)
    rgba = picture.copy()
    rgba.putalpha(PIL.Image.fromarray(alpha))
    expected.add("rgba_soft_alpha.png", rgba, rgb, tolerance=1, alpha=alpha)
    expected.add("gray.png", PIL.Image.fromarray(luma), gray(luma))
    expected.add("gray_alpha.png", PIL.Image.fromarray(np.stack([luma, alpha], axis=-1), "LA"), gray(luma), tolerance=1, alpha=alpha)
    deep = blocks([[2570, 23333, 64250], [46260, 33000, 15420]], np.dtype(">u2"))
    expected.add("gray16.png", png(width, height, 16, 0, [row.tobytes() for row in deep]), gray(deep / 257), tolerance=1)
    deep = (rgb.astype(np.uint16) * 257 + 100).astype(">u2")
    expected.add("rgb16.png", png(width, height, 16, 2, [row.tobytes() for row in deep]), deep / 257, tolerance=1)
    indexed = PIL.Image.fromarray(blocks([[0, 1, 2], [3, 4, 5]]), "P")
    indexed.putpalette([channel for row in COLOURS for colour in row for channel in colour])
    transparency = bytes(a for row in ALPHA for a in row)
    expected.add("palette_transparent.png", indexed, rgb, tolerance=1, alpha=alpha, save={"transparency": transparency})
    black_white = blocks([[0, 255, 0], [255, 0, 0]])
    expected.add("one_bit.png", PIL.Image.fromarray(black_white).convert("1"), gray(black_white))
    one = np.array([[[12, 200, 99]]], np.uint8)
    expected.add("one_pixel.png", PIL.Image.fromarray(one), one)


def add_jpeg_variants(expected, rgb):
    picture = PIL.Image.fromarray(rgb)
    fine = {"quality": 95, "subsampling": 0}
    expected.add("rgb.jpg", picture, rgb, tolerance=4, save=fine)
    expected.add("progressive.jpg", picture, rgb, tolerance=4, save=fine | {"progressive": True})
    luma = blocks([[10, 90, 250], [180, 128, 60]])
    expected.add("gray.jpg", PIL.Image.fromarray(luma), gray(luma), tolerance=4, save={"quality": 95})
    # inks: 255 = full. Adobe stores them inverted, and Pillow and browsers read every CMYK JPEG that way, marked or not
    inks = blocks([[(0, 200, 180, 30), (180, 0, 200, 20), (200, 150, 0, 10)], [(0, 30, 200, 5), (100, 200, 0, 60), (0, 0, 0, 235)]])
    from_inks = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    cmyk = encoded(PIL.Image.fromarray(inks, "CMYK"), "JPEG", **fine)
    expected.add("cmyk_adobe.jpg", cmyk, from_inks, tolerance=6, may_refuse=True)
    expected.add("cmyk_plain.jpg", without_adobe_marker(cmyk), from_inks, tolerance=6, may_refuse=True)
    for orientation, transpose in STORED.items():
        stored = picture.transpose(transpose) if transpose is not None else picture
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        name = f"exif_{orientation}.jpg"
        expected.add(name, encoded(stored, "JPEG", exif=exif, **fine), rgb, tolerance=4)
        upright = np.asarray(ImageOps.exif_transpose(PIL.Image.open(OUT / name)), int)
        assert upright.shape == rgb.shape and np.abs(upright - rgb).max() <= 4, name


def add_other_formats(expected, rgb, alpha):
    picture = PIL.Image.fromarray(rgb)
    rgba = picture.copy()
    rgba.putalpha(PIL.Image.fromarray(alpha))
    expected.add("lossless.webp", picture, rgb, save={"lossless": True})
    expected.add("lossy.webp", picture, rgb, tolerance=8, save={"quality": 95})
    # `exact`: else the colours under alpha 0 may change, which compositing hides anyway
    expected.add("alpha.webp", rgba, rgb, tolerance=1, alpha=alpha, save={"lossless": True, "exact": True})
    expected.add("rgb.gif", picture, rgb)
    expected.add("rgb.bmp", picture, rgb)
    expected.add("rgb.tiff", picture, rgb)


def add_broken(expected):
    large = photo("chelsea", (96, 64))
    whole_png, whole_jpeg = encoded(large, "PNG"), encoded(large, "JPEG", quality=90)
    expected.bad("truncated.png", whole_png[: len(whole_png) // 2], "the second half of the file is missing")
    expected.bad("truncated.jpg", whole_jpeg[: len(whole_jpeg) // 2], "the second half of the file is missing")
    expected.bad("header_only.jpg", whole_jpeg[:20], "only the first 20 bytes of the file")
    huge = png(50000, 50000, 8, 2, [b"\0" * 64])
    expected.bad("huge_header.png", huge, "the header promises 50000x50000 pixels (7.5 GB), the file has almost none")
    expected.bad("text.png", b"This is a text file.\n", "a text file with the name of a picture")
    expected.bad("empty.png", b"", "an empty file")


def write_photos():
    for name, size in (("astronaut", (512, 512)), ("chelsea", (451, 300)), ("coffee", (512, 341))):
        photo(name, size).save(OUT / f"{name}.jpg", quality=88, optimize=True)


def check(expected):
    """Pillow must read every valid file as expected.json says, and fail on every invalid one."""
    for row in expected.valid:
        image = ImageOps.exif_transpose(PIL.Image.open(OUT / row["file"]))
        if image.mode.startswith("I"):  # 16-bit gray: Pillow does not scale it
            image = PIL.Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, "white"), rgba)
        pixels = np.asarray(image.convert("RGB"), int)
        assert pixels.shape == (row["height"], row["width"], 3), row["file"]
        worst = max(np.abs(pixels[y, x] - rgb).max() for x, y, *rgb in row["points"])
        assert worst <= row["tolerance"], (row["file"], worst)
    for row in expected.invalid:
        try:
            PIL.Image.open(OUT / row["file"]).load()
        except (OSError, PIL.Image.DecompressionBombError):
            continue
        raise AssertionError(row["file"] + " can be read")


def main():
    OUT.mkdir(exist_ok=True)
    rgb, alpha = blocks(COLOURS), blocks(ALPHA)
    expected = Expected()
    add_png_variants(expected, rgb, alpha)
    add_jpeg_variants(expected, rgb)
    add_other_formats(expected, rgb, alpha)
    add_broken(expected)
    expected.write()
    check(expected)
    write_photos()


if __name__ == "__main__":
    main()

"""Photo-like pictures: bundled public-domain photographs (some held out) and procedural textures.

The photographs are those which scikit-image ships and marks as public domain or CC0. `astronaut` and `chelsea` are
never used in training: they are the test. Everything is varied strongly (crop, scale, flip, gain, tint, inversion),
because the results of global edits must decode well too.

usage: python photos.py OUT.png [--seed N]     # a contact sheet
"""
import argparse
import functools

import numpy as np
from PIL import Image

TRAIN = ["coffee", "rocket", "hubble_deep_field", "retina", "camera", "brick", "grass", "gravel"]
HELD_OUT = ["astronaut", "chelsea"]


@functools.lru_cache(None)
def load(name):
    """A bundled photograph as an RGB image, at most 640 pixels on its long side."""
    import os
    import skimage
    root = os.path.join(os.path.dirname(skimage.__file__), "data")
    path = next(p for e in ("png", "jpg") if os.path.exists(p := os.path.join(root, f"{name}.{e}")))
    im = Image.open(path).convert("RGB")
    im.thumbnail((640, 640), Image.Resampling.LANCZOS)
    return im


def crop(rng, im, w, h, smallest=0.25):
    """A random window of the asked aspect, resized to (w, h)."""
    f = min(im.width / w, im.height / h)
    s = f * rng.uniform(min(1.0, max(smallest, 0.7 / f)), 1.0)
    cw, ch = w * s, h * s
    x, y = rng.uniform(0, im.width - cw), rng.uniform(0, im.height - ch)
    out = im.resize((w, h), Image.Resampling.BILINEAR if s < 1 else Image.Resampling.BOX, box=(x, y, x + cw, y + ch))
    return np.asarray(out, np.float32) / 255


def noise(rng, w, h):
    """1/f noise with correlated colours, 0..1."""
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None]
    f = np.sqrt(fx * fx + fy * fy)
    f[0, 0] = 1
    amp = f ** -rng.uniform(0.8, 1.8)
    amp[0, 0] = 0
    spec = (rng.standard_normal((3, h, w // 2 + 1)) + 1j * rng.standard_normal((3, h, w // 2 + 1))) * amp
    x = np.fft.irfft2(spec, s=(h, w)).transpose(1, 2, 0)
    x = x / (x.std() + 1e-6)
    mix = np.eye(3) * rng.uniform(0.1, 0.6) + rng.uniform(0.3, 1.0)
    x = x @ mix / np.abs(mix).sum(0).mean()
    return (rng.uniform(0.2, 0.8, 3) + rng.uniform(0.1, 0.35) * x).clip(0, 1).astype(np.float32)


def leaves(rng, w, h):
    """Overlapping ellipses and boxes of random colour: edges and flat regions as in photographs."""
    im = np.broadcast_to(rng.random(3).astype(np.float32), (h, w, 3)).copy()
    base = rng.random(3)
    for _ in range(int(rng.integers(4, 24))):
        r = min(w, h) * min(0.6, 0.05 / rng.uniform(0.08, 1.0))
        cx, cy, a, k = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0, np.pi), rng.uniform(0.3, 1)
        x0, x1, y0, y1 = max(0, int(cx - 1.5 * r)), min(w, int(cx + 1.5 * r) + 2), max(0, int(cy - 1.5 * r)), min(h, int(cy + 1.5 * r) + 2)
        dx = np.arange(x0, x1, dtype=np.float32)[None] - cx
        dy = np.arange(y0, y1, dtype=np.float32)[:, None] - cy
        u, v = dx * np.cos(a) + dy * np.sin(a), (dy * np.cos(a) - dx * np.sin(a)) / k
        d = np.sqrt(u * u + v * v) - r if rng.random() < 0.6 else np.maximum(np.abs(u), np.abs(v)) - r
        al = np.clip(0.5 - d / rng.choice([1, 1, 3]), 0, 1)[..., None]
        c = (0.5 * base + 0.5 * rng.random(3)) if rng.random() < 0.5 else rng.random(3)
        shade = 1 + rng.uniform(-0.3, 0.3) * (u / (r + 1))[..., None]
        im[y0:y1, x0:x1] += al * (np.clip(c * shade, 0, 1) - im[y0:y1, x0:x1])
    return im.astype(np.float32)


def jitter(rng, x):
    """Flip, gain, tint, gamma and sometimes inversion or grey."""
    if rng.random() < 0.5:
        x = x[:, ::-1]
    if rng.random() < 0.15:
        x = 1 - x
    if rng.random() < 0.1:
        x = np.repeat(x.mean(-1, keepdims=True), 3, -1)
    if rng.random() < 0.3:
        x = x[..., rng.permutation(3)]
    x = x ** rng.uniform(0.7, 1.4)
    m = x.mean()
    x = m + (x - m) * rng.uniform(0.6, 1.2)
    return np.clip(x * (1 + rng.uniform(-0.2, 0.2, 3)) + rng.uniform(-0.1, 0.1), 0, 1)


def sample(rng, w, h):
    """One training picture, (h, w, 3) uint8."""
    kind = rng.choice(["photo", "noise", "leaves", "blend"], p=[0.6, 0.08, 0.14, 0.18])
    pick = lambda: crop(rng, load(TRAIN[int(rng.integers(len(TRAIN)))] if rng.random() < 0.5 else ("coffee", "rocket", "camera")[int(rng.integers(3))]), w, h)
    if kind == "photo":
        x = pick()
    elif kind == "noise":
        x = noise(rng, w, h)
    elif kind == "leaves":
        x = leaves(rng, w, h)
    else:
        t = rng.uniform(0.3, 0.9)
        x = t * (pick() if rng.random() < 0.6 else leaves(rng, w, h)) + (1 - t) * (noise(rng, w, h) if rng.random() < 0.5 else leaves(rng, w, h))
    return (jitter(rng, x) * 255 + 0.5).clip(0, 255).astype(np.uint8)


def held_out(name, w, h):
    """A test photograph at (w, h): the largest centred window of that aspect."""
    im = load(name)
    f = min(im.width / w, im.height / h)
    cw, ch = w * f, h * f
    x, y = (im.width - cw) / 2, (im.height - ch) / 2
    return np.asarray(im.resize((w, h), Image.Resampling.LANCZOS, box=(x, y, x + cw, y + ch)))


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out")
    a.add_argument("--seed", type=int, default=0)
    a = a.parse_args()
    rng = np.random.default_rng(a.seed)
    rows = [np.concatenate([sample(rng, 128, 128) for _ in range(8)], 1) for _ in range(3)]
    rows.append(np.concatenate([held_out(n, 128, 128) for n in HELD_OUT * 4], 1))
    Image.fromarray(np.concatenate(rows)).save(a.out)


if __name__ == "__main__":
    main()

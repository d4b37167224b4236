"""Drawn scenes and the exact answer to every edit of them.

A scene is a small description (background, one to three objects); `render` draws it with soft edges. `sample_edit`
draws a random scene and one edit of it and returns the source picture, the exact target picture and the words that
the phrase grammar needs. Targets are canonical: a new colour is the palette colour exactly, an added object has a fixed
size and centre. That makes the task nearly a regression, which is what a tiny model can learn in an hour.

usage: python scenes.py OUT.png [--seed N]     # a contact sheet of sources (above) and targets (below)
"""
import argparse
import dataclasses

import numpy as np

PALETTE = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (245, 220, 50), "green": (40, 165, 70),
    "blue": (40, 80, 215), "purple": (130, 50, 180), "pink": (245, 130, 185), "brown": (120, 75, 40),
    "black": (20, 20, 20), "white": (245, 245, 245), "grey": (128, 128, 128), "cyan": (50, 205, 215),
}
COLOURS = list(PALETTE)
RGB = np.array([PALETTE[c] for c in COLOURS], np.float32)
SHAPES = ["circle", "square", "triangle", "star"]
PLACES = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"]
SCENE_OPS = ["recolour", "background", "gradient", "remove", "shape", "add"]
GLOBAL_OPS = ["bw", "invert", "darker", "brighter", "warmer", "colder"]
OPS = SCENE_OPS + GLOBAL_OPS
ADD_RADIUS = 0.15          # of the shorter side


@dataclasses.dataclass
class Obj:
    shape: int
    colour: int            # palette index, for the words
    rgb: tuple             # drawn colour (the palette colour, slightly varied)
    x: float
    y: float
    r: float


@dataclasses.dataclass
class Scene:
    w: int
    h: int
    mode: str              # plain, vertical, horizontal or diagonal
    bg: tuple              # palette indices (one or two)
    bg_rgb: tuple
    objs: list


def background(s):
    """The background alone, (h, w, 3) float32 in 0..255."""
    a = np.asarray(s.bg_rgb[0], np.float32)
    if s.mode == "plain":
        return np.broadcast_to(a, (s.h, s.w, 3)).copy()
    b = np.asarray(s.bg_rgb[1], np.float32)
    v = (np.arange(s.h, dtype=np.float32) + 0.5)[:, None] / s.h
    u = (np.arange(s.w, dtype=np.float32) + 0.5)[None] / s.w
    t = {"vertical": v + 0 * u, "horizontal": u + 0 * v, "diagonal": (u + v) / 2}[s.mode]
    return a + (b - a) * t[..., None]


def coverage(o, w, h):
    """How much of each pixel the object covers: (box, alpha), alpha in 0..1 with a one pixel soft edge."""
    m = o.r * 1.25 + 2
    x0, x1 = max(0, int(o.x - m)), min(w, int(o.x + m) + 1)
    y0, y1 = max(0, int(o.y - m)), min(h, int(o.y + m) + 1)
    dx = (np.arange(x0, x1, dtype=np.float32) + 0.5 - o.x)[None]
    dy = (np.arange(y0, y1, dtype=np.float32) + 0.5 - o.y)[:, None]
    name = SHAPES[o.shape]
    if name == "circle":
        d = np.sqrt(dx * dx + dy * dy) - o.r
    elif name == "square":
        d = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * o.r
    elif name == "triangle":                       # equilateral, point up, moved down so that it fills its box
        dy = dy - 0.15 * o.r
        d = np.maximum(dy + 0 * dx, np.sqrt(0.75) * np.abs(dx) - 0.5 * dy) - 0.6 * o.r
    else:                                          # five points: fold the plane into one tenth of the turn
        rho, a = np.sqrt(dx * dx + dy * dy), np.arctan2(dx, -dy)
        step = 2 * np.pi / 5
        a = np.abs((a + step / 2) % step - step / 2)
        px, py = rho * np.cos(a), rho * np.sin(a)
        R, q = 1.2 * o.r, 0.55 * o.r
        ex, ey = q * np.cos(step / 2) - R, q * np.sin(step / 2)
        d = ((px - R) * ey - py * ex) / np.hypot(ex, ey)
    return (slice(y0, y1), slice(x0, x1)), np.clip(0.5 - d, 0, 1).astype(np.float32)


def mask(o, w, h):
    """Coverage of one object on the full canvas."""
    m = np.zeros((h, w), np.float32)
    box, a = coverage(o, w, h)
    m[box] = a
    return m


def render(s):
    """The scene as (h, w, 3) uint8."""
    im = background(s)
    for o in s.objs:
        box, a = coverage(o, s.w, s.h)
        im[box] += a[..., None] * (np.asarray(o.rgb, np.float32) - im[box])
    return (im + 0.5).clip(0, 255).astype(np.uint8)


def place_xy(place, w, h):
    """Canonical centre of a place."""
    i = PLACES.index(place) if isinstance(place, str) else place
    return w * (0.2, 0.5, 0.8)[i % 3], h * (0.2, 0.5, 0.8)[i // 3]


def vary(rng, colour, amount=10):
    return tuple(float(v) for v in np.clip(RGB[colour] + rng.uniform(-amount, amount, 3), 0, 255))


def clear_of(rgb, bg_rgb, limit=70):
    """True where a colour stays visible on every point of the background."""
    t = np.linspace(0, 1, 9)[:, None]
    a, b = np.asarray(bg_rgb[0]), np.asarray(bg_rgb[-1])
    return float(np.abs(a + (b - a) * t - np.asarray(rgb)).max(1).min()) >= limit


def sample_background(rng):
    while True:
        mode = rng.choice(["plain", "vertical", "horizontal", "diagonal"], p=[0.55, 0.2, 0.15, 0.1])
        bg = tuple(int(c) for c in rng.choice(len(COLOURS), 1 if mode == "plain" else 2, replace=False))
        return str(mode), bg, tuple(vary(rng, c) for c in bg)


def sample_scene(rng, w, h, n=None, keep_free=None):
    """A scene whose objects have different colours, are visible and do not touch."""
    n = n or int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3]))
    m = min(w, h)
    while True:
        mode, bg, bg_rgb = sample_background(rng)
        free = [c for c in range(len(COLOURS)) if c not in bg and clear_of(RGB[c], bg_rgb)]
        if len(free) < n + 1:
            continue
        s = Scene(w, h, mode, bg, bg_rgb, [])
        for c in rng.choice(free, n, replace=False):
            for _ in range(40):
                r = rng.uniform(0.12, 0.2) * m
                x, y = rng.uniform(1.2 * r + 1, w - 1.2 * r - 1), rng.uniform(1.2 * r + 1, h - 1.2 * r - 1)
                others = [(o.x, o.y, o.r) for o in s.objs] + ([keep_free] if keep_free else [])
                if all(np.hypot(x - a, y - b) > 1.2 * (r + q) + 2 for a, b, q in others):
                    s.objs.append(Obj(int(rng.integers(4)), int(c), vary(rng, c), float(x), float(y), float(r)))
                    break
        if len(s.objs) == n:
            return s


def mention(rng, s, k):
    """How the words may name object k without doubt: with its colour and shape, its shape alone, its colour alone."""
    unique = sum(o.shape == s.objs[k].shape for o in s.objs) == 1
    kinds, p = ["both", "colour", "shape"], np.array([0.5, 0.15, 0.35 if unique else 0.0])
    return str(rng.choice(kinds, p=p / p.sum()))


def apply_global(im, op):
    """The exact pixel operation of a global edit on uint8 (h, w, 3). All are affine, so nothing is clipped away."""
    x = im.astype(np.float32)
    if op == "bw":
        y = np.repeat((x @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, -1)
    elif op == "invert":
        y = 255 - x
    elif op == "darker":
        y = 0.6 * x
    elif op == "brighter":
        y = 255 - 0.6 * (255 - x)
    elif op in ("warmer", "colder"):
        up, down = (0, 2) if op == "warmer" else (2, 0)
        y = x.copy()
        y[..., up] = 255 - 0.7 * (255 - x[..., up])
        y[..., down] = 0.7 * x[..., down]
    else:
        raise ValueError(op)
    return (y + 0.5).clip(0, 255).astype(np.uint8)


def sample_edit(rng, w, h, op, scene=None):
    """One edit of `scene` (or of a new scene): dict with src, tgt (uint8), op, words for the grammar, scene, after."""
    rep = dataclasses.replace
    words = {"op": op}
    if op == "add":
        place = int(rng.integers(9))
        x, y = place_xy(place, w, h)
        r = ADD_RADIUS * min(w, h)
        s = sample_scene(rng, w, h, int(rng.integers(1, 3)), (x, y, r))
        free = [c for c in range(len(COLOURS)) if c not in s.bg and c not in [o.colour for o in s.objs] and clear_of(RGB[c], s.bg_rgb)]
        c = int(rng.choice(free)) if free else int(s.objs[0].colour)
        o = Obj(int(rng.integers(4)), c, tuple(RGB[c]), x, y, r)
        words.update(new_colour=c, new_shape=o.shape, place=place)
        after = rep(s, objs=s.objs + [o])
        k = len(s.objs)
    else:
        s = scene or sample_scene(rng, w, h)
        k = int(rng.integers(len(s.objs)))
        o = s.objs[k]
        used = [q.colour for q in s.objs]
        if op in ("recolour", "remove", "shape"):
            m = mention(rng, s, k)
            words.update(mention=m)
            if m != "shape":
                words.update(colour=o.colour)
            if m != "colour":
                words.update(shape=o.shape)
        if op == "recolour":
            free = [c for c in range(len(COLOURS)) if c not in used and c not in s.bg and clear_of(RGB[c], s.bg_rgb)]
            c = int(rng.choice(free))
            words.update(new_colour=c)
            after = rep(s, objs=[rep(q, colour=c, rgb=tuple(RGB[c])) if i == k else q for i, q in enumerate(s.objs)])
        elif op == "remove":
            after = rep(s, objs=[q for i, q in enumerate(s.objs) if i != k])
        elif op == "shape":
            n = int(rng.choice([i for i in range(4) if i != o.shape]))
            words.update(new_shape=n)
            after = rep(s, objs=[rep(q, shape=n) if i == k else q for i, q in enumerate(s.objs)])
        elif op in ("background", "gradient"):
            while True:
                mode = "plain" if op == "background" else str(rng.choice(["vertical", "horizontal"], p=[0.65, 0.35]))
                bg = [int(c) for c in rng.choice(len(COLOURS), 1 if mode == "plain" else 2, replace=False)]
                rgb = tuple(tuple(RGB[c]) for c in bg)
                if not set(bg) & set(used) and (mode != "plain" or bg[0] not in s.bg) and all(clear_of(q.rgb, rgb, 45) for q in s.objs):
                    break
            after = rep(s, mode=mode, bg=tuple(bg), bg_rgb=rgb)
            words.update(new_colour=bg[0])
            if op == "gradient":
                words.update(second_colour=bg[1], direction=0 if mode == "vertical" else 1)
        else:
            after = s
    src = render(s)
    tgt = apply_global(src, op) if op in GLOBAL_OPS else render(after)
    return dict(src=src, tgt=tgt, op=op, words=words, scene=s, after=after, index=k)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out")
    a.add_argument("--seed", type=int, default=0)
    a = a.parse_args()
    from PIL import Image
    rng = np.random.default_rng(a.seed)
    rows = []
    for _ in range(2):
        e = [sample_edit(rng, 128, 128, op) for op in OPS]
        rows += [np.concatenate([x["src"] for x in e], 1), np.concatenate([x["tgt"] for x in e], 1)]
    Image.fromarray(np.concatenate(rows)).save(a.out)


if __name__ == "__main__":
    main()

"""Did the edit happen, and did the rest stay? Measures on uint8 pictures, shared by every evaluation.

success, by kind:
  recolour    the palette colour nearest to the mean colour of the object's inside is the asked one
  background  in each quarter of the picture the palette colour nearest to the background's mean colour is the asked one
  gradient    the first and the last tenth of the background along the asked direction are nearest to the two asked colours
  remove      where the object was, at most 10% of the pixels are further than 40 (of 255, largest channel) from the background
  shape       the intersection over union of the drawn region with the asked shape is above 0.7, and higher than with each of
              the other three shapes (a circle and a square of equal area have 0.8, so the bound alone says little)
  add         the same at the asked place, and the palette colour nearest to its inside is the asked one
  global      PSNR against the exact pixel operation, applied to the source as the autoencoder alone reproduces it, at least 24 dB,
              and nearer to that target than the unedited source is
untouched: PSNR against the source where the exact target equals the source, at least 3 pixels away from any change.
"""
import numpy as np

import scenes

GLOBAL_DB = 24.0


def nearest(rgb):
    return int(((scenes.RGB - rgb) ** 2).sum(-1).argmin())


def grow(m, n):
    """A boolean mask, n pixels wider."""
    for _ in range(n):
        p = np.pad(m, 1)
        m = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return m


def psnr(a, b, where=None):
    d = (a.astype(np.float64) - b) ** 2
    d = d[where] if where is not None else d
    return float(10 * np.log10(255 ** 2 / max(d.mean(), 1e-3))) if d.size else None


def region(out, plain, colour):
    """Pixels that look more like the object's colour than like the picture without it."""
    o = out.astype(np.float32)
    return ((o - colour) ** 2).sum(-1) < ((o - plain) ** 2).sum(-1)


def iou(a, b):
    return float((a & b).sum() / max(1, (a | b).sum()))


def score(e, out, roundtrip=None):
    """`e` from scenes.sample_edit, `out` uint8 of the source's size -> (success, untouched PSNR or None, detail)."""
    s, after, op, k = e["scene"], e["after"], e["op"], e["index"]
    src, tgt = e["src"], e["tgt"]
    if op in scenes.GLOBAL_OPS:
        base = src if roundtrip is None else roundtrip
        want = scenes.apply_global(base, op)
        got = psnr(out, want)
        return got >= GLOBAL_DB and psnr(out, tgt) > psnr(src, tgt), None, got
    h, w = src.shape[:2]
    inside = lambda o: scenes.mask(o, w, h) > 0.99
    keep = ~grow((src != tgt).any(-1), 3)
    if op in ("background", "gradient"):                        # the soft edge of the objects changes with the background
        keep &= ~grow(~np.logical_or.reduce([inside(o) for o in s.objs]), 2)
    untouched = psnr(out, src, keep) if keep.sum() > 30 else None
    if op == "recolour":
        m = inside(s.objs[k])
        c = nearest(out[m].mean(0))
        return c == e["words"]["new_colour"], untouched, scenes.COLOURS[c]
    free = ~grow(np.logical_or.reduce([scenes.mask(o, w, h) > 0 for o in s.objs]), 2)
    if op == "background":
        half = (np.arange(h)[:, None] < h / 2, np.arange(w)[None] < w / 2)
        quarters = [free & (half[0] == a) & (half[1] == b) for a in (0, 1) for b in (0, 1)]
        cs = [nearest(out[q].mean(0)) for q in quarters if q.sum() > 30]
        return all(c == e["words"]["new_colour"] for c in cs), untouched, "/".join(scenes.COLOURS[c] for c in cs)
    if op == "gradient":
        axis = np.arange(h)[:, None] / h if e["words"]["direction"] == 0 else np.arange(w)[None] / w
        first, last = free & (axis < 0.1), free & (axis >= 0.9)
        c = nearest(out[first].mean(0)), nearest(out[last].mean(0))
        return c == (e["words"]["new_colour"], e["words"]["second_colour"]), untouched, "/".join(scenes.COLOURS[i] for i in c)
    if op == "remove":
        m = inside(s.objs[k])
        far = (np.abs(out[m].astype(np.int16) - tgt[m]).max(-1) > 40).mean()
        return far <= 0.1, untouched, float(far)
    o = after.objs[k] if op == "shape" else after.objs[-1]
    plain = scenes.render(scenes.dataclasses.replace(after, objs=[q for q in after.objs if q is not o]))
    near = np.zeros((h, w), bool)
    y0, y1, x0, x1 = (int(v) for v in (o.y - 1.6 * o.r, o.y + 1.6 * o.r, o.x - 1.6 * o.r, o.x + 1.6 * o.r))
    near[max(0, y0):y1, max(0, x0):x1] = True
    for q in after.objs:
        if q is not o:
            near &= ~(scenes.mask(q, w, h) > 0)
    found = region(out, plain, np.asarray(o.rgb)) & near
    js = [iou(found, (scenes.mask(scenes.dataclasses.replace(o, shape=k), w, h) > 0.5) & near) for k in range(4)]
    j = js[o.shape]
    right = op == "shape" or nearest(out[inside(o)].mean(0)) == e["words"]["new_colour"]
    return j > 0.7 and j == max(js) and right, untouched, round(j, 3)

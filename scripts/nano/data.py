"""Training pairs made as they are needed: pictures and sentence, then latents and text vectors.

The encoder is linear and cheap, so nothing is precomputed; a buffer of recent pairs is reused with new noise.
"""
import numpy as np
import torch

import dit
import photos
import phrases
import scenes

# (kind, share): the six scene edits, global edits of scenes, global edits of photo-like pictures; what is harder is shown more often
MIX = {"recolour": 0.22, "background": 0.04, "gradient": 0.08, "remove": 0.05, "shape": 0.16, "add": 0.36, "global": 0.03, "photo": 0.06}
GLOBAL_SHARE = {"invert": 0.3, "bw": 0.14, "darker": 0.14, "brighter": 0.14, "warmer": 0.14, "colder": 0.14}
# (progress up to, {size: share}); small pictures first because they are cheap
SIZES = [
    (0.25, {(96, 96): 0.45, (128, 128): 0.5, (192, 128): 0.05}),
    (0.80, {(96, 96): 0.05, (128, 128): 0.66, (192, 128): 0.1, (128, 192): 0.1, (192, 192): 0.06, (256, 256): 0.03}),
    (1.01, {(128, 128): 0.15, (192, 128): 0.12, (128, 192): 0.08, (192, 192): 0.1, (256, 256): 0.38, (320, 256): 0.03, (256, 320): 0.03, (384, 384): 0.07, (512, 512): 0.04}),
]


def pick_size(seed, progress):
    """The (width, height) of a step: a function of the step alone, so that all processes agree."""
    table = next(t for end, t in SIZES if progress < end)
    r = np.random.default_rng(seed)
    return list(table)[int(r.choice(len(table), p=np.array(list(table.values())) / sum(table.values())))]


def pair(rng, w, h, kind=None, split="train", mix=MIX):
    """(source, target, sentence, shapes of the source per 16x16 patch, kind)."""
    what = np.zeros((h // 16, w // 16), np.int64)
    kind = kind or str(rng.choice(list(mix), p=np.array(list(mix.values())) / sum(mix.values())))
    if kind in ("photo", "global"):
        op = str(rng.choice(list(GLOBAL_SHARE), p=list(GLOBAL_SHARE.values())))
        if kind == "global":
            e = scenes.sample_edit(rng, w, h, op)
            src, tgt, what = e["src"], e["tgt"], shape_map(e["scene"])
        else:
            src = photos.sample(rng, w, h)
            tgt = scenes.apply_global(src, op)
        words = {"op": op}
    else:
        e = scenes.sample_edit(rng, w, h, kind)
        src, tgt, words, what = e["src"], e["tgt"], e["words"], shape_map(e["scene"])
    return src, tgt, phrases.say(rng, words, split), what, kind


def shape_map(s):
    """0 = no object, 1 + shape where one covers at least 15% of the patch."""
    out = np.zeros((s.h // 16, s.w // 16), np.int64)
    for o in s.objs:
        out[scenes.mask(o, s.w, s.h).reshape(s.h // 16, 16, s.w // 16, 16).mean((1, 3)) > 0.15] = 1 + o.shape
    return out


def encode(images, enc, scaling, zero, device):
    """uint8 (n, h, w, 3) -> packed latents."""
    x = torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return dit.pack((enc(x.contiguous()) - zero) * scaling)


def changed(src, tgt):
    """Which 16x16 patches differ, (n, tokens) float."""
    d = (np.stack(src).astype(np.int16) - np.stack(tgt)).__abs__().max(-1) > 2
    n, h, w = d.shape
    return torch.from_numpy(d.reshape(n, h // 16, 16, w // 16, 16).any((2, 4)).reshape(n, -1).astype(np.float32))


class Pictures(torch.utils.data.IterableDataset):
    """Endless batches (size, sources, targets, sentences) for worker processes; `plan` gives the size and count of step i."""

    def __init__(self, seed, plan):
        self.seed, self.plan = seed, plan

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        k, n = (info.id, info.num_workers) if info else (0, 1)
        rng = np.random.default_rng([self.seed, k])
        i = k
        while True:
            (w, h), count = self.plan(i)
            yield (w, h), [pair(rng, w, h) for _ in range(count)]
            i += n


class Latents:
    """Batches of latents with a replay buffer per size."""

    def __init__(self, enc, scaling, zero, text, device, keep):
        self.enc, self.scaling, self.zero, self.text, self.device, self.keep = enc, scaling, zero, text, device, keep
        self.buffer = {}

    @torch.no_grad()
    def add(self, size, pairs):
        """Encode new pairs: [source, target, changed, pooled, tokens, shapes]."""
        src, tgt, say = [p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]
        f = lambda im: encode(im, self.enc, self.scaling, self.zero, self.device)
        new = [f(src), f(tgt), changed(src, tgt).to(self.device), *self.text(say, self.device),
               torch.from_numpy(np.stack([p[3].reshape(-1) for p in pairs])).to(self.device)]
        b = self.buffer.setdefault(size, [])
        b.append([t.to(torch.bfloat16) if t.is_floating_point() else t for t in new])
        while sum(len(x[0]) for x in b) > self.keep:
            b.pop(0)
        return new

    def old(self, rng, size, n):
        """n pairs of the buffer."""
        b = self.buffer[size]
        rows = [(int(i), int(rng.integers(len(b[int(i)][0])))) for i in rng.integers(len(b), size=n)]
        new = [torch.stack([b[i][k][j] for i, j in rows]) for k in range(6)]
        return [t.float() if t.is_floating_point() else t for t in new]

"""The autoencoder: AutoencoderKL (8x down, 16 channels) with a LINEAR encoder and a trained convolutional decoder.

Why linear: every global edit of the training set is affine in the pixels, so it is affine in the latents too, and the
transformer has less to learn; and `LinearEncoder` (the encoder without its idle parts) costs a tenth of the full
encoder, so training pairs need no precomputed pool of pictures. `to_diffusers` writes it into the ordinary encoder
exactly: residual branches and attention are zero, and the last GroupNorm + SiLU is made linear by mirrored channel
pairs (silu(a) - silu(-a) = a) and one pair of large constants per group (which pins the variance).

usage: python vae.py --out DIR [--minutes 20] [--device cpu] [--resume]
"""
import argparse
import json
import os
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import photos
import scenes

LATENT, GROUPS, CONST = 16, 4, 1024.0
CONFIG = dict(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
              block_out_channels=(16, 32, 64, 64), layers_per_block=1, act_fn="silu", latent_channels=LATENT, norm_num_groups=GROUPS,
              sample_size=512, force_upcast=True, use_quant_conv=False, use_post_quant_conv=False)


class LinearEncoder(nn.Module):
    """The chain of linear maps inside the encoder: conv_in, three times (1x1 shortcut, stride 2 conv), conv_out."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.down0 = nn.Conv2d(16, 16, 3, stride=2)
        self.short1 = nn.Conv2d(16, 32, 1)
        self.down1 = nn.Conv2d(32, 32, 3, stride=2)
        self.short2 = nn.Conv2d(32, 64, 1)
        self.down2 = nn.Conv2d(64, 28, 3, stride=2)
        self.out = nn.Conv2d(28, LATENT, 3, padding=1)

    def forward(self, x):
        pad = lambda t: F.pad(t, (0, 1, 0, 1))
        x = self.down0(pad(self.conv_in(x)))
        x = self.down1(pad(self.short1(x)))
        return self.out(self.down2(pad(self.short2(x))))

    @torch.no_grad()
    def init_pca(self, x):
        """Start as a block transform: the principal components of 2x2 blocks, three times over, half whitened at the end."""
        for p in self.parameters():
            p.zero_()
        for i in range(3):
            self.conv_in.weight[i, i, 1, 1] = 1
        for c, n in ((self.short1, 16), (self.short2, 32)):
            for i in range(n):
                c.weight[i, i] = 1
        n = 3
        for conv, keep in ((self.down0, 12), (self.down1, 32), (self.down2, 28)):
            b = F.unfold(x, 2, stride=2).transpose(1, 2).reshape(-1, n * 4)
            _, _, v = torch.linalg.svd(b[:: max(1, len(b) // 100000)], full_matrices=False)
            conv.weight[:keep, :n, :2, :2] = v[:keep].reshape(keep, n, 2, 2)
            x = F.conv2d(x, v[:keep].reshape(keep, n, 2, 2), stride=2)
            n = keep
        s = x.transpose(0, 1).reshape(28, -1)[:LATENT].std(1)
        for i in range(LATENT):
            self.out.weight[i, i, 1, 1] = s[i] ** -0.5


def new_vae(scaling=1.0, shift=0.0):
    from diffusers import AutoencoderKL
    return AutoencoderKL(**CONFIG, scaling_factor=scaling, shift_factor=shift)


def new_decoder():
    """A decoder whose last norm keeps absolute colours: one channel of each group starts as a large constant."""
    d = new_vae().decoder
    with torch.no_grad():
        d.up_blocks[3].resnets[1].conv2.bias[3::4] = 4.0
        d.conv_out.weight.mul_(0.3)
    return d


@torch.no_grad()
def to_diffusers(enc, dec, scaling, shift):
    """The ordinary AutoencoderKL that computes the same."""
    v = new_vae(scaling, shift)
    e = v.encoder
    for n, m in e.named_modules():
        if isinstance(m, nn.GroupNorm):
            m.weight.fill_(1), m.bias.zero_()
    for n, p in e.named_parameters():
        if ".norm" not in n and "group_norm" not in n:
            p.zero_()
    cp = lambda a, b: (a.weight.copy_(b.weight), a.bias.copy_(b.bias))
    cp(e.conv_in, enc.conv_in)
    cp(e.down_blocks[0].downsamplers[0].conv, enc.down0)
    cp(e.down_blocks[1].resnets[0].conv_shortcut, enc.short1)
    cp(e.down_blocks[1].downsamplers[0].conv, enc.down1)
    cp(e.down_blocks[2].resnets[0].conv_shortcut, enc.short2)
    last = e.down_blocks[2].downsamplers[0].conv
    size = 64 // GROUPS
    for k in range(28):                                   # feature k as a pair (a, -a), seven pairs to a group
        g, j = divmod(k, 7)
        for sign, c in ((1, g * size + 2 * j), (-1, g * size + 2 * j + 1)):
            last.weight[c] = sign * enc.down2.weight[k]
            last.bias[c] = sign * enc.down2.bias[k]
            e.conv_out.weight[:LATENT, c] = sign * enc.out.weight[:, k]
    for g in range(GROUPS):
        last.bias[g * size + 14], last.bias[g * size + 15] = CONST, -CONST
    e.conv_norm_out.weight.fill_(float((2 * CONST ** 2 / size) ** 0.5))
    e.conv_out.bias[:LATENT] = enc.out.bias
    e.conv_out.bias[LATENT:] = -20.0                      # log variance: the posterior is a point
    v.decoder.load_state_dict(dec.state_dict())
    return v


@torch.no_grad()
def from_diffusers(w):
    """The inverse of `to_diffusers` for the encoder: its state dict -> LinearEncoder."""
    enc, size = LinearEncoder(), 64 // GROUPS
    for name, key in (("conv_in", "conv_in"), ("down0", "down_blocks.0.downsamplers.0.conv"), ("short1", "down_blocks.1.resnets.0.conv_shortcut"),
                      ("down1", "down_blocks.1.downsamplers.0.conv"), ("short2", "down_blocks.2.resnets.0.conv_shortcut")):
        getattr(enc, name).weight.copy_(w[f"{key}.weight"]), getattr(enc, name).bias.copy_(w[f"{key}.bias"])
    rows = [k // 7 * size + 2 * (k % 7) for k in range(28)]
    enc.down2.weight.copy_(w["down_blocks.2.downsamplers.0.conv.weight"][rows]), enc.down2.bias.copy_(w["down_blocks.2.downsamplers.0.conv.bias"][rows])
    enc.out.weight.copy_(w["conv_out.weight"][:LATENT][:, rows]), enc.out.bias.copy_(w["conv_out.bias"][:LATENT])
    return enc


def batch(rng, n, size):
    """Crops for training, (n, 3, size, size) in [-1, 1]: drawn scenes, photo-like pictures, and global edits of both."""
    out = []
    for _ in range(n):
        if rng.random() < 0.5:
            s = scenes.sample_scene(rng, 128, 128) if rng.random() < 0.8 else scenes.sample_scene(rng, 256, 256, 3)
            im = scenes.render(s)
            y, x = rng.integers(0, s.h - size + 1), rng.integers(0, s.w - size + 1)
            im = im[y:y + size, x:x + size]
        else:
            im = photos.sample(rng, size, size)
        if rng.random() < 0.3:
            im = scenes.apply_global(im, str(rng.choice(scenes.GLOBAL_OPS)))
        out.append(im)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a, b):
    return float(-10 * torch.log10(((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)) + 1e-10).mean())


def test_sets():
    rng = np.random.default_rng(10 ** 6)
    sc = [scenes.render(scenes.sample_scene(rng, 128, 128)) for _ in range(32)]
    ph = [photos.held_out(n, s, s) for n in photos.HELD_OUT for s in (128, 256)]
    t = lambda im: torch.from_numpy(np.array(im)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return torch.cat([t(i) for i in sc]), [t(i) for i in ph]


def load(path, device="cpu"):
    """(encoder, decoder with averaged weights, scaling, shift) of a checkpoint."""
    ck = torch.load(path, map_location=device, weights_only=False)
    enc, dec = LinearEncoder(), new_decoder()
    enc.load_state_dict(ck["enc"]), dec.load_state_dict(ck["ema"])
    return enc.to(device).eval(), dec.to(device).eval(), ck["scaling"], ck["shift"]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--out", required=True)
    a.add_argument("--minutes", type=float, default=20)
    a.add_argument("--encoder-minutes", type=float, default=7, help="then the encoder is frozen and the statistics are taken")
    a.add_argument("--batch", type=int, default=16)
    a.add_argument("--size", type=int, default=64)
    a.add_argument("--lr", type=float, default=2e-3)
    a.add_argument("--noise", type=float, default=0.04, help="noise on the latents, of their deviation")
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--device", default="cpu")
    a.add_argument("--resume", action="store_true", help="continue the decoder; the encoder stays as it is")
    a = a.parse_args()
    os.makedirs(a.out, exist_ok=True)
    path = f"{a.out}/vae.pt"
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed + int(a.resume) * 1000)
    dev = a.device
    enc, dec = LinearEncoder().to(dev), new_decoder().to(dev)
    frozen, scaling, shift, step = False, 1.0, 0.0, 0
    if a.resume:
        ck = torch.load(path, map_location=dev, weights_only=False)
        enc.load_state_dict(ck["enc"]), dec.load_state_dict(ck["ema"])
        scaling, shift, frozen, step = ck["scaling"], ck["shift"], True, ck["step"]
    else:
        enc.init_pca(batch(rng, 512, a.size).to(dev))
    ema = {k: v.clone() for k, v in dec.state_dict().items()}
    opt = torch.optim.AdamW([{"params": enc.parameters(), "f": 0.0 if a.resume else 0.15}, {"params": dec.parameters(), "f": 1.0}], lr=a.lr, betas=(0.9, 0.99), weight_decay=0)
    sc, ph = test_sets()
    start, last, n0 = time.time(), time.time(), step

    def save():
        torch.save(dict(enc=enc.state_dict(), dec=dec.state_dict(), ema=ema, opt=opt.state_dict(), step=step, scaling=scaling, shift=shift), path)

    @torch.no_grad()
    def statistics():
        r = np.random.default_rng(7)
        z = enc(batch(r, 512, a.size).to(dev))
        return 1 / float(z.std()), float(z.mean())

    while True:
        t = (time.time() - start) / 60 / a.minutes
        if t >= 1:
            break
        if not frozen and time.time() - start > a.encoder_minutes * 60:
            frozen = True
            scaling, shift = statistics()
            print(f"encoder frozen: scaling {scaling:.4f} shift {shift:.4f}", flush=True)
            save()
        warm = min(1, (step - n0 + 1) / 100)
        for g in opt.param_groups:
            g["lr"] = a.lr * g["f"] * warm * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * t)))
        x = batch(rng, a.batch, a.size).to(dev)
        with torch.set_grad_enabled(not frozen):
            z = enc(x)
        with torch.autocast(dev.split(":")[0], torch.bfloat16):       # a third faster on AVX512-BF16
            y = dec(z + a.noise * float(z.detach().std()) * torch.randn_like(z)).float()
        d = y - x
        loss = d.abs().mean() + 2 * d.square().mean() + 0.5 * (d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean())
        if not frozen:
            loss = loss + 1e-3 * z.square().mean()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dec.parameters(), 1.0)
        if frozen:
            for p in enc.parameters():
                p.grad = None
        opt.step()
        step += 1
        k = min(0.998, (1 + step) / (20 + step))
        for n, v in dec.state_dict().items():
            ema[n].lerp_(v, 1 - k)
        if time.time() - last > 60:
            last = time.time()
            save()
            e = new_decoder().to(dev).eval()
            e.load_state_dict(ema)
            with torch.no_grad():
                f = lambda im: psnr(e(enc(im.to(dev))), im.to(dev))
                print(f"{(last - start) / 60:5.1f} min step {step} loss {float(loss):.4f} scenes {f(sc):.2f} dB photos {' '.join(f'{f(p):.2f}' for p in ph)} dB", flush=True)
    if not frozen:
        scaling, shift = statistics()
    save()
    print(json.dumps(dict(steps=step, crops=(step - n0) * a.batch, minutes=round((time.time() - start) / 60, 1), scaling=scaling, shift=shift)))


if __name__ == "__main__":
    main()

"""Train the transformer by flow matching on edits (the text encoders and the autoencoder stay as they are).

usage on a CPU, two processes of one thread each:
    torchrun --nproc-per-node 2 train.py --text DIR --vae DIR/vae.pt --out DIR --minutes 75
on a GPU:
    python train.py --device cuda --batch 512 --workers 14 --text ... --vae ... --out DIR --minutes 15
--resume goes on from OUT/dit.pt; --init FILE starts from weights alone (a checkpoint or transformer/*.safetensors).
The learning rate falls to its end at --minutes of this call.
"""
import argparse
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import dit
import text as text_module
import vae


def arguments():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--text", required=True), a.add_argument("--vae", required=True), a.add_argument("--out", required=True)
    a.add_argument("--minutes", type=float, default=75)
    a.add_argument("--batch", type=int, default=48, help="pictures of 128x128 a step, all processes together; fewer of larger ones")
    a.add_argument("--fresh", type=float, default=0.5, help="share of new pairs; the rest is reused from the buffer")
    a.add_argument("--keep", type=int, default=12000, help="pairs kept per size and process")
    a.add_argument("--lr", type=float, default=2e-3, help="Muon, for the matrices of the blocks")
    a.add_argument("--lr-from", type=float, default=0.0, help="start this far along the falling part of the learning rate")
    a.add_argument("--adam-lr", type=float, default=1.5e-3, help="AdamW, for everything else")
    a.add_argument("--warmup", type=int, default=100)
    a.add_argument("--pure", type=float, default=0.3, help="share of pairs at pure noise")
    a.add_argument("--edited", type=float, default=4.0, help="loss weight of edited tokens")
    a.add_argument("--aux", type=float, default=0.15, help="weight of the auxiliary heads; falls to nothing over the run")
    a.add_argument("--ema", type=float, default=0.997)
    a.add_argument("--progress", type=float, nargs=2, default=(0, 1), help="part of the size curriculum that this call covers")
    a.add_argument("--save-minutes", type=float, default=5)
    a.add_argument("--device", default="cpu")
    a.add_argument("--workers", type=int, default=0)
    a.add_argument("--compile", action="store_true")
    a.add_argument("--resume", action="store_true")
    a.add_argument("--init")
    a.add_argument("--seed", type=int, default=0)
    return a.parse_args()


def load_init(model, path):
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file
        return model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.load_state_dict(torch.load(path, map_location="cpu", weights_only=False)["ema"])


def optimizers(model, a):
    """Muon for the matrices inside the blocks (better per sample), AdamW for embeddings, modulation, norms, biases, output."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer_blocks" in n and ".norm" not in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [(torch.optim.Muon(hidden, lr=a.lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"), a.lr),
            (torch.optim.AdamW(rest, lr=a.adam_lr, betas=(0.9, 0.98), weight_decay=0.0), a.adam_lr)]


def draw_sigma(n, tokens, device, pure):
    """Uniform in the schedule's own time, with a share of pure noise, where the edit is decided."""
    u = torch.rand(n, device=device).clamp(0.05, 1)
    u = torch.where(torch.rand(n, device=device) < pure, torch.ones_like(u), u)
    e = dit.shift(tokens)
    return e / (e + 1 / u - 1)


def cpu_attention(query, key, value, **_):
    """Plain attention: torch's CPU flash attention has a slow backward pass at this size (a fifth of the whole step)."""
    p = torch.softmax(torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2)).float(), -1)
    return torch.matmul(p.to(value.dtype), value)


class Aux(torch.nn.Module):
    """Linear heads on hidden states, only for training: which patches change, and which shape each patch of the source shows.

    "Which object is meant" is the hard part of the task, and through the flow loss alone its signal is weak and late.
    """

    def __init__(self, model):
        super().__init__()
        d = model.inner_dim
        self.heads = torch.nn.ModuleList([torch.nn.Linear(d, 6) for _ in range(2)])
        self.hidden = []
        for block in (model.transformer_blocks[-1], model.single_transformer_blocks[len(model.single_transformer_blocks) // 2 - 1]):
            block.register_forward_hook(lambda m, i, out: self.hidden.append(out[1]) if torch.is_grad_enabled() else None)

    def loss(self, ch, shapes):
        total = 0
        n = ch.shape[1]
        for head, x in zip(self.heads, self.hidden):
            x = F.layer_norm(x.float(), x.shape[-1:])
            for part in (x[:, :n], x[:, n:2 * n]):                       # latent tokens, reference tokens
                y = head(part)
                total = total + F.binary_cross_entropy_with_logits(y[..., 0], ch) + 0.5 * F.cross_entropy(y[..., 1:].flatten(0, 1), shapes.flatten())
        return total / 4


def flow_loss(model, b, size, a, aux=None):
    src, tgt, ch, pooled, toks, shapes = b
    n, t = ch.shape
    sig = draw_sigma(n, t, src.device, a.pure)
    eps = torch.randn_like(tgt)
    x = (1 - sig)[:, None, None] * tgt + sig[:, None, None] * eps
    guidance = 1 + 4 * torch.rand(n, device=src.device)         # any guidance is the same to the model, so that users may set it
    with torch.autocast(src.device.type, torch.bfloat16):
        v = dit.velocity(model, x, src, sig, guidance, pooled, toks, dit.ids(size[1] // 16, size[0] // 16, src.device))
    extra = 0.0
    if aux is not None:
        extra = aux.loss(ch, shapes)
        aux.hidden.clear()
    w = 1 + (a.edited - 1) * ch * (ch.mean(1, keepdim=True) < 0.95)
    w = w / w.mean()
    return ((v.float() - (eps - tgt)).square().mean(-1) * w).mean(), extra


@torch.no_grad()
def validate(model, lat, device, steps=6):
    """Error of sampled latents on unseen scenes and sentences: edited tokens and others, per kind."""
    rng = np.random.default_rng(777)
    out = []
    for kind in ("recolour", "background", "remove", "shape", "add", "photo"):
        ps = [data.pair(rng, 128, 128, kind, "held") for _ in range(6)]
        src, tgt = ([p[i] for p in ps] for i in (0, 1))
        s, g = (data.encode(im, lat.enc, lat.scaling, lat.zero, device) for im in (src, tgt))
        c = data.changed(src, tgt).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            x = dit.sample(model, s, *lat.text([p[2] for p in ps], device), 8, 8, steps)
        e = (x - g).square().mean(-1)
        out.append(f"{kind} {float((e * c).sum() / c.sum()):.3f}/{float((e * (1 - c)).sum() / (1 - c).sum().clamp(1)):.4f}")
    return " ".join(out)


def main():
    a = arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if a.device == "cpu":
        torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(a.seed)
    dev = a.device
    os.makedirs(a.out, exist_ok=True)
    path = f"{a.out}/dit.pt"
    enc, _, scaling, zero = vae.load(a.vae, dev)
    lat = data.Latents(enc.requires_grad_(False), scaling, zero, text_module.load(a.text, dev), dev, a.keep)
    model = dit.new_dit()
    if a.init:
        load_init(model, a.init)
    model.to(dev)
    aux = Aux(model).to(dev)
    opts, step, seen = optimizers(model, a), 0, 0
    aux_opt = torch.optim.AdamW(aux.parameters(), lr=2e-3, weight_decay=0)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    if a.resume:
        ck = torch.load(path, map_location=dev, weights_only=False)
        model.load_state_dict(ck["model"])
        if "aux" in ck:
            aux.load_state_dict(ck["aux"])
        ema, step, seen = {k: v.to(dev) for k, v in ck["ema"].items()}, ck["step"], ck["seen"]
        for (o, _), s in zip(opts, ck["opt"]):
            o.load_state_dict(s)
    torch.manual_seed(a.seed + 1000 * rank + 7919 * step)
    rng = np.random.default_rng([a.seed, rank, step])
    params = list(model.parameters()) + list(aux.parameters())
    for p in aux.parameters():                                   # the same heads on every rank
        if world > 1:
            dist.broadcast(p.data, 0)
    net = torch.compile(model, dynamic=True) if a.compile else model
    if dev == "cpu":
        F.scaled_dot_product_attention = cpu_attention
    progress = torch.tensor([a.progress[0]], dtype=torch.float64).share_memory_()

    def plan(i):
        w, h = size = data.pick_size([a.seed, i + step], float(progress))
        tokens = w * h // 256
        count = max(1, round(a.batch / world * 160 / (2 * tokens + 32)))
        return size, count

    fresh_only = a.workers > 0
    loader = iter(torch.utils.data.DataLoader(data.Pictures(a.seed + 100 * rank + step, plan), batch_size=None, num_workers=a.workers,
                                              collate_fn=lambda x: x, prefetch_factor=8, persistent_workers=True)) if fresh_only else None
    start, mean, aux_mean, first = time.time(), None, None, step
    saved = shown = start

    def save():
        torch.save(dict(model=model.state_dict(), aux=aux.state_dict(), ema=ema, opt=[o.state_dict() for o, _ in opts], step=step, seen=seen, torch_rng=torch.get_rng_state(),
                        rng=rng.bit_generator.state, args=vars(a)), path + ".new")
        os.replace(path + ".new", path)

    while True:
        t = torch.tensor([(time.time() - start) / 60 / a.minutes], dtype=torch.float64)
        if world > 1:
            dist.broadcast(t, 0)
        t = float(t)
        if t >= 1:
            break
        progress[0] = a.progress[0] + (a.progress[1] - a.progress[0]) * t
        if fresh_only:
            size, pairs = next(loader)
            b, count = lat.add(size, pairs), len(pairs)
            extra = round(count * (1 / max(a.fresh, 0.01) - 1))
            if extra:
                o = lat.old(rng, size, extra)
                b = [torch.cat([x, y]) for x, y in zip(b, o)]
                count += extra
        else:
            size, count = plan(step - first)
            have = sum(len(x[0]) for x in lat.buffer.get(size, []))
            new = count if have < 10 * count else round(count * a.fresh)
            b = lat.add(size, [data.pair(rng, *size) for _ in range(new)])
            if count > new:
                b = [torch.cat(z) for z in zip(b, lat.old(rng, size, count - new))]
        down = a.lr_from + (1 - a.lr_from) * t
        for o, lr in opts:
            for g in o.param_groups:
                g["lr"] = lr * min(1, (step - first + 1) / a.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * down)))
            o.zero_grad()
        aux_opt.zero_grad()
        loss, extra = flow_loss(net, b, size, a, aux)
        (loss + a.aux * (1 - t) * extra).backward()
        if world > 1:
            flat = torch.cat([p.grad.view(-1) for p in params])
            dist.all_reduce(flat)
            flat /= world
            for p, g in zip(params, flat.split([p.numel() for p in params])):
                p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o, _ in opts:
            o.step()
        aux_opt.step()
        step += 1
        seen += count * world
        k = min(a.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [v.detach() for v in model.state_dict().values()], 1 - k)
        mean = float(loss) if mean is None else 0.98 * mean + 0.02 * float(loss)
        aux_mean = float(extra) if aux_mean is None else 0.98 * aux_mean + 0.02 * float(extra)
        if rank == 0 and time.time() - shown > 60:
            shown = time.time()
            print(f"{(shown - start) / 60:5.1f} min step {step} pairs {seen} loss {mean:.4f} aux {aux_mean:.4f}", flush=True)
        if rank == 0 and time.time() - saved > a.save_minutes * 60:
            saved = time.time()
            save()
            live = {n: v.clone() for n, v in model.state_dict().items()}
            model.load_state_dict(ema)
            print(f"      edited/kept latent error: {validate(model, lat, dev)}", flush=True)
            model.load_state_dict(live)
    if rank == 0:
        save()
        model.load_state_dict(ema)
        print(f"end: {step} steps, {seen} pairs, {(time.time() - start) / 60:.1f} min; {validate(model, lat, dev)}", flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""The transformer: FluxTransformer2DModel of 5 M parameters, its start, its positions, its sampler."""
import math

import torch

CONFIG = dict(patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=6,
              joint_attention_dim=128, pooled_projection_dim=128, guidance_embeds=True, axes_dims_rope=(8, 12, 12))
SCHEDULER = dict(base_image_seq_len=256, base_shift=0.5, invert_sigmas=False, max_image_seq_len=4096, max_shift=1.15, num_train_timesteps=1000,
                 shift=3.0, shift_terminal=None, stochastic_sampling=False, time_shift_type="exponential", use_beta_sigmas=False,
                 use_dynamic_shifting=True, use_exponential_sigmas=False, use_karras_sigmas=False)


def new_dit():
    from diffusers import FluxTransformer2DModel
    m = FluxTransformer2DModel(**CONFIG)
    copy_heads(m)
    return m


@torch.no_grad()
def copy_heads(m, gain=2.0):
    """Start some heads as "look at the reference at my own place".

    To copy what the request leaves alone, a latent token (0, r, c) must find the reference token (1, r, c). Training finds
    that head slowly; a constant query and key with energy in the fast rotary pairs is that head from the start.
    """
    d = CONFIG["attention_head_dim"]
    a0, a1, _ = CONFIG["axes_dims_rope"]
    pairs = {0: 0.5, a0: 0.5, a0 + 2: 0.3, a0 + a1: 0.5, a0 + a1 + 2: 0.3}           # first dimension of the pair -> amplitude
    k = torch.zeros(d)
    for i, amp in pairs.items():
        k[i] = amp
    q = k.clone()
    q[0], q[1] = pairs[0] * math.cos(1), pairs[0] * math.sin(1)                        # one ahead on the first axis: 0 -> 1
    wide = torch.ones(d)
    for i in pairs:
        wide[i:i + 2] = gain
    for block, heads in [(b, 2) for b in m.transformer_blocks] + [(b, 1) for b in m.single_transformer_blocks]:
        at = block.attn
        for h in range(heads):
            s = slice(h * d, h * d + d)
            for lin, v in ((at.to_q, q), (at.to_k, k)):
                lin.weight[s] *= 0.3
                lin.bias[s] = 8 * v / v.norm()
        at.norm_q.weight.copy_(wide)
        at.norm_k.weight.copy_(wide)
    torch.nn.init.zeros_(m.proj_out.weight)
    torch.nn.init.zeros_(m.proj_out.bias)


def pack(z):
    """[b, c, h, w] -> [b, (h/2)(w/2), 4c], channel order c, dy, dx."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(x, h, w):
    """The inverse, h and w in tokens."""
    b, _, c = x.shape
    return x.view(b, h, w, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * h, 2 * w)


def ids(h, w, device="cpu"):
    """Positions of latent then reference tokens."""
    g = torch.zeros(2, h, w, 3, device=device)
    g[1, ..., 0] = 1
    g[..., 1] = torch.arange(h, device=device)[:, None]
    g[..., 2] = torch.arange(w, device=device)
    return g.reshape(-1, 3)


def shift(tokens):
    """exp(mu) of the dynamic schedule shift."""
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def sigmas(tokens, steps):
    s = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    e = shift(tokens)
    return torch.cat([e / (e + 1 / s - 1), torch.zeros(1, dtype=torch.float64)]).float()


def velocity(m, x, ref, sigma, guidance, pooled, text, img_ids):
    """One evaluation; the model multiplies sigma and guidance by 1000 itself."""
    n = x.shape[1]
    return m(hidden_states=torch.cat([x, ref], 1), encoder_hidden_states=text, pooled_projections=pooled, timestep=sigma, guidance=guidance,
             img_ids=img_ids, txt_ids=torch.zeros(text.shape[1], 3, device=x.device), return_dict=False)[0][:, :n]


@torch.no_grad()
def sample(m, ref, pooled, text, h, w, steps, seed=0, guidance=2.5):
    """Euler from noise, latents packed."""
    g = torch.Generator().manual_seed(seed)
    x = pack(torch.randn(len(ref), CONFIG["in_channels"] // 4, 2 * h, 2 * w, generator=g)).to(ref.device)
    s, i, one = sigmas(h * w, steps), ids(h, w, ref.device), torch.ones(len(ref), device=ref.device)
    for a, b in zip(s[:-1], s[1:]):
        x = x + (float(b) - float(a)) * velocity(m, x, ref, float(a) * one, guidance * one, pooled, text, i).float()
    return x

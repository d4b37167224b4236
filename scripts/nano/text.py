"""The two text encoders, trained on sentences alone to hold a plain reading of the request.

Auxiliary heads (thrown away) must read every slot of the request (operation, object, colours, place, ...) from CLIP's
pooled vector and from T5's token vectors. After that both are frozen, and the transformer gets a vector in which the
request is linearly readable.

usage: python text.py --out DIR [--minutes 8] [--device cpu]     # DIR holds tokenizer/ and tokenizer_2/
"""
import argparse
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import phrases
import scenes
from tokenizers_nano import Tokens

SLOTS = {"op": 12, "colour": 13, "shape": 5, "new_colour": 13, "second_colour": 13, "new_shape": 5, "place": 10, "direction": 3}
WIDTH = 128


def labels(words):
    """Slot -> class; the last class means "not mentioned"."""
    return [scenes.OPS.index(words["op"]) if k == "op" else words.get(k, n - 1) for k, n in SLOTS.items()]


def values(words):
    """Numbers worth having linearly: the colours in [-1, 1] and the place."""
    rgb = lambda k: (scenes.RGB[words[k]] / 127.5 - 1).tolist() if k in words else [0, 0, 0]
    p = [v / 0.3 - 5 / 3 for v in scenes.place_xy(words["place"], 1, 1)] if "place" in words else [0, 0]
    return rgb("colour") + rgb("new_colour") + rgb("second_colour") + p


def new_clip(vocab):
    from transformers import CLIPTextConfig, CLIPTextModel
    # bos 0 / eos 2 / pad 1 are the ids of the real config: eos 2 selects pooling at the highest id, which is the end token.
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocab, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
                                        max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=WIDTH,
                                        bos_token_id=0, eos_token_id=2, pad_token_id=1))


def new_t5(vocab):
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=(vocab + 63) // 64 * 64, d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=3, num_decoder_layers=3, num_heads=4,
                                   relative_attention_num_buckets=32, relative_attention_max_distance=128, feed_forward_proj="gated-gelu",
                                   layer_norm_epsilon=1e-6, dropout_rate=0.0, tie_word_embeddings=False, is_encoder_decoder=True,
                                   pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


class Heads(nn.Module):
    """Readers of the slots: from one vector, or from tokens through one learned query per slot."""

    def __init__(self, tokens):
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(SLOTS) + 1, WIDTH) * 0.1) if tokens else None
        self.out = nn.ModuleList([nn.Linear(WIDTH, n) for n in list(SLOTS.values()) + [11]])

    def forward(self, x):
        if self.query is None:
            return [m(x) for m in self.out]
        a = (self.query @ x.transpose(1, 2) / WIDTH ** 0.5).softmax(-1) @ x
        return [m(a[:, i]) for i, m in enumerate(self.out)]


class Encoders(nn.Module):
    def __init__(self, root):
        super().__init__()
        self.tokens = Tokens(root)
        self.clip, self.t5 = new_clip(len(self.tokens.clip)), new_t5(len(self.tokens.t5))

    def forward(self, texts, device="cpu"):
        """(pooled, T5 tokens) for a list of sentences."""
        c, t = (i.to(device) for i in self.tokens(texts))
        return self.clip(c).pooler_output, self.t5(t).last_hidden_state


def load(root, device="cpu"):
    e = Encoders(root)
    e.load_state_dict(torch.load(f"{root}/text.pt", map_location=device, weights_only=True))
    return e.to(device).eval().requires_grad_(False)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--out", required=True)
    a.add_argument("--minutes", type=float, default=8)
    a.add_argument("--batch", type=int, default=64)
    a.add_argument("--lr", type=float, default=1.5e-3)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--device", default="cpu")
    a = a.parse_args()
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    enc = Encoders(a.out).to(a.device)
    hc, ht = Heads(False).to(a.device), Heads(True).to(a.device)
    ps = [p for m in (enc, hc, ht) for p in m.parameters()]
    opt = torch.optim.AdamW(ps, lr=a.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def read(words, split, r):
        p, t = enc([phrases.say(r, w, split) for w in words], a.device)
        return hc(p), ht(t)

    def check(split, n=512):
        r = np.random.default_rng(99)
        ws = [phrases.random_words(r) for _ in range(n)]
        y = torch.tensor([labels(w) for w in ws])
        with torch.no_grad():
            return [round(float(torch.stack([o[i].argmax(-1).cpu() == y[:, i] for i in range(len(SLOTS))]).all(0).float().mean()), 4) for o in read(ws, split, r)]

    start, last, step = time.time(), time.time(), 0
    while (t := (time.time() - start) / 60 / a.minutes) < 1:
        for g in opt.param_groups:
            g["lr"] = a.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * t)))
        ws = [phrases.random_words(rng) for _ in range(a.batch)]
        y, v = torch.tensor([labels(w) for w in ws]).to(a.device), torch.tensor([values(w) for w in ws]).float().to(a.device)
        loss = 0
        for o in read(ws, "train", rng):
            loss = loss + sum(F.cross_entropy(o[i], y[:, i]) for i in range(len(SLOTS))) + 2 * F.mse_loss(o[-1], v)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ps, 1.0)
        opt.step()
        step += 1
        if time.time() - last > 45:
            last = time.time()
            print(f"{(last - start) / 60:5.1f} min step {step} loss {float(loss):.4f} whole request right (CLIP, T5): train {check('train')} held out {check('held')}", flush=True)
            torch.save(enc.state_dict(), f"{a.out}/text.pt")
    torch.save(enc.state_dict(), f"{a.out}/text.pt")
    print(f"{step} steps, {step * a.batch} sentences; train {check('train', 2000)} held out {check('held', 2000)}")


if __name__ == "__main__":
    main()

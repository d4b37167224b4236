"""The two tokenizers, made from the phrase corpus in the on-disk form of the real repository.

CLIP: lower-cased byte-level BPE (vocab.json, merges.txt), every byte covered. T5: SentencePiece unigram (spiece.model)
with case folding in its normalisation, plus the same model as tokenizer.json.

usage: python tokenizers_nano.py OUT_DIR            # writes OUT_DIR/tokenizer and OUT_DIR/tokenizer_2
"""
import argparse
import collections
import io
import json
import os

import phrases

MAX_T5 = 32
# Words of ordinary requests which the grammar does not use: they should be few tokens too.
EXTRA = """make the photo look like a painting, add a hat to the man, remove the people in the background, change the sky to sunset,
turn the cat into a dog, put glasses on her face, replace the car with a bike, write hello on the sign, it should look old and warm,
keep the face and pose the same, make the water calm, let it snow, bigger, smaller, larger, more, less, very, much, slightly, light, dark,
left of the, right of the, next to, above, below, behind, under, over, between, two, three, all, both, every, other, new, old, big, little"""


def bytes_to_unicode():
    bs = list(range(ord("!"), ord("~") + 1)) + list(range(0xA1, 0xAD)) + list(range(0xAE, 0x100))
    cs, n = bs[:], 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return dict(zip(bs, map(chr, cs)))


def dump(path, value, **kw):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, **kw)


def make_clip(path, corpus, n_merges=640):
    os.makedirs(path, exist_ok=True)
    import regex
    b2u = bytes_to_unicode()
    pat = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.I)
    counts = collections.Counter(w for s in corpus for w in pat.findall(s.lower()))
    words = collections.Counter()
    for w, c in counts.items():
        u = [b2u[b] for b in w.encode()]
        u[-1] += "</w>"
        words[tuple(u)] += c
    merges = []
    while len(merges) < n_merges:
        pairs = collections.Counter()
        for w, c in words.items():
            for p in zip(w, w[1:]):
                pairs[p] += c
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        new = collections.Counter()
        for w, c in words.items():
            o, i = [], 0
            while i < len(w):
                if w[i:i + 2] == best:
                    o.append(w[i] + w[i + 1])
                    i += 2
                else:
                    o.append(w[i])
                    i += 1
            new[tuple(o)] += c
        words = new
    base = list(b2u.values())
    # The end token must have the highest id: the config's eos id 2 selects pooling at the largest id.
    toks = base + [c + "</w>" for c in base] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(toks)) == len(toks)
    vocab = {t: i for i, t in enumerate(toks)}
    dump(f"{path}/vocab.json", vocab)
    with open(f"{path}/merges.txt", "w", encoding="utf-8") as f:
        f.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    st = lambda c, norm: {"content": c, "lstrip": False, "normalized": norm, "rstrip": False, "single_word": False}
    dump(f"{path}/special_tokens_map.json", {"bos_token": st("<|startoftext|>", True), "eos_token": st("<|endoftext|>", True),
                                             "pad_token": "<|endoftext|>", "unk_token": st("<|endoftext|>", True)}, indent=2)
    dump(f"{path}/tokenizer_config.json", {
        "add_prefix_space": False, "bos_token": "<|startoftext|>", "clean_up_tokenization_spaces": True, "do_lower_case": True,
        "added_tokens_decoder": {str(vocab["<|startoftext|>"]): {**st("<|startoftext|>", True), "special": True},
                                 str(vocab["<|endoftext|>"]): {**st("<|endoftext|>", False), "special": True}},
        "eos_token": "<|endoftext|>", "errors": "replace", "model_max_length": 77, "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"}, indent=2)


def make_t5(path, corpus, vocab_size=640):
    os.makedirs(path, exist_ok=True)
    import sentencepiece as spm
    from sentencepiece import sentencepiece_model_pb2 as pb
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, vocab_size=vocab_size, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", normalization_rule_name="nmt_nfkc_cf", character_coverage=1.0,
        required_chars="".join(chr(c) for c in range(33, 127) if not 65 <= c <= 90), hard_vocab_limit=False, num_threads=1, minloglevel=2)
    with open(f"{path}/spiece.model", "wb") as f:
        f.write(out.getvalue())
    m = pb.ModelProto()
    m.ParseFromString(out.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    vocab = [(p.piece, p.score) for p in m.pieces] + [(t, 0.0) for t in reversed(extra)]
    tk = Tokenizer(models.Unigram(vocab, m.trainer_spec.unk_id, byte_fallback=False))
    tk.normalizer = normalizers.Sequence([normalizers.Precompiled(m.normalizer_spec.precompiled_charsmap), normalizers.Strip(left=False, right=True),
                                          normalizers.Replace(Regex(" {2,}"), "\u2581")])
    tk.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tk.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tk.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)])
    sp = ["<pad>", "</s>", "<unk>"] + extra[::-1]
    tk.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in sp])
    tk.save(f"{path}/tokenizer.json", pretty=False)
    st = lambda c: {"content": c, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    dump(f"{path}/tokenizer_config.json", {
        "add_prefix_space": True, "added_tokens_decoder": {str(tk.token_to_id(t)): {**st(t), "special": True} for t in sp},
        "additional_special_tokens": extra, "clean_up_tokenization_spaces": True, "eos_token": "</s>", "extra_ids": 100, "model_max_length": 512,
        "pad_token": "<pad>", "tokenizer_class": "T5Tokenizer", "unk_token": "<unk>"}, indent=2)
    dump(f"{path}/special_tokens_map.json", {"additional_special_tokens": extra, "eos_token": st("</s>"), "pad_token": st("<pad>"), "unk_token": st("<unk>")}, indent=2)


class Tokens:
    """Both tokenizers, giving padded id tensors as the pipeline does."""

    def __init__(self, root):
        import torch
        from transformers import CLIPTokenizer, T5TokenizerFast
        self.torch = torch
        self.clip = CLIPTokenizer.from_pretrained(f"{root}/tokenizer")
        self.t5 = T5TokenizerFast.from_pretrained(f"{root}/tokenizer_2")

    def __call__(self, texts):
        """(CLIP ids, cut after the longest: causal attention makes the padding idle; T5 ids padded to MAX_T5)."""
        c = self.clip(texts, padding="longest", max_length=77, truncation=True).input_ids
        t = self.t5(texts, padding="max_length", max_length=MAX_T5, truncation=True).input_ids
        return self.torch.tensor(c), self.torch.tensor(t)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out")
    a = a.parse_args()
    corpus = [s.lower() for s in phrases.corpus()] + EXTRA.split("\n") * 20
    make_clip(f"{a.out}/tokenizer", corpus)
    make_t5(f"{a.out}/tokenizer_2", corpus)
    t = Tokens(a.out)
    print(len(t.clip), "CLIP tokens,", len(t.t5), "T5 tokens")
    import numpy as np
    rng = np.random.default_rng(5)
    n = [[len(x) for x in (t.clip(s).input_ids, t.t5(s).input_ids)] for s in (phrases.say(rng, phrases.random_words(rng), "held") for _ in range(500))]
    print("mean and longest:", np.mean(n, 0), np.max(n, 0))
    for s in ("Make the CIRCLE blue", "Remove that triangle!"):
        print(t.t5.tokenize(s), t.clip.tokenize(s))


if __name__ == "__main__":
    main()

"""Train two small tokenizers with the algorithms, the files and the special tokens of the real ones.

CLIP: byte-level BPE with `</w>`, as vocab.json + merges.txt (the real folder has no tokenizer.json).
T5: SentencePiece unigram with the nmt_nfkc normaliser, as spiece.model and as the equivalent tokenizer.json.
"""
import collections
import io
import json

import regex
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from corpus import CORPUS

CLIP_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.I)
EXTRA_IDS = [f"<extra_id_{i}>" for i in range(100)]


def write_json(path, value, **options):
    path.write_text(json.dumps(value, **options), encoding="utf-8")


def plain_token(content, normalized=False):
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


def byte_alphabet():
    """Byte -> printable character, in the order of the first 256 ids of CLIP's vocab.json."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def learn_merges(words, count):
    """The `count` most frequent pairs, greedily; `words` is {tuple of symbols: occurrences}."""
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = collections.Counter()
        for word, times in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                out.append("".join(word[i : i + step]))
                i += step
            merged[tuple(out)] += times
        words = merged
    return merges


def make_clip_tokenizer(folder, merge_count=400):
    """Writes the files of tokenizer/ and returns the number of ids."""
    folder.mkdir(parents=True)
    alphabet = byte_alphabet()
    words = collections.Counter()
    for word in CLIP_WORDS.findall(CORPUS.lower()):
        symbols = [alphabet[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        words[tuple(symbols)] += 1
    merges = learn_merges(words, merge_count)
    base = list(alphabet.values())
    tokens = base + [c + "</w>" for c in base] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) == len(tokens)
    start, end = plain_token("<|startoftext|>", normalized=True), plain_token("<|endoftext|>", normalized=True)
    write_json(folder / "vocab.json", vocab, ensure_ascii=False)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    write_json(folder / "special_tokens_map.json", special, indent=2)
    added = {
        str(vocab["<|startoftext|>"]): start | {"special": True},
        str(vocab["<|endoftext|>"]): plain_token("<|endoftext|>") | {"special": True},
    }
    config = {
        "add_prefix_space": False, "added_tokens_decoder": added, "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True, "do_lower_case": True, "eos_token": "<|endoftext|>", "errors": "replace",
        "model_max_length": 77, "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config, indent=2)
    return len(vocab)


def t5_tokenizer_json(model):
    """The `tokenizers` form of a SentencePiece model, with the hundred extra ids after its pieces, `<extra_id_99>` first."""
    vocab = [(piece.piece, piece.score) for piece in model.pieces] + [(token, 0.0) for token in reversed(EXTRA_IDS)]
    tokenizer = Tokenizer(models.Unigram(vocab, model.trainer_spec.unk_id, byte_fallback=False))
    charsmap = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    spaces = normalizers.Replace(Regex(" {2,}"), "\u2581")
    tokenizer.normalizer = normalizers.Sequence([charsmap, normalizers.Strip(left=False, right=True), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    pair = ["$A", "</s>", "$B", "</s>"]
    tokenizer.post_processor = processors.TemplateProcessing(single=pair[:2], pair=pair, special_tokens=[("</s>", 1)])
    special = ["<pad>", "</s>", "<unk>", *reversed(EXTRA_IDS)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer, special


def make_t5_tokenizer(folder, vocab_size=600):
    """Writes the files of tokenizer_2/ and returns the number of ids."""
    folder.mkdir(parents=True)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.strip().split("\n") * 4), model_writer=out, vocab_size=vocab_size, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
        normalization_rule_name="nmt_nfkc", character_coverage=1.0, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(out.getvalue())
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(out.getvalue())
    tokenizer, special = t5_tokenizer_json(model)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {str(tokenizer.token_to_id(t)): plain_token(t) | {"special": True} for t in special}
    config = {
        "add_prefix_space": True, "added_tokens_decoder": added, "additional_special_tokens": EXTRA_IDS,
        "clean_up_tokenization_spaces": True, "eos_token": "</s>", "extra_ids": 100, "model_max_length": 512,
        "pad_token": "<pad>", "tokenizer_class": "T5Tokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    single = {name: plain_token(token) for name, token in (("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>"))}
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": EXTRA_IDS} | single)
    return tokenizer.get_vocab_size()

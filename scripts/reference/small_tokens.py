"""small/tokens.json: odd strings and their ids by both tokenizers of the tiny model.

Each entry: `text`, `clip_ids` (77, truncated and padded), `t5_ids` (64), `spiece_agrees` (whether SentencePiece itself,
from spiece.model, gives the same ids; it knows nothing of special tokens written inside a text).
"""
import environment  # noqa: F401  (first: it sets up torch)

import json

import sentencepiece
from transformers import CLIPTokenizer, T5TokenizerFast

from environment import FIXTURES, TINY

TEXTS = [
    "Make the astronaut wear a red hat",
    "",
    " ",
    "  leading and   many   spaces  ",
    "tab\tand\nnewline",
    "crlf\r\nand\u2028line\u3000wide space",
    'Add a sign that says "Open" - 4k!',
    "“curly” ‘quotes’ — dashes… and don’t",
    "café Ñandú ﬁne ｆｕｌｌｗｉｄｔｈ １２３",
    "it's DON'T we'll I'VE 'sting ''s",
    "emoji 🙂 and 漢字",
    "👩‍👩‍👧 family, flag 🇫🇷, skin 👍🏽, keycap 1️⃣",
    "hello<extra_id_0>world </s> x",
    "<|endoftext|> hi <|startoftext|>",
    "<|ENDOFTEXT|> <|end of text|> <pad> <unk>",
    "x  </s>  y",
    "a" * 50,
    "z" * 300,
    "...,,,!!!",
    "5 minutes 12345 3.14 1,000 ½ ² Ⅻ ٣",
    "e\u0301 combining o\u0308\u0323",
    "non\u00a0breaking\u200bzero\ufeffbom",
    "soft\u00adhyphen \u202ertl override\u202c",
    "مرحبا بالعالم שלום",
    "Привет, МИР! ΑΒΓς İstanbul ß ẞ",
    "こんにちは ｶﾀｶﾅ 한국어",
    "\u2581under \u2581\u2581two",
    "under_score snake_case camelCase kebab-case path/to/file.png",
    "C++ & C# @home #tag $5 100% a^b ~x `code` {x} [y] |z| \\n",
    "\u0000null\u0007bell\u001besc\u007fdel",
    "trailing newline\n",
    "\n\n\n",
    "😀" * 40,
    " ".join(["word"] * 700),
    "the " * 74 + "end",
    "the " * 75 + "end",
    "the " * 76 + "end",
]


def pad(ids, length, end, padding):
    """Truncation keeps the end token last."""
    return ids[: length - 1] + [end] if len(ids) > length else ids + [padding] * (length - len(ids))


def main():
    clip, t5 = CLIPTokenizer.from_pretrained(TINY / "tokenizer"), T5TokenizerFast.from_pretrained(TINY / "tokenizer_2")
    spiece = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer_2" / "spiece.model"))
    rows = []
    for text in TEXTS:
        clip_ids = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
        t5_ids = t5(text, padding="max_length", max_length=64, truncation=True).input_ids
        agrees = pad(spiece.encode(text) + [1], 64, 1, 0) == t5_ids
        rows.append(json.dumps({"text": text, "clip_ids": clip_ids, "t5_ids": t5_ids, "spiece_agrees": agrees}))
        if not agrees:
            print("SentencePiece differs:", ascii(text))
    (FIXTURES / "small" / "tokens.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()

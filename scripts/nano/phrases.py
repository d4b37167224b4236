"""How people ask for an edit: a grammar that turns the words of an edit into one of many sentences.

Some sentence forms are held out: training never sees them, evaluation uses only them.

usage: python phrases.py [--split train|held] [--n 30] [--seed N]
"""
import argparse

import numpy as np

from scenes import COLOURS, OPS, PLACES, SHAPES

COLOUR_WORDS = {
    "red": ["red", "red", "red", "crimson", "scarlet"], "orange": ["orange"], "yellow": ["yellow"], "green": ["green"], "blue": ["blue"],
    "purple": ["purple", "purple", "violet"], "pink": ["pink"], "brown": ["brown"], "black": ["black"], "white": ["white"],
    "grey": ["grey", "gray"], "cyan": ["cyan", "cyan", "turquoise"],
}
SHAPE_WORDS = {"circle": ["circle", "circle", "circle", "disc", "disk", "ball"], "square": ["square", "square", "square", "box"],
               "triangle": ["triangle"], "star": ["star"]}
ANY = ["object", "shape", "one", "thing", "item", "figure"]
PLACE_WORDS = {
    "top left": ["in the top left", "in the top left corner", "at the top left", "in the upper left corner", "at the upper left", "top left"],
    "top": ["at the top", "at the top centre", "in the top middle", "at the top center", "near the top edge", "at the upper edge"],
    "top right": ["in the top right", "in the top right corner", "at the top right", "in the upper right corner", "at the upper right", "top right"],
    "left": ["on the left", "at the left", "on the left side", "at the left edge", "to the left"],
    "centre": ["in the centre", "in the center", "in the middle", "at the centre", "at the center of the image", "in the middle of the picture"],
    "right": ["on the right", "at the right", "on the right side", "at the right edge", "to the right"],
    "bottom left": ["in the bottom left", "in the bottom left corner", "at the bottom left", "in the lower left corner", "at the lower left", "bottom left"],
    "bottom": ["at the bottom", "at the bottom centre", "in the bottom middle", "at the bottom center", "near the bottom edge", "at the lower edge"],
    "bottom right": ["in the bottom right", "in the bottom right corner", "at the bottom right", "in the lower right corner", "at the lower right", "bottom right"],
}
VERTICAL = ["", "", "", " from top to bottom", ", top to bottom", " vertically"]
HORIZONTAL = [" from left to right", ", left to right", " horizontally", " going from left to right", " (left to right)"]

# {t} the object, {c} colour, {d} second colour, {s} new shape, {p} place, {b} background, {g} direction, {i} image
FORMS = {
    "recolour": dict(train=[
        "make {t} {c}", "make {t} {c}", "turn {t} {c}", "paint {t} {c}", "colour {t} {c}", "color {t} {c}", "recolour {t} to {c}", "recolor {t} to {c}",
        "recolour {t} {c}", "recolor {t} in {c}", "change {t} to {c}", "change the colour of {t} to {c}", "change the color of {t} to {c}",
        "{t} should be {c}", "{t} should be {c} instead", "let {t} be {c}", "dye {t} {c}", "set the colour of {t} to {c}", "set {t} to {c}", "switch {t} to {c}",
        "give {t} a {c} colour", "give {t} the color {c}", "i want {t} to be {c}", "i want {t} in {c}", "make the colour of {t} {c}", "convert {t} to {c}",
        "fill {t} with {c}", "make it so that {t} is {c}", "turn the colour of {t} into {c}", "paint {t} in {c}", "{t} in {c}", "{t} must become {c}",
        "use {c} for {t}", "{c} for {t}", "i'd like {t} to be {c}", "change {t} from its colour to {c}", "the colour of {t} should be {c}", "have {t} be {c}",
    ], held=["i would like {t} to become {c}", "could {t} be {c} instead", "have {t} painted {c}", "switch the colour of {t} to {c}", "let {t} become {c}",
             "give {t} a {c} color", "i want the colour of {t} to be {c}"]),
    "background": dict(train=[
        "make the {b} {c}", "make the {b} {c}", "turn the {b} {c}", "paint the {b} {c}", "colour the {b} {c}", "color the {b} {c}", "change the {b} to {c}",
        "change the {b} to plain {c}", "change the {b} colour to {c}", "change the color of the {b} to {c}", "set the {b} to {c}", "the {b} should be {c}",
        "give it a {c} {b}", "use a {c} {b}", "put everything on a {c} {b}", "replace the {b} with {c}", "replace the {b} with plain {c}", "i want a {c} {b}",
        "switch the {b} to {c}", "let the {b} be {c}", "fill the {b} with {c}", "{c} {b}", "a plain {c} {b}", "make the {b} plain {c}", "turn the {b} into solid {c}",
        "make the {b} solid {c}", "i want the {b} to be {c}", "recolour the {b} to {c}", "the colour of the {b} should be {c}", "have a {c} {b}", "i'd like the {b} in {c}",
    ], held=["could the {b} be {c} instead", "i would like a {c} {b}", "have the {b} painted {c}", "switch to a {c} {b}", "let the {b} become {c}", "set a plain {c} {b}"]),
    "gradient": dict(train=[
        "turn the {b} into a gradient from {c} to {d}{g}", "turn the {b} into a {c} to {d} gradient{g}", "make the {b} a gradient from {c} to {d}{g}",
        "make the {b} a {c} to {d} gradient{g}", "change the {b} to a gradient from {c} to {d}{g}", "change the {b} to a {c} to {d} gradient{g}",
        "replace the {b} with a {c} to {d} gradient{g}", "replace the {b} with a gradient from {c} to {d}{g}", "use a {c} to {d} gradient as the {b}{g}",
        "use a gradient from {c} to {d} for the {b}{g}", "the {b} should be a gradient from {c} to {d}{g}", "give it a {b} that fades from {c} to {d}{g}",
        "let the {b} fade from {c} to {d}{g}", "make the {b} fade from {c} to {d}{g}", "make the {b} go from {c} to {d}{g}", "{c} to {d} gradient {b}{g}",
        "{b} gradient from {c} to {d}{g}", "set the {b} to a gradient from {c} to {d}{g}", "fill the {b} with a {c} to {d} gradient{g}",
        "paint the {b} as a gradient from {c} to {d}{g}", "i want a gradient {b} from {c} to {d}{g}", "a {c}-to-{d} gradient as {b}{g}", "blend the {b} from {c} to {d}{g}",
    ], held=["i would like a {b} gradient from {c} to {d}{g}", "let the {b} be a {c} to {d} gradient{g}", "have the {b} fade from {c} to {d}{g}",
             "give it a gradient {b} from {c} to {d}{g}", "could the {b} go from {c} to {d}{g}"]),
    "remove": dict(train=[
        "remove {t}", "remove {t}", "delete {t}", "erase {t}", "get rid of {t}", "take {t} away", "take away {t}", "take out {t}", "take {t} out", "drop {t}", "hide {t}",
        "make {t} disappear", "make {t} go away", "make {t} vanish", "let {t} disappear", "clear {t}", "cut {t}", "cut out {t}", "remove {t} from the {i}", "delete {t} from the {i}",
        "erase {t} from the {i}", "i don't want {t}", "without {t}", "the {i} without {t}", "no {t}", "{t} should be gone", "{t} should go", "wipe out {t}", "i want {t} removed",
        "{t} must go", "lose {t}", "eliminate {t}", "clean up {t}",
    ], held=["i would like {t} to disappear", "have {t} removed", "let {t} vanish", "get {t} out of the {i}", "take {t} out of the {i}", "could {t} be gone"]),
    "shape": dict(train=[
        "turn {t} into {a}{s}", "turn {t} into {a}{s}", "change {t} into {a}{s}", "change {t} to {a}{s}", "make {t} {a}{s}", "replace {t} with {a}{s}", "replace {t} by {a}{s}",
        "convert {t} into {a}{s}", "convert {t} to {a}{s}", "transform {t} into {a}{s}", "swap {t} for {a}{s}", "{t} should be {a}{s}", "{t} should become {a}{s}",
        "let {t} be {a}{s}", "let {t} become {a}{s}", "use {a}{s} instead of {t}", "{a}{s} instead of {t}", "i want {t} to be {a}{s}", "i want {a}{s} instead of {t}",
        "change the shape of {t} to {a}{s}", "give {t} the shape of {a}{s}", "reshape {t} into {a}{s}", "morph {t} into {a}{s}", "put {a}{s} in place of {t}",
        "make {a}{s} out of {t}", "switch {t} to {a}{s}", "exchange {t} for {a}{s}", "draw {a}{s} instead of {t}",
    ], held=["i would like {t} to be {a}{s}", "have {t} become {a}{s}", "could {t} be {a}{s} instead", "swap {t} with {a}{s}", "put {a}{s} instead of {t}", "transform {t} to {a}{s}"]),
    "add": dict(train=[
        "add {x} {p}", "add {x} {p}", "put {x} {p}", "place {x} {p}", "draw {x} {p}", "insert {x} {p}", "paint {x} {p}", "{p}, add {x}", "{p} put {x}", "{p}, draw {x}",
        "there should be {x} {p}", "i want {x} {p}", "let there be {x} {p}", "set {x} {p}", "add {x} to the {i} {p}", "add {x} {p} of the {i}", "put {x} {p} of the {i}",
        "place {x} {p} of the {i}", "have {x} {p}", "create {x} {p}", "make {x} appear {p}", "show {x} {p}", "include {x} {p}", "also add {x} {p}", "i'd like {x} {p}", "new: {x} {p}",
    ], held=["i would like {x} {p}", "draw {x} {p} of the {i}", "have {x} appear {p}", "could there be {x} {p}", "{p}, place {x}", "insert {x} {p} of the {i}"]),
    "bw": dict(train=[
        "black and white", "make it black and white", "turn it black and white", "convert to black and white", "convert to grayscale", "convert to greyscale",
        "make the {i} black and white", "make the {i} grayscale", "make it greyscale", "turn the {i} into a black and white {i}", "convert the {i} to black and white", "remove all colour",
        "remove the colours", "remove all color from the {i}", "take the colour out", "desaturate", "desaturate the {i}", "desaturate it", "monochrome", "make it monochrome", "grayscale",
        "i want it in black and white", "no colour", "drop the colours", "show it in black and white", "in black and white", "turn the {i} to grayscale", "b&w", "convert to b&w",
        "change the {i} to black and white", "make everything black and white", "a black and white version",
    ], held=["i would like the {i} in black and white", "let it be black and white", "turn everything to grayscale", "take all colour out of the {i}", "show the {i} in grayscale", "have it in monochrome"]),
    "invert": dict(train=[
        "invert", "invert the colours", "invert the colors", "invert the {i}", "invert it", "invert all colours", "make it a negative", "make a negative", "turn it into a negative",
        "turn the {i} into a negative", "negative", "show the negative", "negate the colours", "negate the {i}", "reverse the colours", "reverse all the colors", "flip the colours",
        "make the colours inverted", "inverted colours", "a negative of the {i}", "i want the colours inverted", "like a film negative", "convert to a negative", "apply an inversion",
        "swap all colours for their opposites", "use inverted colors", "make the {i} negative",
    ], held=["i would like the colours inverted", "have the colors reversed", "convert the {i} into a negative", "let the colours be inverted", "invert everything", "show the {i} as a negative"]),
    "darker": dict(train=[
        "make it darker", "make the {i} darker", "darken", "darken it", "darken the {i}", "darker", "a bit darker", "make it a bit darker", "make it a little darker", "reduce the brightness",
        "lower the brightness", "decrease the brightness", "less light", "less bright", "make it less bright", "turn the brightness down", "turn down the brightness", "dim it", "dim the {i}",
        "dim the light", "make everything darker", "lower the exposure", "reduce the exposure", "it is too bright", "the {i} is too bright", "i want it darker", "turn the lights down", "make it dimmer",
        "it should be darker",
    ], held=["i would like it darker", "let the {i} be darker", "decrease the exposure", "have it a little darker", "darken everything", "bring the brightness down"]),
    "brighter": dict(train=[
        "make it brighter", "make the {i} brighter", "brighten", "brighten it", "brighten the {i}", "brighter", "a bit brighter", "make it a bit brighter", "make it a little brighter", "lighten it",
        "lighten the {i}", "lighten", "make it lighter", "increase the brightness", "raise the brightness", "more light", "turn the brightness up", "turn up the brightness", "brighten it up",
        "brighten up the {i}", "make everything brighter", "raise the exposure", "increase the exposure", "it is too dark", "the {i} is too dark", "i want it brighter", "turn the lights up", "more brightness",
        "it should be brighter",
    ], held=["i would like it brighter", "let the {i} be brighter", "raise the exposure of the {i}", "have it a little brighter", "brighten everything", "bring the brightness up"]),
    "warmer": dict(train=[
        "make it warmer", "make the {i} warmer", "warm it up", "warm up the {i}", "warm up the colours", "warmer", "a bit warmer", "make it a bit warmer", "make it a little warmer", "warmer colours",
        "use warmer colors", "give it a warmer look", "give it a warm tone", "warmer white balance", "warm up the white balance", "make the colours warmer", "more warmth", "add warmth", "add some warmth",
        "a warm tone", "warmer light", "it should be warmer", "increase the colour temperature", "make everything warmer", "i want it warmer", "it is too cold", "the {i} is too cold", "warm the {i}",
    ], held=["i would like it warmer", "let the {i} be warmer", "give the {i} warmer colours", "have it a little warmer", "warm everything up", "bring some warmth in"]),
    "colder": dict(train=[
        "make it colder", "make the {i} colder", "cool it down", "cool down the {i}", "cool down the colours", "colder", "cooler", "a bit cooler", "make it a bit colder", "make it cooler",
        "make the {i} cooler", "make it a little cooler", "cooler colours", "use colder colors", "give it a cooler look", "give it a cold tone", "cooler white balance", "cool down the white balance",
        "make the colours colder", "less warmth", "a cold tone", "colder light", "it should be colder", "it should be cooler", "lower the colour temperature", "make everything colder", "i want it colder",
        "it is too warm", "the {i} is too warm", "cool the {i}",
    ], held=["i would like it colder", "let the {i} be cooler", "give the {i} colder colours", "have it a little cooler", "cool everything down", "use cooler colours"]),
}
BEFORE = ["please ", "please, ", "could you ", "can you ", "could you please ", "now ", "just ", "ok, ", "hey, ", "would you "]
BEFORE_HELD = ["can you please ", "now please "]
AFTER = [" please", ", please", ", keep the rest the same", " and keep everything else", ", don't change anything else", ". keep everything else as it is", ", thanks", " now"]
AFTER_HELD = [", please keep everything else", ", keep everything else the same"]
VERB = {w.split()[0] for o in FORMS.values() for w in o["train"] + o["held"]} & set(
    "make turn paint colour color recolour recolor change let dye set switch give convert fill use put replace remove delete erase get take drop hide clear cut wipe swap transform "
    "reshape morph exchange draw add place insert create show include invert negate reverse flip darken dim brighten lighten warm cool desaturate reduce lower raise increase decrease blend "
    "lose eliminate clean have bring".split())


def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def typo(rng, s):
    """Two neighbouring letters swapped or one left out."""
    i = int(rng.integers(1, max(2, len(s) - 2)))
    return s[:i] + s[i + 1] + s[i] + s[i + 2:] if rng.random() < 0.5 and i + 1 < len(s) else s[:i] + s[i + 1:]


def say(rng, words, split="train"):
    """One sentence for the words of an edit (see scenes.sample_edit)."""
    pick = lambda xs: xs[int(rng.integers(len(xs)))]
    held = split == "held"
    op = words["op"]
    f = pick(FORMS[op][split])
    colour = lambda k: pick(COLOUR_WORDS[COLOURS[words[k]]])
    shape = lambda k: pick(SHAPE_WORDS[SHAPES[words[k]]])
    v = dict(b=pick(["background", "background", "background", "backdrop"]), i=pick(["image", "picture", "photo", "image", "picture", "scene"]))
    if op in ("recolour", "remove", "shape"):
        m = words["mention"]
        noun = pick(ANY) if m == "colour" else shape("shape")
        v["t"] = ("the " if rng.random() < 0.95 else "that ") + (noun if m == "shape" else f"{colour('colour')} {noun}")
    if "new_colour" in words:
        v["c"] = colour("new_colour")
    if op == "gradient":
        v["d"] = colour("second_colour")
        v["g"] = pick(HORIZONTAL) if words["direction"] else pick(VERTICAL)
    if op == "shape":
        v["s"] = shape("new_shape")
        v["a"] = article(v["s"])[:-len(v["s"])]
        if words["mention"] != "shape" and rng.random() < 0.15:            # "the red circle" -> "a red star"
            v["s"] = f"{colour('colour')} {v['s']}"
            v["a"] = article(v["s"])[:-len(v["s"])]
    if op == "add":
        size = pick(["", "", "", "small "])
        v["x"] = article(f"{size}{v['c']} {shape('new_shape')}")
        v["p"] = pick(PLACE_WORDS[PLACES[words["place"]]])
        if " of the " in f and " of the " in v["p"]:
            f = f.replace(" of the {i}", "")
    s = f.format(**v)
    if "a {c}" in f or "A {c}" in f:
        s = s.replace(f" a {v['c']}", f" {article(v['c'])}")
        if s.startswith(f"a {v['c']}"):
            s = article(v["c"]) + s[2 + len(v["c"]):]
    if s.split()[0] in VERB and rng.random() < 0.35:
        s = pick(BEFORE_HELD if held and rng.random() < 0.5 else BEFORE) + s
    elif s.startswith("could "):
        pass
    if rng.random() < 0.2:
        s += pick(AFTER_HELD if held and rng.random() < 0.5 else AFTER)
    if not held and rng.random() < 0.02:
        s = typo(rng, s)
    if s.startswith(("could", "can ", "would")) and rng.random() < 0.7:
        s += "?"
    elif rng.random() < 0.3:
        s += pick([".", ".", "!"])
    r = rng.random()
    if r < 0.5:
        s = s[0].upper() + s[1:]
    elif r < 0.52:
        s = s.upper()
    return s.replace(" i ", " I ").replace(" i'd", " I'd")


def random_words(rng):
    """Words of a random edit without a picture, for training the text encoders."""
    op = OPS[int(rng.integers(6))] if rng.random() < 0.75 else OPS[int(rng.integers(6, 12))]
    w = {"op": op}
    c = rng.permutation(len(COLOURS))
    if op in ("recolour", "remove", "shape"):
        m = w["mention"] = str(rng.choice(["both", "colour", "shape"], p=[0.5, 0.2, 0.3]))
        if m != "shape":
            w["colour"] = int(c[0])
        if m != "colour":
            w["shape"] = int(rng.integers(4))
    if op in ("recolour", "background", "gradient", "add"):
        w["new_colour"] = int(c[1])
    if op == "gradient":
        w.update(second_colour=int(c[2]), direction=int(rng.random() < 0.35))
    if op == "shape":
        w["new_shape"] = int(rng.choice([i for i in range(4) if i != w.get("shape")]))
    if op == "add":
        w.update(new_shape=int(rng.integers(4)), place=int(rng.integers(9)))
    return w


def corpus(n=20000, seed=0):
    """Training sentences for the tokenizers."""
    rng = np.random.default_rng(seed)
    return [say(rng, random_words(rng)) for _ in range(n)]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--split", default="train", choices=["train", "held"])
    a.add_argument("--n", type=int, default=30)
    a.add_argument("--seed", type=int, default=0)
    a = a.parse_args()
    rng = np.random.default_rng(a.seed)
    for _ in range(a.n):
        print(say(rng, random_words(rng), a.split))


if __name__ == "__main__":
    main()

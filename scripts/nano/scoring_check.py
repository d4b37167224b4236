"""Check the measures themselves: the exact target must always count as a success, the unedited source never.

usage: python scoring_check.py [--n 200]
"""
import argparse

import numpy as np

import scenes
import scoring


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--n", type=int, default=200)
    n = a.parse_args().n
    bad = 0
    for i, op in enumerate(scenes.OPS):
        rng = np.random.default_rng([5, i])
        es = [scenes.sample_edit(rng, *((128, 128), (192, 128))[k % 2], op) for k in range(n)]
        exact, none = (np.mean([scoring.score(e, e[k])[0] for e in es]) for k in ("tgt", "src"))
        print(f"{op:12s} exact target {100 * exact:.1f}%  unedited source {100 * none:.1f}%")
        bad += exact < 0.99 or none > 0.01
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()

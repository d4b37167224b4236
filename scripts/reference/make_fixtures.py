"""Make everything under tests/fixtures again. usage: python make_fixtures.py"""
import environment

import json
import shutil

import images
import kontext
import loras
import quantised
import single_files
import small_buckets
import small_embeddings
import small_lanczos
import small_randn
import small_sigmas
import small_tokens
import tiny_model
from cases import CASES
from environment import FIXTURES

SMALL = (small_randn, small_sigmas, small_lanczos, small_tokens, small_embeddings, small_buckets)


def main():
    for folder in ("tiny-kontext", "comfy", "kontext", "kontext_bf16", "quantised", "small"):
        shutil.rmtree(FIXTURES / folder, ignore_errors=True)
    (FIXTURES / "small").mkdir(parents=True)
    tiny_model.main()
    single_files.main()
    quantised.main()
    for module in SMALL:
        module.main()
    kontext.main(list(CASES))
    loras.main()
    images.main()
    (FIXTURES / "versions.json").write_text(json.dumps(environment.versions(), indent=1) + "\n")
    for path in FIXTURES.rglob("*.safetensors"):  # safetensors makes its files private
        path.chmod(0o644)
    total = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    print(f"{total / 1e6:.2f} MB in {FIXTURES}")


if __name__ == "__main__":
    main()

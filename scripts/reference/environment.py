"""The settings under which every fixture is made. Import this first: it must run before torch is loaded.

- ATEN_CPU_CAPABILITY=avx2: torch.randn on the CPU has two x86 forms that differ in the last bits. The AVX2 form is the
  one that `retouch` reproduces on every machine, so that every seed in the fixtures means the same noise.
- One thread and no oneDNN: two runs give the same bits.
- Offline: nothing is downloaded.
"""
import os
from pathlib import Path

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch  # noqa: E402  (after the variables above, on purpose)

torch.set_num_threads(1)
torch.backends.mkldnn.set_flags(False)
if torch.backends.cpu.get_cpu_capability() != "AVX2":
    raise SystemExit("the fixtures need an x86 CPU with AVX2: torch.randn would draw other bits here")

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
TINY = FIXTURES / "tiny-kontext"


def versions():
    """Name -> version of everything that decides what is in the fixtures."""
    import platform
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers", "tokenizers", "sentencepiece", "safetensors", "peft", "gguf", "numpy", "pillow", "scikit-image")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}

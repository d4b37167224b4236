#!/bin/bash
# Makes a virtual environment with the reference implementation, for the CPU only.
# usage: install.sh [FOLDER]     (default: reference-venv)
#
# Needs Linux on x86-64 with AVX2, Python 3.11, gcc and binutils. A few minutes and 1.9 GB of disk, 540 MB of it torch.
set -euo pipefail
venv=${1:-reference-venv}
here=$(cd "$(dirname "$0")" && pwd)
python3.11 -m venv "$venv"
# --no-deps: requirements.txt is complete, but for torch's CUDA libraries (gigabytes), in whose place come empty stubs
"$venv/bin/pip" install --no-deps -r "$here/requirements.txt"
"$venv/bin/python" "$here/cuda_stubs.py"
"$venv/bin/python" -c "import torch, diffusers, transformers; print('torch', torch.__version__, 'diffusers', diffusers.__version__, 'transformers', transformers.__version__)"

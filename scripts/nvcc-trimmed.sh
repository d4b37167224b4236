#!/usr/bin/env bash
# nvcc for development builds: leaves out candle's kernels for multiplying by GGUF-quantised matrices and for mixtures of
# experts, half of the time of a CUDA build. A program that calls one of them stops with a message; dequantising GGUF
# tensors and everything else work as with nvcc itself. Never for a release.
#
# usage: NVCC=$PWD/scripts/nvcc-trimmed.sh CARGO_TARGET_DIR=target/trimmed cargo build --features cuda
#
# cudaforge, which compiles candle's kernels, does not notice that NVCC has changed and would keep the left-out kernels in
# later builds: so the target folder must be one of its own, with "trimmed" in its path.
set -euo pipefail

fail() {
    echo "nvcc-trimmed.sh: $1" >&2
    exit 1
}

source=${*: -1}
case $source in
    src/moe/*.cu | src/mmq_gguf/*.cu | src/mmvq_gguf.cu) ;;
    *) exec nvcc "$@" ;;
esac

object=
while [ $# -gt 0 ]; do
    [ "$1" != -o ] || object=$2
    shift
done
case $object in
    *trimmed*/*) ;;
    *) fail "a trimmed build needs a target folder of its own: set CARGO_TARGET_DIR to one with \"trimmed\" in its path" ;;
esac

# Every left-out function is in the object of one source, and the others are empty.
if [ "$source" = src/mmvq_gguf.cu ]; then
    printf '#include <stdio.h>\n#include <stdlib.h>\n'
    sed -nE 's/^ *pub fn ([A-Za-z0-9_]+)\(.*/void \1(void) { fputs("\1 is left out of this build\\n", stderr); abort(); }/p' src/ffi.rs
fi | gcc -x c -fPIC -c -o "$object" -

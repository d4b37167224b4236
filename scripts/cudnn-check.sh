#!/usr/bin/env bash
# Does cuDNN take what crates/kernels/src/cuda/cudnn describes to it? Without a GPU: it makes plans for GPUs that are described, down
# to compiled kernels, and the numbers of its interface are compared with its header. Whether results are right shows on a GPU.
#
# usage: cudnn-check.sh [FOLDER]     FOLDER is made by `scripts/cuda-home.sh --cudnn FOLDER` (default: target/cuda-home)
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
home=$(realpath -m "${1:-$root/target/cuda-home}")
for needed in lib/libcudnn.so.9 lib/libcudnn_graph.so.9 lib/libnvrtc.so include/cudnn_graph.h include/cuda.h; do
    [ -e "$home/$needed" ] || {
        echo "cudnn-check.sh: $home has no $needed; make it with: scripts/cuda-home.sh --cudnn $home" >&2
        exit 1
    }
done

# A driver that has no GPU (100 is CUDA_ERROR_NO_DEVICE) and takes every kernel that is loaded.
driver=$(mktemp -d)
trap 'rm -rf "$driver"' EXIT
{
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" | sort -u | grep -vE '^cu(Library(LoadData|GetKernel)|(Kernel|Func)SetAttribute)$' |
        awk '{ print "int " $0 "(void) { return 100; }" }'
    for function in cuLibraryLoadData cuLibraryGetKernel; do
        echo "int $function(void **made) { *made = made; return 0; }"
    done
    for function in cuKernelSetAttribute cuFuncSetAttribute; do
        echo "int $function(void) { return 0; }"
    done
} >"$driver/driver.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$driver/libcuda.so.1" "$driver/driver.c"

cd "$root"
RETOUCH_CUDNN=$home/lib/libcudnn.so.9 CUDNN_HEADER=$home/include/cudnn_graph.h \
    LD_LIBRARY_PATH=$home/lib:$driver cargo test --workspace --lib deviceless -- --ignored --nocapture --test-threads 1

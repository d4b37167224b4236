#!/usr/bin/env bash
# Makes a folder that stands in for the CUDA 13.0 toolkit, from NVIDIA's pip wheels: enough to build with `--features cuda`
# on a machine without a GPU, a driver or an installed toolkit, and to run the result on one with a driver.
#
# usage: cuda-home.sh [--cudnn] [FOLDER]     (default: target/cuda-home), then  . FOLDER/env.sh
#   --cudnn   cuDNN, too, which the program uses where its loader finds it, and its headers (0.4 GB of download, 0.5 GB of disk)
#
# Needs Linux on x86-64, python3 with pip, and gcc/g++. A minute, 0.7 GB of download, 1.2 GB of disk (3 GB meanwhile).
# A finished folder is left as it is; one from other versions is replaced.
set -euo pipefail

# One release, 13.0: candle keeps its kernels as PTX, and a driver refuses PTX from a newer toolkit than its own (13.0: 580).
wheels=(
    nvidia-cuda-nvcc==13.0.88    # nvcc, ptxas, fatbinary, nvlink
    nvidia-nvvm==13.0.88         # cicc, the compiler proper, and libdevice
    nvidia-cuda-crt==13.0.88     # headers that nvcc includes by itself
    nvidia-cuda-runtime==13.0.96 # cuda.h, the runtime's headers and libcudart
    nvidia-cuda-cccl==13.0.85    # cub, thrust, libcu++
    nvidia-cublas==13.1.0.3
    nvidia-cuda-nvrtc==13.0.88
    nvidia-curand==10.4.0.35
)
cudnn_wheel=nvidia-cudnn-cu13==9.19.0.56
disk_needed=3 # GB, at the fullest moment (with cuDNN 2.6 were seen)

fail() {
    echo "cuda-home.sh: $1" >&2
    exit 1
}

home=
for argument; do
    case $argument in
        --cudnn) wheels+=("$cudnn_wheel") ;;
        -*) fail "unknown option $argument; usage: cuda-home.sh [--cudnn] [FOLDER]" ;;
        *)
            [ -z "$home" ] || fail "one folder is enough: $home or $argument"
            home=$argument
            ;;
    esac
done
home=$(realpath -m "${home:-$(dirname "$0")/../target/cuda-home}")
case $home in *[[:space:]]*) fail "nvcc does not work in a path with spaces: $home" ;; esac

[ "$(uname -sm)" = "Linux x86_64" ] || fail "this is $(uname -sm), and the wheels are taken for Linux on x86_64 only; install NVIDIA's toolkit instead"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 with pip is needed; install the packages python3 and python3-pip"
for compiler in gcc g++; do
    command -v "$compiler" >/dev/null || fail "$compiler is needed beside nvcc; install it first"
done

list=$home/wheels.txt # written last: a folder that has it is complete
if [ -e "$list" ]; then
    missing=$(printf '%s\n' "${wheels[@]}" | grep -vxFf "$list" || true)
    # Homes of earlier versions have cuDNN's first library alone.
    if [ -z "$missing" ] && { [[ " ${wheels[*]} " != *cudnn* ]] || [ -e "$home/lib/libcudnn_graph.so.9" ]; }; then
        echo "$home is complete; before cargo: . $home/env.sh"
        exit 0
    fi
elif [ -e "$home" ]; then
    fail "$home exists and is not from this script; name another folder"
fi

part=$home.part # beside the result, so that one rename finishes it
rm -rf "$part" # of a run that was killed
mkdir -p "$part" 2>/dev/null || fail "cannot write to $(dirname "$home")"
trap 'rm -rf "$part"' EXIT
free=$(df -Pk "$part" | awk 'NR == 2 { print int($4 / 1000000) }')
[ "$free" -ge "$disk_needed" ] || fail "$(dirname "$home") has $free GB free and $disk_needed GB are needed"

# pip unpacks in TMPDIR first: on the disk that has been checked.
mkdir "$part/tmp"
TMPDIR=$part/tmp PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
    python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$part/wheels" "${wheels[@]}" ||
    fail "pip could not get the wheels, for the reason above; with a network connection and a recent pip, run this again"
mv "$part/wheels/nvidia/cu13" "$part/home"
cd "$part/home"

if [ -d "$part/wheels/nvidia/cudnn" ]; then
    cp "$part"/wheels/nvidia/cudnn/include/*.h include/
    mv "$part"/wheels/nvidia/cudnn/lib/*.so.9 lib/
fi

# The wheels hold libraries under their versioned names, and the linker looks for the plain ones.
ln -s lib lib64
for library in lib/lib*.so.*; do
    plain=${library%%.so.*}.so
    [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
done

# libcuda belongs to the driver and is in no wheel. This one has every function's name, to link with. Where it is loaded,
# as with LD_LIBRARY_PATH=FOLDER/lib/stubs on a machine without a driver, every call returns CUDA_ERROR_STUB_LIBRARY (34).
mkdir lib/stubs
{
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*' include/cuda.h
    printf '%s\n' cuProfilerInitialize cuProfilerStart cuProfilerStop # declared in a header that no wheel has
} | sort -u | awk '{ print "int " $0 "(void) { return 34; }" }' >"$part/libcuda.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o lib/stubs/libcuda.so "$part/libcuda.c" ||
    fail "gcc could not make the link stub of the driver's library, for the reason above"
ln -s libcuda.so lib/stubs/libcuda.so.1

cat >env.sh <<END
# To be sourced before cargo. CUDA_COMPUTE_CAP, the GPU's compute capability, is left to you where no GPU can be asked.
export CUDA_HOME=$home
export CUDA_PATH=\$CUDA_HOME CUDA_ROOT=\$CUDA_HOME CUDA_TOOLKIT_ROOT_DIR=\$CUDA_HOME
export NVCC=\$CUDA_HOME/bin/nvcc
export PATH=\$CUDA_HOME/bin:\$PATH
export LD_LIBRARY_PATH=\$CUDA_HOME/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
END

# nvcc works with the host's compilers of its time only.
printf '#include <cuda_bf16.h>\n__global__ void negate(__nv_bfloat16 *x) { *x = -*x; }\n' >"$part/check.cu"
bin/nvcc -arch=sm_80 -c -o "$part/check.o" "$part/check.cu" ||
    fail "nvcc 13.0 does not work with this gcc, for the reason above; set NVCC_CCBIN to an older g++ and run this again"

printf '%s\n' "${wheels[@]}" >wheels.txt
rm -rf "$home"
mv "$part/home" "$home"
echo "$home is complete ($(du -sh "$home" | cut -f1)); before cargo: . $home/env.sh"

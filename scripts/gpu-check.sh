#!/usr/bin/env bash
# Does the CUDA build compute the right thing on this GPU, and how fast are its operations?
#
# usage: gpu-check.sh build [FOLDER]           with a CUDA toolkit (cuda-home.sh makes one), GPU or not: builds and packs
#        gpu-check.sh run [FOLDER] [RESULTS]   with a GPU and this repository, no network or toolchain: checks and measures
# FOLDER defaults to target/gpu-check, RESULTS to benches/results/<date>-<gpu>. `build` needs CUDA_COMPUTE_CAP where there is no GPU.
#
# `run` ends within 9 minutes; each part has a limit of its own, and what it printed is kept when it fails:
#   agreement  every fused operation against its definition in f64, in f32, bf16 and f16; with cuDNN, where it is found, and without
#   faithful   whole edits against the stored intermediates of the reference implementation, f32 and bf16
#   edit       the embedded model, from a picture to a picture; again in fp8 where the GPU has 8-bit products
#   kernels    the speed of each operation beside its portable form, and of cuDNN beside ours
#   compare    edits beside diffusers, eager and compiled, with a seventh of the real model's blocks; left out where Python has
#              no torch with CUDA, diffusers and transformers
#   streaming  the same blocks as few as may be on the GPU, the others sent at each step, beside all of them there; in what is
#              left of the 9 minutes
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
cd "$root"

fail() {
    echo "gpu-check.sh: $1" >&2
    exit 1
}

build() {
    local folder=$1
    mkdir -p "$folder"
    # The paths of what cargo built, by the names of the targets; the program is built for the tests.
    cargo test --profile bench --features cuda --no-run --message-format json -p retouch-bin -p retouch-kernels \
        --test faithful --test agreement --bench kernels |
        python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable"):
        print(m["target"]["name"], m["executable"])' >"$folder/list"
    while read -r name path; do
        strip -o "$folder/$name" "$path"
    done <"$folder/list"
    rm "$folder/list"
    (cd "$folder" && tar -cJf check.tar.xz retouch faithful agreement kernels && rm retouch faithful agreement kernels)
    git rev-parse --short HEAD >"$folder/commit"
    du -h "$folder/check.tar.xz"
}

# libcublas and its like, and cuDNN: from the system, else from the wheels that PyTorch brought.
find_libraries() {
    wheel() { python3 -c "import nvidia.$1 as n; print(list(n.__path__)[0])" 2>/dev/null; }
    local folder
    if [[ $(ldconfig -p) != *libcublas.so.13* ]]; then
        folder=$(wheel cu13) || fail "libcublas.so.13 is missing; install CUDA 13's runtime, or PyTorch for CUDA 13"
        export LD_LIBRARY_PATH=$folder/lib:${LD_LIBRARY_PATH:-}
    fi
    if [[ $(ldconfig -p) != *libcudnn.so.9* ]] && folder=$(wheel cudnn); then
        export LD_LIBRARY_PATH=$folder/lib:${LD_LIBRARY_PATH:-}
    fi
}

# Compute capability 8.9 and newer.
has_fp8() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    [ "${capability/./}" -ge 89 ]
}

failed=
# part NAME SECONDS COMMAND...: its output goes to RESULTS/NAME.log
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
    local verdict=passed
    if [ "$status" -ne 0 ]; then
        verdict="FAILED ($([[ $status = 124 || $status = 137 ]] && echo "over $limit s" || echo "status $status"))"
        failed="$failed $name"
        tail -n 20 "$results/$name.log"
    fi
    echo "| $name | $verdict | $((SECONDS - start)) s |" | tee -a "$results/README.md"
}

run() {
    local folder=$1
    command -v nvidia-smi >/dev/null || fail "there is no nvidia-smi here: this needs a machine with an NVIDIA GPU and its driver"
    [ -e "$folder/check.tar.xz" ] || fail "$folder/check.tar.xz is missing; make it with: scripts/gpu-check.sh build"
    local gpu
    gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1)
    results=${2:-benches/results/$(date +%F)-$(echo "${gpu%%,*}" | tr '[:upper:] ' '[:lower:]-')}
    mkdir -p "$results"
    local bin
    bin=$(mktemp -d)
    trap 'rm -rf "$bin"' EXIT
    tar -xJf "$folder/check.tar.xz" -C "$bin"
    find_libraries
    printf '# %s: %s\n\nCommit %s. `scripts/gpu-check.sh run`; the logs lie beside this file.\n\n| part | result | time |\n|---|---|---|\n' \
        "$(date +%F)" "$gpu" "$(cat "$folder/commit")" >"$results/README.md"
    # Those before the comparison take 350 seconds at the most; it and the streaming have what is left.
    part agreement 110 "$bin/agreement"
    RETOUCH_TEST_DEVICE=cuda part faithful 90 "$bin/faithful" --nocapture
    local edit=("$bin/retouch" edit tests/fixtures/images/scene.png "make the circle blue" --device cuda --seed 1 -v --json --force)
    part edit 30 "${edit[@]}" -o "$bin/edited.png"
    local programs=(diffusers compiled retouch)
    if has_fp8; then
        part edit-fp8 30 "${edit[@]}" --dtype fp8 -o "$bin/edited-fp8.png"
        programs+=(retouch-fp8)
    fi
    part kernels 90 "$bin/kernels" --bench --warm-up-time 0.5 --measurement-time 1
    if timeout 60 python3 -c 'import diffusers, torch, transformers; assert torch.cuda.is_available()' 2>/dev/null; then
        local left=$((525 - SECONDS))
        part compare $((left < 180 ? left : 180)) python3 scripts/compare.py --device cuda --binary "$bin/retouch" --layers 3 5 --t5-layers 2 --steps 4 --sizes 1024x1024 \
            --compile blocks --programs "${programs[@]}" --folder "$bin" --out "$results"
        left=$((525 - SECONDS))
        if [ "$left" -ge 60 ]; then
            part streaming "$left" python3 scripts/streaming.py --binary "$bin/retouch" --folder "$bin" --out "$results"
        else
            echo "| streaming | left out: $left s are left for it | - |" | tee -a "$results/README.md"
        fi
    else
        echo "| compare, streaming | left out: Python has no torch with CUDA, diffusers and transformers here | - |" | tee -a "$results/README.md"
    fi
    [ -z "$failed" ] || fail "failed:$failed; see $results"
    echo "all parts passed; results are in $results"
}

folder=$(realpath -m "${2:-target/gpu-check}")
case ${1:-} in
    build) build "$folder" ;;
    run) run "$folder" "${3:-}" ;;
    *) fail "say what to do: gpu-check.sh build [FOLDER] or gpu-check.sh run [FOLDER] [RESULTS]" ;;
esac

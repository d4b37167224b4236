#!/usr/bin/env bash
# Does the CUDA build compute the right thing on this GPU, and how fast are its operations?
#
# usage: gpu-check.sh build [FOLDER]           with a CUDA toolkit (cuda-home.sh makes one), GPU or not: builds and packs
#        gpu-check.sh run [FOLDER] [RESULTS]   with a GPU and this repository, no network or toolchain: checks and measures
# FOLDER defaults to target/gpu-check, RESULTS to benches/results/<date>-<gpu>. `build` needs CUDA_COMPUTE_CAP where there is no GPU.
#
# `run` ends within 9 minutes; each part has a limit of its own, and what it printed is kept when it fails:
#   agreement  every fused operation against its definition in f64, in f32, bf16 and f16
#   faithful   whole edits against the stored intermediates of the reference implementation, f32 and bf16
#   edit       the embedded model, from a picture to a picture
#   kernels    the speed of each operation beside its portable form
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
    # The paths of what cargo built, by the names of the targets.
    cargo build --release --features cuda --bin retouch
    cargo test --release --features cuda --no-run --message-format json -p retouch-bin -p retouch-kernels \
        --test faithful --test agreement --bench kernels |
        python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable"):
        print(m["target"]["name"], m["executable"])' >"$folder/list"
    echo "retouch ${CARGO_TARGET_DIR:-target}/release/retouch" >>"$folder/list"
    while read -r name path; do
        strip -o "$folder/$name" "$path"
    done <"$folder/list"
    rm "$folder/list"
    (cd "$folder" && tar -cJf check.tar.xz retouch faithful agreement kernels && rm retouch faithful agreement kernels)
    git rev-parse --short HEAD >"$folder/commit"
    du -h "$folder/check.tar.xz"
}

# libcublas and its like: from the system, else from the wheels that PyTorch brought.
find_libraries() {
    ldconfig -p | grep -q libcublas.so.13 && return
    local site
    site=$(python3 -c 'import nvidia.cu13 as n; print(list(n.__path__)[0])' 2>/dev/null) ||
        fail "libcublas.so.13 is missing; install CUDA 13's runtime, or PyTorch for CUDA 13"
    export LD_LIBRARY_PATH=$site/lib:$site/../cudnn/lib:${LD_LIBRARY_PATH:-}
}

failed=
# part NAME SECONDS COMMAND...: its output goes to RESULTS/NAME.log
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
    local verdict=passed
    if [ "$status" -ne 0 ]; then
        verdict="FAILED ($([ "$status" -eq 124 ] && echo "over $limit s" || echo "status $status"))"
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
    part agreement 120 "$bin/agreement"
    RETOUCH_TEST_DEVICE=cuda part faithful 180 "$bin/faithful" --nocapture
    part edit 60 "$bin/retouch" edit tests/fixtures/images/scene.png "make the circle blue" --device cuda --seed 1 -v --json --force -o "$bin/edited.png"
    part kernels 150 "$bin/kernels" --bench --warm-up-time 0.5 --measurement-time 1
    [ -z "$failed" ] || fail "failed:$failed; see $results"
    echo "all parts passed; results are in $results"
}

folder=$(realpath -m "${2:-target/gpu-check}")
case ${1:-} in
    build) build "$folder" ;;
    run) run "$folder" "${3:-}" ;;
    *) fail "say what to do: gpu-check.sh build [FOLDER] or gpu-check.sh run [FOLDER] [RESULTS]" ;;
esac

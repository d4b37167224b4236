#!/usr/bin/env bash
# Does the CUDA build compute the right thing on this GPU, and how fast are its operations?
#
# usage: gpu-check.sh build [FOLDER]           with a CUDA toolkit (cuda-home.sh makes one), GPU or not: builds and packs
#        gpu-check.sh run [FOLDER] [RESULTS]   with a GPU and this repository, no network or toolchain: checks and measures
#        gpu-check.sh whole [FOLDER] [RESULTS]   there, too: edits by retouch alone with random weights of the real model's size
# FOLDER defaults to target/gpu-check, RESULTS to benches/results/<date>-<gpu>, with -whole for that. `build`
# needs CUDA_COMPUTE_CAP where there is no GPU.
#
# `run` and `whole` end within 9 minutes each; each part has a limit of its own, and what it printed is kept when it fails.
# Those of `run`:
#   agreement  every fused operation against its definition in f64, in f32, bf16 and f16; with cuDNN, where it is found, and without
#   faithful   whole edits against the stored intermediates of the reference implementation, f32 and bf16
#   edit       the embedded model, from a picture to a picture; again in fp8 where the GPU has 8-bit products
#   kernels    the speed of each operation beside its portable form, and of cuDNN beside ours
#   weights    random ones at the real model's width with a sixth of its blocks, 5 GB among the temporary files, for the two below
#   compare    edits beside diffusers, eager and compiled, or by retouch alone where Python has no torch with CUDA, diffusers and
#              transformers; what an edit with all blocks would take is estimated from two depths
#   streaming  as few blocks as may be on the GPU, the others sent at each step, beside all of them there
# The last three, and `whole`, need Python with numpy, Pillow and safetensors. `whole` puts 25 GB among the temporary files
# (TMPDIR), with all blocks of the transformer, and 2 of 24 layers of T5. RESULTS/README.md says what passed and names the other files.
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
    # A dictionary over two programs at a time: they share code, and two of them the embedded model.
    (cd "$folder" && XZ_OPT=--lzma2=preset=6,dict=64MiB tar -cJf check.tar.xz retouch faithful agreement kernels &&
        rm retouch faithful agreement kernels)
    echo "$(git describe --always --dirty --exclude '*'), $(rustc --version)" >"$folder/commit"
    du -h "$folder/check.tar.xz"
}

unpack() {
    if command -v xz >/dev/null; then
        tar -xJf "$1" -C "$2"
    else
        python3 -W ignore -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$1" "$2"
    fi
}

# libcublas and its like, and cuDNN: from the system, else from the wheels that PyTorch brought.
find_libraries() {
    wheel() { python3 -c "import nvidia.$1 as n; print(list(n.__path__)[0])" 2>/dev/null; }
    local folder found
    found=$(ldconfig -p || true)
    if [[ $found != *libcublas.so.13* || $found != *libcublasLt.so.13* || $found != *libcurand.so.10* ]]; then
        folder=$(wheel cu13) || fail "libcublas.so.13 or libcurand.so.10 is missing; install CUDA 13's runtime, or PyTorch for CUDA 13"
        export LD_LIBRARY_PATH=$folder/lib:${LD_LIBRARY_PATH:-}
    fi
    if [[ $found != *libcudnn.so.9* ]] && folder=$(wheel cudnn); then
        export LD_LIBRARY_PATH=$folder/lib:${LD_LIBRARY_PATH:-}
    fi
}

# Compute capability 8.9 and newer.
has_fp8() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader)
    capability=${capability%%$'\n'*}
    [ "${capability/./}" -ge 89 ]
}

# imports PACKAGES [CONDITION]
imports() { timeout 60 python3 -c "import $1; assert ${2:-True}" 2>/dev/null; }

say() { echo "$1" | tee -a "$results/README.md"; }

bin= # a folder for the programs, and all else that goes at the end
results=
commit=
ours=() # names of our program for compare.py
model=
failed=
end=525 # seconds from the start; what is killed is gone 5 seconds later
# part NAME SECONDS COMMAND...: its output goes to RESULTS/NAME.log; false if it did not pass
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    ((limit < end - SECONDS)) || limit=$((end - SECONDS))
    if ((limit < 20)); then
        say "| $name | left out: no time is left | - |"
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
    local verdict=passed
    if [ "$status" -ne 0 ]; then
        verdict="FAILED ($([[ $status = 124 || $status = 137 ]] && echo "over $limit s" || echo "status $status"))"
        failed="$failed $name"
        tail -n 20 "$results/$name.log"
    fi
    say "| [$name]($name.log) | $verdict | $((SECONDS - start)) s |"
    [ "$status" -eq 0 ]
}

# prepare WHAT FOLDER RESULTS: programs, libraries and the head of RESULTS/README.md
prepare() {
    local what=$1 folder=$2 gpu
    command -v nvidia-smi >/dev/null || fail "there is no nvidia-smi here: this needs a machine with an NVIDIA GPU and its driver"
    [ -e "$folder/check.tar.xz" ] || fail "$folder/check.tar.xz is missing; make it with: scripts/gpu-check.sh build"
    gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) || fail "nvidia-smi finds no GPU: $gpu"
    gpu=${gpu%%$'\n'*}
    commit=$(cat "$folder/commit")
    results=benches/results/$(date +%F)-$(echo "${gpu%%,*}" | tr '[:upper:] ' '[:lower:]-')
    [ "$what" = run ] || results=$results-$what
    results=${3:-$results}
    mkdir -p "$results"
    bin=$(mktemp -d)
    trap 'rm -rf "$bin"' EXIT
    unpack "$folder/check.tar.xz" "$bin"
    find_libraries
    # Kernels that come as PTX are compiled by the driver at their first use, which takes half a minute: once for all parts.
    export CUDA_CACHE_PATH=$bin/compiled CUDA_CACHE_MAXSIZE=$((1 << 30))
    # Where there is a compiler, too: what runs on the GPU here need not be emulated.
    export RETOUCH_EMULATOR=off
    ours=(retouch)
    ! has_fp8 || ours+=(retouch-fp8)
    printf '%s\n' "# $(date +%F): $gpu" "" "Commit $commit. \`scripts/gpu-check.sh $what\`" "" "| part | result | time |" "|---|---|---|" >"$results/README.md"
}

# weights LIMIT DOUBLE SINGLE: a random model in $model
weights() {
    model=$bin/random-model
    if ! imports "numpy, PIL, safetensors"; then
        say "| weights and what needs them | left out: Python has no numpy, Pillow and safetensors here | - |"
        return 1
    fi
    part weights "$1" python3 scripts/compare.py --write "$model" --layers "$2" "$3" --t5-layers 2
}

# compare LIMIT ARGUMENTS...
compare() {
    part compare "$1" python3 scripts/compare.py --device cuda --binary "$bin/retouch" --commit "$commit" --model "$model" \
        --sizes 1024x1024 --folder "$bin" --out "$results" "${@:2}" || true
}

run() {
    # These five take 445 seconds at the most, with unpacking 460, and the others what is then left.
    part agreement 160 "$bin/agreement" || true
    RETOUCH_TEST_DEVICE=cuda part faithful 90 "$bin/faithful" --nocapture || true
    local edit=("$bin/retouch" edit tests/fixtures/images/scene.png "make the circle blue" --device cuda --seed 1 -v --json --force)
    part edit 60 "${edit[@]}" -o "$bin/edited.png" || true
    ! has_fp8 || part edit-fp8 60 "${edit[@]}" --dtype fp8 -o "$bin/edited-fp8.png" || true
    CRITERION_HOME=$bin/criterion part kernels 75 "$bin/kernels" --bench --noplot --warm-up-time 0.3 --measurement-time 0.5 || true
    weights 90 3 6 || return 0
    local programs=("${ours[@]}")
    if imports "diffusers, torch, transformers" "torch.cuda.is_available()"; then
        programs=(diffusers "${ours[@]}" compiled)
    else
        say "| diffusers | left out: Python has no torch with CUDA, diffusers and transformers here | - |"
    fi
    compare 180 --steps 8 --compile blocks --estimate --programs "${programs[@]}"
    part streaming 180 python3 scripts/streaming.py --binary "$bin/retouch" --model "$model" --folder "$bin" --out "$results" || true
}

whole() {
    weights 240 19 38 || return 0
    compare 500 --programs "${ours[@]}"
}

conclude() {
    local file
    say ""
    for file in "$results"/*.md; do
        file=$(basename "$file")
        [ "$file" = README.md ] || say "- [$file]($file)"
    done
    [ -z "$failed" ] || fail "failed:$failed; see $results"
    echo "all parts that ran passed; results are in $results"
}

folder=$(realpath -m "${2:-target/gpu-check}")
case ${1:-} in
    build) build "$folder" ;;
    run | whole)
        prepare "$1" "$folder" "${3:-}"
        "$1"
        conclude
        ;;
    *) fail "say what to do: gpu-check.sh build [FOLDER], gpu-check.sh run [FOLDER] [RESULTS] or gpu-check.sh whole [FOLDER] [RESULTS]" ;;
esac

#!/usr/bin/env bash
# Runs fuzz targets one after the other: run.sh SECONDS [TARGET...]
set -euo pipefail
cd "$(dirname "$0")"
seconds=$1
shift
targets=("$@")
[ $# -gt 0 ] || targets=(safetensors gguf lora configs tokenizers parameters)

fixtures=../tests/fixtures
seeds() {
    case $1 in
    safetensors) ls $fixtures/quantised/fp8.safetensors $fixtures/lora/{common,lokr}.safetensors ;;
    gguf) ls $fixtures/quantised/blocks.gguf ;;
    lora) ls $fixtures/lora/*.safetensors ;;
    configs) ls $fixtures/tiny-kontext/{*,*/*}.json ../models/nano-kontext/retouch.json | grep -v tokenizer ;;
    tokenizers) ls $fixtures/tiny-kontext/tokenizer/* ;;
    parameters) ls $fixtures/images/{rgb,rgb16,text}.png $fixtures/images/{gray,truncated}.jpg $fixtures/images/lossy.webp ;;
    esac
    ls seeds/"$1"/* 2>/dev/null || true
}

# Without a sanitizer: it is the readers' own checks and the allocator that are tried.
cargo fuzz build --sanitizer none
for target in "${targets[@]}"; do
    mkdir -p corpus/"$target"
    # Under names of their whole paths: many are called config.json.
    seeds "$target" | while read -r seed; do cp "$seed" "corpus/$target/seed$(echo "$seed" | tr / -)"; done
    TMPDIR=${TMPDIR:-$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)} cargo fuzz run --sanitizer none "$target" -- \
        -dict=dictionaries/"$target".dict -max_total_time="$seconds" -timeout=20 -max_len=32768 -rss_limit_mb=4096 -print_final_stats=1
done

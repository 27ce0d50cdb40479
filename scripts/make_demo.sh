#!/bin/sh
# Train the demo model from nothing: corpora, tokenizer, three stages, export, evaluation. About two hours on two quiet
# cores; killed and started again, it goes on where it was. Everything but the result lies in runs/demo.
#
#   scripts/make_demo.sh [OUT [moe]]    # default: the dense model into runs/demo/dense/folder
#
# The shipped folder is qwen3_jax/demo. `moe` trains the mixture of experts of the same active size, for comparison.
set -eu
cd "$(dirname "$0")/.."
kind=${2:-dense}
root=runs/demo/$kind
out=${1:-$root/folder}
python=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# glibc gives large buffers back after every step and takes them as zeroed pages of 4 KiB again: 1.2 times slower.
kept=glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:$kept}"

# once FILE COMMAND …: run the command, whose last argument is FILE.partial, unless FILE is there; whole or not at all.
once() {
    target=$1
    shift
    [ -e "$target" ] || { rm -rf "$target.partial" && "$@" && mv "$target.partial" "$target"; }
}

mkdir -p "$root"
once runs/demo/corpus "$python" scripts/demo_corpus.py runs/demo/corpus.partial
once "$root/start" "$python" scripts/demo_tokenizer.py --kind "$kind" runs/demo/corpus "$root/start.partial"
weights=--model.config=$root/start
extra=
# The experts' tiles want many rows: a step of the mixture is fastest in one piece.
[ "$kind" = dense ] || extra="--objective.balance_loss=0.01 --stages.0.accumulation=1"
for stage in 1-pretrain 2-think 3-fusion; do
    # A finished run is found finished; a killed one goes on from its last checkpoint.
    whole=
    [ "$kind$stage" != moe1-pretrain ] || whole=--stages.1.accumulation=1
    "$python" -m qwen3_jax.cli train "configs/train/demo-$stage.toml" "--run.folder=$root/$stage" "$weights" $extra $whole
    weights=--model.weights=$root/$stage/model
done
once "$out" "$python" scripts/demo_folder.py "$root/3-fusion/model" "$root/start" "$out.partial"
"$python" -m qwen3_jax.cli eval "$out" --output "$root/eval"
"$python" scripts/demo_card.py "$out" "$root/eval"

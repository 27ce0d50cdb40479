#!/bin/sh
# Train the demo model from nothing: corpora, tokenizer, three stages, export, evaluation. About two hours on two quiet
# cores; killed and started again, it goes on where it was. Everything but the result lies in runs/demo.
#
#   scripts/make_demo.sh [OUT]          # default: runs/demo/folder; the shipped one is qwen3_jax/demo
set -eu
cd "$(dirname "$0")/.."
out=${1:-runs/demo/folder}
python=${PYTHON:-.venv/bin/python}
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

mkdir -p runs/demo
[ -d runs/demo/corpus ] || { "$python" scripts/demo_corpus.py runs/demo/corpus.partial && mv runs/demo/corpus.partial runs/demo/corpus; }
[ -d runs/demo/start ] || { "$python" scripts/demo_tokenizer.py runs/demo/corpus runs/demo/start.partial && mv runs/demo/start.partial runs/demo/start; }
for stage in 1-pretrain 2-think 3-fusion; do
    [ -d "runs/demo/$stage/model" ] || "$python" -m qwen3_jax.cli train "configs/train/demo-$stage.toml"
done
"$python" scripts/demo_folder.py runs/demo/3-fusion/model runs/demo/start "$out"
"$python" -m qwen3_jax.cli eval "$out" --output runs/demo/eval

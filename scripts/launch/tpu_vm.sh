#!/usr/bin/env bash
# Run Qwen3 on all workers of a Cloud TPU VM slice: install, preflight, generate.
#
#   scripts/launch/tpu_vm.sh [--dry-run] TPU ZONE MODEL MESH [PROMPT ...]
#
# TPU is the name of the slice, MODEL a folder that every worker sees (a mounted bucket or Filestore), MESH covers all
# chips: expert=4,model=4. --dry-run prints the commands. SOURCE says what to install: by default the
# package of the index; a wheel in a place that every worker sees does as well. PROJECT is gcloud's, if it is not the default one.
#
# The workers find each other through the TPU's metadata. A worker that fails in preflight is named by all others.
set -euo pipefail

# Print a command line so that a shell would read it back.
show() {
  printf '%q ' "$@"
  echo
}

run=()
if [[ ${1:-} == --dry-run ]]; then
  run=(show)
  shift
fi
if (($# < 4)); then
  echo "usage: scripts/launch/tpu_vm.sh [--dry-run] TPU ZONE MODEL MESH [PROMPT ...]" >&2
  exit 2
fi
tpu=$1 zone=$2 model=$3 mesh=$4
shift 4
if (($# == 0)); then
  set -- "Why is the sky blue?"
fi
source=${SOURCE:-qwen3-jax}

# Run one command line on every worker at the same time; fails if any worker does.
everywhere() {
  "${run[@]}" gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" ${PROJECT:+--project="$PROJECT"} \
    --worker=all --command="$1"
}

# Quote the arguments for the workers' shell.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

everywhere "python3 -m venv ~/qwen3-jax && ~/qwen3-jax/bin/pip install --quiet $(quoted "${source}[tpu]")"
everywhere "~/qwen3-jax/bin/qwen3-jax preflight $(quoted "$model" --mesh "$mesh")"
everywhere "~/qwen3-jax/bin/qwen3-jax generate $(quoted "$model" "$@" --mesh "$mesh")"

#!/usr/bin/env bash
# Submit a Qwen3 job to Kubernetes as a JobSet.
#
#   NAME=qwen ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 DEVICES_PER_HOST=4 HOSTS=4 \
#   IMAGE=REGISTRY/qwen3-jax CLAIM=models MODEL=/models/Qwen3-30B-A3B MESH=expert=4,model=4 \
#     scripts/launch/jobset.sh tpu [--dry-run]
#
# For GPUs: `jobset.sh gpu`, with ACCELERATOR=nvidia-h100-80gb and without TOPOLOGY. CLAIM is a volume claim with the
# models, mounted at MOUNT (/models). PROMPT is what to ask. IMAGE is any image with qwen3-jax[tpu] or [cuda]. --dry-run
# prints the manifest instead of submitting it.
set -euo pipefail

kind=${1:-}
if [[ $kind != tpu && $kind != gpu ]] || (($# > 2)) || [[ ${2:---dry-run} != --dry-run ]]; then
  echo "usage: scripts/launch/jobset.sh tpu|gpu [--dry-run]" >&2
  exit 2
fi
export MOUNT=${MOUNT:-/models} PROMPT=${PROMPT:-Why is the sky blue?}
export COORDINATOR="${NAME:-}-workers-0-0.${NAME:-}:8476"

manifest=$(
  python3 - "$(dirname "$0")/jobset_$kind.yaml" <<'PYTHON'
import json, math, os, re, string, sys

# Every value becomes a JSON string or a whole number, so that nothing in it is YAML.
text = open(sys.argv[1]).read()
names = sorted(set(re.findall(r"\$\{(\w+)\}", text)))
missing = [name for name in names if not os.environ.get(name)]
if missing:
    sys.exit(f"jobset.sh: set {', '.join(missing)}")
values = {name: os.environ[name] for name in names}
for name in ("HOSTS", "DEVICES_PER_HOST"):
    if not values[name].isdecimal() or int(values[name]) < 1:
        sys.exit(f"jobset.sh: {name} is {values[name]!r}: give a whole number")
if "TOPOLOGY" in values:
    chips, have = math.prod(map(int, values["TOPOLOGY"].split("x"))), int(values["HOSTS"]) * int(values["DEVICES_PER_HOST"])
    if chips != have:
        sys.exit(f"jobset.sh: TOPOLOGY {values['TOPOLOGY']} has {chips} chips, HOSTS × DEVICES_PER_HOST is {have}")
if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", values["NAME"]):
    sys.exit(f"jobset.sh: NAME is {values['NAME']!r}: give up to 40 lower-case letters, digits and dashes")
# Kubernetes would expand $(NAME) in the value of a variable.
quoted = {name: json.dumps(value.replace("$(", "$$(")) for name, value in values.items()}
whole = {name: values[name] for name in ("HOSTS", "DEVICES_PER_HOST")}
print(string.Template(text).substitute(quoted | whole))
PYTHON
)
if [[ ${2:-} == --dry-run ]]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi

#!/usr/bin/env bash
# Serve a Qwen3 model on Kubernetes: replicas behind a Service, scaled by the length of their queue.
#
#   NAME=qwen ACCELERATOR=nvidia-h100-80gb DEVICES=8 IMAGE=REGISTRY/qwen3-jax CLAIM=models \
#   MODEL=/models/Qwen3-32B MESH=model=8 scripts/launch/serve.sh gpu [--dry-run]
#
# For TPUs: `serve.sh tpu`, with ACCELERATOR=tpu-v6e-slice TOPOLOGY=2x4 DEVICES=8; a replica is one host. CLAIM is a
# volume claim with the models, mounted at MOUNT (/models). ROWS (16) requests are decoded together per replica;
# between REPLICAS (1) and MAX_REPLICAS (4) run, so that about QUEUE (8) requests wait in each. An API key comes from
# the secret NAME, key api-key, if there is one. --dry-run prints the manifest instead of applying it.
set -euo pipefail

kind=${1:-}
if [[ $kind != tpu && $kind != gpu ]] || (($# > 2)) || [[ ${2:---dry-run} != --dry-run ]]; then
  echo "usage: scripts/launch/serve.sh tpu|gpu [--dry-run]" >&2
  exit 2
fi
export MOUNT=${MOUNT:-/models} ROWS=${ROWS:-16}
export REPLICAS=${REPLICAS:-1} MAX_REPLICAS=${MAX_REPLICAS:-4} QUEUE=${QUEUE:-8}

manifest=$(
  python3 - "$(dirname "$0")/serve.yaml" "$kind" <<'PYTHON'
import json, math, os, re, string, sys

# Every value becomes a JSON string or a whole number, so that nothing in it is YAML.
text, kind = open(sys.argv[1]).read(), sys.argv[2]
made = {"NODES", "DEVICE"}
asked = {"ACCELERATOR", "TOPOLOGY"} if kind == "tpu" else {"ACCELERATOR"}
names = sorted(set(re.findall(r"\$\{(\w+)\}", text)) - made | asked)
missing = [name for name in names if not os.environ.get(name)]
if missing:
    sys.exit(f"serve.sh: set {', '.join(missing)}")
values = {name: os.environ[name] for name in names}
numbers = ("DEVICES", "ROWS", "REPLICAS", "MAX_REPLICAS", "QUEUE")
for name in numbers:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", values[name]):
        sys.exit(f"serve.sh: {name} is {values[name]!r}: give a whole number")
if int(values["REPLICAS"]) > int(values["MAX_REPLICAS"]):
    sys.exit(f"serve.sh: REPLICAS is {values['REPLICAS']}, MAX_REPLICAS {values['MAX_REPLICAS']}: give at least as many")
if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", values["NAME"]):
    sys.exit(f"serve.sh: NAME is {values['NAME']!r}: give up to 40 lower-case letters, digits and dashes")
if kind == "gpu":
    nodes, device = {"cloud.google.com/gke-accelerator": values["ACCELERATOR"]}, "nvidia.com/gpu"
else:
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": values["ACCELERATOR"],
        "cloud.google.com/gke-tpu-topology": values["TOPOLOGY"],
    }
    device = "google.com/tpu"
    if math.prod(map(int, re.findall(r"\d+", values["TOPOLOGY"]))) != int(values["DEVICES"]):
        sys.exit(f"serve.sh: TOPOLOGY {values['TOPOLOGY']} does not have DEVICES {values['DEVICES']} chips: a replica is one host")
# Kubernetes would expand $(NAME) in the value of a variable.
quoted = {name: json.dumps(value.replace("$(", "$$(")) for name, value in values.items()}
whole = {name: values[name] for name in numbers}
print(string.Template(text).substitute(quoted | whole | {"NODES": json.dumps(nodes), "DEVICE": device}))
PYTHON
)
if [[ ${2:-} == --dry-run ]]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi

"""The launch templates without a cluster: they parse, render to what Kubernetes takes, and pass arguments on intact.

The commands that reach a cluster (srun, gcloud, kubectl) are replaced by scripts that run or record what they get.
"""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from qwen3_jax import cli
from qwen3_jax.distributed import Cluster, detect

LAUNCH = Path(__file__).parent.parent / "scripts" / "launch"
PROMPT = 'it\'s $HOME, "quoted": {a: b} # $(rm) *\nand a second line'
TPU = {
    "NAME": "qwen",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x4",
    "DEVICES_PER_HOST": "4",
    "HOSTS": "4",
    "IMAGE": "registry.example/qwen3-jax:1",
    "CLAIM": "models",
    "MODEL": "/models/Qwen3-30B-A3B",
    "MESH": "expert=4,model=4",
}
GPU = {key: value for key, value in TPU.items() if key != "TOPOLOGY"} | {
    "ACCELERATOR": "nvidia-h100-80gb",
    "DEVICES_PER_HOST": "8",
    "HOSTS": "2",
}
SETTINGS = {"tpu": TPU, "gpu": GPU}


def bash(
    *arguments: object, path: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script with a bare environment, `path` first on PATH."""
    search = os.pathsep.join([*([str(path)] if path else []), "/usr/local/bin", "/usr/bin", "/bin"])
    environment = {"PATH": search, **(env or {})}
    return subprocess.run(["bash", *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=60)


def stub(folder: Path, name: str, body: str) -> None:
    """Put a script on the PATH of a test."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def recorder(folder: Path, log: Path, name: str = "qwen3-jax") -> None:
    """Put a command on the PATH that writes its arguments as one line of JSON."""
    code = "import json,sys; print(json.dumps(sys.argv[1:]))"
    stub(folder, name, f'python3 -c {shlex.quote(code)} "$@" >> {shlex.quote(str(log))}')


def recorded(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh", "jobset.sh"])
def test_scripts_parse_stop_at_errors_and_tell_their_use(script):
    assert bash("-n", LAUNCH / script).returncode == 0
    assert "set -euo pipefail" in (LAUNCH / script).read_text()
    told = bash(LAUNCH / script)
    assert told.returncode == 2
    assert told.stderr.startswith("usage: ")


# --- Slurm ------------------------------------------------------------------------------------------------------------

# Options of sbatch (its manual page) that a template may use.
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "time", "output"}


def test_sbatch_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    head, _, body = text.partition("set -euo pipefail")
    assert text.startswith("#!")
    assert "#SBATCH" not in body  # Slurm stops reading at the first command
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.M))
    assert len(directives) == head.count("\n#SBATCH")
    assert directives.keys() <= SBATCH
    assert directives["ntasks-per-node"] == "1"  # one process drives the node's GPUs, see distributed.detect


def test_sbatch_runs_preflight_then_generate_on_every_task(tmp_path):
    recorder(tmp_path, tmp_path / "log")
    stub(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done\n"$@"\n"$@"')
    ran = bash(LAUNCH / "slurm.sbatch", "/a folder", "model=16", PROMPT, "second", path=tmp_path)
    assert ran.returncode == 0, ran.stderr
    preflight = ["preflight", "/a folder", "--mesh", "model=16"]
    generate = ["generate", "/a folder", PROMPT, "second", "--mesh", "model=16"]
    for command in (preflight, generate):  # the command line takes them
        cli._parse(command)
    assert recorded(tmp_path / "log") == [preflight, preflight, generate, generate]
    shown = bash(LAUNCH / "slurm.sbatch", "--dry-run", "/a folder", "model=16", PROMPT, "second")
    words = shlex.split(shown.stdout.replace("$'", "'").splitlines()[0])
    assert words == ["srun", "--kill-on-bad-exit=1", "--label", "qwen3-jax", *preflight]


def test_sbatch_ends_when_preflight_fails(tmp_path):
    stub(tmp_path, "srun", 'echo "$@" >> "$LOG"; exit 3')
    ran = bash(LAUNCH / "slurm.sbatch", "m", "model=16", path=tmp_path, env={"LOG": str(tmp_path / "log")})
    assert ran.returncode == 3
    assert len((tmp_path / "log").read_text().splitlines()) == 1


# --- Cloud TPU VM -----------------------------------------------------------------------------------------------------


def test_tpu_vm_arguments_survive_two_shells(tmp_path):
    home = tmp_path / "home"
    recorder(home / "qwen3-jax" / "bin", tmp_path / "log")
    recorder(home / "qwen3-jax" / "bin", tmp_path / "pip", "pip")
    stub(tmp_path, "python3", '[[ $1 == -m ]] && exit; exec /usr/bin/env -i PATH="$REAL" python3 "$@"')
    stub(
        tmp_path,
        "gcloud",
        'for a in "$@"; do [[ $a == --command=* ]] && command=${a#--command=}; done\n'
        'echo "${@:1:5} $7 $8" >> "$GCLOUD"\nbash -c "$command"',
    )
    environment = {"HOME": str(home), "REAL": "/usr/local/bin:/usr/bin:/bin", "GCLOUD": str(tmp_path / "gcloud.log")}
    ran = bash(
        LAUNCH / "tpu_vm.sh", "pod", "us-east5-b", "/a folder", "expert=4", PROMPT, path=tmp_path, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert recorded(tmp_path / "log") == [
        ["preflight", "/a folder", "--mesh", "expert=4"],
        ["generate", "/a folder", PROMPT, "--mesh", "expert=4"],
    ]
    assert recorded(tmp_path / "pip") == [["install", "--quiet", "qwen3-jax[tpu]"]]
    for line in (tmp_path / "gcloud.log").read_text().splitlines()[:3]:
        assert line.startswith("compute tpus tpu-vm ssh pod --worker=all")
    shown = bash(LAUNCH / "tpu_vm.sh", "--dry-run", "pod", "us-east5-b", "m", "expert=4", env={"PROJECT": "mine"})
    assert shown.stdout.count("--zone=us-east5-b --project=mine --worker=all") == 3


# --- JobSet -----------------------------------------------------------------------------------------------------------

# What each object may hold, from the JobSet v1alpha2 and Kubernetes v1 API references, as far as the templates use it.
SCHEMA = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name", "annotations"},
    "spec": {"network", "failurePolicy", "replicatedJobs"},
    "network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "failurePolicy": {"maxRestarts"},
    "replicatedJobs": {"name", "replicas", "template"},
    "job": {"parallelism", "completions", "completionMode", "backoffLimit", "template"},
    "pod": {"restartPolicy", "nodeSelector", "containers", "volumes"},
    "container": {"name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"},
    "env": {"name", "value", "valueFrom"},
    "resources": {"requests", "limits"},
    "volumeMounts": {"name", "mountPath", "readOnly"},
    "volumes": {"name", "persistentVolumeClaim", "emptyDir"},
}


def validate(manifest: dict) -> tuple[dict, dict, dict]:
    """Check names and types of every field; return (job spec, pod spec, container)."""

    def fields(kind: str, value: dict) -> dict:
        assert isinstance(value, dict)
        assert value.keys() <= SCHEMA[kind], f"{kind}: {value.keys() - SCHEMA[kind]}"
        return value

    fields("", manifest)
    fields("metadata", manifest["metadata"])
    assert all(isinstance(value, str) for value in manifest["metadata"].get("annotations", {}).values())
    spec = fields("spec", manifest["spec"])
    fields("network", spec["network"])
    fields("failurePolicy", spec["failurePolicy"])
    [jobs] = spec["replicatedJobs"]
    fields("replicatedJobs", jobs)
    assert jobs["template"].keys() == {"spec"}
    job = fields("job", jobs["template"]["spec"])
    assert job["template"].keys() == {"spec"}
    pod = fields("pod", job["template"]["spec"])
    [container] = pod["containers"]
    fields("container", container)
    for env in container["env"]:
        fields("env", env)
        assert isinstance(env.get("value", ""), str)  # Kubernetes refuses numbers here
        assert ("value" in env) != ("valueFrom" in env)
    fields("resources", container["resources"])
    assert all(isinstance(port["containerPort"], int) for port in container["ports"])
    names = {fields("volumes", volume)["name"] for volume in pod["volumes"]}
    assert names == {fields("volumeMounts", mount)["name"] for mount in container["volumeMounts"]}
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())
    return job, pod, container


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_manifest(kind):
    settings = SETTINGS[kind] | {"PROMPT": PROMPT}
    shown = bash(LAUNCH / "jobset.sh", kind, "--dry-run", env=settings)
    assert shown.returncode == 0, shown.stderr
    manifest = yaml.safe_load(shown.stdout)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "qwen"
    job, pod, container = validate(manifest)
    hosts, per_host = int(settings["HOSTS"]), int(settings["DEVICES_PER_HOST"])
    assert job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == manifest["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert pod["restartPolicy"] == "Never"
    device = "google.com/tpu" if kind == "tpu" else "nvidia.com/gpu"
    assert container["resources"] == {"requests": {device: per_host}, "limits": {device: per_host}}
    assert container["image"] == settings["IMAGE"]
    assert manifest["spec"]["network"]["publishNotReadyAddresses"] is True
    assert settings["ACCELERATOR"] in pod["nodeSelector"].values()
    if kind == "tpu":
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_pod_runs_the_commands_with_arguments_intact(kind, tmp_path):
    manifest = yaml.safe_load(
        bash(LAUNCH / "jobset.sh", kind, "--dry-run", env=SETTINGS[kind] | {"PROMPT": PROMPT}).stdout
    )
    *_, container = validate(manifest)
    environment = {env["name"]: expanded(env["value"]) for env in container["env"] if "value" in env}
    assert environment["PROMPT"] == PROMPT
    recorder(tmp_path, tmp_path / "log")
    script = [*container["command"][1:], expanded(container["args"][0])]
    ran = bash(*script, path=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    model, mesh = SETTINGS[kind]["MODEL"], SETTINGS[kind]["MESH"]
    assert recorded(tmp_path / "log") == [
        ["preflight", model, "--mesh", mesh],
        ["generate", model, PROMPT, "--mesh", mesh],
    ]


def expanded(text: str) -> str:
    """Do what Kubernetes does to values and arguments: $(NAME) is a variable unless written $$(NAME)."""
    assert not re.search(r"(?<!\$)\$\(", text)
    return text.replace("$$(", "$(")


def test_gpu_pods_find_each_other():
    """Pod i's variables, read by the library; the coordinator is the name that JobSet gives pod 0."""
    manifest = yaml.safe_load(bash(LAUNCH / "jobset.sh", "gpu", "--dry-run", env=GPU).stdout)
    *_, container = validate(manifest)
    environment = {env["name"]: env.get("value") for env in container["env"]}
    [index] = [env["valueFrom"] for env in container["env"] if env["name"] == "QWEN3_PROCESS_ID"]
    assert index == {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    jobs = manifest["spec"]["replicatedJobs"][0]["name"]
    name = manifest["metadata"]["name"]
    for i in range(2):
        pod = environment | {"QWEN3_PROCESS_ID": str(i), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, the subdomain being the JobSet's name
        assert detect(environment=pod) == Cluster(f"{name}-{jobs}-0-0.{name}:8476", 2, i)
    assert 8476 in [port["containerPort"] for port in container["ports"]]


def test_jobset_is_applied_as_shown(tmp_path):
    stub(tmp_path, "kubectl", 'echo "$@" > "$OUT.args"; cat > "$OUT"')
    out = tmp_path / "applied"
    assert bash(LAUNCH / "jobset.sh", "tpu", path=tmp_path, env=TPU | {"OUT": str(out)}).returncode == 0
    assert out.read_text() == bash(LAUNCH / "jobset.sh", "tpu", "--dry-run", env=TPU).stdout
    assert (tmp_path / "applied.args").read_text() == "apply -f -\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL": "", "IMAGE": ""}, "jobset.sh: set IMAGE, MODEL"),
        ({"HOSTS": "four"}, "jobset.sh: HOSTS is 'four': give a whole number"),
        ({"HOSTS": "2"}, "jobset.sh: TOPOLOGY 4x4 has 16 chips, HOSTS × DEVICES_PER_HOST is 8"),
        ({"NAME": "Qwen_3"}, "jobset.sh: NAME is 'Qwen_3'"),
    ],
)
def test_jobset_refuses(changes, message):
    refused = bash(LAUNCH / "jobset.sh", "tpu", "--dry-run", env=TPU | changes)
    assert refused.returncode == 1
    assert refused.stderr.startswith(message)
    assert refused.stdout == ""

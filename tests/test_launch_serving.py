"""The manifests of a served model without a cluster: field by field, and the server that a pod would start."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from qwen3_jax import cli
from qwen3_jax.server.metrics import Metrics
from tests.fake_engine import FakeEngine
from tests.test_launch import bash, expanded, recorded, recorder, stub

LAUNCH = Path(__file__).parent.parent / "scripts" / "launch"
MODEL = "/models/it's a $HOME: {model} #1"
GPU = {"NAME": "qwen", "ACCELERATOR": "nvidia-h100-80gb", "DEVICES": "8", "IMAGE": "registry.example/qwen3-jax:1",
       "CLAIM": "models", "MODEL": MODEL, "MESH": "model=8"}  # fmt: skip
TPU = GPU | {"ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "2x4"}
SETTINGS = {"gpu": GPU, "tpu": TPU}

# What the templates use of the Kubernetes API (apps/v1, v1, autoscaling/v2), by the field that holds it.
SCHEMA = {
    "Deployment.spec": {"selector", "strategy", "template"},
    "template": {"metadata", "spec"},
    "pod": {"terminationGracePeriodSeconds", "nodeSelector", "containers", "volumes"},
    "container": {"name", "image", "command", "args", "env", "ports", "startupProbe", "readinessProbe", "livenessProbe",
                  "lifecycle", "resources", "securityContext", "volumeMounts"},
    "probe": {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"},
    "Service.spec": {"selector", "ports"},
    "HorizontalPodAutoscaler.spec": {"scaleTargetRef", "minReplicas", "maxReplicas", "metrics", "behavior"},
}  # fmt: skip


def manifests(kind: str, **changes: str) -> dict[str, dict]:
    shown = bash(LAUNCH / "serve.sh", kind, "--dry-run", env=SETTINGS[kind] | changes)
    assert shown.returncode == 0, shown.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(shown.stdout)}


def container_of(found: dict[str, dict]) -> dict:
    [container] = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def test_the_script_parses_stops_at_errors_and_tells_its_use():
    assert bash("-n", LAUNCH / "serve.sh").returncode == 0
    assert "set -euo pipefail" in (LAUNCH / "serve.sh").read_text()
    told = bash(LAUNCH / "serve.sh")
    assert told.returncode == 2
    assert told.stderr.startswith("usage: ")


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_the_manifests_fit_together(kind):
    found = manifests(kind)
    versions = {name: one["apiVersion"] for name, one in found.items()}
    assert versions == {"Deployment": "apps/v1", "Service": "v1", "HorizontalPodAutoscaler": "autoscaling/v2"}
    deployment, service, scaler = found.values()
    template = deployment["spec"]["template"]
    pod, container = template["spec"], container_of(found)
    for name, value in (("Deployment.spec", deployment["spec"]), ("template", template), ("pod", pod),
                        ("container", container), ("Service.spec", service["spec"]),
                        ("HorizontalPodAutoscaler.spec", scaler["spec"])):  # fmt: skip
        assert value.keys() <= SCHEMA[name], name
    # Whom the Service sends to and the Deployment counts are the pods that it makes.
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    assert service["spec"]["selector"] == selector
    [port] = service["spec"]["ports"]
    assert port["targetPort"] in [p["name"] for p in container["ports"]]
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "qwen"}
    assert 1 <= scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe].keys() <= SCHEMA["probe"]
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}  # the one door without a key
    device = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}[kind]
    assert container["resources"] == {"requests": {device: 8}, "limits": {device: 8}}
    assert pod["nodeSelector"] == (
        {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"} if kind == "gpu" else
        {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "2x4"}
    )  # fmt: skip
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    for env in container["env"]:
        assert isinstance(env.get("value", ""), str)
        assert ("value" in env) != ("valueFrom" in env)


def test_a_pod_starts_the_server_with_its_arguments_intact(tmp_path):
    container = container_of(manifests("gpu", ROWS="32"))
    environment = {env["name"]: expanded(env["value"]) for env in container["env"] if "value" in env}
    recorder(tmp_path, tmp_path / "log")
    ran = bash(*container["command"][1:], expanded(container["args"][0]), path=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    [arguments] = recorded(tmp_path / "log")
    assert arguments[:2] == ["serve", MODEL]
    command: Any = cli._parse(arguments)  # the command line takes them
    assert (command.folder, command.host, command.port) == (MODEL, "0.0.0.0", 8000)
    assert (command.mesh, command.rows, command.shutdown_timeout) == ("model=8", 32, 120)
    stop = container["lifecycle"]["preStop"]["exec"]["command"]
    grace = manifests("gpu")["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(stop[1]) + command.shutdown_timeout < grace
    # Where the root is read-only, what is written lies on a volume.
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert {command.compile_cache, "/tmp"} <= mounts


def test_the_autoscalers_metric_is_one_that_the_server_has():
    rules = yaml.safe_load((LAUNCH / "serve_metrics.yaml").read_text())["rules"]["custom"]
    [rule] = rules
    series = rule["seriesQuery"].split("{")[0]
    metrics = Metrics("demo")
    metrics.watch(FakeEngine())
    assert f"{series}{{" in metrics.text().decode()
    given = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("${1}", r"\1"), series)
    [wanted] = manifests("gpu", QUEUE="5")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert wanted["pods"]["metric"]["name"] == given
    assert wanted["pods"]["target"] == {"type": "AverageValue", "averageValue": "5"}


def test_it_is_applied_as_shown(tmp_path):
    stub(tmp_path, "kubectl", 'echo "$@" > "$OUT.args"; cat > "$OUT"')
    out = tmp_path / "applied"
    assert bash(LAUNCH / "serve.sh", "tpu", path=tmp_path, env=TPU | {"OUT": str(out)}).returncode == 0
    assert out.read_text() == bash(LAUNCH / "serve.sh", "tpu", "--dry-run", env=TPU).stdout
    assert (tmp_path / "applied.args").read_text() == "apply -f -\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MODEL": "", "IMAGE": ""}, "serve.sh: set IMAGE, MODEL"),
        ({"ROWS": "0"}, "serve.sh: ROWS is '0': give a whole number"),
        ({"DEVICES": "4"}, "serve.sh: TOPOLOGY 2x4 does not have DEVICES 4 chips"),
        ({"REPLICAS": "9"}, "serve.sh: REPLICAS is 9, MAX_REPLICAS 4"),
        ({"NAME": "Qwen_3"}, "serve.sh: NAME is 'Qwen_3'"),
    ],
)
def test_what_is_refused(changes, message):
    refused = bash(LAUNCH / "serve.sh", "tpu", "--dry-run", env=TPU | changes)
    assert refused.returncode == 1
    assert refused.stderr.startswith(message)
    assert refused.stdout == ""


# --- Ray Serve, of which there is only the outside here ---------------------------------------------------------------


@pytest.fixture
def ray_serve(monkeypatch) -> tuple[ModuleType, SimpleNamespace]:
    """Import the application's module with a stand-in for `ray.serve` that keeps what it is given."""
    given = SimpleNamespace(builder=None, options={})

    def ingress(builder):
        given.builder = builder
        return lambda: type("Replica", (), {})

    def deployment(replica, **options):
        given.options = options
        return SimpleNamespace(bind=lambda: "bound")

    serve: Any = ModuleType("ray.serve")
    serve.ingress, serve.deployment = ingress, deployment
    ray: Any = ModuleType("ray")
    ray.serve = serve
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    spec = importlib.util.spec_from_file_location("serve_ray", LAUNCH / "serve_ray.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_ray", module)
    spec.loader.exec_module(module)
    return module, given


def test_the_ray_application(ray_serve, monkeypatch):
    module, given = ray_serve
    arguments = {"model": "/models/Qwen3-8B", "gpus": "2", "max_replicas": "4", "queue": "10", "rows": "8"}
    assert module.app(arguments) == "bound"
    assert given.options["ray_actor_options"] == {"num_gpus": 2.0, "resources": {}}
    assert given.options["autoscaling_config"]["max_replicas"] == 4
    assert given.options["autoscaling_config"]["target_ongoing_requests"] == 10
    json.dumps(given.options)  # plain data
    seen = []
    monkeypatch.setattr(module, "build", seen.append)
    given.builder()  # what a replica calls
    assert (seen[0].model, seen[0].rows) == ("/models/Qwen3-8B", 8)
    assert dataclasses.is_dataclass(seen[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give model=FOLDER"),
        ({"model": "m", "modle": "x"}, "unknown arguments modle"),
        ({"model": "m", "replicas": "3"}, "replicas is 3: give 1 to max_replicas, 1"),
        ({"model": "m", "rows": "many"}, "many"),
    ],
)
def test_what_the_ray_application_refuses(ray_serve, arguments, message):
    with pytest.raises(ValueError, match=message):
        ray_serve[0].app(arguments)

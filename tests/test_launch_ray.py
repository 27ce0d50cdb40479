"""The Ray Serve application on one local replica; runs where `pip install 'qwen3-jax[ray]'` was done."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]")
def test_one_replica_answers_as_the_server_does(tmp_path):
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "qwen3",
                "import_path": "serve_ray:app",
                "args": {"model": str(ROOT / "qwen3_jax" / "demo"), "rows": "2", "cache_tokens": "512"},
            }
        ],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    serve = Path(sys.executable).with_name("serve")
    command = [serve, "run", tmp_path / "config.yaml"]
    said = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 100, "temperature": 0}
    path = os.pathsep.join([str(ROOT / "scripts" / "launch"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "JAX_PLATFORMS": "cpu"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < until:
            try:
                models = json.loads(call(port, "/v1/models"))
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(2)
        else:
            pytest.fail((tmp_path / "log").read_text()[-3000:])
        assert [model["id"] for model in models["data"]] == ["demo"]
        answer = json.loads(call(port, "/v1/chat/completions", said))
        assert answer["choices"][0]["message"]["content"] == "The answer is 42."
        stream = call(port, "/v1/chat/completions", said | {"stream": True})
        chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "The answer is 42."
        assert "qwen3:generation_tokens_total" in call(port, "/metrics")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def call(port: int, path: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()

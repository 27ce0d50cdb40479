"""One server over two processes: the first answers, the others follow; when one is lost, nothing hangs."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from qwen3_jax.engine.lockstep import LOST_EXIT
from tests.ports import free_port
from tests.server_process import ROOT

ARGUMENTS = ["--mesh", "model=2", "--rows", "2", "--chunk-tokens", "32", "--cache-tokens", "1024"]


@contextlib.contextmanager
def served(tmp_path, *, processes: int):
    """Run a server over processes; yield its address and them."""
    port = free_port()
    common = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(2 // processes)}
    if processes > 1:
        common |= {"QWEN3_COORDINATOR": f"127.0.0.1:{free_port()}", "QWEN3_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", "qwen3_jax", "serve", "--port", str(port), *ARGUMENTS]
    command += ["--compile-cache", str(tmp_path / "xla")]
    running = []
    for i in range(processes):
        with (tmp_path / f"{processes}-{i}.log").open("wb") as log:
            environment = common | ({"QWEN3_PROCESS_ID": str(i)} if processes > 1 else {})
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if health(address) == 200:
                break
            assert all(p.poll() is None for p in running), [p.read_text()[-2000:] for p in tmp_path.glob("*.log")]
            time.sleep(0.25)
        yield address, running
    finally:
        for process in running:
            process.kill()
            process.wait()


def health(address: str) -> int:
    """Return the status of /health, 0 if nobody answers."""
    try:
        with urllib.request.urlopen(address + "/health", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def post(address: str, path: str, value: object) -> tuple[int, dict]:
    request = urllib.request.Request(address + path, json.dumps(value).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def texts(address: str) -> list[str]:
    prompts = ["The sky", "1 + 1 =", "Once upon a time there was a"]
    asked = [{"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True} for prompt in prompts]
    return [post(address, "/v1/completions", body)[1]["choices"][0]["text"] for body in asked]


@pytest.mark.slow  # engines for two devices, compiled three times
def test_two_processes_serve_what_one_serves(tmp_path):
    with served(tmp_path, processes=1) as (address, _):
        expected = texts(address)
    with served(tmp_path, processes=2) as (address, (first, second)):
        assert texts(address) == expected
        status, answer = post(address, "/v1/embeddings", {"input": "The sky", "model": "demo"})
        assert (status, answer["error"]["code"]) == (501, 501)
        second.terminate()  # as a scheduler that ends a job tells everybody
        first.terminate()
        assert first.wait(60) == 0
        assert second.wait(60) == 0


@pytest.mark.slow
def test_a_lost_process_turns_health_red_and_ends_the_other(tmp_path):
    with served(tmp_path, processes=2) as (address, (first, second)):
        second.kill()
        seen = set()
        until = time.monotonic() + 60
        while first.poll() is None and time.monotonic() < until:
            seen.add(health(address))
            time.sleep(0.2)
        assert 503 in seen
        assert first.wait(1) in (1, LOST_EXIT)

"""`qwen3-jax generate --mesh` says what it says on one device: on eight devices, and in two processes of four."""

import json
import os
import subprocess
import sys

import pytest

from qwen3_jax import cli
from tests import engines
from tests.ports import free_port

ASKED = ["Hi there", "Hello", "Bye", "--max-tokens", "8", "--seed", "1", "--dtype", "float32", "--json"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    engines.write(folder)
    return ["generate", str(folder), *ASKED]


def texts(out: str) -> list[dict]:
    keys = ("text", "token_ids", "finish_reason", "seed")
    lines = [line for line in out.splitlines() if line.startswith("{")]  # Gloo greets on stdout
    return [{key: record[key] for key in keys} for record in map(json.loads, lines)]


def test_any_mesh_and_any_number_of_processes_say_the_same(argv, capsys):
    capsys.readouterr()
    assert cli.main(argv) == 0
    alone = texts(capsys.readouterr().out)
    assert len(alone) == 3
    assert cli.main([*argv, "--mesh", "data=2,expert=2,model=2"]) == 0
    assert texts(capsys.readouterr().out) == alone

    common = os.environ | {"QWEN3_COORDINATOR": f"127.0.0.1:{free_port()}", "QWEN3_NUM_PROCESSES": "2"}
    common["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "qwen3_jax", *argv, "--mesh", "data=2,model=4"]
    processes = [
        subprocess.Popen(
            command,
            env=common | {"QWEN3_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outs
    assert texts(outs[0][0]) == alone
    assert texts(outs[1][0]) == []  # the first process speaks for all


def test_a_mesh_of_another_size_is_refused_in_one_line(argv, capsys):
    assert cli.main([*argv, "--mesh", "model=3"]) == 2
    assert "= 3 devices, have 8" in capsys.readouterr().err

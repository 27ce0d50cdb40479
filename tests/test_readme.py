"""Every command and every line of Python in the README runs, as it is printed there."""

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qwen3_jax import cli
from tests import ports

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line[2:], comments=True)
    for language, text in BLOCKS
    if language == "console"
    for line in text.replace("\\\n", "").splitlines()
    if line.startswith("$ ")
]
COMPILES = "--topology"  # minutes of a TPU compiler: tests/test_plan_tpu.py runs these


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """Stand in a folder that has what the README speaks of: a model folder, here the embedded one, and two files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-0.6B").symlink_to(ROOT / "qwen3_jax" / "demo")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    messages = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small Qwen3."}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    request: dict[str, object] = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
    request["body"] = {"messages": messages[:1], "max_tokens": 4}
    (tmp_path / "requests.jsonl").write_text(json.dumps(request) + "\n")
    return tmp_path


def test_there_is_something_to_run():
    assert ["make", "demo"] in COMMANDS
    assert ["make", "test"] in COMMANDS
    assert sum(command[0] == "qwen3-jax" for command in COMMANDS) >= 4
    assert {command[0] for command in COMMANDS} <= {"make", "qwen3-jax", "pip"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=" ".join)
def test_make_targets_exist(command):
    """`make test` is what runs this test; a dry run shows that each target is there and can be planned."""
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "pip"], ids=" ".join)
def test_extras_exist(command):
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\[([\w,]+)\]", " ".join(command)):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", pyproject, re.MULTILINE), name


def serve(argv: list[str]) -> None:
    """Run a server until it is well, then end it; the last --port counts."""
    port = ports.free_port()
    process = subprocess.Popen([sys.executable, "-m", "qwen3_jax", *argv, "--port", str(port)])
    try:
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    assert answer.status == 200
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.25)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_commands_run_one_after_the_other(newcomer, monkeypatch):
    for command in COMMANDS:
        if command[:2] == ["qwen3-jax", "serve"]:
            serve(command[1:])
        elif command[0] == "qwen3-jax" and COMPILES not in command:
            with open("/dev/null") as nobody:  # a chat with nobody ends at once
                monkeypatch.setattr("sys.stdin", nobody)
                assert cli.main(command[1:]) == 0, command


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"])
def test_python_runs(code, newcomer, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_file_map_names_every_module_and_nothing_else():
    (listing,) = [text for language, text in BLOCKS if language == "text" and "model.py" in text]
    named = set(re.findall(r"^ *([\w./]+)", listing, re.MULTILINE)) - {"qwen3_jax/"}
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "qwen3_jax").iterdir() if not p.name.startswith("__")}
    top = {"configs/", "scripts/", "tests/"}
    assert named == there | top

"""The command line: what it prints, where, and its exit codes; in this process, and once as a process of its own."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from qwen3_jax import cli, cli_text
from qwen3_jax.generate import Generator
from qwen3_jax.reply import Completion
from qwen3_jax.sampling_params import SamplingParams
from tests import tiny
from tests.text_folders import DEMO

FOLDER = str(DEMO)


@functools.cache
def demo_generator() -> Generator:
    return Generator.from_folder(DEMO, cache="off")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line; models are loaded once. Returns (code, stdout, stderr)."""

    def run(*argv: str, stdin: str = ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = cli.main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(cli_text, "_load", lambda *_: demo_generator())


def shown(completion: Completion) -> str:
    """Return what a terminal shows of a reply."""
    reasoning = f"<think>\n{completion.reasoning}\n</think>" if completion.reasoning else ""
    between = "\n\n" if reasoning and completion.answer else ""
    return f"{reasoning}{between}{completion.answer}\n"


def one_error(result: tuple[int, str, str]) -> str:
    """Check the shape of a refusal and return its line."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("qwen3-jax: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.usefixtures("loaded")
def test_generate_streams_one_answer(run):
    expected = demo_generator().chat("Hello", max_tokens=12, seed=1)
    code, out, err = run("generate", FOLDER, "Hello", "--max-tokens", "12", "--seed", "1")
    assert (code, out) == (0, expected.text + "\n")
    for word in ("12 tokens", "tokens/s", "first token", "load", "compile", "prefill", "decode"):
        assert word in err
    raw = demo_generator().generate(["Hello"], max_tokens=12, seed=1)[0]
    assert run("generate", FOLDER, "--raw", "--max-tokens", "12", "--seed", "1", stdin="Hello\n")[1] == raw.text + "\n"


@pytest.mark.usefixtures("loaded")
def test_generate_json_has_everything(run):
    code, out, _ = run("generate", FOLDER, "a", "b", "--json", "--max-tokens", "6", "--seed", "2", "--logprobs", "1")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, len(records)) == (0, 2)
    for prompt, record in zip("ab", records, strict=True):
        expected = demo_generator().chat(prompt, max_tokens=6, seed=2)
        assert record["answer"] == expected.answer
        assert record["token_ids"] == list(expected.token_ids)
        assert record["usage"]["completion_tokens"] == 6
        assert set(record["timings"]) >= {
            "load_s",
            "compile_s",
            "prefill_s",
            "decode_s",
            "first_token_s",
            "tokens_per_s",
        }
        assert len(record["logprobs"]) == 6
    code, out, _ = run("generate", FOLDER, "a", "b", "--max-tokens", "6", "--seed", "2")
    assert out == "".join(f"=== {p}\n{r['text']}\n" for p, r in zip("ab", records, strict=True))


@pytest.mark.usefixtures("loaded")
def test_thinking_is_shown_in_its_tags(run):
    settings = ["--max-tokens", "60", "--thinking-budget", "0", "--temperature", "0"]
    expected = demo_generator().chat("Hi", max_tokens=60, thinking_budget=0, temperature=0)
    _, out, err = run("generate", FOLDER, "Hi", *settings)
    assert out.startswith("<think>\nConsidering the limited time")
    assert out == shown(expected)
    assert f"({expected.usage.reasoning_tokens} thinking)" in err
    assert "</think>" not in run("generate", FOLDER, "Hi", "--thinking", "off", *settings)[1]


@pytest.mark.usefixtures("loaded")
def test_chat_from_a_pipe_keeps_the_conversation(run):
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    flags = ["--max-tokens", "6", "--temperature", "0"]
    first = demo_generator().chat("one", **settings)
    said = {"role": "assistant", "content": first.answer, "reasoning_content": first.reasoning}
    turns = [{"role": "user", "content": "one"}, said, {"role": "user", "content": "two /no_think"}]
    second = demo_generator().chat(turns, **settings)
    code, out, err = run("chat", FOLDER, *flags, stdin="one\n\ntwo /no_think\n/reset\none\n")
    assert (code, out) == (0, shown(first) + shown(second) + shown(first))
    assert "the conversation is forgotten" in err
    code, out, _ = run("chat", FOLDER, "--json", *flags, stdin="one\ntwo /no_think\n")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [first.text, second.text]
    system = demo_generator().chat([{"role": "system", "content": "S"}, turns[0]], **settings)
    assert run("chat", FOLDER, "--system", "S", *flags, stdin="one\n")[1] == shown(system)


@pytest.mark.usefixtures("loaded")
def test_demo_thinks_and_answers(run):
    code, out, err = run("demo", "--temperature", "0")
    assert code == 0
    assert out.count("<think>\n") == out.count("\n</think>\n\n") == 4
    for sum in (4786 + 359, 4786 + 359 - 84, 233 + 113):
        assert f"\n={sum}\n</think>" in out
    assert "\n=December 7\n</think>\n\nThe answer is December 7.\n" in out
    assert "> Now take away 84." in err
    code, out, err = run("demo", "--json", "8 + 5", "--temperature", "0")
    assert code == 0
    assert json.loads(out)["answer"] == "The answer is 13."


def test_models_lists_all_released_configs(run):
    from qwen3_jax.config import Qwen3Config

    _, out, _ = run("models", "--json")
    facts = {f["name"]: f for f in json.loads(out)}
    assert set(facts) == set(Qwen3Config.names())
    big = facts["Qwen3-235B-A22B"]
    assert (big["parameters"], big["active_parameters"]) == (235093634560, 22190763520)
    assert big["bfloat16_cache_bytes_per_token"] == 192512
    table = run("models")[1]
    assert all(name in table for name in facts)
    assert "235,093,634,560  22,190,763,520" in table


def test_convert_there_and_back(run, tmp_path):
    tiny.save(tmp_path / "hf", num_hidden_layers=1)
    there, back = str(tmp_path / "orbax"), str(tmp_path / "back")
    assert run("convert", str(tmp_path / "hf"), there, "--to", "orbax")[0] == 0
    assert run("convert", there, back, "--to", "hf")[0] == 0
    assert (tmp_path / "hf" / "config.json").read_bytes() == (tmp_path / "back" / "config.json").read_bytes()
    assert "orbax" in one_error(run("convert", str(tmp_path / "hf"), there, "--to", "orbax"))


def test_parity_is_called_with_the_flags(run, tmp_path, monkeypatch):
    from qwen3_jax import parity

    calls = []
    monkeypatch.setattr(parity, "main", lambda folder, **options: calls.append((folder, options)) or 1)
    assert run("parity", FOLDER, "--report", str(tmp_path / "r.html"), "--length", "9")[0] == 1
    ((folder, options),) = calls
    assert folder == DEMO
    assert (options["report"], options["length"]) == (tmp_path / "r.html", 9)


def test_flags_are_the_fields_of_sampling_params():
    flags = {f.name for f in dataclasses.fields(cli_text._Flags)}
    assert flags == {f.name for f in dataclasses.fields(SamplingParams)}
    argv = ["generate", "DIR", "x", "--temperature", "0.5", "--top-k", "3", "--stop", "a", "b", "--stop-token-ids", "4"]
    command: Any = cli._parse(
        [*argv, "--logit-bias", "7", "-1.5", "--ignore-eos", "--thinking-budget", "0", "--seed", "-3"]
    )
    assert cli_text._changes(command.sampling) == {
        "temperature": 0.5,
        "top_k": 3,
        "stop": ("a", "b"),
        "stop_token_ids": (4,),
        "logit_bias": {7: -1.5},
        "ignore_eos": True,
        "thinking_budget": 0,
        "seed": -3,
    }


def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    tiny.save(broken, num_hidden_layers=1)
    run("models", "--json")  # empties what transformers said
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    for argv, message in (
        (["frobnicate"], "Unrecognized options: frobnicate"),
        (["generate"], "DIR"),
        (["generate", FOLDER, "x", "--tempreature", "1"], "did you mean --temperature?"),
        (["generate", FOLDER, "x", "--temperature", "warm"], "--temperature cannot be 'warm'"),
        (["generate", FOLDER, "x", "--temperature", "nan"], "temperature is nan"),
        (["generate", FOLDER, "x", "--top-p", "0"], "top_p is 0.0: must be a finite number above 0 to 1"),
        (["chat", FOLDER, "--max-tokens", "0"], "max_tokens is 0"),
        (["generate", FOLDER], "no prompt: standard input is empty"),
        (["generate", str(tmp_path / "nowhere"), "x"], "no such folder"),
        (["generate", str(empty), "x"], "config.json"),
        (["generate", str(broken), "x"], "num_key_value_heads"),
        (["convert", str(empty), str(tmp_path / "out"), "--to", "orbax"], "config.json"),
        (["convert", FOLDER, str(tmp_path / "out"), "--to", "gguf"], "gguf"),
        (["parity", str(empty)], "config.json"),
    ):
        assert message in one_error(run(*argv))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("loaded")
def test_a_prompt_beyond_the_context_names_both_numbers(run):
    words = "sky " * 5000
    tokens = len(demo_generator().tokenizer.encode(words))
    for argv in (["generate", FOLDER, "--raw", words], ["chat", FOLDER]):
        error = one_error(run(*argv, stdin=words if argv[0] == "chat" else ""))
        assert "the context of the model is 4096" in error
        assert argv[0] == "chat" or f"{tokens} tokens" in error


@pytest.mark.usefixtures("loaded")
def test_interrupting_is_clean(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Generator, "stream", interrupted)
    code, _, err = run("generate", FOLDER, "x")
    assert (code, err) == (130, "\n")


def test_errors_of_the_program_keep_their_traceback(run, monkeypatch):
    monkeypatch.setattr(cli_text, "_load", lambda *_: [][0])
    with pytest.raises(IndexError):
        run("demo")

    def buggy(*_) -> Generator:
        raise ValueError("a shape of ours")

    monkeypatch.setattr(cli_text, "_load", buggy)
    with pytest.raises(ValueError, match="a shape of ours"):
        run("demo")


def test_help_and_the_demo_as_processes(tmp_path):
    """Parsing imports no JAX; `demo` answers in any working directory and fills the compile cache."""
    code = "import sys; from qwen3_jax import cli; cli._parse(['models']); assert 'jax' not in sys.modules"
    root = {"PYTHONPATH": str(DEMO.parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | root)
    environment = os.environ | root | {"QWEN3_JAX_COMPILE_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "qwen3_jax.cli", "demo", "--max-tokens", "8"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "8 tokens" in done.stderr
    assert list((tmp_path / "cache").iterdir())

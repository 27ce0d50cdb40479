"""The demo checkpoint: a folder that transformers takes for a released one, trained, and as good as its card says."""

import json
import re
import runpy
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qwen3_jax.evaluate import harness
from qwen3_jax.evaluate.harness import Mode
from qwen3_jax.evaluate.tasks import TASKS
from qwen3_jax.generate import Generator
from tests.text_folders import DEMO, RELEASED, REPO, ours, released, template, theirs

pytestmark = pytest.mark.users_programs


@cache
def generator() -> Generator:
    return Generator.from_folder(DEMO, dtype="float32", cache="off")


def test_transformers_loads_it_and_reads_the_same_prompt():
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(DEMO, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    config = model.config
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.vocab_size > ours().vocab_size == len(theirs())
    generation = model.generation_config
    assert generation.eos_token_id == [ours().eos_id, ours().pad_id] == list(ours().stop_ids)
    assert (generation.do_sample, generation.temperature, generation.top_p, generation.top_k) == (True, 0.6, 0.95, 20)
    messages = [{"role": "user", "content": "Hello! Привет 你好 😀"}]
    ids = ours().encode(template().render(messages))
    assert ids == theirs().apply_chat_template(messages, add_generation_prompt=True).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits.float().numpy()
    assert logits.shape == (1, len(ids), config.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_greedy_text_is_that_of_transformers(enable_thinking):
    """In float32 on both sides; a problem of every family, held out of training.

    One pass over prompt and answer says what transformers would have drawn at every place of it.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    problems = [task.sample(Random(7), held_out=True) for task in TASKS]
    prompts = [template().render(list(p.messages), enable_thinking=enable_thinking) for p in problems]
    found = generator().generate(prompts, max_tokens=160, temperature=0.0)
    for prompt, completion in zip(prompts, found, strict=True):
        ids, answer = ours().encode(prompt), list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer, completion.text
        ended = [token in model.generation_config.eos_token_id for token in answer]
        assert not any(ended[:-1])
        assert ended[-1] or len(answer) == 160


def test_it_answers_problems_that_it_never_saw_as_its_card_says():
    """The rates of few problems; the card's are of many (`qwen3-jax eval`)."""
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    problems = harness.draw(TASKS, 8, seed=11)
    answer = harness.through_generator(generator(), batch_size=16)
    rates = {}
    for thinking in (True, False):
        mode = Mode(thinking)
        outcomes = harness.evaluate(
            answer, template(), generator().defaults, problems, [mode], max_tokens=256, seed=0
        )  # fmt: skip
        rates[thinking] = harness.score(outcomes, mode=mode)
    # The columns of the last row: problems, greedy without thinking, greedy with it, and the same two sampled.
    (row,) = re.findall(r"^\| \*\*all\*\* \|.*$", card, re.MULTILINE)
    plain, thought = (float(cell.split()[0]) / 100 for cell in row.split("|")[3:5])
    said = {False: plain, True: thought}
    for thinking, score in rates.items():
        low, high = score.interval
        assert low - 0.05 <= said[thinking] <= high + 0.05
    assert rates[True].interval[0] > rates[False].interval[1]


def test_its_files_are_few_and_small():
    names = {p.name for p in DEMO.iterdir()}
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == files | {"README.md", "budget.png"}
    assert sum(p.stat().st_size for p in DEMO.iterdir()) < 16e6
    config = json.loads((DEMO / "config.json").read_text())
    with safe_open(DEMO / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in f.keys()  # noqa: SIM118 (not a dict)
        assert f.get_slice("model.embed_tokens.weight").get_shape() == [config["vocab_size"], config["hidden_size"]]


@pytest.mark.slow
def test_its_tokenizer_is_what_the_scripts_write(tmp_path):
    runpy.run_path(str(REPO / "scripts" / "demo_corpus.py"))["write"](tmp_path / "corpus", seed=0, documents=120_000)
    runpy.run_path(str(REPO / "scripts" / "demo_tokenizer.py"))["write"](tmp_path / "corpus", tmp_path / "out", "dense")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (DEMO / path.name).read_bytes(), path.name


@released
def test_its_tokenizer_differs_from_the_released_one_only_in_its_tables():
    demo, real = (json.loads((f / "tokenizer.json").read_text(encoding="utf-8")) for f in (DEMO, RELEASED))
    offset = real["added_tokens"][0]["id"] - demo["added_tokens"][0]["id"]
    assert [t | {"id": t["id"] + offset} for t in demo["added_tokens"]] == real["added_tokens"]
    for spec in (demo, real):
        del spec["added_tokens"], spec["model"]["vocab"], spec["model"]["merges"]
    assert demo == real
    demo, real = (json.loads((f / "tokenizer_config.json").read_text(encoding="utf-8")) for f in (DEMO, RELEASED))
    for spec in (demo, real):
        del spec["added_tokens_decoder"], spec["model_max_length"]
    assert demo == real

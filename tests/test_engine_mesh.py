"""The engine on a mesh says what it says on one device: on eight devices, and in two processes of four."""

import json
import os
import subprocess
import sys
import threading
from typing import Any

import chex
import jax
import numpy as np
import pytest
import torch
import transformers

from qwen3_jax import loaded
from qwen3_jax.engine.device import Device
from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.lockstep import LOST_EXIT, Leader, pack, unpack
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.generate import Generator
from qwen3_jax.loaded import load_model
from qwen3_jax.ops.plain import XLA
from qwen3_jax.placement import dotted
from qwen3_jax.sampling_params import SamplingParams
from tests import engine_job
from tests.engines import ask, write
from tests.ports import free_port

TEXTS = ["The sky", "Once upon a time there was", "1 + 1 =", "x", "Hello, " * 9, "a"]
OPTIONS = EngineOptions(rows=4, page_tokens=8, chunk_tokens=32, cache_tokens=384, decode_tokens=4)
EACH = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=20, seed=3)] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write(path, moe=True, num_hidden_layers=1, num_experts=8, num_key_value_heads=4)
    return path


@pytest.mark.slow  # eleven programs for eight devices
def test_eight_devices_say_what_one_says(folder, tmp_path_factory):
    """Rows over `data` and `expert`, heads over `model`; the cache's pages are whole on every device, of its heads."""
    cache = tmp_path_factory.getbasetemp() / "xla"
    expected = Generator.from_folder(folder, dtype="float32", cache=cache).generate(TEXTS, EACH, max_tokens=12)
    engine = Engine(load_model(folder, dtype="float32", mesh="data=2,expert=2,model=2", cache=cache), OPTIONS)
    engine.start()
    compiled = engine.device.compiles
    try:
        ours = engine.generate(TEXTS, EACH, max_tokens=12)
        again = engine.generate(TEXTS, EACH, max_tokens=12)  # on cached prefixes
        scored = ask(engine, TEXTS[1], max_tokens=2, prompt_logprobs=1, logprobs=1).wait()
    finally:
        engine.stop()
    assert [c.token_ids for c in ours] == [c.token_ids for c in expected]
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]
    assert scored.logprobs is not None
    assert engine.device.compiles == compiled
    pages = engine.device.cache[0]["k"]
    assert pages.sharding.shard_shape(pages.shape)[0] == 2  # of 4 heads


@pytest.mark.parametrize("mesh", ["expert=4,model=2", "data=2,expert=2,model=2", "fsdp=2,expert=2,model=2"])
def test_a_prompt_in_chunks_over_a_mesh_has_transformers_hidden_states(mesh, folder):
    """A chunk's tokens split over the devices: a whole chunk, and one in whose bucket half is padding."""
    device = Engine(load_model(folder, dtype="float32", mesh=mesh), OPTIONS).device
    ids = np.arange(3, 41, dtype=np.int32) * 7
    table = np.full(device.columns, device.pages, np.int32)
    table[:5] = [4, 1, 3, 0, 2]
    hidden = []
    for start in (0, 32):
        device.prefill(table, ids[start : start + 32], start)
        hidden.append(np.asarray(device._held["hidden"][0])[: len(ids[start : start + 32])])
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
        expected = model(torch.from_numpy(ids)[None].long()).last_hidden_state[0].numpy()
    np.testing.assert_allclose(np.concatenate(hidden), expected, atol=2e-5, rtol=0)
    np.testing.assert_array_equal(device._held["last"][0][0], hidden[1][-1])


@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,model=2"])
def test_programs_are_compiled_for_the_order_in_which_weights_lie(mesh, folder, monkeypatch):
    """As on a TPU, o_proj lies heads first: neither generator nor engine sees a difference, also after a swap."""
    texts, greedy = TEXTS[:2], SamplingParams(temperature=0.0, max_tokens=6)
    plain = load_model(folder, dtype="float32", mesh=mesh)
    expected = [c.token_ids for c in Generator.from_folder(folder, dtype="float32", mesh=mesh).generate(texts, greedy)]
    chosen = XLA._replace(weight_order={"embed heads head_dim": (1, 0, 2)})
    monkeypatch.setattr(loaded, "XLA", chosen)
    monkeypatch.setattr(loaded, "for_platform", lambda platform: chosen)
    turned = Generator.from_folder(folder, dtype="float32", mesh=mesh)
    assert [c.token_ids for c in turned.generate(texts, greedy)] == expected

    model = load_model(folder, dtype="float32", mesh=mesh)
    for ours, theirs in ((model.params, plain.params), (turned.runner.params, plain.params)):
        chex.assert_trees_all_equal(jax.device_get(ours), jax.device_get(theirs))
        for path, leaf in dotted(ours).items():
            order = (1, 0, 2) if path.endswith("o_proj") else tuple(range(leaf.ndim))
            assert leaf.format.layout.major_to_minor == order
    engine = Engine(model, OPTIONS)
    monkeypatch.setattr(engine.device, "warm_up", lambda progress: None)  # only what is asked for is compiled
    engine.start()
    try:
        assert [c.token_ids for c in engine.generate(texts, greedy)] == expected
        assert isinstance(engine.device, Device)
        engine.device.model = plain  # other weights may lie as a training step leaves them
        assert [c.token_ids for c in engine.generate(texts, greedy)] == expected
    finally:
        engine.stop()


def pair(folder, cache, *more: str) -> list[Any]:
    common = os.environ | {"QWEN3_COORDINATOR": f"127.0.0.1:{free_port()}", "QWEN3_NUM_PROCESSES": "2"}
    common |= {"XLA_FLAGS": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine_job", str(folder), str(cache), *more],
            env=common | {"QWEN3_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def test_two_processes_say_what_one_says_and_a_lost_one_ends_the_other(folder, tmp_path):
    """In lockstep over both; then the second dies in a long text: an error for its listener, and a clear end."""
    options = {"max_tokens": 8, "temperature": 0.0}
    expected = Generator.from_folder(folder, dtype="float32", cache="off").generate(engine_job.TEXTS, **options)
    first, second = processes = pair(folder, tmp_path, "stay")
    try:
        assert json.loads(first.stdout.readline() or first.stderr.read()) == [list(c.token_ids) for c in expected]
        assert first.stdout.readline() == "begun\n"
        second.kill()
        error, failure = json.loads(first.stdout.readline())
        assert error == f"the engine failed: {failure}"
        assert failure == "process 1 is gone: look at its log, and start all processes again"
        assert first.wait(60) == LOST_EXIT
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("told", [True, False])
def test_a_broken_collective_leaves_it_to_the_watcher_to_say_why(told, folder, monkeypatch):
    """It may break before the watcher has seen who is gone; if nobody is, it is what failed."""
    engine = Engine(load_model(folder, dtype="float32"), OPTIONS)
    leader = object.__new__(Leader)
    vars(leader)["_device"] = engine.device
    engine.device = leader
    watcher = threading.Timer(0.2, engine._lost, ["process 1 is gone"])

    def broken() -> None:
        if told:
            watcher.start()
        raise RuntimeError("connection reset by peer")

    monkeypatch.setattr(engine, "_turn", broken)
    heard = ask(engine, "x")
    engine._thread = threading.Thread(target=engine._run)
    engine._thread.start()
    engine._thread.join(30)
    reason = "process 1 is gone" if told else "RuntimeError: connection reset by peer"
    assert heard.updates[-1].error == f"the engine failed: {reason}"
    assert str(engine.failure) == ("process 1 is gone" if told else "connection reset by peer")


@pytest.mark.slow
def test_without_process_0_the_others_end(folder, tmp_path):
    first, second = processes = pair(folder, tmp_path, "stay")
    try:
        assert first.stdout.readline()
        assert first.stdout.readline() == "begun\n"
        first.kill()
        assert second.wait(60) == LOST_EXIT
        assert "process 0 is gone" in second.stderr.read()
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_end_together(folder, tmp_path):
    processes = pair(folder, tmp_path)
    try:
        outs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outs


def test_a_call_survives_its_journey():
    seat = {"bias": np.ones((1, 3), np.float32), "ids": np.arange(4, dtype=np.int32)[None], "flag": np.array([True])}
    frame = pack("join", (np.int32(3), seat, "all", np.zeros((0, 2), np.uint32)))
    size = int.from_bytes(frame[:4], "little")
    name, (row, taken, sampler, nothing) = unpack(frame[8 : 8 + size], frame[8 + size :])
    assert (name, row, sampler, nothing.shape) == ("join", 3, "all", (0, 2))
    for key, value in seat.items():
        np.testing.assert_array_equal(taken[key], value)
        assert taken[key].dtype == value.dtype

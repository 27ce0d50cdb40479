"""Deterministic mode: a request's tokens and log-probabilities are its own, whatever else the engine does.

Each request is run alone on an empty prefix cache, which is the truth here; then beside many others, on cached
prefixes, in other chunks than its neighbours, and preempted. Not a bit may differ, in float32 or bfloat16.
"""

import functools
import random
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.engine.device import Device
from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.engine.programs import DECODES
from qwen3_jax.loaded import load_model
from qwen3_jax.reply import Completion
from qwen3_jax.steps import State
from tests.engines import Cycle, ask, write

pytestmark = pytest.mark.users_programs
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5},
    {"logprobs": 2},
    {"temperature": 0.9, "logprobs": 1, "thinking_budget": 3},
    {"temperature": 1.0, "grammar": True},
)


class Preemptions(Observer):
    count = 0

    def preempted(self) -> None:
        self.count += 1


def requests(engine: Engine, count: int, *, lengths: tuple[int, ...], outputs: tuple[int, ...], seed: int):
    """Draw prompts, a third of which begin alike, and what is asked of them."""
    rng = random.Random(seed)
    top = engine.model.tokenizer.vocab_size
    common = [rng.randrange(20, top) for _ in range(max(lengths))]
    grammar = Cycle([[300, 301, 302], [400, 401]], 6, engine.model.tokenizer.stop_ids[0])
    asked = []
    for i in range(count):
        prompt = [rng.randrange(20, top) for _ in range(rng.choice(lengths))]
        if i % 3 == 0:
            prompt = common[: rng.choice(lengths)] + prompt[: min(lengths)]
        kind = dict(rng.choice(KINDS))
        if kind.pop("grammar", False):
            kind["grammar"] = grammar
        asked.append((prompt, {"seed": i, "max_tokens": rng.choice(outputs), **kind}))
    return asked


def alone(engine: Engine, asked) -> list[Completion]:
    """Run the requests one by one, each on an empty prefix cache."""
    out = []
    for prompt, options in asked:
        engine.call(engine._stepper.scheduler.pages.clear).result()
        out.append(ask(engine, prompt, **options).wait())
    return out


def together(engine: Engine, asked, *, at_once: int, seed: int) -> list[Completion]:
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    found: dict[int, Completion] = {}
    for first in range(0, len(order), at_once):
        all_asked = threading.Event()  # a slow client must not decide how many run together
        engine.call(functools.partial(all_asked.wait, 60))
        heard = {i: ask(engine, asked[i][0], **asked[i][1]) for i in order[first : first + at_once]}
        all_asked.set()
        found |= {i: h.wait(600) for i, h in heard.items()}
    return [found[i] for i in range(len(asked))]


def differences(ours: list[Completion], theirs: list[Completion]) -> list[int]:
    """Return which of two lists of completions differ, in tokens or in a bit of a log-probability."""
    return [
        i
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if (a.token_ids, a.logprobs, a.finish_reason) != (b.token_ids, b.logprobs, b.finish_reason)
    ]


def run(folder, dtype: str, options: EngineOptions, *, pairs: int, at_once: int, lengths, outputs) -> None:
    observer = Preemptions()
    engine = Engine(load_model(folder, dtype=dtype), options, observer=observer)
    engine.start()
    try:
        asked = requests(engine, pairs, lengths=lengths, outputs=outputs, seed=1)
        truth = alone(engine, asked)
        assert observer.count == 0
        assert len({c.token_ids for c in truth}) > pairs // 2
        assert not differences(truth, together(engine, asked, at_once=at_once, seed=2))
        preempted = observer.count
        cached = engine._stepper.scheduler.pages.cached
        assert not differences(truth, together(engine, asked, at_once=at_once // 2, seed=3))
    finally:
        engine.stop()
    assert preempted > 0, "nothing was preempted: the test has not tried it"
    assert cached > 0, "no prefix was shared"


def test_a_hundred_requests_are_the_same_alone_and_among_others(tmp_path):
    write(tmp_path)
    options = EngineOptions(rows=4, page_tokens=8, chunk_tokens=32, cache_tokens=384, decode_tokens=4)
    run(
        tmp_path, "float32", options, pairs=100, at_once=50,
        lengths=(1, 3, 20, 31, 32, 33, 70), outputs=(3, 20, 90),
    )  # fmt: skip


def test_experts_in_bfloat16_are_the_same_in_every_program(tmp_path):
    # Beside a row that follows a grammar all others decode by another program.
    write(tmp_path, moe=True, hidden_size=128, num_attention_heads=8, head_dim=32, intermediate_size=256)
    options = EngineOptions(rows=32, page_tokens=16, chunk_tokens=64, cache_tokens=32 * 16, decode_tokens=8)
    run(
        tmp_path, "bfloat16", options, pairs=32, at_once=32,
        lengths=(1, 5, 40, 63, 64, 65, 130), outputs=(4, 30, 60),
    )  # fmt: skip


@pytest.mark.parametrize(("moe", "dtype"), [(True, "bfloat16"), pytest.param(False, "float32", marks=pytest.mark.slow)])
def test_every_program_decodes_to_the_same_bits(moe, dtype, tmp_path):
    # Where a row of twenty thousand differs in its last bit, the tests above find it only by luck.
    write(tmp_path, moe=moe, hidden_size=128, num_attention_heads=8, head_dim=32, intermediate_size=256)
    options = EngineOptions(rows=64, page_tokens=16, chunk_tokens=64, cache_tokens=64 * 64, decode_tokens=8)
    device = Device(load_model(tmp_path, dtype=dtype), options, Observer())
    B, V = options.rows, device.model.config.vocab_size
    growth, everybody = np.full((B, device.growth, 2), -1, np.int32), np.ones(B, np.bool_)
    drawn, all_ids = np.full((options.decode_tokens, B), -1, np.int32), np.full((B, -(-V // 32)), 2**32 - 1, np.uint32)

    def emitted(name: str) -> dict[str, np.ndarray]:
        if name == "grammar":
            device.forward(growth, everybody)
            out = device.draw(everybody, drawn[0], ~everybody, all_ids)
        else:
            out = device.decode(growth, everybody, 1, drawn, name)
        return {key: np.asarray(value[0]) for key, value in out.items()}

    differing = {name: 0 for name in (*DECODES, "grammar")}
    for seed in range(20):
        found = {}
        for name in differing:
            put_random_rows(device, seed)
            found[name] = emitted(name) | {str(i): np.asarray(a) for i, a in enumerate(jax.tree.leaves(device.cache))}
        truth = found["all"]
        for name, theirs in found.items():
            differing[name] += sum(not np.array_equal(theirs[key], truth[key]) for key in theirs)
    assert not any(differing.values()), differing


def put_random_rows(device: Device, seed: int) -> None:
    """Give every row of a device its own pages, of random keys and values, and a random last token."""
    rng = np.random.default_rng(seed)
    held, B = device._held, device.options.rows
    numbers = [rng.standard_normal(a.shape, np.float32) for a in held["cache"]]
    if device.steps.dtype == jnp.bfloat16:
        numbers = [a.astype(jnp.bfloat16).view(np.uint16) for a in numbers]
    each = device.pages // B
    tables = np.full((B, device.columns), device.pages, np.int32)
    tables[:, :each] = np.arange(B * each).reshape(B, each)
    state = State(
        token=jnp.array(rng.integers(20, 2000, B, np.int32)),
        position=jnp.array(rng.integers(1, each * device.options.page_tokens - 1, B, np.int32)),
        index=jnp.full(B, 3, jnp.int32),
        stage=jnp.full(B, len(device.steps.stop_text) + 1, jnp.int32),
        done=jnp.zeros(B, jnp.bool_),
        history={},
    )
    rows = jax.tree.unflatten(device._trees["rows"], held["rows"]) | {"limit": np.full(B, 99, np.int32)}
    for name, tree in {"cache": numbers, "tables": tables, "state": state, "rows": rows}.items():
        held[name] = tuple(jnp.array(leaf) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_thousand_requests_are_the_same_alone_and_among_64(moe, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("wide")
    write(path, moe=moe, hidden_size=128, num_attention_heads=8, head_dim=32, intermediate_size=256)
    options = EngineOptions(rows=64, page_tokens=16, chunk_tokens=64, cache_tokens=64 * 20, decode_tokens=8)
    run(
        path, dtype, options, pairs=1000, at_once=64,
        lengths=(1, 5, 40, 63, 64, 65, 130), outputs=(4, 30, 120),
    )  # fmt: skip

"""A tiny model with the demo's tokenizer and template for the engine's tests, and what they listen with."""

import json
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.updates import RequestStats, Update
from qwen3_jax.reply import Completion
from qwen3_jax.sampling_params import SamplingParams
from tests import tiny
from tests.text_folders import DEMO

VOCAB = 2112  # more than the tokenizer has: the rest is padding


def write(path: Path, **options: Any) -> Any:
    """Write a model folder; returns transformers' model."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    end = next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == "<|im_end|>")
    settings = {"vocab_size": VOCAB, "tie_word_embeddings": True, "eos_token_id": end, "seed": 1} | options
    _, model = tiny.save(path, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    return model


class Heard:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.updates: list[Update] = []
        self.over = threading.Event()
        self.begun = threading.Event()
        self.ticket: Any = None

    def __call__(self, update: Update) -> None:
        assert not self.over.is_set(), "an update after the last one"
        self.updates.append(update)
        self.begun.set()
        if update.completion is not None:
            self.over.set()

    @property
    def tokens(self) -> list[int]:
        return [t for update in self.updates for t in update.tokens]

    def text(self, label: str) -> str:
        return "".join(text for update in self.updates for kind, text in update.pieces if kind == label)

    @property
    def stats(self) -> RequestStats:
        stats = self.updates[-1].stats
        assert stats is not None
        return stats

    def wait(self, timeout_s: float = 120) -> Completion:
        assert self.over.wait(timeout_s), "no end"
        completion = self.updates[-1].completion
        assert completion is not None
        return completion


def ask(engine: Engine, prompt: Any, *, params: SamplingParams | None = None, **options: Any) -> Heard:
    """Submit one request; keywords that `submit` does not know are sampling parameters."""
    known = ("priority", "cache_salt", "grammar", "prompt_logprobs", "request_id")
    own = {name: options.pop(name) for name in known if name in options}
    params = (SamplingParams(temperature=0.0) if params is None else params).replace(**options)
    heard = Heard()
    heard.ticket = engine.submit(engine.requests.make(prompt, params), heard, **own)
    return heard


def settled(engine: Engine, timeout_s: float = 30) -> bool:
    """Wait until nothing runs, waits or holds a page."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        load = engine.load()
        if not (load.running or load.waiting or load.pages_used):
            return True
        time.sleep(0.01)
    return False


class Cycle:
    """A grammar whose texts go round through sets of ids, `length` tokens long, then an end token."""

    def __init__(self, sets: Sequence[Sequence[int]], length: int, end: int):
        self.sets, self.length, self.end = sets, length, end

    def start(self) -> "CycleMatcher":
        return CycleMatcher(self)


class CycleMatcher:
    error = None

    def __init__(self, grammar: Cycle):
        self.grammar, self.taken = grammar, []

    def _allowed(self) -> Sequence[int]:
        g, n = self.grammar, len(self.taken)
        return g.sets[n % len(g.sets)] if n < g.length else [g.end]

    def mask(self, out: np.ndarray) -> None:
        out[:] = 0
        for i in self._allowed():
            out[i // 32] |= np.uint32(1 << i % 32)

    def accept(self, token: int) -> bool:
        assert token in self._allowed(), (token, self.taken)
        self.taken.append(token)
        return True

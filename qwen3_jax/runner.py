"""Token ids in, token ids out: run a batch of prompts through the jitted steps with few compiled programs.

Shapes are bucketed (rows and prompt tokens to powers of two, cache slots in steps of a half), so a new length inside a
bucket runs a program that exists. Programs are compiled ahead of their first call: `Runner.compile_s` is exactly what
compiling cost. A cache starts small and is copied into a larger one as its rows grow. Prompts longer than
`prefill_tokens` are prefilled in parts of that size.

    batch = Batch(runner, requests)      # prefill and first token, dispatched
    tokens = batch.read(batch.first)     # waits for the device
    more = batch.decode(8)               # dispatched; read it while the next is under way
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax import distributed
from qwen3_jax import ops as ops_
from qwen3_jax.config import Qwen3Config
from qwen3_jax.layerwise import Layerwise
from qwen3_jax.model import Params, declare
from qwen3_jax.ops import Ops
from qwen3_jax.request import Request
from qwen3_jax.sampling import Sampler
from qwen3_jax.sharding import Rules
from qwen3_jax.steps import CALL, Steps

PROMPT_TOKENS = 16  # smallest buckets
CACHE_SLOTS = 128
LARGE = 2**22  # parameters of a layer: reading them takes a CPU many times as long as a call from the host
HEADROOM = 256  # generated tokens that a new cache has room for; it grows when they are used up


class Runner:
    """A model with its compiled programs.

    Attributes:
        context: positions the model was made for; prompt and generated tokens together stay within it.
        programs: {key: compiled program}; grows by the number of compilations.
        compile_s: seconds spent compiling since construction.
    """

    def __init__(
        self,
        config: Qwen3Config,
        params: Params,
        *,
        dtype: Any = jnp.float32,
        ops: Ops | None = None,
        tokens: int | None = None,
        stop_text: Sequence[int] = (),
        think_end: int = -1,
        prefill_tokens: int = 2048,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        layerwise: bool | None = None,
    ):
        """Take a model.

        Args:
            params: nested dict of arrays, as `checkpoint.load` returns.
            dtype: of activations.
            ops: the formulation; None is the one for the default backend.
            tokens: ids that the tokenizer has; the vocabulary's rest is never drawn. None is the whole vocabulary.
            stop_text: ids forced when a thinking budget is spent; () if the model does not think.
            think_end: the id of `</think>`.
            prefill_tokens: a power of two, the most prompt tokens per call.
            mesh: where `params` lie, if they are spread; `ops` is then of `ops.mesh.on_mesh`.
            rules: the table of `sharding.RULES` they were spread by.
            layerwise: run the network a few layers at a time, see `layerwise`; None does where that costs little: on
                a CPU, with layers of `LARGE` parameters or more.
        """
        ops = ops_.for_platform(jax.default_backend()) if ops is None else ops
        graphdef, _ = declare(config, dtype=dtype, ops=ops)
        self.steps = Steps(graphdef, config, jnp.dtype(dtype), ops, tuple(stop_text), think_end)
        self.config = config
        self.params = params
        self.tokens = config.vocab_size if tokens is None else tokens
        self.context = config.max_position_embeddings
        self.prefill_tokens = prefill_tokens
        self.programs: dict[tuple[Any, ...], Any] = {}
        self.compile_s = 0.0
        self.everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        if layerwise is None:
            layerwise = mesh is None and jax.default_backend() == "cpu" and _layer_size(params) >= LARGE
        self.layerwise = Layerwise(self.steps, self._run) if layerwise else None
        self.row_parts = 1 if mesh is None or rules is None else math.prod(mesh.shape[axis] for axis in rules["batch"])

    @property
    def waits(self) -> bool:
        """Whether a call to decode returns when its tokens are there, rather than when it is dispatched."""
        return self.layerwise is not None

    def capacity(self, tokens: int) -> int:
        """Return the bucket of cache slots for this many positions: a power of two, or one and a half of one.

        Decoding reads every slot, so the finer steps save up to a quarter of what attention reads.
        """
        power = _bucket(tokens, CACHE_SLOTS)
        bucket = 3 * power // 4 if tokens <= 3 * power // 4 and power > CACHE_SLOTS else power
        return min(_whole(bucket, CACHE_SLOTS), _whole(self.context, CACHE_SLOTS))

    def call(self, name: str, args: tuple[Any, ...], *, key: tuple[Any, ...], donate: tuple[int, ...] = (), **static):
        """Run a step, compiling what is new."""
        if self.layerwise is not None and hasattr(self.layerwise, name):
            return getattr(self.layerwise, name)(*args, key=key, **static)
        function = functools.partial(getattr(self.steps, name), **static)
        return self._run((name, *key, *static.values()), function, args, donate=donate)

    def _run(self, key: tuple[Any, ...], function: Any, args: tuple[Any, ...], donate: tuple[int, ...] = ()) -> Any:
        """Run a function, compiling it if `key` is new."""
        program = self.programs.get(key)
        if program is None:
            began = time.perf_counter()
            program = jax.jit(function, donate_argnums=donate)
            if self.everywhere is None:
                program = program.lower(*args).compile()
            # On a mesh the compiler chooses where a step's results lie, and the next step takes them from there.
            self.programs[key] = program
            self.compile_s += time.perf_counter() - began
        return program(*args)


class Batch:
    """A batch under way. Construction dispatches the prefill; only `read` waits for the device, and see `waits`."""

    def __init__(self, runner: Runner, requests: Sequence[Request]):
        self.runner = runner
        self.requests = list(requests)
        self.size = _whole(_bucket(len(requests), 1), runner.row_parts)
        self.sampler = Sampler.of([r.params for r in requests], tokens=runner.tokens)
        self.lengths = np.array([len(r.prompt) for r in requests] + [1] * (self.size - len(requests)), np.int32)
        self.limits = np.zeros(self.size, np.int32)
        self.limits[: len(requests)] = [r.limit for r in requests]
        self.halted = np.zeros(self.size, np.bool_)
        self.halted[len(requests) :] = True
        self.issued = 1  # tokens per row that the dispatched calls may have emitted
        self._rows = jax.device_put(self._lay_out(), runner.everywhere)
        self._prefill()

    @property
    def exhausted(self) -> bool:
        """Whether every row that is not halted has reached its limit in the calls dispatched so far."""
        return bool(np.all(self.halted | (self.limits <= self.issued)))

    def decode(self, count: int) -> dict[str, jax.Array]:
        """Dispatch up to `count` more tokens per row, at most CALL; `halted` rows stay as they are."""
        runner, count = self.runner, min(count, CALL)
        live = ~self.halted
        ahead = self.lengths + np.minimum(self.limits, self.issued + count)
        needed = runner.capacity(int(np.max(np.where(live, ahead, 1))))
        if needed > self.capacity:
            self._cache = runner.call(
                "grow",
                (self._cache,),
                key=(self.size, self.capacity),
                batch=self.size,
                capacity=needed,
            )
            self.capacity = needed
        self._cache, self._state, out = runner.call(
            "decode",
            (runner.params, self._cache, self._state, self._rows, self.halted.copy(), np.int32(count)),
            key=(self.size, self.capacity, self._width),
            donate=(1, 2),
            sampler=self.sampler,
        )
        self.issued += count
        return out

    def read(self, emitted: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """Wait for what `first` or `decode` emitted: "token" [n, B] int32, and log-probabilities if asked for."""
        return distributed.fetch(emitted)

    def wait(self) -> None:
        """Wait until the device has nothing of this batch left to do."""
        arrays = jax.tree.leaves((self._state, self._cache))
        jax.block_until_ready([array for array in arrays if not array.is_deleted()])  # a call may have been interrupted

    def _lay_out(self) -> dict[str, np.ndarray]:
        requests, steps = self.requests, self.runner.steps
        rows = self.sampler.rows(
            [r.params for r in requests],
            seeds=[r.seed for r in requests],
            stop_ids=[r.stop_ids for r in requests],
            batch=self.size,
            vocab_size=self.runner.config.vocab_size,
        )
        rows["limit"] = self.limits
        rows["stage"] = np.full(self.size, len(steps.stop_text) + 1, np.int32)
        rows["budget"] = np.full(self.size, np.iinfo(np.int32).max, np.int32)
        for b, request in enumerate(requests):
            if request.thinks and steps.stop_text:
                rows["stage"][b] = 0
                if request.params.thinking_budget is not None:
                    rows["budget"][b] = max(0, request.params.thinking_budget - request.thought)
        self._width = rows["stop_ids"].shape[1]
        return rows

    def _prefill(self) -> None:
        runner, size = self.runner, self.size
        longest = int(max(self.lengths))
        parts = _parts(longest, runner.prefill_tokens, most=_whole(runner.context, CACHE_SLOTS))
        wanted = int(np.max(self.lengths + np.minimum(self.limits, HEADROOM)))
        self.capacity = runner.capacity(max(wanted, sum(parts)))
        tokens = np.zeros((size, sum(parts)), np.int32)
        for b, request in enumerate(self.requests):
            tokens[b, : len(request.prompt)] = request.prompt
        piece = tokens[:, : parts[0]]
        self._cache, last = runner.call(
            "start",
            (runner.params, piece, self.lengths),
            key=(size, parts[0], self.capacity),
            capacity=self.capacity,
        )
        at = parts[0]
        for part in parts[1:]:
            piece = tokens[:, at : at + part]
            self._cache, last = runner.call(
                "extend",
                (runner.params, self._cache, last, piece, self.lengths, np.int32(at)),
                key=(size, part, self.capacity),
                donate=(1,),
            )
            at += part
        history = self.sampler.history(
            [r.prompt for r in self.requests], batch=size, vocab_size=runner.config.vocab_size
        )
        args = (runner.params, last, self.lengths, self._rows, jax.device_put(history, runner.everywhere))
        self._state, self.first = runner.call("first", args, key=(size, self._width), donate=(4,), sampler=self.sampler)


def _layer_size(params: Params) -> int:
    """Return how many parameters the first layer has."""
    return sum(leaf.size for leaf in jax.tree.leaves(params["layers"][0]))


def _bucket(n: int, least: int) -> int:
    """Return the power of two at or above n, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def _whole(n: int, unit: int) -> int:
    """Round n up to a multiple of unit."""
    return -(-n // unit) * unit


def _parts(length: int, most_per_call: int, *, most: int) -> list[int]:
    """Split a prompt into calls: full ones, then the bucket of the rest; together at most `most` positions."""
    full, rest = divmod(length, most_per_call)
    parts = [most_per_call] * full
    if rest:
        parts.append(min(_bucket(rest, min(PROMPT_TOKENS, most_per_call)), most - sum(parts)))
    return parts

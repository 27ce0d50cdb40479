"""The device side of an engine: the arrays that stay there, and the compiled programs that take them further.

Every method dispatches and returns without waiting; `Emitted` is read later. All that comes from the host is numpy, so
that in a mesh of several processes each can be handed the same calls.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import distributed
from qwen3_jax.cache import Cache
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import CACHE_CONTEXT, EngineOptionError, EngineOptions
from qwen3_jax.engine.programs import DECODES, Programs, Seat, row_names, samplers, seat
from qwen3_jax.loaded import LoadedModel
from qwen3_jax.model import declare
from qwen3_jax.ops.paged import paged
from qwen3_jax.request import Request, Requests
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.sharding import RULES, spec
from qwen3_jax.steps import Emitted, State, Steps

log = logging.getLogger("qwen3_jax.engine")

MEMORY_SHARE = 0.5  # of what a host has left; of an accelerator's memory it is 0.9


class Device:
    """Parameters, pages and rows of one engine.

    Attributes:
        pages: of the cache, without the scratch page, whose number this is.
        columns: of a row's table; growth: most pages that one decode call adds to it.
        samplers: {name: Sampler} that programs exist for.
        compiles: programs compiled so far, and compile_s the seconds it took.
    """

    def __init__(self, model: LoadedModel, options: EngineOptions, observer: Observer):
        config, mesh = model.config, model.mesh
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        ops = paged(model.ops, platform=platform, mesh=mesh, rules=model.rules)
        prompt_ops = paged(model.prompt_ops, platform=platform, mesh=mesh, rules=RULES["prefill"])
        graphdef, _ = declare(config, dtype=model.dtype, ops=ops)
        prompts, _ = declare(config, dtype=model.dtype, ops=prompt_ops)
        tags = Requests(config, model.tokenizer).tags
        self.steps = Steps(
            graphdef,
            config,
            jnp.dtype(model.dtype),
            ops,
            () if tags is None else tags.stop_ids,
            -1 if tags is None else tags.close_id,
        )
        self._model = model
        self.options = options = options.on(platform)
        self.observer = observer
        self.tokens = model.tokenizer.vocab_size
        self.samplers = samplers(tokens=self.tokens)
        self.compiles, self.compile_s = 0, 0.0
        self.buckets = _buckets(options)
        self._everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        # Gloo mixes the messages of programs that run side by side.
        self._one_by_one = jax.process_count() > 1 and platform == "cpu"
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._functions = Programs(self.steps, prompts, options.decode_tokens, options.chunk)
        empty = lambda pages: ops.init_cache(  # noqa: E731
            pages, options.page_tokens, config.num_key_value_heads, config.head_dim, self.steps.dtype
        )
        page = jax.eval_shape(lambda: empty(0))  # the scratch page alone
        layers = config.num_hidden_layers
        self.page_bytes = layers * sum(math.prod(a.shape) * a.dtype.itemsize for a in page.values())
        self.pages = int(distributed.share(_pages(options, config.max_position_embeddings, self.page_bytes)))
        chunk_pages = -(-options.chunk // options.page_tokens)
        longest = min(-(-config.max_position_embeddings // options.page_tokens), self.pages)
        self.columns = longest + chunk_pages  # the padding of a last chunk writes behind it, to the scratch page
        self.growth = -(-options.decode_tokens // options.page_tokens)
        at = None
        if mesh is not None and model.rules is not None:
            axes = ops.cache_axes
            at = [{name: NamedSharding(mesh, spec(axes[name], model.rules)) for name in axes}] * layers
        cache = jax.jit(lambda: [empty(self.pages) for _ in range(layers)], out_shardings=at)()
        held = {"params": model.params, "cache": cache, "no edits": {}, **self._empty()}
        held |= dict.fromkeys(
            ("hidden", "last", "logits"), 0
        )  # of the last `prefill` and `forward`, when there was one
        self._trees = {name: jax.tree.structure(tree) for name, tree in held.items()}
        # Flat, since a call looks at the keys of every dictionary again: a third of what it costs the host.
        self._held = {name: tuple(jax.tree.leaves(tree)) for name, tree in held.items()}
        self._cache_at = tuple(array.sharding for array in self._held["cache"])
        self._sent: dict[str, tuple[np.ndarray, jax.Array | None]] = {}
        self._counts = [self._put(np.array(n, np.int32)) for n in range(options.decode_tokens + 1)]

    @property
    def model(self) -> LoadedModel:
        """What it computes with."""
        return self._model

    @model.setter
    def model(self, model: LoadedModel) -> None:
        # Programs are compiled for where their arguments lie, and in which order, see `placement.formats`.
        leaves = zip(jax.tree.leaves(model.params), self._held["params"], strict=True)
        self._held["params"] = tuple(
            a if a.format == old.format else jax.device_put(a, old.format) for a, old in leaves
        )
        self._model = model

    @property
    def cache(self) -> Cache:
        """The pages."""
        return jax.tree.unflatten(self._trees["cache"], self._held["cache"])

    # What is dispatched: host values in, so that other processes can be told to do the same

    def prefill(self, table: np.ndarray, tokens: np.ndarray, start: int) -> None:
        """Run one sequence's next tokens [n], n at most the chunk; its table [columns]. See `Programs.prefill`."""
        length = len(tokens)
        bucket = next(size for size in self.buckets if size >= length)
        padded = np.zeros((1, bucket), np.int32)
        padded[0, :length] = tokens
        host = (table[None], padded, np.array([start], np.int32), np.array([length], np.int32))
        self._call("prefill", ("params", "cache"), host, keep=("cache", "hidden", "last"), key=bucket)

    def score(self, targets: np.ndarray) -> Emitted:
        """Return log-probabilities of the tokens that follow those of the last `prefill`, padded to the chunk."""
        padded = np.zeros(self.options.chunk, np.int32)
        padded[: len(targets)] = targets
        return self._call("score", ("params", "hidden"), (padded,), sampler=self.samplers["all"])

    def join(self, row: int, seat: Seat, name: str) -> Emitted:
        """Draw the next token after the last `prefill` and give the sequence a row; `name` is "whole" or "all"."""
        kept = ("state", "rows", self._edits_of(name), "tables")
        return self._call(
            "join", ("params", "last", *kept), (np.int32(row), seat), keep=kept, key=name, sampler=self.samplers[name]
        )

    def decode(self, growth: np.ndarray, active: np.ndarray, count: int, known: np.ndarray, name: str) -> Emitted:
        """Emit up to `count` tokens per active row: growth [B, growth, 2], known [decode_tokens, B]."""
        kept = ("cache", "state", self._edits_of(name), "tables")
        host = (
            self._there("growth", growth),
            self._there("active", active),
            self._counts[count],
            self._there("known", known),
        )
        return self._call("decode", ("params", *kept, "rows"), host, keep=kept, key=name, sampler=self.samplers[name])

    def forward(self, growth: np.ndarray, active: np.ndarray) -> None:
        """Run the last token of every active row, for `draw`."""
        host = self._there("growth", growth), self._there("active", active), self._counts[1]
        self._call("forward", ("params", "cache", "tables", "state"), host, keep=("cache", "tables", "logits"))

    def draw(self, active: np.ndarray, known: np.ndarray, answers: np.ndarray, allowed: np.ndarray) -> Emitted:
        """Draw one token per active row after `forward`; known, answers [B], allowed [B, W]."""
        host = (active, known, answers, allowed)
        kept = ("state", "edits")
        return self._call("draw", ("logits", *kept, "rows"), host, keep=kept, sampler=self.samplers["all"])

    def scrub(self, table: np.ndarray) -> None:
        """Fill the pages of a sequence that broke with zeros; its table [columns]."""
        self._call("scrub", ("cache",), (table,), keep=("cache",))

    # Compiling

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every program, by running each once on nothing."""
        B, V = self.options.rows, self.model.config.vocab_size
        nobody, table = np.zeros(B, np.bool_), np.full(self.columns, self.pages, np.int32)
        growth = np.full((B, self.growth, 2), -1, np.int32)
        known = np.full((self.options.decode_tokens, B), -1, np.int32)
        tell = progress or (lambda text: None)
        for bucket in self.buckets:
            tell(f"prefill of {bucket} tokens")
            self.prefill(table, np.zeros(bucket, np.int32), 0)
        self.score(np.zeros(1, np.int32))
        for name in ("whole", "all"):
            tell(f"first token, {name}")
            self.join(0, self._dummy_seat(name), name)
        for name in DECODES:
            tell(f"decode of {B} rows, {name}")
            self.decode(growth, nobody, 1, known, name)
        tell("decode under grammars")
        self.forward(growth, nobody)
        self.draw(nobody, known[0], nobody, np.zeros((B, -(-V // 32)), np.uint32))
        self.scrub(table)
        self.wait()
        self._held |= {name: tuple(jax.tree.leaves(tree)) for name, tree in self._empty().items()}

    def wait(self) -> None:
        """Wait until nothing is under way."""
        jax.block_until_ready((self._held["cache"], self._held["state"]))

    def _call(
        self, name: str, held: tuple[str, ...], host: tuple[Any, ...], *, keep: tuple[str, ...] = (), key: Any = (),
        **static: Any,
    ) -> Any:  # fmt: skip
        """Call a program on what is held on the device and what comes from the host.

        Args:
            name: of the function in `Programs`.
            held: its first arguments; those that it returns as well are donated.
            keep: what its first results are held as; the other one is returned.
            key: tells programs of one function apart, as `static` does.
        """
        args = (*(self._held[each] for each in held), *host)
        program = self._programs.get((name, key))
        if program is None:
            began = time.perf_counter()
            program = self._compiled(name, held, args, keep, static)
            self._programs[name, key] = program
            spent = time.perf_counter() - began
            self.compiles, self.compile_s = self.compiles + 1, self.compile_s + spent
            self.observer.compiled(f"{name} {key}" if key else name, spent)
        kept, out = program(*args)
        self._held.update(zip(keep, kept, strict=True))
        if self._one_by_one:
            jax.block_until_ready((kept, out))
        return out

    def _compiled(
        self, name: str, held: tuple[str, ...], args: tuple[Any, ...], keep: tuple[str, ...], static: dict[str, Any]
    ) -> Any:
        function = getattr(self._functions, name)

        def run(*args: Any) -> Any:
            trees = [jax.tree.unflatten(self._trees[each], arg) for each, arg in zip(held, args, strict=False)]
            outs = function(*trees, *args[len(held) :], **static)
            outs = outs if isinstance(outs, tuple) else (outs,)
            kept = [tuple(jax.tree.leaves(tree)) for tree in outs[: len(keep)]]
            return kept, outs[-1] if len(outs) > len(keep) else None

        run.__name__ = name
        where: dict[str, Any] = {}
        if (whole := self._everywhere) is not None:  # what comes from the host goes everywhere
            ins = jax.tree.map(lambda a: a.sharding if isinstance(a, jax.Array) else whole, args)
            kept = [self._cache_at if each == "cache" else whole for each in keep]
            where = {"in_shardings": ins, "out_shardings": (kept, whole)}
        donated = [i for i, each in enumerate(held) if each in keep]
        # XLA may leave out roundings to bfloat16, and which depends on what surrounds them: `forward` and `draw` would
        # say something else than `decode`.
        exact: dict[str, str | bool] = {"xla_allow_excess_precision": False} if self.options.deterministic else {}
        return jax.jit(run, donate_argnums=donated, **where).lower(*args).compile(compiler_options=exact)

    def _there(self, name: str, array: np.ndarray) -> np.ndarray | jax.Array:
        """Return what says the same on the device, once the same array comes again; see `Layout`."""
        last, there = self._sent.get(name, (None, None))
        if array is not last:
            self._sent[name] = array, None
            return array
        if there is None:
            there = self._put(array)
            self._sent[name] = array, there
        return there

    def _put(self, array: np.ndarray) -> jax.Array:
        whole = self._everywhere
        if whole is None:
            return jax.device_put(array)
        return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])

    def _edits_of(self, name: str) -> str:
        return "edits" if self.samplers[name].edits else "no edits"

    def _dummy_seat(self, name: str) -> Seat:
        request = Request([0], SamplingParams(temperature=0.0), seed=0, stop_ids=(), limit=1)
        table = np.full(self.columns, self.pages, np.int32)
        return seat(
            self.steps, request, [], target=1, index=0, known=-1,
            sampler=self.samplers[name], allowed=None, table=table,
        )  # fmt: skip

    def _empty(self) -> dict[str, Any]:
        """Return what is held of rows that nobody has."""
        B, V = self.options.rows, self.model.config.vocab_size
        put = self._put
        zeros = lambda shape, dtype: put(np.zeros(shape, dtype))  # noqa: E731
        state = State(
            token=zeros(B, np.int32),
            position=zeros(B, np.int32),
            index=zeros(B, np.int32),
            stage=zeros(B, np.int32),
            done=put(np.ones(B, np.bool_)),
            history={},
        )
        one = self._dummy_seat("whole")
        rows = {name: put(np.repeat(one[name], B, axis=0)) for name in row_names(one)}
        edits = {
            "bias": zeros((B, V), np.float32),
            "prompt": zeros((B, V), np.bool_),
            "counts": zeros((B, V), np.int32),
        }
        tables = put(np.full((B, self.columns), self.pages, np.int32))
        return {"state": state, "rows": rows, "edits": edits, "tables": tables}


def _buckets(options: EngineOptions) -> list[int]:
    """Return the chunk shapes, ascending: the whole chunk, and quarters of it down to a page."""
    sizes = [options.chunk]
    while sizes[-1] // 4 >= options.page_tokens:
        sizes.append(-(-sizes[-1] // 4 // options.page_tokens) * options.page_tokens)
    return sizes[::-1]


def _pages(options: EngineOptions, context: int, page_bytes: int) -> int:
    """Return how many pages the options ask for, or memory allows if they leave it open."""
    wanted = options.pages(context)
    if options.cache_tokens is None and (free := _free_bytes()) is not None:
        wanted = min(wanted, free // page_bytes)
    if wanted < 2:
        raise EngineOptionError(
            f"a cache of {wanted} pages of {page_bytes} bytes: free memory, or set cache_tokens to what is there"
        )
    context_of = f" (rows * {CACHE_CONTEXT} at most)" if options.cache_tokens is None else ""
    log.info(
        "KV cache: %d pages of %d tokens, %d tokens%s, %.2f GB",
        wanted, options.page_tokens, wanted * options.page_tokens, context_of, wanted * page_bytes / 1e9,
    )  # fmt: skip
    return wanted


def _free_bytes() -> int | None:
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
            lines = Path("/proc/meminfo").read_text().splitlines()
            available = next(line for line in lines if line.startswith("MemAvailable:"))
            return int(int(available.split()[1]) * 1024 * MEMORY_SHARE)
        return None
    stats: Mapping[str, int] | None = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int((stats["bytes_limit"] - stats["bytes_in_use"]) * 0.9)

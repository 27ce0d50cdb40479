"""Prompts in, text out: the Python API of generation.

    from qwen3_jax import Generator
    g = Generator.from_folder("Qwen3-0.6B")
    print(g.chat("Why is the sky blue?", thinking_budget=256).answer)

prompt text or messages → ids → `Batch` (the jitted steps, several tokens per call) → ids → text, told apart into
reasoning and answer and cut at stop strings → `Event`s as they arrive, or one `Completion` per prompt. While the host
turns one call's ids into text, the device runs the next call.
"""

import itertools
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen3_jax import checkpoint, compile_cache
from qwen3_jax.checkpoint.folder import open_folder
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.ops import Ops, for_platform
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.plain import XLA
from qwen3_jax.placement import load_sharded
from qwen3_jax.runner import Batch, PromptError, Request, Runner
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.sharding import RULES, Rules, make_mesh, parse_mesh
from qwen3_jax.steps import BROKEN, CALL, IDLE
from qwen3_jax.text.detokenize import StopStrings
from qwen3_jax.text.template import ChatTemplate, NoTemplateError, TemplateError
from qwen3_jax.text.thinking import Label, ThinkingIds, ThinkingStream
from qwen3_jax.text.tokenizer import Tokenizer, read_json

Prompt = str | Sequence[int]  # raw text, or token ids
Messages = str | Sequence[Mapping[str, Any]]  # one user turn, or a conversation

STREAM_S = 0.1  # a stream aims at a piece of text this often


class GenerationError(ValueError):
    """The model produced logits that are not finite; `completions` holds every row as far as it went."""

    def __init__(self, message: str, completions: "list[Completion]"):
        super().__init__(message)
        self.completions = completions


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its log-probability under the model, and the best alternatives as (id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts. `reasoning_tokens` are those of the completion up to `</think>`, both tags included."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the seconds of the batch went, until this row ended.

    `load_s` is the folder's, once per `Generator`; `compile_s` what this batch had to compile; `prefill_s` and
    `decode_s` run the model; `first_token_s` is from the call to the first token, compiling included;
    `tokens_per_s` counts this row's tokens after the first, per second of decode.
    """

    load_s: float
    compile_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    `reasoning` and `answer` are told apart by the token ids of the thinking tags; without them everything is answer.
    `token_ids` are all generated ids, the one that ended the row included. `finish_reason` is "stop" (`stop_reason`
    says which id or string), "length", or "error" (logits that are not finite). `seed` reproduces the row.
    """

    reasoning: str
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "error"]
    stop_reason: int | str | None
    seed: int
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def text(self) -> str:
        """Reasoning and answer in the form that the model writes."""
        return f"<think>\n{self.reasoning}\n</think>\n\n{self.answer}" if self.reasoning else self.answer


@dataclass(frozen=True)
class Event:
    """A piece of one row's text as it arrives; the row's last event carries its `completion` and no text."""

    row: int
    kind: Literal["reasoning", "answer", "end"]
    text: str = ""
    completion: Completion | None = None


class Generator:
    """A loaded model with its tokenizer, ready to generate.

    Every method takes `params`, a `SamplingParams` or one per prompt (None: the model's `defaults`), and field changes
    as keywords: `g.chat("Hi", temperature=0)`. A row's text depends on its prompt, its parameters and its seed only.

    Attributes: `config`, `tokenizer`, `template` (None if the folder has none), `defaults`, `load_s`, `runner`.
    """

    def __init__(
        self,
        config: Qwen3Config,
        params: Params,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None = None,
        defaults: SamplingParams | None = None,
        dtype: Any = jnp.float32,
        ops: Ops | None = None,
        prefill_tokens: int = 2048,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        load_s: float = 0.0,
    ):
        """Put a model together from its parts; `dtype` is that of activations, see `Runner` for the rest."""
        tags = ThinkingIds.of(tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = SamplingParams() if defaults is None else defaults
        self.load_s = load_s
        self._tags = tags
        self._turn = tokenizer.special.get("<|im_start|>")
        self.runner = Runner(
            config,
            params,
            dtype=dtype,
            ops=ops,
            tokens=tokenizer.vocab_size,
            stop_text=() if tags is None else tags.stop_ids,
            think_end=-1 if tags is None else tags.close_id,
            prefill_tokens=prefill_tokens,
            mesh=mesh,
            rules=rules,
        )

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        dtype: str | None = None,
        param_dtype: str | None = None,
        mesh: str | None = None,
        progress: bool = False,
        cache: str | Path | None = None,
    ) -> Self:
        """Load a Hugging Face folder, or a hub id where a network is there.

        Args:
            folder: with config.json, weights (safetensors or Orbax), tokenizer.json, tokenizer_config.json;
                generation_config.json gives the `defaults`, without it decoding is greedy.
            dtype: "float32" or "bfloat16", what the network computes in; None is the file's (float32 for float16).
            param_dtype: what the parameters are kept in; None is `dtype`, "file" keeps the file's.
            mesh: spread the model over all devices: axis sizes as in "data=1,expert=4,model=4". Every process of the
                mesh makes the same calls and gets the same results.
            progress: show a bar while loading.
            cache: folder of the persistent compile cache, "off", or None for the default; see `compile_cache.enable`.

        Raises:
            ValueError: a subclass that names the file and the problem, before anything large is read.
        """
        began = time.perf_counter()
        folder = checkpoint.resolve(folder)
        found = open_folder(folder)
        dtype = dtype or ("bfloat16" if found.config.dtype == "bfloat16" else "float32")
        tokenizer = Tokenizer.from_folder(folder)
        settings = folder / "generation_config.json"
        generation = read_json(settings) if settings.is_file() else {}
        defaults = SamplingParams.from_generation_config(generation, settings)
        try:
            template = ChatTemplate.from_folder(folder)
        except NoTemplateError:  # a base model: raw prompts only
            template = None
        compile_cache.enable(cache)
        stored = None if param_dtype == "file" else param_dtype or dtype
        spread: dict[str, Any] = {}
        if mesh is None:
            config, params = found.config, found.load(dtype=stored, progress=progress)
        else:
            sizes = parse_mesh(mesh)
            devices, rules = make_mesh(**sizes, devices=None), RULES["serve"]
            # The CPU's own formulation is for one device.
            ops = XLA if jax.default_backend() == "cpu" else for_platform(jax.default_backend())
            spread = {"ops": on_mesh(ops, devices, rules), "mesh": devices, "rules": rules}
            config, params = load_sharded(
                folder, devices, rules, dtype=dtype, param_dtype=param_dtype, ops=spread["ops"], progress=progress
            )
        return cls(
            config,
            params,
            tokenizer,
            template=template,
            defaults=defaults,
            dtype=jnp.dtype(dtype),
            load_s=time.perf_counter() - began,
            **spread,
        )

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> list[int]:
        """Return the prompt ids of a conversation, by the model's chat template.

        `enable_thinking=False` puts an empty thinking block into the prompt (hybrid models); other keywords are
        variables of the template.

        Raises:
            TemplateError: the folder has no template, or it cannot render these messages.
        """
        if self.template is None:
            raise TemplateError("this model has no chat template: give a raw prompt to generate or stream")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        text = self.template.render(turns, tools, enable_thinking=enable_thinking, **variables)
        return self.tokenizer.encode(text)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        batch_size: int = 8,
        **changes: Any,
    ) -> list[Completion]:
        """Continue raw prompts, `batch_size` at a time; the result is in their order.

        Conversations are prompts too: `g.generate([g.prompt(messages) for messages in conversations])`.

        Raises:
            PromptError: a prompt that is empty or leaves the context.
            SamplingError: a parameter out of range.
            GenerationError: the model's logits are not finite.
        """
        requests = self._requests(prompts, params, changes)
        done: list[Completion] = []
        for at in range(0, len(requests), batch_size):
            group = requests[at : at + batch_size]
            rows = {e.row: e.completion for e in self._events(group, interval_s=None) if e.completion is not None}
            done += [rows[b] for b in range(len(group))]
        _require_finite(done)
        return done

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        **changes: Any,
    ) -> Completion:
        """Answer a user's text or a conversation. Raises as `prompt` and `generate` do.

        `thinking_budget=n` ends the thinking after n tokens. A budget of 0 makes the reply begin with the stop text;
        to have no thinking at all, `enable_thinking=False` is the form that the models were trained with.
        """
        return self.generate([self.prompt(messages, tools=tools, enable_thinking=enable_thinking)], params, **changes)[
            0
        ]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **changes: Any,
    ) -> Iterator[Event]:
        """Continue raw prompts as one batch and yield text as it arrives; each row ends with its completion.

        The arguments are checked before the first event is asked for. Raises as `generate` does.
        """
        return self._finite_events(self._requests(prompts, params, changes))

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        **changes: Any,
    ) -> Iterator[Event]:
        """Answer a conversation and yield text as it arrives; see `chat` and `stream`."""
        return self.stream([self.prompt(messages, tools=tools, enable_thinking=enable_thinking)], params, **changes)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        changes: Mapping[str, Any],
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise PromptError("prompts is a string: give a list of prompts, [prompt] for one")
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.defaults] * len(prompts)
        if len(params) != len(prompts):
            raise PromptError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts: give one, or one per prompt"
            )
        return [
            self._request(i, prompt, p.replace(**changes))
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

    def _request(self, i: int, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        context = self.runner.context
        if not ids:
            raise PromptError(f"prompt {i} is empty: give at least one token")
        if bad := [t for t in ids if not 0 <= t < self.config.vocab_size]:
            raise PromptError(f"prompt {i} has token id {bad[0]}: the model has ids 0 to {self.config.vocab_size - 1}")
        room = context - len(ids)
        if room < 1:
            raise PromptError(
                f"prompt {i} has {len(ids)} tokens, the context of the model is {context}: shorten it to {context - 1}"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise PromptError(
                f"prompt {i} has {len(ids)} tokens and max_tokens is {params.max_tokens}, together "
                f"{len(ids) + params.max_tokens} of a context of {context}: set max_tokens to {room} or less"
            )
        thinks, thought = self._thinking(ids)
        return Request(
            prompt=ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_ids=(() if params.ignore_eos else self.tokenizer.stop_ids) + params.stop_token_ids,
            limit=room if params.max_tokens is None else params.max_tokens,
            thinks=thinks,
            thought=thought,
        )

    def _thinking(self, ids: Sequence[int]) -> tuple[bool, int]:
        """Tell whether the reply to a prompt may still think, and how many tokens of its thinking the prompt holds."""
        if self._tags is None:
            return False, 0
        for n, token in enumerate(reversed(ids), 1):
            if token == self._tags.close_id:
                return False, 0
            if token == self._tags.open_id:
                return True, n
            if token == self._turn:
                break
        return True, 0

    def _finite_events(self, requests: list[Request]) -> Iterator[Event]:
        done: dict[int, Completion] = {}
        for event in self._events(requests, interval_s=STREAM_S):
            if event.completion is not None:
                done[event.row] = event.completion
            yield event
        _require_finite([done[b] for b in sorted(done)])

    def _events(self, requests: list[Request], *, interval_s: float | None) -> Iterator[Event]:
        """Run one batch. `interval_s` asks for calls of about that many seconds; None for the fewest calls."""
        runner = self.runner
        if jax.process_count() > 1:
            interval_s = None  # clocks differ, and every process must make the same calls
        began, compiled = time.perf_counter(), runner.compile_s
        batch = Batch(runner, requests)
        try:
            yield from self._text(batch, began, compiled, interval_s)
        finally:
            batch.wait()  # whoever stops listening must not leave the process while the device still computes

    def _text(self, batch: Batch, began: float, compiled: float, interval_s: float | None) -> Iterator[Event]:
        runner = self.runner
        emitted = batch.read(batch.first)
        first_s = time.perf_counter() - began
        clock = Timings(
            load_s=self.load_s,
            compile_s=runner.compile_s - compiled,
            prefill_s=first_s - (runner.compile_s - compiled),
            decode_s=0.0,
            first_token_s=first_s,
            tokens_per_s=0.0,
        )
        rows = [_Row(self.tokenizer, self._tags, b, request) for b, request in enumerate(batch.requests)]
        yield from _advance(rows, emitted, clock)
        count = CALL if interval_s is None else 1
        under_way: tuple[float, int, dict[str, Any]] | None = None
        while True:
            for row in rows:
                batch.halted[row.number] = row.completion is not None
            following = None
            if not batch.exhausted:
                before = runner.compile_s
                out = batch.decode(count)
                clock = replace(clock, compile_s=clock.compile_s + runner.compile_s - before)
                following = (time.perf_counter(), count, out)
            if under_way is not None:
                started, asked, out = under_way
                emitted = batch.read(out)
                spent = time.perf_counter() - started
                clock = replace(clock, decode_s=clock.decode_s + spent)
                if interval_s is not None:
                    steps = max(1, int(np.sum(np.any(emitted["token"] >= 0, axis=1))))
                    # At most twice as many as before: the first, short calls time the overhead, not the tokens.
                    count = min(CALL, 2 * asked, max(1, round(interval_s * steps / spent)))
                if following is not None:
                    following = (max(following[0], time.perf_counter()), *following[1:])
                yield from _advance(rows, emitted, clock)
            if following is None:
                return
            under_way = following


Piece = tuple[Label, str]


class _Row:
    """The text of one row as it grows."""

    def __init__(self, tokenizer: Tokenizer, tags: ThinkingIds | None, number: int, request: Request):
        self.number = number
        self.request = request
        self.completion: Completion | None = None
        self._tags = tags
        forced = request.thinks and request.params.thinking_budget == 0  # the first token is the stop text's
        self._opened = tags is not None and (forced or tags.opened_by(request.prompt, tokenizer))
        self._stream = ThinkingStream(tokenizer, opened=self._opened)
        params = request.params
        self._stops: dict[Label, StopStrings] = {
            "reasoning": StopStrings(params.stop, include_stop=params.include_stop_str_in_output),
            "answer": StopStrings(params.stop, include_stop=params.include_stop_str_in_output),
        }
        self._label: Label | None = None
        self._text: dict[Label, list[str]] = {"reasoning": [], "answer": []}
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, token: int, logprob: TokenLogprob | None, clock: Timings) -> list[Piece]:
        """Take the row's next token; return the text it lets out, and set `completion` if it ends the row."""
        if token == BROKEN:
            return self._end("error", None, clock)
        self._ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        if token in self.request.stop_ids:
            return self._end("stop", token, clock)
        pieces = self._cut(self._stream.feed([token]))
        if self._matched is not None:
            return pieces + self._end("stop", self._matched, clock)
        if len(self._ids) >= self.request.limit:
            return pieces + self._end("length", None, clock)
        return pieces

    @property
    def _matched(self) -> str | None:
        return self._stops["reasoning"].matched or self._stops["answer"].matched

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        """Pass text through the stop strings; a thinking tag between two pieces ends what a string can span."""
        out: list[Piece] = []
        early = len(self._ids) < self.request.params.min_tokens
        for label, text in pieces:
            if self._matched is not None:
                break
            if label != self._label:
                out += self._release()
                self._label = label
            out += self._let_out(text if early else self._stops[label].feed(text))
        return out

    def _release(self) -> list[Piece]:
        """Let out what could have become a stop string."""
        return [] if self._label is None else self._let_out(self._stops[self._label].finish())

    def _let_out(self, text: str) -> list[Piece]:
        if self._label is None or not text:
            return []
        self._text[self._label].append(text)
        return [(self._label, text)]

    def _end(self, reason: Literal["stop", "length", "error"], stop: int | str | None, clock: Timings) -> list[Piece]:
        pieces = [] if self._matched is not None else [*self._cut(self._stream.finish()), *self._release()]
        n = len(self._ids)
        self.completion = Completion(
            reasoning="".join(self._text["reasoning"]),
            answer="".join(self._text["answer"]),
            token_ids=tuple(self._ids),
            finish_reason=reason,
            stop_reason=stop,
            seed=self.request.seed,
            usage=Usage(len(self.request.prompt), n, self._reasoning_tokens()),
            timings=replace(clock, tokens_per_s=(n - 1) / clock.decode_s if n > 1 and clock.decode_s else 0.0),
            logprobs=None if self.request.params.logprobs is None else tuple(self._logprobs),
        )
        return pieces

    def _reasoning_tokens(self) -> int:
        if self._tags is None or not (self._opened or self._tags.open_id in self._ids):
            return 0
        closed = self._tags.close_id in self._ids
        return self._ids.index(self._tags.close_id) + 1 if closed else len(self._ids)


def _advance(rows: Sequence[_Row], emitted: Mapping[str, np.ndarray], clock: Timings) -> Iterator[Event]:
    """Feed what one call emitted, "token" [n, B] and log-probabilities, to the rows that have not ended."""
    for row in rows:
        if row.completion is not None:
            continue
        pieces: list[Piece] = []
        for i, token in enumerate(emitted["token"][:, row.number].tolist()):
            if token == IDLE or row.completion is not None:
                break
            pieces += row.take(token, _logprob(emitted, i, row), clock)
        for label, run in itertools.groupby(pieces, key=_label):
            yield Event(row.number, label, "".join(text for _, text in run))
        if row.completion is not None:
            yield Event(row.number, "end", completion=row.completion)


def _logprob(emitted: Mapping[str, np.ndarray], i: int, row: _Row) -> TokenLogprob | None:
    wanted, b = row.request.params.logprobs, row.number
    if wanted is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        ids, values = (emitted[name][i, b, :wanted].tolist() for name in ("top_ids", "top_logprobs"))
        top = tuple(zip(ids, values, strict=True))
    return TokenLogprob(int(emitted["token"][i, b]), float(emitted["logprob"][i, b]), top)


def _require_finite(completions: list[Completion]) -> None:
    for b, completion in enumerate(completions):
        if completion.finish_reason == "error":
            n = len(completion.token_ids)
            raise GenerationError(
                f"row {b}: the logits are not finite after {n} generated tokens; check the weights with "
                "`qwen3-jax parity`, or load them with dtype float32",
                completions,
            )


def _label(piece: Piece) -> Label:
    return piece[0]

"""Prompts in, text out: the Python API of generation.

    from qwen3_jax import Generator
    g = Generator.from_folder("Qwen3-0.6B")
    print(g.chat("Why is the sky blue?", thinking_budget=256).answer)

prompt text or messages → ids → `Batch` (the jitted steps, several tokens per call) → ids → text, told apart into
reasoning and answer and cut at stop strings → `Event`s as they arrive, or one `Completion` per prompt. While the host
turns one call's ids into text, the device runs the next call (on a CPU, which is both, they take turns).
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen3_jax.config import Qwen3Config
from qwen3_jax.loaded import LoadedModel, load_model
from qwen3_jax.model import Params
from qwen3_jax.ops import Ops
from qwen3_jax.reply import Completion, Reply, Timings, logprobs_of
from qwen3_jax.request import Prompt, PromptError, Request, Requests
from qwen3_jax.runner import Batch, Runner
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.sharding import Rules
from qwen3_jax.steps import CALL, emitted_ids
from qwen3_jax.text.template import ChatTemplate, TemplateError
from qwen3_jax.text.tokenizer import Tokenizer

Messages = str | Sequence[Mapping[str, Any]]  # one user turn, or a conversation

STREAM_S = 0.1  # a stream aims at a piece of text this often


class GenerationError(ValueError):
    """The model produced logits that are not finite; `completions` holds every row as far as it went."""

    def __init__(self, message: str, completions: "list[Completion]"):
        super().__init__(message)
        self.completions = completions


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
        self._asks = Requests(config, tokenizer)
        self._tags = tags = self._asks.tags
        self.config = config
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = SamplingParams() if defaults is None else defaults
        self.load_s = load_s
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
    def of(cls, model: LoadedModel, *, prefill_tokens: int = 2048) -> Self:
        """Put a loaded model to work."""
        return cls(
            model.config,
            model.params,
            model.tokenizer,
            template=model.template,
            defaults=model.defaults,
            dtype=model.dtype,
            ops=model.ops,
            prefill_tokens=prefill_tokens,
            mesh=model.mesh,
            rules=model.rules,
            load_s=model.load_s,
        )

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> Self:
        """Load a Hugging Face folder, or a hub id where a network is there; options as in `loaded.load_model`.

        Raises:
            ValueError: a subclass that names the file and the problem, before anything large is read.
        """
        return cls.of(load_model(folder, **options))

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
            self._asks.make(prompt, p.replace(**changes), name=f"prompt {i}")
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]

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
        rows = [Reply(self.tokenizer, self._tags, b, request) for b, request in enumerate(batch.requests)]
        yield from _advance(rows, emitted, clock)
        count = CALL if interval_s is None else 1
        under_way: deque[tuple[float, int, dict[str, Any]]] = deque()  # calls: when they began, tokens asked for, out
        most = 0 if runner.waits else 1  # calls under way while the host is at the text of another
        free = 0.0  # when the device was done with the last call that was read
        while True:
            for row in rows:
                batch.halted[row.number] = row.completion is not None
            if not batch.exhausted:
                before, asked_at = runner.compile_s, time.perf_counter()
                out = batch.decode(count)
                compiled = runner.compile_s - before
                clock = replace(clock, compile_s=clock.compile_s + compiled)
                under_way.append((asked_at + compiled, count, out))
                if len(under_way) <= most:
                    continue
            if not under_way:
                return
            started, asked, out = under_way.popleft()
            emitted = batch.read(out)
            started, free = max(started, free), time.perf_counter()
            clock = replace(clock, decode_s=clock.decode_s + free - started)
            if interval_s is not None:
                steps = max(1, int(np.sum(np.any(emitted["token"] >= 0, axis=1))))
                # At most twice as many as before: the first, short calls time the overhead, not the tokens.
                count = min(CALL, 2 * asked, max(1, round(interval_s * steps / (free - started))))
            yield from _advance(rows, emitted, clock)


def _advance(rows: Sequence[Reply], emitted: Mapping[str, np.ndarray], clock: Timings) -> Iterator[Event]:
    """Feed what one call emitted, "token" [n, B] and log-probabilities, to the rows that have not ended."""
    columns = emitted["token"].T.tolist()
    for row in rows:
        if row.completion is not None:
            continue
        ids, broken = emitted_ids(columns[row.number])
        pieces = row.take(ids, logprobs_of(emitted, row.number, ids, row.request.params.logprobs), lambda: clock)
        if broken and row.completion is None:
            pieces += row.end("error", lambda: clock)
        for label, text in pieces:
            yield Event(row.number, label, text)
        if row.completion is not None:
            yield Event(row.number, "end", completion=row.completion)


def _require_finite(completions: list[Completion]) -> None:
    for b, completion in enumerate(completions):
        if completion.finish_reason == "error":
            n = len(completion.token_ids)
            raise GenerationError(
                f"row {b}: the logits are not finite after {n} generated tokens; check the weights with "
                "`qwen3-jax parity`, or load them with dtype float32",
                completions,
            )

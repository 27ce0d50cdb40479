"""An engine that says what it is told to: for what a model cannot be made to do.

It has the interface of `qwen3_jax.engine.engine.Engine` as far as the server uses it, on the embedded checkpoint's
tokenizer and template, without weights. A script decides what each request is answered with.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwen3_jax.config import Qwen3Config
from qwen3_jax.engine.updates import EngineStopped, Listener, Load, Overloaded, RequestStats, Ticket, Update
from qwen3_jax.reply import Reply, Timings, TokenLogprob
from qwen3_jax.request import Request, Requests
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.text.template import ChatTemplate
from qwen3_jax.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "qwen3_jax" / "demo"


def clock() -> Timings:
    return Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass
class Step:
    """Something that happens to a request instead of a token."""

    wait_s: float = 0.0
    error: str | None = None  # the engine cannot go on, with this request
    fatal: bool = False  # or with any
    broken: bool = False  # logits that are not finite


@dataclass
class FakeEngine:
    """Answers with `script(request)`: text, ids, `Step`s, or several; then the end token, until the limit."""

    script: Callable[[Request], Any] = lambda request: "<think>\nhm\n</think>\n\nAn answer."
    room: int = 1000  # requests taken at once
    failure: BaseException | None = None
    asked: list[Any] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokenizer = Tokenizer.from_folder(DEMO)
        config = Qwen3Config.from_file(DEMO / "config.json")
        self.model = SimpleNamespace(
            name="demo",
            backbone=False,
            config=config,
            tokenizer=tokenizer,
            template=ChatTemplate.from_folder(DEMO),
            defaults=SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        )
        self.requests = Requests(config, tokenizer)
        self.running: set[str] = set()
        self.lock = threading.Lock()

    def load(self) -> Load:
        return Load(len(self.running), 0, 0, 0, 1)

    def submit(
        self,
        request: Request,
        listener: Listener,
        *,
        priority: int = 0,
        cache_salt: str = "",
        grammar: Any = None,
        prompt_logprobs: int | None = None,
        request_id: str = "",
    ) -> Ticket:
        if self.failure is not None:
            raise EngineStopped("the engine has failed")
        with self.lock:
            if len(self.running) >= self.room:
                raise Overloaded(f"{self.room} requests wait: ask again later")
            self.running.add(request_id)
        self.asked.append(SimpleNamespace(
            request=request, priority=priority, salt=cache_salt, grammar=grammar, id=request_id))  # fmt: skip
        stopped = threading.Event()

        def cancel() -> None:
            self.cancelled.append(request_id)
            stopped.set()

        work = threading.Thread(
            target=self._answer, args=(request, listener, prompt_logprobs, request_id, stopped), daemon=True
        )
        work.start()
        return Ticket(request_id, cancel)

    def _answer(
        self, request: Request, listener: Listener, prompt_logprobs: int | None, id: str, stopped: threading.Event
    ) -> None:
        tokenizer = self.model.tokenizer
        reply = Reply(tokenizer, self.requests.tags, 0, request)
        wanted = request.params.logprobs
        prompt = None
        if prompt_logprobs is not None:
            prompt = (None, *(_logprob(t, prompt_logprobs) for t in request.prompt[1:]))
        try:
            if request.limit == 0:
                reply.end("length", clock)
                listener(Update(prompt_logprobs=prompt, completion=reply.completion, stats=self._stats(reply)))
                return
            for step in self._steps(request):
                if isinstance(step, Step):
                    stopped.wait(step.wait_s)
                    if step.error is not None:
                        if step.fatal:
                            self.failure = RuntimeError(step.error)
                        reply.end("error", clock)
                        listener(Update(completion=reply.completion, stats=self._stats(reply), error=step.error))
                        return
                    if not step.broken and not stopped.is_set():
                        continue
                if stopped.is_set():
                    pieces = reply.end("abort", clock)
                    listener(Update(tuple(pieces), completion=reply.completion, stats=self._stats(reply)))
                    return
                tokens = () if isinstance(step, Step) else (step,)
                entries = () if wanted is None else tuple(_logprob(token, wanted) for token in tokens)
                pieces = reply.take(tokens, entries, clock) if tokens else reply.end("error", clock)
                done = reply.completion
                listener(
                    Update(
                        tuple(pieces),
                        tokens,
                        entries,
                        prompt,
                        done,
                        None if done is None else self._stats(reply),
                    )
                )
                prompt = None
                if done is not None:
                    return
        finally:
            with self.lock:
                self.running.discard(id)

    def _steps(self, request: Request) -> Iterator[int | Step]:
        said = self.script(request)
        parts: Iterable[Any] = [said] if isinstance(said, str | int | Step) else said
        for part in parts:
            if isinstance(part, str):
                yield from self.model.tokenizer.encode(part)
            else:
                yield part
        while True:
            yield self.model.tokenizer.stop_ids[0] if request.stop_ids else 5

    def _stats(self, reply: Reply) -> RequestStats:
        done = reply.completion
        assert done is not None
        u = done.usage
        return RequestStats(
            u.prompt_tokens, u.completion_tokens, u.reasoning_tokens, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, reply.request.limit
        )

    def drain(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while self.running and time.monotonic() < until:
            time.sleep(0.01)
        return not self.running

    def stop(self) -> None:
        pass


def _logprob(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -1.0, tuple((i, -1.0 - i) for i in range(top)))


def scripts() -> dict[str, Callable[[Request], Any]]:
    """Name some scripts, for a server of its own process."""

    def slow(request: Request) -> Iterator[Any]:
        while True:
            yield Step(wait_s=0.05)
            yield "a"

    return {
        "answer": lambda request: "<think>\nhm\n</think>\n\nAn answer.",
        "slow": slow,
        "silent": lambda request: [Step(wait_s=1e6)],
        "long": lambda request: [64] * 100_000,
        "dies": lambda request: ["abc", Step(error="the engine has failed: broken", fatal=True)],
    }


def main(argv: list[str]) -> int:
    """Serve a script: `python -m tests.fake_engine SCRIPT PORT OPTIONS-AS-JSON`."""
    import json

    from qwen3_jax.server.app import create_app
    from qwen3_jax.server.options import ServerOptions
    from qwen3_jax.server.run import Tls, bind, run

    script, port, given = argv
    engine = FakeEngine(scripts()[script])
    changes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(given).items()}
    tls = Tls(*changes.pop("tls", ()))
    options = ServerOptions(**changes)
    return run(create_app(engine, options), bind("127.0.0.1", int(port)), options, tls=tls)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))

"""The subcommands that make text: `generate`, `chat`, `demo`. See `cli` for the rest.

Text goes to stdout as it arrives, reasoning in its tags; what it cost goes to stderr.
"""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from qwen3_jax import cli_options
from qwen3_jax.cli_options import OK, Dtype, Folder, Json, UsageError, is_ours
from qwen3_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwen3_jax.generate import Event, Generator
    from qwen3_jax.reply import Completion

Thinking = Annotated[
    Literal["on", "off"] | None,
    arg(metavar="{on,off}", help="thinking of hybrid models", help_behavior_hint="(default: the template's)"),
]
System = Annotated[str | None, arg(metavar="TEXT", help="system message", help_behavior_hint="")]


def _sampling_flags() -> type:
    """Make the flags of `SamplingParams`: its fields, each optional; left out means the model's own default."""
    names = {float: "NUMBER", int: "N", str: "TEXT"}
    flags = []
    for f in dataclasses.fields(SamplingParams):
        unset: Any = None
        if f.type is bool:
            kind, metavar = bool, None
            unset = False
        elif f.default == ():
            kind = f.type
            metavar = "TEXT [TEXT ...]" if f.name == "stop" else "N [N ...]"
            unset = ()
        elif f.name == "logit_bias":
            kind, metavar = dict[int, float], "ID NUMBER [ID NUMBER ...]"
        else:
            base = next(t for t in names if t is f.type or t in getattr(f.type, "__args__", ()))
            kind, metavar = base | None, names[base]
        options = arg(metavar=metavar, help=f.metadata["help"], help_behavior_hint="")
        if f.name == "logit_bias":
            flags.append((f.name, Annotated[kind, options], dataclasses.field(default_factory=dict)))
        else:
            flags.append((f.name, Annotated[kind, options], dataclasses.field(default=unset)))
    return dataclasses.make_dataclass("sampling", flags, frozen=True)


_Flags: Any = _sampling_flags()
if TYPE_CHECKING:
    SamplingFlags = Any
else:
    SamplingFlags = _Flags


def _changes(flags: Any) -> dict[str, Any]:
    """Return the flags that were given."""
    given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags)}
    return {name: value for name, value in given.items() if not (value is None or value is False or value in ((), {}))}


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer a prompt, or several as one batch.

    The prompt is a user's turn of the model's chat template; with --raw it is text to continue. Without a prompt,
    standard input is one. One prompt is streamed; several are printed when all are done.
    """

    folder: Positional[Folder]
    prompt: Positional[Annotated[tuple[str, ...], arg(metavar="[PROMPT ...]", help="", help_behavior_hint="")]] = ()
    raw: Annotated[bool, arg(help="continue the text as it is, without the chat template", help_behavior_hint="")] = (
        False
    )
    system: System = None
    thinking: Thinking = None
    json: Json = False
    dtype: Dtype = None
    mesh: cli_options.Mesh = None
    compile_cache: cli_options.CompileCache = None
    sampling: OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=_Flags)

    def run(self) -> int:
        changes = _changes(self.sampling)
        SamplingParams().replace(**changes)  # before a model is loaded
        if self.mesh is None:
            return self._answer(list(self.prompt) or [_standard_input()], changes)
        from qwen3_jax import distributed

        cluster = distributed.detect()
        with distributed.session(cluster):
            # Every process runs the same program on the same prompts and seed; the first one speaks.
            main = distributed.is_main()
            prompts = list(self.prompt) or distributed.share([_standard_input()] if main else None)
            changes["seed"] = changes.get("seed", distributed.share(secrets.randbits(32)))
            with contextlib.ExitStack() as stack:
                if not main:
                    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                return self._answer(prompts, changes)

    def _answer(self, prompts: list[str], changes: dict[str, Any]) -> int:
        generator = _load(self.folder, self.dtype, self.compile_cache, self.mesh)
        ids = [generator.tokenizer.encode(p) if self.raw else _turn(generator, p, self) for p in prompts]
        if self.json:
            for completion in generator.generate(ids, batch_size=len(ids), **changes):
                print(json.dumps(_record(completion), ensure_ascii=False))
        elif len(ids) == 1:
            _say(_show(generator.stream(ids, **changes)))
        else:
            for prompt, completion in zip(
                prompts, generator.generate(ids, batch_size=len(ids), **changes), strict=True
            ):
                print(f"=== {prompt}\n{completion.text}")
                _say(completion)
        return OK


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talk with a model.

    Ctrl-C stops a reply, Ctrl-C or Ctrl-D at the prompt leaves. /reset forgets the conversation; /think and /no_think
    are text that hybrid models understand. With standard input from a pipe, every line is a turn.
    """

    folder: Positional[Folder]
    system: System = None
    thinking: Thinking = None
    json: Json = False
    dtype: Dtype = None
    compile_cache: cli_options.CompileCache = None
    sampling: OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=_Flags)

    def run(self) -> int:
        changes = _changes(self.sampling)
        SamplingParams().replace(**changes)
        generator = _load(self.folder, self.dtype, self.compile_cache)
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        generator.prompt([*opening, {"role": "user", "content": ""}])  # a folder without a template is refused here
        _converse(generator, _turns(), changes, opening=opening, thinking=self.thinking, as_json=self.json)
        return OK


WORTH_ASKING = (
    ("What is 4786 + 359?", "Now take away 84."),
    ("太郎さんはあめを233個持っています。113個もらいました。全部で何個ですか。",),
    ("What date is 46 days after October 22, 2024?",),
    ("What date is 46 days after October 22, 2024? /no_think",),  # a guess
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """Talk with the checkpoint in the package: a tiny Qwen3 that reasons about numbers and dates. Needs no download.

    Without a prompt it answers a few, then, on a terminal, yours.
    """

    prompt: Positional[Annotated[tuple[str, ...], arg(metavar="[PROMPT ...]", help="", help_behavior_hint="")]] = ()
    json: Json = False
    compile_cache: cli_options.CompileCache = None
    sampling: OmitArgPrefixes[SamplingFlags] = dataclasses.field(default_factory=_Flags)

    def run(self) -> int:
        changes: dict[str, Any] = {"seed": 0} | _changes(self.sampling)
        SamplingParams().replace(**changes)
        generator = _load(str(Path(__file__).parent / "demo"), None, self.compile_cache)
        print(
            f"The checkpoint in the package: {generator.config.num_parameters():,} parameters, trained on sums,\n"
            "sorting, counting, dates and small stories in English, Japanese and Korean. It knows nothing else.\n",
            file=sys.stderr,
        )
        for turns in [self.prompt] if self.prompt else WORTH_ASKING:
            _converse(generator, map(_shown, turns), changes, as_json=self.json)
        if not self.prompt and not self.json and sys.stdin.isatty():
            _converse(generator, _turns(), changes)
        return OK


def _shown(text: str) -> str:
    print(f"> {text}", file=sys.stderr)
    return text


def _load(folder: str, dtype: Dtype, cache: str | None, mesh: str | None = None) -> "Generator":
    from qwen3_jax.generate import Generator

    return Generator.from_folder(folder, dtype=dtype, cache=cache, mesh=mesh, progress=True)


def _on(thinking: Thinking) -> bool | None:
    return None if thinking is None else thinking == "on"


def _turn(generator: "Generator", text: str, command: Generate) -> list[int]:
    opening = [] if command.system is None else [{"role": "system", "content": command.system}]
    return generator.prompt([*opening, {"role": "user", "content": text}], enable_thinking=_on(command.thinking))


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise UsageError("no prompt: give one, or pipe it in")
    if not (text := sys.stdin.read()):
        raise UsageError("no prompt: standard input is empty")
    return text.removesuffix("\n")


def _converse(
    generator: "Generator",
    turns: Iterable[str],
    changes: dict[str, Any],
    *,
    opening: Sequence[dict[str, Any]] = (),
    thinking: Thinking = None,
    as_json: bool = False,
) -> None:
    """Answer a user's turns as one conversation and say each reply."""
    messages = list(opening)
    for text in turns:
        if text.strip() == "/reset":
            messages = list(opening)
            print("the conversation is forgotten", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": text})
        try:
            events = generator.stream_chat(messages, enable_thinking=_on(thinking), **changes)
            completion = _interruptible(events, quiet=as_json)
        except ValueError as error:
            if not is_ours(error) or not sys.stdin.isatty():
                raise
            messages.pop()
            print(f"{error} (/reset forgets the conversation)", file=sys.stderr)
            continue
        if isinstance(completion, dict):  # stopped by Ctrl-C: what was said stays in the conversation
            messages.append({"role": "assistant", **completion})
            continue
        messages.append({"role": "assistant", "content": completion.answer, "reasoning_content": completion.reasoning})
        if as_json:
            print(json.dumps(_record(completion), ensure_ascii=False), flush=True)
        else:
            _say(completion)


def _turns() -> Iterator[str]:
    """Yield what the user says, until the end of input; a blank line is nothing."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() a line editor
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip():
            yield text


def _show(events: "Iterable[Event]", said: dict[str, str] | None = None) -> "Completion":
    """Print text as it arrives, reasoning in its tags and dim on a terminal, and return the completion."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    said = {} if said is None else said
    kind, completion = "", None
    try:
        for event in events:
            if event.kind == "end":
                completion = event.completion
                continue
            if event.kind != kind:
                opening = f"{dim}<think>\n" if event.kind == "reasoning" else ""
                sys.stdout.write(f"\n</think>{plain}\n\n{opening}" if kind == "reasoning" else opening)
                kind = event.kind
            said[kind] = said.get(kind, "") + event.text
            sys.stdout.write(event.text)
            sys.stdout.flush()
        if kind == "reasoning":
            sys.stdout.write("\n</think>")
    finally:
        sys.stdout.write(f"{plain}\n")
        sys.stdout.flush()
    if completion is None:
        raise RuntimeError("a stream ended without a completion")
    return completion


def _interruptible(events: Any, *, quiet: bool) -> "Completion | dict[str, str]":
    """Show a reply; Ctrl-C ends it and returns what was said so far as parts of a message."""
    said: dict[str, str] = {}
    try:
        with contextlib.closing(events):
            if quiet:
                return next(e.completion for e in events if e.completion is not None)
            return _show(events, said)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("(stopped)", file=sys.stderr)
        return {"content": said.get("answer", ""), "reasoning_content": said.get("reasoning", "")}


def _say(completion: "Completion") -> None:
    """Print where the time went, to stderr."""
    t, usage = completion.timings, completion.usage
    parts = [
        f"{usage.completion_tokens} tokens"
        + (f" ({usage.reasoning_tokens} thinking)" if usage.reasoning_tokens else ""),
        f"{t.tokens_per_s:.1f} tokens/s",
        f"first token {t.first_token_s:.2f} s",
        f"load {t.load_s:.2f} s",
        f"compile {t.compile_s:.2f} s",
        f"prefill {t.prefill_s:.2f} s",
        f"decode {t.decode_s:.2f} s",
    ]
    if completion.finish_reason == "length":
        parts.append("cut at the token limit")
    print(f"[{' · '.join(parts)}]", file=sys.stderr)


def _record(completion: "Completion") -> dict[str, Any]:
    return {"text": completion.text, **dataclasses.asdict(completion)}

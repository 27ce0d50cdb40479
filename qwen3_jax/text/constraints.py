"""Constrained output: which tokens may come next so that the text fits a JSON schema, regex, choice or grammar.

`Constraint` → `grammars.source` (checked, in llguidance's form) → tried in a child process (`grammar_check`) →
`Grammar`, kept in a bounded cache → one `Matcher` per row: `mask` before a token is drawn, `accept` after.

llguidance sees the bytes of each token of our own tokenizer. Added tokens (`<|im_end|>`, `<think>`, `<tool_call>` …)
are never part of a grammar's text; only structural tags may name those that the tokenizer does not call special. Rows
of the vocabulary without a token are never allowed. The end tokens are allowed exactly when the text may end.
"""

import hashlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_jax.text.grammars import Constraint, ConstraintError, one_line, source
from qwen3_jax.text.tokenizer import Tokenizer

__all__ = ["Constraint", "ConstraintError", "Constraints", "Grammar", "Matcher"]

# llguidance's fuel of one compilation (50k/ms) and of one mask (14k/ms, items 20k/ms); lexer states take up to 2 kB.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
}
CACHED = 64  # grammars kept
CACHED_BYTES = 256 << 20  # and the memory they may have taken together
GRAMMAR_BYTES = 128 << 20  # the most that one may take
CHECKS = 4  # child processes at once


class Constraints:
    """Compiles constraints for one tokenizer; thread-safe.

    Attributes: `vocab_size`, rows of the model's logits, which masks cover; `compile_s`, seconds spent compiling.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Take the tokenizer; nothing is built before the first `compile`.

        Raises ConstraintError when the model has fewer rows than the tokenizer has ids.
        """
        if vocab_size < tokenizer.vocab_size:
            raise ConstraintError(f"vocab_size is {vocab_size}, the tokenizer has {tokenizer.vocab_size} ids")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.compile_s = 0.0
        self._lock = threading.Lock()
        self._checks = threading.BoundedSemaphore(CHECKS)
        self._cache: OrderedDict[bytes, Grammar] = OrderedDict()
        self._backend: Any = None
        # The added tokens that appear in text: the others end turns or mark them, and no grammar may name them.
        self._tags = {t: i for t, i in tokenizer.special.items() if tokenizer.token_bytes(i, skip_special_tokens=True)}
        self._tags = {t: i for t, i in self._tags.items() if i not in tokenizer.stop_ids}
        self._stops = self._bits(tokenizer.stop_ids)
        self._text = self._bits(sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special.values())))

    def compile(self, constraint: Constraint, *, timeout_s: float = 5.0) -> "Grammar":
        """Compile a constraint, or find it in the cache; `timeout_s` of CPU, and four times as long on a busy machine.

        Raises ConstraintError in one line: malformed, unsupported, impossible, or too much work.
        """
        began = time.perf_counter()
        made = source(constraint, self._tags)
        key = hashlib.sha256(made.text.encode("utf-8", "surrogatepass")).digest()
        with self._lock:
            if (found := self._cache.get(key)) is not None and not found.spent:
                self._cache.move_to_end(key)
                return found
        backend = self.prepare()
        size = 0 if made.plain else self._check(constraint, timeout_s)
        from llguidance import LLMatcher, LLParserLimits

        inner = LLMatcher(backend, made.text, log_level=0, limits=LLParserLimits(verbose_errors=False, **LIMITS))
        grammar = Grammar(self, inner, self._text | self._bits(made.tags), max(size, 4 * len(made.text)))
        first = grammar.start()
        first.mask(np.zeros(-(-self.vocab_size // 32), np.uint32))
        if first.error is not None:
            raise ConstraintError(f"{constraint.kind} cannot be honoured: {first.error}")
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > CACHED or sum(g.size for g in self._cache.values()) > CACHED_BYTES:
                self._cache.popitem(last=False)
            self.compile_s += time.perf_counter() - began
        return grammar

    def prepare(self) -> Any:
        """Build llguidance's form of the tokenizer, once (1.3 s and 120 MB for the released one); return it."""
        with self._lock:
            if self._backend is None:
                try:
                    from llguidance import LLTokenizer, TokenizerWrapper
                except ImportError:
                    raise ConstraintError(
                        "structured output needs llguidance: pip install 'qwen3-jax[serve]'"
                    ) from None
                if not self.tokenizer.stop_ids:
                    raise ConstraintError("structured output needs an end token: set eos_token_id in config.json")
                table = _Table(self.tokenizer)
                self._backend = LLTokenizer(
                    TokenizerWrapper(table),
                    n_vocab=self.tokenizer.vocab_size,
                    eos_token=list(self.tokenizer.stop_ids),
                )
            return self._backend

    def _check(self, constraint: Constraint, timeout_s: float) -> int:
        """Try a grammar in a child process, where only added tokens have ids, from 257 on; return the bytes it took."""
        import llguidance

        made = source(constraint, {tag: 257 + i for i, tag in enumerate(self._tags)})

        program = Path(__file__).with_name("grammar_check.py")
        command = [sys.executable, "-I", str(program), str(Path(llguidance.__file__).parents[1])]
        request = json.dumps(
            {"grammar": made.text, "limits": LIMITS, "tags": len(self._tags), "seconds": math.ceil(timeout_s)}
        )
        late = ConstraintError(f"the grammar did not compile within {timeout_s:g} s: simplify it")
        if not self._checks.acquire(timeout=4 * timeout_s):
            raise ConstraintError(f"{CHECKS} grammars are being compiled: send the request again")
        try:
            ran = subprocess.run(command, input=request.encode(), capture_output=True, timeout=4 * timeout_s)
            if ran.returncode == -signal.SIGXCPU:
                raise late
            said = json.loads(ran.stdout) if ran.returncode == 0 else {}
        except subprocess.TimeoutExpired:
            raise late from None
        except (OSError, json.JSONDecodeError) as e:
            raise ConstraintError(f"the grammar cannot be checked: {one_line(e)}") from None
        finally:
            self._checks.release()
        if "error" not in said:
            raise ConstraintError("the grammar is too large or too deeply nested to compile: simplify it")
        if said["error"]:
            raise ConstraintError(f"the grammar cannot be honoured: {one_line(said['error'])}")
        if said["bytes"] > GRAMMAR_BYTES:
            raise ConstraintError(
                f"the grammar takes {said['bytes'] >> 20} MiB, at most {GRAMMAR_BYTES >> 20} are allowed: simplify it"
            )
        return int(said["bytes"])

    def _bits(self, ids: Any) -> np.ndarray:
        bits = np.zeros(-(-self.vocab_size // 32) * 32, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.dtype("<u4")).astype(np.uint32)


class Grammar:
    """A compiled constraint, shared by all rows that ask for it."""

    def __init__(self, owner: Constraints, inner: Any, allowed: np.ndarray, size: int):
        self.size = size  # bytes it took, roughly
        self.spent = False  # its matchers share lexer states, and these reached a limit: compile it anew
        self._owner = owner
        self._inner = inner
        self._allowed = allowed
        self._lock = threading.Lock()

    def start(self) -> "Matcher":
        """Return a matcher at the start of the text."""
        with self._lock:
            inner = self._inner.deep_copy()
        return Matcher(self, inner, self._allowed, self._owner._stops, frozenset(self._owner.tokenizer.stop_ids))


class Matcher:
    """Where one text stands in its grammar. Used by one thread at a time."""

    def __init__(self, grammar: Grammar, inner: Any, allowed: np.ndarray, stops: np.ndarray, stop_ids: frozenset[int]):
        self._grammar = grammar
        self._inner = inner
        self._allowed = allowed
        self._stops = stops
        self._stop_ids = stop_ids
        self._ended = False
        self._stuck = False
        self._taken = 0

    @property
    def error(self) -> str | None:
        """Why this text cannot go on (a limit was reached), else None."""
        if self._inner.is_error():
            return one_line(self._inner.get_error()) or "a limit was reached"
        if self._stuck:
            return "it goes on with tokens that no text may hold"
        return "no text fits it" if self._inner.is_stopped() and not self._inner.is_accepting() else None

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but an end token can follow."""
        return self._ended or (self._inner.is_stopped() and self._inner.is_accepting())

    def mask(self, out: np.ndarray) -> None:
        """Fill the bits of the ids that may come next.

        Args:
            out: [ceil(V / 32)] uint32, V the model's vocabulary; id i is bit i % 32 of word i // 32.

        After an `error`, and after the end, only the end tokens are allowed: a row always has something to draw.
        """
        out[:] = 0
        if not self._ended:
            bits = np.frombuffer(self._inner.compute_bitmask(), np.dtype("<u4"))
            np.bitwise_and(bits, self._allowed[: len(bits)], out=out[: len(bits)])
        ends = self._ended or self._inner.is_accepting()
        self._stuck = not ends and not out.any()
        if ends:
            out |= self._stops
        elif self.error is not None:
            out |= self._stops
            self._grammar.spent = True

    def accept(self, token: int) -> bool:
        """Take a token; False, and nothing changes, if it was not allowed."""
        if self._ended:
            return False
        if token in self._stop_ids:
            self._ended = self._inner.is_accepting()
            self._taken += self._ended
            return self._ended
        word, bit = divmod(token, 32)
        if not 0 <= word < len(self._allowed) or not int(self._allowed[word]) >> bit & 1:
            return False
        taken = self._inner.try_consume_tokens([token]) == 1
        self._taken += taken
        return taken

    def rollback(self, n: int) -> None:
        """Take back the last n tokens; ValueError if fewer were accepted."""
        if not 0 <= n <= self._taken:
            raise ValueError(f"cannot take back {n} tokens, {self._taken} were accepted")
        self._taken -= n
        if n and self._ended:
            self._ended = False
            n -= 1
        if n:
            self._inner.rollback(n)


class _Table:
    """Our tokenizer as llguidance asks for one: the bytes of every id, and which ids are no text."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id = tokenizer.stop_ids[0]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(set(tokenizer.special.values()) | set(tokenizer.stop_ids))
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)

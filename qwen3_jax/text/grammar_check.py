"""The program that tries a grammar in a process of its own, before the server's own process compiles it.

llguidance bounds most of its work by fuel, but some hostile grammars overflow its stack or multiply automata without
end. Here that kills only this child: `constraints` runs this file by its path with `python -I`, writes the grammar to
its standard input and reads one line of JSON, {"error": str, "bytes": memory that compiling took}. The argument is the
folder that llguidance lies in. Nothing of this package is imported.
"""

import json
import resource
import sys
import threading
from typing import Any

# Less than any thread of the server has, so that what fits here cannot overflow there.
STACK_BYTES = 2 << 20
MEMORY_BYTES = 2 << 30
STEPS = 16  # tokens to take: what blows up does so at once


def peak_bytes() -> int:
    """Return the largest resident size so far (Linux counts KiB, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def try_grammar(grammar: str, limits: dict[str, Any], tags: int, said: dict[str, object]) -> None:
    """Compile with a tokenizer of single bytes and `tags` added tokens, take a few steps; fill in `said`."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    wrapper = TokenizerWrapper(_Bytes(tags))
    before = peak_bytes()
    tokenizer = LLTokenizer(wrapper, n_vocab=257 + tags, eos_token=[256])
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False, **limits))
    for _ in range(STEPS):
        mask = matcher.compute_bitmask()
        allowed = next((b for b in range(256) if mask[b >> 3] >> (b & 7) & 1), None)
        if matcher.is_error() or allowed is None:
            break
        matcher.consume_token(allowed)
    said["error"] = matcher.get_error()
    said["bytes"] = peak_bytes() - before


class _Bytes:
    """A tokenizer of the 256 bytes, an end token and added tokens."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, tags: int):
        self.tokens = [bytes([b]) for b in range(256)] + [f"<{i}>".encode() for i in range(256, 257 + tags)]
        self.special_token_ids = list(range(256, 257 + tags))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.loads(sys.stdin.buffer.read())
    # SIGXCPU ends this process when the time is up, in seconds of CPU besides those that starting took.
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"] + int(used.ru_utime + used.ru_stime), -1))
    said: dict[str, object] = {}
    threading.stack_size(STACK_BYTES)
    arguments = (request["grammar"], request["limits"], request["tags"], said)
    thread = threading.Thread(target=try_grammar, args=arguments, daemon=True)
    thread.start()
    thread.join()
    print(json.dumps(said))


if __name__ == "__main__":
    main()

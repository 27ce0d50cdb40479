"""What an engine tells of itself while it runs: methods that do nothing, to be overridden by whoever counts.

All are called on the engine's thread, except `rejected`, which is called on the thread that submits, and `compiled`,
which may be called on any; they must be quick and must not raise.
"""

from qwen3_jax.engine.updates import RequestStats


class Observer:
    """Hears of every step and request of an engine."""

    def step(self, *, host_s: float, rows: int, prompt_tokens: int, generated_tokens: int) -> None:
        """Hear of one turn of the engine's loop.

        Args:
            host_s: processor seconds that the engine's thread took to schedule, lay out, dispatch and read. On a CPU
                the computation itself runs on other threads, and competes for the same cores: wall-clock time would
                count its turns too.
            rows: sequences in the decode batch.
            prompt_tokens: computed by the prefill calls of this turn.
            generated_tokens: read in this turn.
        """

    def finished(self, stats: RequestStats, *, finish_reason: str) -> None:
        """Hear of a request that has ended: "stop", "length", "error" or "abort"."""

    def first_token(self, seconds: float) -> None:
        """Hear of a request's first token, seconds after it was submitted."""

    def inter_token(self, seconds: float, count: int) -> None:
        """Hear of `count` tokens of one sequence that arrived together, `seconds` after those before them."""

    def preempted(self) -> None:
        """Hear of a sequence that gave up its pages and will be computed again."""

    def prefix(self, *, queried: int, hits: int) -> None:
        """Hear of a lookup in the prefix cache: prompt tokens asked for, and found."""

    def rejected(self, reason: str) -> None:
        """Hear of a request that was refused: "queue", "queue_tokens" or "stopped"."""

    def compiled(self, name: str, seconds: float) -> None:
        """Hear of a program that was compiled; to generate, none is after the warm-up."""

    def corrupted(self) -> None:
        """Hear of a request whose logits were not finite."""

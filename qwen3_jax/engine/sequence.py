"""What the scheduler and the engine pass to one another: sequences, and plans for them. No JAX import.

A sequence's positions are those of prompt + output. Keys and values of positions [0, computed) are written by the
dispatched calls. The chunk that completes the prompt draws output token 0; a decode step writes the position of the
token drawn last and draws the next, so output token n is drawn when position len(prompt) + n - 1 is computed.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(eq=False, slots=True)
class Sequence:
    """One prompt and its continuation. The caller gives the first fields, the scheduler keeps the others.

    Attributes:
        id: unique among the sequences that the scheduler holds.
        limit: generate at most this many tokens; 0 ends it with its prompt.
        priority: lower runs first; equal ones in the order of `add`.
        salt: prefixes are shared only between equal salts.
        stepwise: its next token cannot be planned before its last one is known, as under a grammar. May be changed
            between plans.
        output: the tokens that are known.
        row: its slot among the rows that decode together; None unless running.
        pages: of positions in order; only grows while it runs.
        computed: positions whose keys and values are written by the calls planned so far.
        target: position at which prefill ends and decoding begins.
        cached: positions that it did not have to compute when it was first admitted.
        in_flight: tokens planned but not committed; they may be of a life before a preemption.
        preemptions: how often it lost its pages.
        arrival: order of `add`.
    """

    id: int
    prompt: list[int]
    limit: int
    priority: int = 0
    salt: str = ""
    stepwise: bool = False
    output: list[int] = field(default_factory=list)
    state: Literal["new", "waiting", "running", "ended"] = "new"
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    target: int = 0
    cached: int = 0
    in_flight: int = 0
    preemptions: int = 0
    arrival: int = 0
    digests: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    registered: int = 0  # blocks that are shared, or were when they were full
    announced: int = 0  # end of the blocks that others wait for rather than compute too
    awaited: bytes = b""  # the block of another's that it waits for

    @property
    def prefilling(self) -> bool:
        """Whether it runs and still has positions to prefill."""
        return self.state == "running" and self.computed < self.target

    def token(self, position: int) -> int:
        """Return the known token at a position of prompt + output."""
        at = position - len(self.prompt)
        return self.prompt[position] if at < 0 else self.output[at]


@dataclass(eq=False, slots=True)
class Chunk:
    """Prefill positions [start, start + length) of a sequence, which attend to all positions before them.

    Attributes:
        draws: whether it completes the prefill and so draws output token `first`, if there is to be one; its row
            decodes from the next plan on.
        first: index of the output token it draws.
        known: that token if it is known and drawn again, after a preemption in deterministic mode; else ().
        life: `sequence.preemptions` when it was planned.
    """

    sequence: Sequence
    start: int
    length: int
    draws: bool
    first: int
    known: tuple[int, ...]
    life: int

    @property
    def new(self) -> int:
        """Tokens that the host will learn from it."""
        return int(self.draws) - len(self.known)


@dataclass(eq=False, slots=True)
class Decode:
    """Decode `count` tokens of a row, from output token `first` on, writing positions [start, start + count).

    The input of the first step is the token at position `start`: the one that the row drew last, on the device, unless
    the host knows it.

    Attributes:
        known: the first of these tokens, as far as they are known already: replay them instead of drawing.
        life: `sequence.preemptions` when it was planned.
    """

    sequence: Sequence
    start: int
    count: int
    first: int
    known: tuple[int, ...]
    life: int

    @property
    def new(self) -> int:
        """Tokens that the host will learn from it."""
        return self.count - len(self.known)


@dataclass(slots=True)
class Plan:
    """What to dispatch: the chunks, in any order, and one decode call of `decode_tokens` steps.

    A sequence is in `prefill` or in `decode`, once. Its `row` and `pages` are those of the plan until the scheduler is
    called again. `preempted` have lost row and pages, `admitted` have got theirs; a plan may hold nothing to dispatch
    while uncommitted plans hold everything there is to do.
    """

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Decode] = field(default_factory=list)
    decode_tokens: int = 0
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)

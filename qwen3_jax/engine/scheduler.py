"""What the device computes next: rows, pages, chunks of prompts, steps of decoding. Ints and lists, no JAX import.

    scheduler.add(sequence)                 # waits
    plan = scheduler.plan()                 # admits, allots pages, preempts; dispatch plan.prefill and plan.decode
    scheduler.commit(plan, tokens, ended)   # what came back: sequences advance or end, full pages become shareable

The device may run ahead of the host: further plans may be made, and dispatched in order, before a plan is committed.
A plan counts the tokens of the uncommitted ones without knowing them; a sequence that then turns out to have ended is
dropped when its later plans are committed. Because the device executes dispatches in order, pages and rows are given
away at once: whoever gets them next writes after the last use.

Deterministic mode makes every token a function of its own sequence alone, given calls whose shape fixes the order of
their sums: chunks begin at multiples of chunk_tokens, cached prefixes end there, only pages written by whole prompt
chunks are shared, and a preempted sequence gets its generated tokens back by the decode steps that made them, replaying
the tokens that are known. Otherwise prefixes are shared page by page, generated ones too, and a preempted sequence is
prefilled with its output.
"""

from bisect import insort
from collections.abc import Collection, Mapping

from qwen3_jax.engine.pages import Pages
from qwen3_jax.engine.prefixes import Prefixes
from qwen3_jax.engine.sequence import Chunk, Decode, Plan, Sequence

LOOK = 32  # sequences at the head of the queue that one plan considers
SHORT = 4  # chunks of a prompt that is over soon
CALL_S = 0.2  # seconds that a decode call should take at most: who comes during it waits for its end
CALL_STEPS = 3  # that it takes all the same: what a call costs the host, about 2 ms, is for all of them


class TooLarge(ValueError):
    """A sequence that could not run even alone: it needs more positions than the whole cache has."""


class Scheduler:
    """Decides for one engine. Not thread-safe: everything is called on the engine's thread."""

    def __init__(
        self,
        *,
        rows: int,
        pages: int,
        page_tokens: int,
        chunk_tokens: int,
        decode_tokens: int = 8,
        busy_tokens: int = 1,
        prefix_cache: bool = True,
        deterministic: bool = False,
    ):
        """Start with an empty cache.

        Args:
            rows: most sequences that run together.
            pages: of the whole cache, numbered from 0; a page for writes that count for nothing is the engine's own.
            page_tokens: positions per page.
            chunk_tokens: most prompt tokens per plan, except that one chunk always fits.
            decode_tokens: most steps per decode call when nobody waits; fewer when they are slow, see `pace`.
            busy_tokens: the same while a prompt of more than `SHORT` chunks is prefilled, at most decode_tokens; fewer,
                down to 1, the larger the share of those who do not decode. Beside short prompts it is 1: a row that
                decodes nothing costs a step as much as one that does, and they are over soon.
            deterministic: see the module.

        Raises:
            ValueError: a number is below 1, busy_tokens above decode_tokens, or chunk_tokens no multiple of page_tokens
                in deterministic mode.
        """
        numbers = {"rows": rows, "pages": pages, "page_tokens": page_tokens}
        numbers |= {"chunk_tokens": chunk_tokens, "decode_tokens": decode_tokens, "busy_tokens": busy_tokens}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} is {number}: set it to at least 1")
        if busy_tokens > decode_tokens:
            raise ValueError(f"busy_tokens is {busy_tokens}, decode_tokens {decode_tokens}: set it to that or less")
        if deterministic and chunk_tokens % page_tokens:
            raise ValueError(
                f"chunk_tokens is {chunk_tokens} and page_tokens is {page_tokens}: "
                "deterministic mode needs chunks of whole pages, set chunk_tokens to a multiple"
            )
        self.pages = Pages(pages)
        self.page_tokens = page_tokens
        self.chunk_tokens = chunk_tokens
        self.decode_tokens = decode_tokens
        self.busy_tokens = busy_tokens
        self._paced_tokens = decode_tokens
        self.deterministic = deterministic
        grain = chunk_tokens // page_tokens if deterministic else 1
        self.prefixes = Prefixes(self.pages, page_tokens=page_tokens, grain=grain, enabled=prefix_cache)
        self.waiting: list[Sequence] = []  # by priority and arrival
        self.waiting_tokens = 0  # prompt tokens of those that wait
        self._sequences: dict[int, Sequence] = {}
        self._prefilling: list[Sequence] = []  # whose turn it is first
        self._decoding: list[Sequence] = []  # by priority and arrival
        self._rows = list(range(rows - 1, -1, -1))  # free ones
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._sequences)

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have a row."""
        return self._prefilling + self._decoding

    def needed(self, sequence: Sequence) -> int:
        """Return the most pages that a sequence can come to use: the last token's position is never written."""
        return self._pages_of(len(sequence.prompt) + max(0, sequence.limit - 1))

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn.

        Raises:
            TooLarge: it needs more pages than there are.
            ValueError: empty prompt, limit below 0, or an id that is taken.
        """
        if not sequence.prompt or sequence.limit < 0:
            raise ValueError(
                f"sequence {sequence.id} has {len(sequence.prompt)} prompt tokens and limit {sequence.limit}: "
                "give at least one prompt token, and a limit of at least 0"
            )
        if sequence.id in self._sequences or sequence.state != "new":
            raise ValueError(f"sequence id {sequence.id} is {sequence.state} already: give every sequence its own")
        if self.needed(sequence) > self.pages.total:
            positions = len(sequence.prompt) + max(0, sequence.limit - 1)
            room = self.pages.total * self.page_tokens
            most = max(0, room + 1 - len(sequence.prompt))
            raise TooLarge(
                f"{len(sequence.prompt)} prompt tokens and up to {sequence.limit} generated ones take {positions} "
                f"positions, the cache has {room}: set max_tokens to {most} or less, or make the cache larger"
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[sequence.id] = sequence
        self._wait(sequence)

    def cancel(self, sequence_id: int) -> bool:
        """End a sequence in whatever state it is; its row and pages are free for the next plan.

        Returns:
            whether there was such a sequence.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    def pace(self, step_s: float) -> None:
        """Note how many seconds a step of decoding takes: further calls take `CALL_S`, or `CALL_STEPS` steps."""
        self._paced_tokens = min(self.decode_tokens, max(CALL_STEPS, int(CALL_S / max(step_s, 1e-9))))

    def plan(self) -> Plan:
        """Decide what the device computes next, and allot its pages."""
        plan = Plan()
        self._plan_decode(plan, self._most_steps())
        if not plan.preempted:
            self._admit(plan)
        self._plan_prefill(plan)
        return plan

    def commit(
        self,
        plan: Plan,
        tokens: Mapping[int, Collection[int]],
        ended: Collection[int] = (),
        failed: Collection[int] = (),
    ) -> list[Sequence]:
        """Take what the device computed for the oldest uncommitted plan.

        Args:
            tokens: {sequence id: the `new` tokens of its chunk or decode}, shorter only if the sequence has ended.
                Entries of sequences that ended before are ignored.
            ended: ids of sequences that end with these tokens; those at their limit end of themselves.
            failed: ids of those that end because their numbers are no good: what they wrote is never shared again.

        Returns:
            the sequences that have ended now.
        """
        over = []
        for entry in (*plan.prefill, *plan.decode):
            sequence, planned = entry.sequence, entry.new
            sequence.in_flight -= planned
            if sequence.state == "ended":
                continue
            if sequence.id in failed:
                self.pages.forget(sequence.pages)
                self._end(sequence)
                over.append(sequence)
                continue
            new = tokens.get(sequence.id, ()) if planned else ()
            ends = sequence.id in ended
            if len(new) > planned or (len(new) < planned and not ends):
                raise ValueError(f"sequence {sequence.id} got {len(new)} tokens where {planned} were planned")
            sequence.output.extend(new)
            if entry.life == sequence.preemptions:
                self._register(sequence, entry)
            whole = isinstance(entry, Decode) or entry.start + entry.length >= len(sequence.prompt)
            if ends or (whole and len(sequence.output) >= sequence.limit):
                self._end(sequence)
                over.append(sequence)
        return over

    def _most_steps(self) -> int:
        """Return how many steps a decode call may take: beside a long prompt, the share of the rows that decode."""
        decode, others = len(self._decoding), len(self.waiting) + len(self._prefilling)
        if not others:
            return self._paced_tokens
        if all(len(s.prompt) - s.cached <= SHORT * self.chunk_tokens for s in self._prefilling):
            return 1
        return max(1, -(-self.busy_tokens * decode // (decode + others)))

    def _plan_decode(self, plan: Plan, most: int) -> None:
        """Plan up to `most` steps of every row that has one to do, best first; the worst lose their pages if there are
        too few."""
        # Not those all of whose tokens are in flight, nor who waits for the one that its next depends on.
        ready = [s for s in self._decoding if _issued(s) < s.limit and not (s.stepwise and s.in_flight)]
        steps = 1
        if ready and most > 1 and not any(s.stepwise for s in self._decoding):
            steps = min(most, max(s.limit - _issued(s) for s in ready))
            if sum(self._lacking(s, min(steps, s.limit - _issued(s))) for s in ready) > self.pages.available:
                steps = 1
        for sequence in ready:
            if sequence.state != "running":  # preempted for a better one, as are all behind it
                break
            start, first = sequence.computed, _issued(sequence)
            count = min(steps, sequence.limit - first)
            if start + count > len(sequence.pages) * self.page_tokens:
                lacking = self._lacking(sequence, count)
                if not self._make_room(sequence, lacking, plan):
                    break
                sequence.pages += self.pages.take(lacking)
            known = () if first >= len(sequence.output) else tuple(sequence.output[first : first + count])
            plan.decode.append(Decode(sequence, start, count, first, known, sequence.preemptions))
            plan.decode_tokens = max(plan.decode_tokens, count)
            sequence.computed = start + count
            sequence.in_flight += count - len(known)

    def _lacking(self, sequence: Sequence, count: int) -> int:
        """Return how many pages a row still needs for the next `count` positions."""
        return max(0, self._pages_of(sequence.computed + count) - len(sequence.pages))

    def _make_room(self, sequence: Sequence, lacking: int, plan: Plan) -> bool:
        """Preempt the worst until there are pages; says whether the sequence itself still runs."""
        while sequence.state == "running" and lacking > self.pages.available:
            worst = max(self.running, key=_rank)
            self._preempt(worst)
            plan.preempted.append(worst)
        return sequence.state == "running"

    def _admit(self, plan: Plan) -> None:
        """Give rows and the pages of everything known to those that wait, in order, while both last.

        Who waits for a block that a running prefill is about to share is passed over; who lacks pages is not. Every
        running row keeps a page to grow into.
        """
        at = 0
        while at < min(len(self.waiting), LOOK) and self._rows:
            sequence = self.waiting[at]
            # In flight are tokens of a life before its preemption: they will be known soon.
            if sequence.in_flight or self.prefixes.awaits(sequence):
                at += 1
                continue
            target = len(sequence.prompt) + (0 if self.deterministic else len(sequence.output))
            shared = self.prefixes.cached(sequence, target)
            if self.prefixes.promises_more(sequence, target, len(shared)):
                at += 1
                continue
            self.pages.share(shared)
            lacking = self._pages_of(len(sequence.prompt) + len(sequence.output)) - len(shared)
            if lacking > self.pages.available - len(self.running):
                self.pages.release(shared)
                break
            del self.waiting[at]
            self.waiting_tokens -= len(sequence.prompt)
            sequence.pages = shared + self.pages.take(lacking)
            sequence.computed = len(shared) * self.page_tokens
            sequence.registered = len(shared)
            sequence.target = target
            sequence.row = self._rows.pop()
            sequence.state = "running"
            if not sequence.preemptions:
                sequence.cached = sequence.computed
            self.prefixes.announce(sequence)
            self._prefilling.append(sequence)
            plan.admitted.append(sequence)

    def _plan_prefill(self, plan: Plan) -> None:
        """Plan chunks in turn, best priority first, as many as fit into chunk_tokens and at least one."""
        left = self.chunk_tokens
        turns = []
        for sequence in sorted(self._prefilling, key=lambda s: s.priority):
            start, count = sequence.computed, len(sequence.prompt)
            length = min(self.chunk_tokens, sequence.target - start)
            cost = max(length, self.page_tokens)
            if turns and cost > left:
                continue
            draws = start + length == sequence.target and sequence.limit > 0
            first = sequence.target - count
            known = tuple(sequence.output[first : first + 1]) if draws else ()
            plan.prefill.append(Chunk(sequence, start, length, draws, first, known, sequence.preemptions))
            sequence.computed += length
            sequence.in_flight += draws - len(known)
            turns.append(sequence)
            left -= cost
            if left <= 0:
                break
        for sequence in turns:
            self._prefilling.remove(sequence)
            if sequence.prefilling:
                self._prefilling.append(sequence)
            else:
                insort(self._decoding, sequence, key=_rank)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self.waiting, sequence, key=_rank)
        self.waiting_tokens += len(sequence.prompt)

    def _end(self, sequence: Sequence) -> None:
        if sequence.state == "running":
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
            self.waiting_tokens -= len(sequence.prompt)
        sequence.state = "ended"
        del self._sequences[sequence.id]

    def _leave(self, sequence: Sequence) -> None:
        """Take row and pages from a running sequence."""
        self.prefixes.withdraw(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.registered = sequence.announced = 0
        (self._prefilling if sequence in self._prefilling else self._decoding).remove(sequence)
        assert sequence.row is not None
        self._rows.append(sequence.row)
        sequence.row = None

    def _pages_of(self, positions: int) -> int:
        return -(-positions // self.page_tokens)

    def _register(self, sequence: Sequence, entry: Chunk | Decode) -> None:
        """Share what an entry has filled, as far as its tokens are known; never decoded pages in deterministic mode."""
        if isinstance(entry, Chunk):
            self.prefixes.register(sequence, entry.start + entry.length)
        elif not self.deterministic:
            known = min(entry.first + entry.count, len(sequence.output))
            self.prefixes.register(sequence, len(sequence.prompt) + known - 1)


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Order of preference: lower goes first, the highest loses its pages first."""
    return sequence.priority, sequence.arrival


def _issued(sequence: Sequence) -> int:
    """Return how many of its tokens the calls planned so far draw, of a sequence past its prefill."""
    return sequence.computed - len(sequence.prompt) + 1

"""The scheduler driven against a device made of tuples, whose tokens depend on exactly what attention would read.

A slot of a page holds (position, digest of the tokens up to it): keys and values depend on the whole prefix. The device
draws a token as a hash of all slots it reads, through the page table, so any wrong, stale or foreign page changes the
text. The truth is a sequence continued alone by the same hash without pages.
"""

import hashlib
import random
from array import array
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax.engine.scheduler import Scheduler, TooLarge
from qwen3_jax.engine.sequence import Chunk, Plan, Sequence

VOCAB = 50
END = 0  # ends a sequence
EMPTY: tuple[int, bytes] = (-1, b"")


def extend(prefix: bytes, token: int) -> bytes:
    return hashlib.blake2b(prefix + bytes([token]), digest_size=8).digest()


def draw(prefix: bytes, seed: int) -> int:
    return hashlib.blake2b(prefix + array("q", [seed]).tobytes(), digest_size=2).digest()[0] % VOCAB


def alone(prompt: list[int], limit: int, seed: int) -> list[int]:
    prefix = b""
    for token in prompt:
        prefix = extend(prefix, token)
    output: list[int] = []
    while len(output) < limit and END not in output:
        output.append(draw(prefix, seed))
        prefix = extend(prefix, output[-1])
    return output


class Device:
    """Executes plans in order; a row keeps the token it drew last."""

    def __init__(self, pages: int, page_tokens: int, rows: int):
        self.slots = [[EMPTY] * page_tokens for _ in range(pages)]
        self.page_tokens = page_tokens
        self.last: list[int | None] = [None] * rows

    def _write(self, pages: tuple[int, ...], position: int, token: int) -> bytes:
        """Write a position, after reading every position before it."""
        size, prefix = self.page_tokens, b""
        if position:
            at, prefix = self.slots[pages[(position - 1) // size]][(position - 1) % size]
            assert at == position - 1
        page = pages[position // size]
        self.slots[page][position % size] = position, extend(prefix, token)
        return self.slots[page][position % size][1]

    def check(self, pages: tuple[int, ...], tokens: list[int]) -> None:
        """Read all positions as attention does, and compare with the tokens they must be of."""
        prefix = b""
        for position, token in enumerate(tokens):
            prefix = extend(prefix, token)
            slot = self.slots[pages[position // self.page_tokens]][position % self.page_tokens]
            assert slot == (position, prefix)

    def run(self, work: list, seeds: dict[int, int]) -> dict[int, list[int]]:
        """Execute a plan laid out by `lay_out`; return every token drawn."""
        drawn: dict[int, list[int]] = {}
        for id, row, pages, positions, inputs, forced, draws in work:
            count = len(positions) if draws == "each" else 1
            for step, position in enumerate(positions):
                token = inputs[step] if inputs[step] is not None else self.last[row]
                assert token is not None
                prefix = self._write(pages, position, token)
                if draws == "each" or (draws == "last" and step == len(positions) - 1):
                    tokens = drawn.setdefault(id, [])
                    new = draw(prefix, seeds[id])
                    if len(tokens) < len(forced):
                        assert new == forced[len(tokens)]  # a replay draws what it drew before
                    tokens.append(new)
                    self.last[row] = new
            assert draws == "none" or len(drawn[id]) == count
        return drawn


def lay_out(plan: Plan) -> list:
    """Copy what the device needs out of a plan: the scheduler may change before it runs."""
    work = []
    for c in plan.prefill:
        s, span = c.sequence, range(c.start, c.start + c.length)
        work.append(
            (s.id, s.row, tuple(s.pages), span, [s.token(p) for p in span], c.known, "last" if c.draws else "none")
        )
    for d in plan.decode:
        s, span = d.sequence, range(d.start, d.start + d.count)
        known = len(s.prompt) + len(s.output)
        work.append(
            (s.id, s.row, tuple(s.pages), span, [s.token(p) if p < known else None for p in span], d.known, "each")
        )
    return work


class Engine:
    """A scheduler, a device, and a host that is `ahead` plans behind it. Checks every invariant after every call."""

    def __init__(self, *, ahead: int, rows: int, pages: int, page_tokens: int, **options):
        self.scheduler = Scheduler(rows=rows, pages=pages, page_tokens=page_tokens, **options)
        self.device = Device(pages, page_tokens, rows)
        self.ahead = ahead
        self.rows = rows
        self.seeds: dict[int, int] = {}
        self.held: dict[int, Sequence] = {}
        self.done: dict[int, Sequence] = {}
        self.under_way: deque[tuple[Plan, dict[int, list[int]]]] = deque()
        self.plans = 0
        self.says: dict[bytes, list] = {}  # digest: what a page registered under it holds

    def add(self, id: int, prompt: list[int], limit: int, *, seed: int = 0, **fields) -> Sequence:
        sequence = Sequence(id, prompt, limit, **fields)
        self.scheduler.add(sequence)
        self.held[id], self.seeds[id] = sequence, seed
        return sequence

    def cancel(self, id: int) -> None:
        assert self.scheduler.cancel(id)
        assert not self.scheduler.cancel(id)
        del self.held[id]
        self.check()

    def step(self) -> Plan:
        scheduler = self.scheduler
        one = any(s.stepwise for s in scheduler._decoding)
        most = scheduler.busy_tokens if scheduler.waiting or scheduler._prefilling else scheduler.decode_tokens
        plan = scheduler.plan()
        self.plans += 1
        assert plan.decode_tokens <= (1 if one else most)
        self.check_plan(plan)
        if plan:
            work = lay_out(plan)
            drawn = self.device.run(work, self.seeds)
            for entry in (*plan.prefill, *plan.decode):
                s = entry.sequence
                end = entry.start + (entry.length if isinstance(entry, Chunk) else entry.count)
                known = s.prompt + s.output
                self.device.check(tuple(s.pages), known[: min(end, len(known))])
            self.under_way.append((plan, drawn))
        while self.under_way and (len(self.under_way) > self.ahead or not plan):
            self.commit()
        self.check()
        return plan

    def commit(self, failed: tuple[int, ...] = ()) -> None:
        plan, drawn = self.under_way.popleft()
        tokens, ended = {}, set()
        for entry in (*plan.prefill, *plan.decode):
            id = entry.sequence.id
            new = drawn.get(id, [])[len(entry.known) :]
            assert len(new) == entry.new
            if END in new:
                ended.add(id)
                new = new[: new.index(END) + 1]
            if new:
                tokens[id] = new
        for sequence in self.scheduler.commit(plan, tokens, ended, failed):
            assert sequence.state == "ended"
            assert sequence.row is None
            assert not sequence.pages
            self.done[sequence.id] = self.held.pop(sequence.id)

    def check_plan(self, plan: Plan) -> None:
        scheduler = self.scheduler
        entries = [entry.sequence.id for entry in (*plan.prefill, *plan.decode)]
        assert len(entries) == len(set(entries))
        assert all(1 <= d.count <= plan.decode_tokens for d in plan.decode)
        assert sum(c.length for c in plan.prefill) <= scheduler.chunk_tokens
        for entry in plan.decode:
            s = entry.sequence
            assert entry.first + entry.count <= s.limit
            assert not s.stepwise or entry.new <= 1
        if scheduler.deterministic:
            for c in plan.prefill:
                assert c.start % scheduler.chunk_tokens == 0
                assert c.length == min(scheduler.chunk_tokens, len(c.sequence.prompt) - c.start)

    def check(self) -> None:
        """Every page's users are those that hold it, nothing leaks, and what is cached is what its digest says."""
        scheduler, pages = self.scheduler, self.scheduler.pages
        users = Counter(page for s in self.held.values() for page in s.pages)
        assert pages.users == [users[page] for page in range(pages.total)]
        assert pages.available == sum(n == 0 for n in pages.users)
        rows = [s.row for s in self.held.values() if s.row is not None]
        assert len(rows) == len(set(rows)) <= self.rows
        assert len(scheduler.running) == len(rows)
        assert scheduler.waiting_tokens == sum(len(s.prompt) for s in scheduler.waiting)
        for page in range(pages.total):
            digest = pages.digest(page)
            if digest is not None:
                slots = self.device.slots[page]
                assert self.says.setdefault(digest, list(slots)) == slots
                assert [at for at, _ in slots] == list(range(slots[0][0], slots[0][0] + len(slots)))
        first: dict[int, tuple] = {}
        for s in self.held.values():
            assert s.in_flight >= 0
            for at, page in enumerate(s.pages):
                if users[page] > 1:  # shared by sequences that are equal up to its end
                    end = (at + 1) * scheduler.page_tokens
                    assert end <= len(s.prompt) + len(s.output)
                    says = (s.salt, tuple((s.prompt + s.output)[:end]))
                    assert first.setdefault(page, says) == says

    def finish(self, most: int) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        while self.under_way:
            self.commit()

    def check_over(self) -> None:
        """All capacity is back."""
        self.check()
        pages = self.scheduler.pages
        assert pages.available == pages.total
        assert not self.scheduler.prefixes.announced
        assert len(self.scheduler._rows) == self.rows
        pages.clear()
        assert pages.cached == 0
        assert sorted(pages.take(pages.total)) == list(range(pages.total))


SETTINGS = [
    dict(rows=4, pages=12, page_tokens=4, chunk_tokens=8, decode_tokens=4, ahead=1, deterministic=False),
    dict(rows=4, pages=12, page_tokens=4, chunk_tokens=8, decode_tokens=4, ahead=1, deterministic=True),
    dict(rows=8, pages=40, page_tokens=2, chunk_tokens=4, decode_tokens=8, busy_tokens=3, ahead=0, deterministic=True),
    dict(rows=3, pages=7, page_tokens=8, chunk_tokens=12, decode_tokens=3, ahead=2, deterministic=False),
    dict(rows=6, pages=90, page_tokens=1, chunk_tokens=5, decode_tokens=5, busy_tokens=5, ahead=1, deterministic=True),
    dict(rows=6, pages=24, page_tokens=2, chunk_tokens=4, decode_tokens=2, busy_tokens=2, ahead=4, deterministic=False),
    dict(rows=5, pages=16, page_tokens=4, chunk_tokens=4, decode_tokens=2, ahead=1, prefix_cache=False),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_random_traffic_keeps_every_page_and_text(number: int):
    chance = random.Random(number)
    engine = Engine(**SETTINGS[number])
    room = engine.scheduler.pages.total * engine.scheduler.page_tokens
    heads = [[chance.randrange(1, VOCAB) for _ in range(room // 2)] for _ in range(3)]
    truth = {}
    preemptions = cached = 0
    for id in range(10**6):
        if engine.plans >= 2500:
            break
        if len(engine.held) < 12 and chance.random() < 0.6:
            head = chance.choice(heads)[: chance.randrange(room // 2)]
            tail = [chance.randrange(1, VOCAB) for _ in range(chance.randrange(1, room // 8 + 2))]
            limit = chance.randrange(room - len(head + tail) + 2)
            truth[id] = (head + tail, limit, chance.randrange(3))
            engine.add(
                id,
                head + tail,
                limit,
                seed=truth[id][2],
                priority=chance.choice([0, 0, 0, 1, -1]),
                salt=chance.choice(["", "", "a"]),
                stepwise=chance.random() < 0.05,
            )
        if engine.held and chance.random() < 0.05:
            engine.cancel(chance.choice(list(engine.held)))
        if chance.random() < 0.01:
            engine.scheduler.pages.clear()
        engine.step()
    engine.finish(2000)
    for id, sequence in engine.done.items():
        assert sequence.output == alone(*truth[id])
        preemptions += sequence.preemptions
        cached += sequence.cached
    assert len(engine.done) > 80
    assert preemptions > 0
    assert (cached > 0) == engine.scheduler.prefixes.enabled
    engine.check_over()


ACTIONS = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(0, 2),  # which of three prompts to begin with, and how much of it
        st.integers(0, 24),
        st.integers(0, 20),
        st.sampled_from([0, 0, 1]),
        st.sampled_from(["", "salt"]),
        st.booleans(),
    ),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("fail"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 6)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=40), st.integers(0, len(SETTINGS) - 1))
def test_any_history_ends_with_the_texts_of_sequences_alone(actions, number):
    engine = Engine(**SETTINGS[number])
    heads = [[7 * n + at % 5 + 1 for at in range(24)] for n in range(3)]
    truth = {}
    for id, (action, *details) in enumerate(actions):
        if action == "add":
            head, length, limit, priority, salt, stepwise = details
            truth[id] = ([*heads[head][:length], 1], limit, head)
            engine.add(id, *truth[id][:2], seed=head, priority=priority, salt=salt, stepwise=stepwise)
        elif action == "step":
            for _ in range(details[0]):
                engine.step()
        elif engine.held and action == "cancel":
            engine.cancel(sorted(engine.held)[details[0] % len(engine.held)])
        elif engine.under_way and action == "fail":
            plan = engine.under_way[0][0]
            ids = sorted(e.sequence.id for e in (*plan.prefill, *plan.decode) if e.sequence.id in engine.held)
            failed = tuple(ids[details[0] % len(ids) :][:1]) if ids else ()
            engine.commit(failed=failed)
            for gone in failed:
                del engine.done[gone]
            engine.check()
    engine.finish(5000)
    for id, sequence in engine.done.items():
        assert sequence.output == alone(*truth[id])
    engine.check_over()


PLAIN = dict(rows=4, pages=64, page_tokens=4, chunk_tokens=8, decode_tokens=8, ahead=1)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1, VOCAB) for _ in range(length)]


def endless(length: int, limit: int, seed: int = 0) -> list[int]:
    """Return a prompt whose continuation does not end before its limit."""
    return next(p for n in range(1000) if END not in alone(p := prompt_of(length, seed * 1000 + n), limit, 0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_cached_prefix_leaves_something_to_draw_from(deterministic):
    engine = Engine(**PLAIN, deterministic=deterministic)
    prompt = prompt_of(16)
    first = engine.add(0, prompt, 1)
    engine.finish(20)
    assert first.cached == 0
    for id, (length, page_hit, chunk_hit) in enumerate([(16, 12, 8), (17, 16, 16), (15, 12, 8), (3, 0, 0)], 1):
        again = engine.add(id, [*prompt, 1][:length], 1)
        engine.finish(20)
        assert again.cached == (chunk_hit if deterministic else page_hit)
    other = engine.add(9, prompt, 1, salt="other")
    engine.finish(20)
    assert other.cached == 0


def test_pages_of_generated_tokens_are_shared_only_when_bits_may_differ():
    for deterministic, cached in ((False, 28), (True, 16)):
        engine = Engine(**PLAIN, deterministic=deterministic)
        first = engine.add(0, endless(16, 14), 14)
        engine.finish(40)
        turn = engine.add(1, first.prompt + first.output + [5], 1)
        engine.finish(20)
        assert turn.cached == cached


def test_choices_of_one_prompt_prefill_it_once():
    engine = Engine(**PLAIN)
    choices = [engine.add(id, prompt_of(33), 4, seed=id) for id in range(4)]
    chunks = []
    while engine.scheduler.has_work:
        chunks += [c.length for c in engine.step().prefill]
    assert [s.cached for s in choices] == [0, 32, 32, 32]
    assert sum(chunks) == 33 + 3


def test_nobody_waits_for_a_prefill_of_worse_priority():
    engine = Engine(**PLAIN)
    engine.add(0, prompt_of(33), 1, priority=1)
    engine.step()
    better, same = engine.add(1, prompt_of(33), 1, priority=0), engine.add(2, prompt_of(33), 1, priority=1)
    assert engine.step().admitted == [better]
    engine.finish(30)
    assert same.cached == 32


@pytest.mark.parametrize(("busy", "steps"), [(1, 1), (3, 2), (8, 4)])
def test_running_rows_decode_in_every_plan_of_a_long_prefill(busy: int, steps: int):
    engine = Engine(**PLAIN, busy_tokens=busy)
    runs = engine.add(0, endless(5, 80), 80)
    engine.step()
    engine.step()
    engine.add(1, prompt_of(80), 1)
    plans = [engine.step() for _ in range(10)]
    assert [sum(c.length for c in plan.prefill) for plan in plans] == [8] * 10
    assert all([d.sequence for d in plan.decode] == [runs] for plan in plans)
    assert [plan.decode_tokens for plan in plans] == [1] + [steps] * 9  # the first found it waiting


def test_short_prompts_are_prefilled_beside_one_step_each():
    engine = Engine(**PLAIN, busy_tokens=8)
    engine.add(0, endless(5, 80), 80)
    engine.step()
    engine.step()
    for id, length in ((1, 32), (2, 33)):  # four chunks, and a token more
        engine.add(id, prompt_of(length, id), 1)
        steps = [plan.decode_tokens for plan in (engine.step() for _ in range(-(-length // 8))) if plan.prefill]
        assert steps == ([1] * 4 if id == 1 else [1] + [4] * 4)
        engine.step()
        engine.step()


def test_slow_steps_make_short_calls():
    engine = Engine(**PLAIN)
    engine.add(0, endless(5, 80), 80)
    engine.step()
    for step_s, steps in ((0.0, 8), (0.01, 8), (0.05, 4), (0.15, 3), (3.0, 3), (0.001, 8)):
        engine.scheduler.pace(step_s)
        assert engine.step().decode_tokens == steps


def test_long_prefills_take_turns_and_short_ones_do_not_wait_for_them():
    engine = Engine(**PLAIN)
    for id in range(2):
        engine.add(id, prompt_of(40, id), 1)
    turns = [engine.step().prefill[0].sequence.id for _ in range(4)]
    assert turns == [0, 1, 0, 1]
    engine.add(2, prompt_of(3, 5), 1)
    turns = [c.sequence.id for _ in range(3) for c in engine.step().prefill]
    assert 2 in turns


def test_several_tokens_per_dispatch_only_when_nobody_waits_and_no_row_is_stepwise():
    engine = Engine(**PLAIN)
    first = engine.add(0, endless(4, 30), 30)
    assert not engine.step().decode
    assert [(d.start, d.count, d.first) for d in engine.step().decode] == [(4, 8, 1)]
    first.stepwise = True
    engine.step()  # in flight: nothing can be planned
    assert [d.count for d in engine.step().decode] == [1]
    engine.commit()
    first.stepwise = False
    engine.add(1, prompt_of(4, 3), 8)
    assert [d.count for d in engine.step().decode] == [1]
    engine.cancel(1)
    counts = []
    while engine.scheduler.has_work:
        counts += [d.count for d in engine.step().decode]
    assert counts[0] == 8
    assert sum(counts) + 1 + 8 + 1 + 1 == 30


def test_a_preempted_sequence_replays_its_tokens_by_the_same_calls():
    engine = Engine(**{**PLAIN, "pages": 10, "rows": 2}, deterministic=True)
    for id in range(2):
        engine.add(id, endless(10, 25, id + 1), 25)
    calls: dict[int, set] = {0: set(), 1: set()}
    replayed = 0
    while engine.scheduler.has_work:
        plan = engine.step()
        for c in plan.prefill:
            calls[c.sequence.id].add(("prefill", c.start, c.length))
        for d in plan.decode:
            replayed += len(d.known)
            calls[d.sequence.id] |= {("decode", d.start + step) for step in range(d.count)}
    assert engine.done[1].preemptions > engine.done[0].preemptions == 0
    assert replayed > 0
    for id in range(2):  # no position was ever computed in two ways
        assert calls[id] == {("prefill", 0, 8), ("prefill", 8, 2)} | {("decode", at) for at in range(10, 34)}
        assert engine.done[id].output == alone(engine.done[id].prompt, 25, 0)


def test_priorities_then_arrival_decide_who_runs_and_who_gives_way():
    engine = Engine(**{**PLAIN, "pages": 12, "rows": 2, "decode_tokens": 1})
    late, low = engine.add(0, endless(8, 30), 30, priority=0), engine.add(1, endless(8, 30, 1), 30, priority=5)
    first = engine.add(2, endless(8, 30, 2), 30, priority=-1)
    assert engine.step().admitted == [first, late]
    while not low.output:
        engine.step()
    assert first.preemptions == 0
    assert late.preemptions >= 1


def test_a_failed_sequence_leaves_nothing_to_share():
    engine = Engine(**{**PLAIN, "ahead": 5})
    prompt = prompt_of(20)
    engine.add(0, prompt, 2)
    for _ in range(3):
        engine.step()
    engine.commit()
    assert engine.scheduler.pages.longest(engine.held[0].digests)
    engine.commit(failed=(0,))
    again = engine.add(1, prompt, 2)
    engine.finish(30)
    assert again.cached == 0


def test_what_could_never_run_is_refused_with_both_numbers():
    scheduler = Scheduler(rows=1, pages=4, page_tokens=4, chunk_tokens=8)
    scheduler.add(Sequence(0, [1] * 10, 7))  # the last token's position is never written
    with pytest.raises(TooLarge, match=r"10 prompt tokens and up to 8 .* 17 positions, the cache has 16: .* 7 or less"):
        scheduler.add(Sequence(1, [1] * 10, 8))
    with pytest.raises(ValueError, match="id 0 is"):
        scheduler.add(Sequence(0, [1], 1))
    with pytest.raises(ValueError, match="0 prompt tokens"):
        scheduler.add(Sequence(2, [], 1))
    with pytest.raises(ValueError, match="chunk_tokens is 6 and page_tokens is 4"):
        Scheduler(rows=1, pages=4, page_tokens=4, chunk_tokens=6, deterministic=True)
    with pytest.raises(ValueError, match="busy_tokens is 9, decode_tokens 8"):
        Scheduler(rows=1, pages=4, page_tokens=4, chunk_tokens=4, busy_tokens=9)
    with pytest.raises(ValueError, match="rows is 0"):
        Scheduler(rows=0, pages=4, page_tokens=4, chunk_tokens=6)

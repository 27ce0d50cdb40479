"""The engine against transformers (greedy texts, log-probabilities) and the Generator (drawn ones); under stress."""

import random
import threading
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import torch

from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.options import EngineOptionError, EngineOptions
from qwen3_jax.engine.updates import EngineError, EngineStopped, Overloaded, TooLarge
from qwen3_jax.generate import Generator
from qwen3_jax.loaded import load_model
from qwen3_jax.sampling_params import SamplingParams
from tests import tiny
from tests.engines import VOCAB, Cycle, Heard, ask, settled, write

OPTIONS = EngineOptions(rows=4, page_tokens=8, chunk_tokens=32, cache_tokens=384, decode_tokens=4, deterministic=False)
TEXTS = ["The sky", "Once upon a time there was", "1 + 1 =", "x", "Hello, " * 20, "one two three " * 8]


class Counted(Observer):
    def __init__(self) -> None:
        self.compiles, self.finishes, self.preemptions, self.corruptions = 0, [], 0, 0
        self.prompt = self.generated = self.queried = self.hits = 0
        self.rejections: list[str] = []
        self.host_s: list[float] = []

    def step(self, *, host_s, rows, prompt_tokens, generated_tokens):
        self.host_s.append(host_s)
        self.prompt += prompt_tokens
        self.generated += generated_tokens

    def finished(self, stats, *, finish_reason):
        self.finishes.append((finish_reason, stats))

    def preempted(self):
        self.preemptions += 1

    def prefix(self, *, queried, hits):
        self.queried, self.hits = self.queried + queried, self.hits + hits

    def rejected(self, reason):
        self.rejections.append(reason)

    def compiled(self, name, seconds):
        self.compiles += 1

    def corrupted(self):
        self.corruptions += 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf = write(path)
    return load_model(path, dtype="float32"), hf


@pytest.fixture(scope="module")
def engine(built):
    engine = Engine(built[0], OPTIONS, observer=Counted())
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def generator(built):
    return Generator.of(built[0])


@pytest.fixture(scope="module")
def greedy(generator):
    """What the Generator says to TEXTS, 25 tokens each."""
    return generator.generate(TEXTS, max_tokens=25)


@pytest.fixture
def counted(engine):
    assert settled(engine)  # the test before has heard its last token, its last turn may not be over
    observer = engine.observer
    observer.__init__()
    return observer


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert (a.reasoning, a.answer, a.finish_reason, a.stop_reason) == (
            b.reasoning, b.answer, b.finish_reason, b.stop_reason
        )  # fmt: skip
        assert a.usage == b.usage


def begin(ours, theirs) -> None:
    """Check tokens that may end before the others do."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids[: len(a.token_ids)]
        assert a.token_ids


def test_greedy_tokens_and_logprobs_equal_transformers(engine, built):
    """More requests than rows, prompts of one and of several chunks; the prompts' log-probabilities too."""
    hf = built[1]
    heard = [ask(engine, text, max_tokens=12, logprobs=2, prompt_logprobs=1) for text in TEXTS]
    padding = list(range(engine.model.tokenizer.vocab_size, VOCAB))
    for text, h in zip(TEXTS, heard, strict=True):
        ids = engine.model.tokenizer.encode(text)
        n, ours = len(ids), h.wait()
        theirs = hf.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, n, dtype=torch.long), do_sample=False, max_new_tokens=12,
            pad_token_id=0, suppress_tokens=padding,
        )  # fmt: skip
        assert list(ours.token_ids) == theirs[0, n:].tolist()
        assert ours.logprobs is not None
        full = torch.tensor(tiny.logits(hf, theirs.numpy()))[0].log_softmax(-1).numpy()
        assert [t.token_id for t in ours.logprobs] == list(ours.token_ids)
        np.testing.assert_allclose(
            [t.logprob for t in ours.logprobs], full[np.arange(n - 1, len(full) - 1), theirs[0, n:]], atol=1e-5, rtol=0
        )
        assert all(len(t.top) == 2 and t.top[0][1] == pytest.approx(t.logprob) for t in ours.logprobs)
        prompt: Any
        (prompt,) = [u.prompt_logprobs for u in h.updates if u.prompt_logprobs is not None]
        assert prompt[0] is None
        assert [t.token_id for t in prompt[1:]] == ids[1:]
        expected = full[np.arange(n - 1), ids[1:]]
        np.testing.assert_allclose([t.logprob for t in prompt[1:]], expected, atol=1e-5, rtol=0)
        best = full[: n - 1, : engine.model.tokenizer.vocab_size].max(-1)
        np.testing.assert_allclose([t.top[0][1] for t in prompt[1:]], best, atol=1e-5, rtol=0)


def test_drawn_tokens_equal_the_generators(engine, generator):
    """Every kind of parameter. The Generator runs one batch, which needs the program that does everything; the engine
    runs the first four by the program for bounded candidates, then all at once."""
    changes = [
        {"top_k": 20, "top_p": 0.9}, {"top_k": 40, "thinking_budget": 5}, {"top_k": 1}, {"top_k": 64},
        {}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 0.7}, {"thinking_budget": 0},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
        {"logit_bias": {70: 5.0, 71: -5.0}, "min_tokens": 9, "logprobs": 0},
        {"logprobs": 2, "top_p": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
    ]  # fmt: skip
    each = [SamplingParams(temperature=1.0, max_tokens=30, seed=11).replace(**c) for c in changes]
    texts = TEXTS[:4] * 3
    theirs = generator.generate(texts, each, batch_size=12)
    same(engine.generate(texts[:4], each[:4]), theirs[:4])
    same(engine.generate(texts, each), theirs)


def test_rows_that_want_different_programs_share_a_batch(engine, greedy):
    """A row's neighbours change programs as they come and go; a biased row leaves nothing to the next owner."""
    each = [
        SamplingParams(temperature=0.0, max_tokens=25),
        SamplingParams(temperature=1.0, top_k=20, max_tokens=7, seed=1),
        SamplingParams(temperature=0.0, max_tokens=3, logit_bias={80: 100.0}),
        SamplingParams(temperature=1.0, top_p=0.8, max_tokens=12, seed=2, logprobs=1),
        SamplingParams(temperature=0.0, max_tokens=20, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, max_tokens=20),
    ]
    one_by_one = [engine.generate([text], [params])[0] for text, params in zip(TEXTS, each, strict=True)]
    begin([one_by_one[0], one_by_one[5]], [greedy[0], greedy[5]])
    assert one_by_one[2].token_ids == (80, 80, 80)
    same(engine.generate(TEXTS * 2, each * 2), one_by_one * 2)


def test_stop_strings_cut_exactly(engine, greedy):
    """Within tokens and across them, several tokens per call: the text before the stop, to the character."""
    free = greedy[2].text
    stops = [free[i : i + 3] for i in range(1, len(free) - 3, 4) if "\ufffd" not in free[i : i + 3]][:3]
    assert stops
    for stop in stops:
        cut, kept = (
            engine.generate([TEXTS[2]], max_tokens=25, stop=[stop], include_stop_str_in_output=keep)[0]
            for keep in (False, True)
        )
        assert (cut.text, cut.finish_reason, cut.stop_reason) == (free[: free.index(stop)], "stop", stop)
        assert kept.text == free[: free.index(stop) + len(stop)]
        begin([cut, kept], [greedy[2]] * 2)


def test_updates_add_up_to_the_completion(engine, counted):
    heard = [ask(engine, text, max_tokens=14, thinking_budget=3, logprobs=0) for text in TEXTS]
    ends = [h.wait() for h in heard]
    for h, completion in zip(heard, ends, strict=True):
        assert tuple(h.tokens) == completion.token_ids
        assert (h.text("reasoning"), h.text("answer")) == (completion.reasoning, completion.answer)
        assert tuple(t for u in h.updates for t in u.logprobs) == completion.logprobs
        stats = h.stats
        assert stats.generated_tokens == completion.usage.completion_tokens == 14
        assert stats.queue_s is not None
        assert stats.first_token_s is not None
        assert 0 <= stats.queue_s <= stats.first_token_s <= stats.e2e_s
    assert settled(engine)
    assert counted.generated == sum(c.usage.completion_tokens for c in ends)
    assert counted.prompt + counted.hits == sum(c.usage.prompt_tokens for c in ends) == counted.queried
    assert [reason for reason, _ in counted.finishes] == ["length"] * len(TEXTS)


def test_a_cancelled_request_frees_its_pages_and_harms_nobody(engine, greedy):
    long = [ask(engine, text, max_tokens=300) for text in TEXTS[:2]]
    others = [ask(engine, text, max_tokens=20) for text in TEXTS]
    late = ask(engine, TEXTS[4], max_tokens=200)
    late.ticket.cancel()
    assert long[0].begun.wait(60)
    for h in (*long, *long):
        h.ticket.cancel()
    assert [h.wait().finish_reason for h in (*long, late)] == ["abort"] * 3
    begin([h.wait() for h in others], greedy)
    assert tuple(long[0].tokens) == long[0].wait().token_ids
    assert settled(engine)


def test_preempted_sequences_say_the_same(engine, counted):
    """Four rows want 60 pages together, the cache has 48."""
    texts = [t + " " for t in (*TEXTS[:4], *TEXTS[:4])]
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 4, "presence_penalty": 0.4}):
        settings = {"max_tokens": 115, **settings}
        alone = [engine.generate([text], **settings)[0] for text in texts]
        assert not counted.preemptions
        same(engine.generate(texts, **settings), alone)
        assert counted.preemptions > 0
        counted.preemptions = 0
    assert settled(engine)


def test_prefixes_are_shared_within_a_salt(engine, counted):
    prompt = [100 + i for i in range(70)]
    first = ask(engine, prompt, max_tokens=4).wait()
    again = ask(engine, prompt, max_tokens=4)
    salted = ask(engine, prompt, max_tokens=4, cache_salt="another tenant")
    assert again.wait().token_ids == salted.wait().token_ids == first.token_ids
    assert [h.stats.cached_tokens for h in (again, salted)] == [64, 0]
    same_start = [ask(engine, [*prompt, 5], max_tokens=6, temperature=1.0, seed=s) for s in range(4)]  # n = 4
    assert len({h.wait().token_ids for h in same_start}) > 1
    assert all(h.stats.cached_tokens == 64 for h in same_start)


def test_urgent_requests_go_first(engine):
    order: list[int] = []
    submitted = threading.Event()
    engine.call(submitted.wait)  # whatever the machine does, all of them are there before the first one runs
    running = [ask(engine, TEXTS[0], max_tokens=60) for _ in range(4)]
    heard = []
    for i, priority in enumerate((5, 5, 1, 0)):
        h = Heard()
        request = engine.requests.make("x", SamplingParams(temperature=0.0, max_tokens=40))

        def listener(update, h=h, i=i):
            if not h.updates:
                order.append(i)
            h(update)

        engine.submit(request, listener, priority=priority)
        heard.append(h)
    submitted.set()
    for h in (*running, *heard):
        h.wait()
    assert order == [3, 2, 0, 1]


def test_a_grammar_binds_the_answer_only(engine, greedy):
    """Alone, beside free rows, after thinking that a budget ends; the neighbours do not notice."""
    end = engine.model.tokenizer.stop_ids[0]
    sets = [[300, 301, 302], [400, 401], [500, 501, 502, 503]]
    grammar = Cycle(sets, 8, end)
    closed = engine.model.tokenizer.encode("<think>\n\n</think>\n\nHi")
    settings = {"max_tokens": 120, "temperature": 1.0, "seed": 3}
    bound = [ask(engine, closed, grammar=grammar, **settings)]
    free = [ask(engine, text, max_tokens=25) for text in TEXTS[:3]]
    bound.append(ask(engine, "<think>\n", grammar=grammar, thinking_budget=6, **settings))
    tags = engine.requests.tags
    for h in bound:
        completion = h.wait()
        ids = list(completion.token_ids)
        if tags.close_id in ids:
            ids = ids[4 + len(tags.stop_ids) :]  # two of the budget's six stand in the prompt
        assert len(ids) == 9
        assert all(t in sets[i % 3] for i, t in enumerate(ids[:8]))
        assert completion.finish_reason == "stop"
    thought = ask(engine, "<think>\n", thinking_budget=6, **settings).wait().token_ids
    assert tuple(bound[1].tokens[: 4 + len(tags.stop_ids)]) == thought[: 4 + len(tags.stop_ids)]
    begin([h.wait() for h in free], greedy[:3])


def test_a_grammar_decides_the_first_token_or_lets_it_think(engine):
    """A model that may think and was not told to: the first token opens its thinking, or begins the answer."""
    tags = engine.requests.tags
    grammar = Cycle([[300, 301]], 3, engine.model.tokenizer.stop_ids[0])
    biased = ask(engine, "Hi", grammar=grammar, max_tokens=100, logit_bias={tags.open_id: 100.0}, thinking_budget=4)
    plain = ask(engine, "Hi", grammar=grammar, max_tokens=40, logit_bias={tags.open_id: -100.0}, thinking_budget=4)
    ids = list(biased.wait().token_ids)
    assert ids[:4] == [tags.open_id] * 4
    assert ids[4 : 4 + len(tags.stop_ids)] == list(tags.stop_ids)
    assert len(ids[4 + len(tags.stop_ids) :]) == 4
    assert len(plain.wait().token_ids) == 4
    assert set(plain.tokens[:3]) <= {300, 301}


def test_a_grammar_that_fails_ends_its_request_only(engine, greedy):
    end = engine.model.tokenizer.stop_ids[0]
    heard = []
    for method in ("mask", "accept"):
        grammar = Cycle([[300, 301]], 9, end)
        matcher = grammar.start()
        setattr(matcher, method, lambda _: 1 / 0)
        grammar.start = lambda matcher=matcher: matcher
        heard.append(ask(engine, "<think>\n\n</think>\n\nHi", grammar=grammar, max_tokens=20))
    free = ask(engine, TEXTS[0], max_tokens=20)
    for h in heard:
        completion = h.wait()
        assert (completion.finish_reason, completion.token_ids[-1]) == ("error", end)
        assert h.updates[-1].error == "the grammar failed: ZeroDivisionError: division by zero"
    begin([free.wait()], greedy[:1])


def test_logits_that_are_not_finite_end_one_request(engine, greedy, counted):
    """The embedding of an id that no tokenizer gives is broken; whoever has it in the prompt fails, nobody else."""
    model = engine.device.model
    table = np.asarray(model.params["embed_tokens"]).copy()
    table[VOCAB - 1] = np.nan
    engine.call(
        lambda: setattr(
            engine.device, "model", replace(model, params={**model.params, "embed_tokens": jax.device_put(table)})
        )
    ).result()
    bad = [5, 6, VOCAB - 1, 7]
    heard = [ask(engine, prompt, max_tokens=20) for prompt in (bad, TEXTS[0], bad * 12, *TEXTS[1:4])]
    ends = [h.wait() for h in heard]
    assert settled(engine)
    after = engine.generate(TEXTS, max_tokens=20)  # on the pages that held NaN
    engine.call(lambda: setattr(engine.device, "model", model)).result()
    assert [c.finish_reason for c in ends] == ["error", "length", "error", *["length"] * 3]
    assert counted.corruptions == 2
    begin([ends[1], *ends[3:]], greedy[:4])
    begin(after, greedy)


def test_a_thousand_mixed_requests_compile_nothing(engine, counted):
    """Lengths, samplers, stops, budgets, grammars, priorities, cancels; every page comes back."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: events.append(event))
    compiled = engine.device.compiles
    rng = random.Random(0)
    grammar = Cycle([[300, 301], [400]], 3, engine.model.tokenizer.stop_ids[0])
    heard: list[Heard] = []
    for i in range(1000):
        prompt = [rng.randrange(20, 800) for _ in range(rng.choice((1, 2, 5, 9, 33)))]
        options: dict[str, Any] = rng.choice(
            ({}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"logprobs": 3}, {"presence_penalty": 1.0},
             {"stop": ["a"]}, {"thinking_budget": 1}, {"stop_token_ids": list(range(300, 330))},
             {"logit_bias": {5: 3.0}, "min_tokens": 1})
        )  # fmt: skip
        if i % 25 == 0:
            options = options | {"grammar": grammar}
        if i % 50 == 0:
            options = options | {"prompt_logprobs": 2}
        while engine.load().waiting >= OPTIONS.max_waiting - 1:
            time.sleep(0.005)
        heard.append(ask(engine, prompt, max_tokens=rng.choice((1, 2, 3)), seed=i, priority=i % 3, **options))
        if i % 40 == 0:
            heard[-1].ticket.cancel()
    reasons = {h.wait().finish_reason for h in heard}
    assert reasons <= {"stop", "length", "abort"}
    assert settled(engine)
    assert engine.device.compiles == compiled
    assert counted.compiles == 0
    assert not [event for event in events if "backend_compile" in event]
    jax.jit(lambda x: x * 3)(np.ones(3))
    assert [event for event in events if "backend_compile" in event]  # the listener does listen


def test_no_step_copies_the_cache(engine):
    """What is donated is written in place, in every program that writes."""
    pages = engine.device.cache[0]["k"]
    shape = "f32[" + ",".join(map(str, pages.shape)) + "]"
    for (name, key), program in engine.device._programs.items():
        if name in ("prefill", "decode", "forward"):
            lines = program.as_text().splitlines()
            assert not [line for line in lines if " copy(" in line and shape in line.split(" copy(")[0]], (name, key)
            layers = engine.model.config.num_hidden_layers
            assert program.memory_analysis().alias_size_in_bytes >= 2 * layers * pages.nbytes


def test_calls_run_between_steps(engine):
    heard = ask(engine, TEXTS[1], max_tokens=40)
    name = engine.call(lambda: threading.current_thread().name).result(30)
    assert name == "engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(30)
    assert heard.wait().finish_reason == "length"


def test_what_does_not_fit_is_refused_or_held_to_the_cache(engine):
    with pytest.raises(TooLarge, match="the cache holds 384"):
        ask(engine, "x", max_tokens=400)
    free = ask(engine, "x")
    assert free.wait().usage.completion_tokens == 384 + 1 - free.wait().usage.prompt_tokens
    with pytest.raises(EngineError, match="stop token ids: at most 32"):
        ask(engine, "x", stop_token_ids=list(range(100, 140)))
    with pytest.raises(EngineOptionError, match="chunk_tokens is 20, page_tokens 16"):
        EngineOptions(chunk_tokens=20)
    with pytest.raises(EngineOptionError, match="busy_tokens is 9, decode_tokens 8"):
        EngineOptions(busy_tokens=9)
    with pytest.raises(EngineOptionError, match="rows is 0"):
        EngineOptions(rows=0)


def idle(built, **options) -> Engine:
    """An engine whose thread does not run and whose programs are not compiled."""
    return Engine(built[0], replace(OPTIONS, **options), observer=Counted())


def test_a_full_queue_refuses(built):
    engine: Any = idle(built, max_waiting=2, max_waiting_tokens=10)
    ask(engine, [5] * 6)
    with pytest.raises(Overloaded, match="6 prompt tokens are waiting, at most 10"):
        ask(engine, [5] * 6)
    ask(engine, [5] * 3)
    with pytest.raises(Overloaded, match="2 requests are waiting, at most 2"):
        ask(engine, "x")
    assert (engine.load().waiting, engine.load().waiting_tokens) == (2, 9)
    assert engine.observer.rejections == ["queue_tokens", "queue"]
    assert not engine.drain(0.01)
    with pytest.raises(EngineStopped, match="is draining"):
        ask(engine, "x")


def test_a_failure_reaches_everybody(built, monkeypatch):
    """The thread dies in a step: every request hears of it, whether it ran or waited, and new ones are refused."""
    engine = idle(built)
    monkeypatch.setattr(engine.device, "warm_up", lambda progress: None)
    monkeypatch.setattr(engine.device, "prefill", lambda *_: 1 / 0)
    heard = [ask(engine, text) for text in TEXTS]
    engine.start()
    for h in heard:
        assert h.wait(30).finish_reason == "error"
        assert h.updates[-1].error == "the engine failed: ZeroDivisionError: division by zero"
    assert isinstance(engine.failure, ZeroDivisionError)
    with pytest.raises(EngineStopped, match="has failed"):
        ask(engine, "x")
    with pytest.raises(EngineStopped, match="has failed"):
        engine.call(lambda: None)
    engine.stop()


def test_drained_and_stopped(engine):
    """Last in this module: those under way end, or are given up."""
    heard = [ask(engine, text, max_tokens=10) for text in TEXTS]
    assert engine.drain(60)
    assert [h.wait().finish_reason for h in heard] == ["length"] * len(TEXTS)
    with pytest.raises(EngineStopped, match="is draining"):
        ask(engine, "x")
    engine._draining = False
    late = ask(engine, "x", max_tokens=300)
    late.begun.wait(60)
    engine.stop()
    assert late.wait().finish_reason == "abort"
    with pytest.raises(EngineStopped, match="has been stopped"):
        ask(engine, "x")

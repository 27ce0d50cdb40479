"""Batches of ids against transformers' generate, and the promises of the jitted loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from qwen3_jax import layerwise as layerwise_
from qwen3_jax import runner as runner_
from qwen3_jax.checkpoint import load
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import declare
from qwen3_jax.ops import plain
from qwen3_jax.request import Request
from qwen3_jax.runner import Batch, Runner
from qwen3_jax.sampling_params import SamplingParams
from tests import tiny

EOS = 95
THINK_END = 51
STOP_TEXT = (60, 61, THINK_END, 62)
GREEDY = SamplingParams(temperature=0.0)
RAGGED = (5, 17, 3)


@pytest.fixture(autouse=True)
def one_layer_at_a_time(monkeypatch):
    monkeypatch.setattr(layerwise_, "TOGETHER", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=["whole", "layerwise"])
def dense(whole, request):
    runner, hf = whole
    return (runner, hf) if request.param == "whole" else (again(runner, layerwise=True), hf)


@pytest.fixture(scope="module", params=["whole", "layerwise"])
def mixed(tmp_path_factory, request):
    """Every other layer of experts."""
    folder = tmp_path_factory.mktemp("mixed")
    runner, hf = make(folder, moe=True, num_hidden_layers=4, decoder_sparse_step=2)
    return (runner, hf) if request.param == "whole" else (again(runner, layerwise=True), hf)


def make(folder, **options):
    folder, hf = tiny.save(folder, **{"num_hidden_layers": 2, **options})
    config, params = load(folder, dtype="float32", progress=False)
    return Runner(config, params, stop_text=STOP_TEXT, think_end=THINK_END, ops=plain.XLA, layerwise=False), hf


def again(runner, params=None, *, layerwise=None, stop_text=STOP_TEXT, think_end=THINK_END, prefill_tokens=2048):
    """A runner of the same model, by the same way if none is given."""
    return Runner(
        runner.config,
        runner.params if params is None else params,
        ops=runner.steps.ops,
        layerwise=runner.layerwise is not None if layerwise is None else layerwise,
        stop_text=stop_text,
        think_end=think_end,
        prefill_tokens=prefill_tokens,
    )


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 94, n).tolist() for n in lengths]


def request(prompt, params=GREEDY, *, limit=24, stop_ids=(EOS,), seed=None, thinks=False, thought=0):
    return Request(prompt, params, seed if seed is not None else params.seed or 0, stop_ids, limit, thinks, thought)


def run(runner, requests, *, counts=(32,)):
    """Run to the end, `counts` tokens per call in turn; return token ids per row, and everything emitted [n, B]."""
    batch = Batch(runner, requests)
    out = [batch.read(batch.first)]
    turn = 0
    while not batch.exhausted:
        emitted = batch.read(batch.decode(counts[turn % len(counts)]))
        turn += 1
        out.append(emitted)
        if (emitted["token"][0] < 0).all():
            break
    joined = {name: np.concatenate([part[name] for part in out]) for name in out[0]}
    return [joined["token"][joined["token"][:, b] >= 0, b].tolist() for b in range(len(requests))], joined


def generate(hf, prompt, **options):
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": 94} | options
    return hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def test_greedy_tokens_and_logprobs_equal_transformers(dense):
    check_against_transformers(*dense)


def test_experts_between_dense_layers_equal_transformers(mixed, monkeypatch):
    monkeypatch.setattr(layerwise_, "TOGETHER", 3)  # and one left over
    check_against_transformers(*mixed)


def check_against_transformers(runner, hf):
    rows = prompts(*RAGGED)
    asked = GREEDY.replace(logprobs=3)
    ours, emitted = run(runner, [request(p, asked) for p in rows], counts=(5, 32))
    for b, prompt in enumerate(rows):
        assert ours[b] == generate(hf, prompt)
        full = torch.tensor(tiny.logits(hf, np.array([prompt + ours[b]])))[0].log_softmax(-1)
        n = len(ours[b])
        expected = full[len(prompt) - 1 : len(prompt) - 1 + n].numpy()
        live = emitted["token"][:, b] >= 0
        own = np.take_along_axis(expected, np.array(ours[b])[:, None], 1)[:, 0]
        chex.assert_trees_all_close(emitted["logprob"][live, b], own, atol=1e-5, rtol=0)
        listed = np.take_along_axis(expected, emitted["top_ids"][live, b], 1)
        chex.assert_trees_all_close(emitted["top_logprobs"][live, b], listed, atol=1e-5, rtol=0)
        assert (emitted["top_ids"][live, b, 0] == ours[b]).all()


def test_the_number_of_tokens_per_call_changes_nothing(dense):
    runner, _ = dense
    params = SamplingParams(seed=3, temperature=0.9, top_k=30, presence_penalty=0.5)
    rows = [request(p, params, limit=20 + b) for b, p in enumerate(prompts(*RAGGED))]
    expected, _ = run(runner, rows, counts=(1,))
    assert [len(r) for r in expected] == [20, 21, 22]
    for counts in ((3,), (8,), (1, 2, 4, 32)):
        assert run(runner, rows, counts=counts)[0] == expected


def test_batch_composition_changes_no_row(whole):
    """Alone, in another order, with another length bucket and beside rows that want another program."""
    runner, _ = whole
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.95)
    rows = [request(p, params, seed=s) for s, p in enumerate(prompts(*RAGGED))]
    together, _ = run(runner, rows)
    assert len({tuple(r) for r in together}) == 3
    assert run(runner, rows[::-1])[0] == together[::-1]
    stranger = request(prompts(40)[0], SamplingParams(frequency_penalty=0.3, top_p=0.9), seed=9)
    mixed, _ = run(runner, [stranger, *rows])
    assert mixed[1:] == together
    assert run(runner, rows[1:2])[0] == together[1:2]


def test_penalties_equal_transformers(whole):
    runner, hf = whole
    penalised = GREEDY.replace(repetition_penalty=1.3)
    rows = prompts(*RAGGED)
    ours, _ = run(runner, [request(p, penalised) for p in rows])
    for b, prompt in enumerate(rows):
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
        assert ours[b] == generate(hf, prompt, logits_processor=processors)
    assert ours != run(runner, [request(p) for p in rows])[0]


def test_long_prompts_in_parts_and_growing_caches(dense, monkeypatch):
    """A prompt of 45 tokens in parts of 16, then 150 tokens through caches of 128 and 256 slots."""
    runner, hf = dense
    monkeypatch.setattr(runner_, "HEADROOM", 8)
    parts = again(runner, prefill_tokens=16)
    rows = prompts(45, 9, 16)
    ours, _ = run(parts, [request(p, limit=150) for p in rows])
    kinds = {key[0] for key in parts.programs}
    if runner.waits:
        assert kinds == {"empty", "in", "fresh", "more", "out", "first", "begin", "step in", "step", "step out", "grow"}
    else:
        assert kinds == {"start", "extend", "first", "decode", "grow"}
    for b, prompt in enumerate(rows):
        assert ours[b] == generate(hf, prompt, max_new_tokens=150)


def test_ends_at_stop_ids_limits_and_not_before_min_tokens(dense):
    runner, hf = dense
    prompt = prompts(6)[0]
    free = generate(hf, prompt, eos_token_id=None)
    end = free[4]
    first = free.index(end)
    rows = [
        request(prompt, stop_ids=(end, EOS)),
        request(prompt, limit=1),
        request(prompt, stop_ids=()),
        request(prompt, GREEDY.replace(min_tokens=10), stop_ids=(end,)),
    ]
    ours, _ = run(runner, rows)
    assert ours[0] == free[: first + 1]
    assert ours[1] == free[:1]
    assert ours[2] == free
    assert ours[3] == generate(hf, prompt, eos_token_id=end, min_new_tokens=10)


def test_budget_is_exact_to_the_token(dense):
    """The rule of the model's documentation, applied by hand with transformers: cut, append the stop text, go on."""
    runner, hf = dense
    prompt = prompts(6)[0]
    free = generate(hf, prompt, eos_token_id=None)
    assert THINK_END not in free
    budgets = (0, 1, 7, 19, 22, 23, 24, None)
    thinking = [request(prompt, GREEDY.replace(thinking_budget=b), thinks=True) for b in budgets]
    ours = run(runner, thinking[:4], counts=(3, 5))[0] + run(runner, thinking[4:])[0]
    for budget, row in zip(budgets, ours, strict=True):
        if budget is None:
            expected = free
        else:
            forced = (free[:budget] + list(STOP_TEXT))[:24]
            rest = 24 - len(forced)
            expected = forced + (generate(hf, prompt + forced, max_new_tokens=rest) if rest else [])
        assert row == expected, budget


def test_budget_leaves_closed_thinking_alone(whole):
    """Closed in time, closed exactly at the budget, ended by a stop id, closed in the prompt: nothing is forced."""
    runner, hf = whole
    prompt = prompts(6)[0]
    free = generate(hf, prompt, eos_token_id=None)
    closing = again(runner, think_end=free[4])
    at = free.index(free[4]) + 1  # tokens up to the one that closes
    budget = lambda n: GREEDY.replace(thinking_budget=n)  # noqa: E731
    rows = [
        request(prompt, budget(at + 2), thinks=True),
        request(prompt, budget(at), thinks=True),
        request(prompt, budget(at - 1), thinks=True),
        request(prompt, budget(2), thinks=False),
        request(prompt, budget(at + 3), thinks=True, stop_ids=(free[4],)),
        request(prompt, budget(at + 1), thinks=True, thought=2),
    ]
    ours, _ = run(closing, rows)
    assert ours[0] == ours[1] == ours[3] == free
    assert ours[2][: at + 3] == free[: at - 1] + list(STOP_TEXT)
    assert ours[4] == free[:at]
    assert ours[5][: at + 3] == free[: at - 1] + list(STOP_TEXT)


def test_halted_rows_stay_as_they_are(dense):
    runner, _ = dense
    batch = Batch(runner, [request(p) for p in prompts(5, 6)])
    batch.read(batch.first)
    batch.halted[0] = True
    token = batch.read(batch.decode(6))["token"]
    assert (token[:, 0] == -1).all()
    assert (token[:6, 1] >= 0).all()
    assert (token[6:, 1] == -1).all()


def test_broken_logits_end_their_row_only(dense):
    runner, hf = dense
    params = jax.tree.map(lambda x: x, runner.params)
    params["embed_tokens"] = params["embed_tokens"].at[93].set(np.nan)
    broken = again(runner, params, stop_text=(), think_end=-1)
    good = [i for i in prompts(6)[0] if i != 93]
    ours, emitted = run(broken, [request([4, 93]), request(good, limit=4)])
    assert emitted["token"][0, 0] == -2
    assert (emitted["token"][1:, 0] == -1).all()
    assert ours[1] == generate(hf, good, max_new_tokens=4)


def test_new_lengths_inside_a_bucket_compile_nothing(dense):
    runner, _ = dense
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: events.append(event))
    compiles = lambda: sum("backend_compile" in name for name in events)  # noqa: E731
    params = SamplingParams(seed=1, temperature=0.6, top_k=20, top_p=0.95)
    run(runner, [request(p, params) for p in prompts(17, 3, 4)], counts=(4,))
    warm, known = compiles(), len(runner.programs)
    for seed, lengths in enumerate([(18, 2, 1), (31, 32, 30), (20, 5, 9, 11)]):
        other = params.replace(temperature=0.9, top_k=5 + seed, top_p=0.8, min_p=0.1, thinking_budget=2)
        run(runner, [request(p, other, seed=seed, limit=10 + seed) for p in prompts(*lengths)], counts=(3, 8))
    assert (compiles(), len(runner.programs)) == (warm, known)
    run(runner, [request(p, params) for p in prompts(70)])
    assert compiles() > warm  # the counter does count


def test_cache_and_state_are_donated(dense):
    """The compiled decode aliases every byte of the cache to its output: no step copies it."""
    runner, _ = dense
    run(runner, [request(p) for p in prompts(*RAGGED)])
    cache_bytes = 2 * 2 * 4 * 128 * 2 * 16 * 4  # k and v, layers, rows, slots, kv heads, head_dim, float32
    if runner.waits:  # a layer at a time
        found, cache_bytes = [k for k in runner.programs if k[:3] == ("step", 4, 128)], cache_bytes // 2
    else:
        found = [k for k in runner.programs if k[:3] == ("decode", 4, 128) and k[-1].draw == "greedy"
                 and not k[-1].edits and k[-1].logprobs is None]  # fmt: skip
    (key,) = found
    program = runner.programs[key]
    assert program.memory_analysis().alias_size_in_bytes >= cache_bytes
    assert "input_output_alias" in program.as_text()
    batch = Batch(runner, [request(p) for p in prompts(*RAGGED)])
    before = jax.tree.leaves(batch._cache)
    batch.decode(1)
    assert all(leaf.is_deleted() for leaf in before)


def test_layers_in_several_dtypes(whole):
    """A checkpoint may hold them so; layers of a kind then share no program."""
    runner, _ = whole
    layers = runner.params["layers"]
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layers[1])
    params = {**runner.params, "layers": {**layers, 1: narrow}}
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)  # the same numbers
    rows = [request(p) for p in prompts(*RAGGED)]
    parted = again(runner, params, layerwise=True)
    assert run(parted, rows)[0] == run(again(runner, wide), rows)[0]
    assert len([key for key in parted.programs if key[0] == "step"]) == 2


def test_an_interrupted_call_leaves_nothing_to_wait_for(whole, monkeypatch):
    """Ctrl-C between two layers, when a part of the cache was given away."""
    runner = again(whole[0], layerwise=True)
    batch = Batch(runner, [request(p) for p in prompts(*RAGGED)])
    calls, go_on = [], runner._run

    def stop(key, *args, **options):
        calls.append(key[0])
        if calls.count("step") == 4:
            raise KeyboardInterrupt
        return go_on(key, *args, **options)

    object.__setattr__(runner.layerwise, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        batch.decode(8)
    batch.wait()


@pytest.mark.parametrize(("hidden", "layerwise"), [(64, False), (1024, True)])
def test_large_layers_run_layer_by_layer(hidden, layerwise):
    config = Qwen3Config.from_dict(
        Qwen3Config.from_name("Qwen3-0.6B").to_dict()
        | {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 1}
    )
    _, shapes = declare(config, dtype=jnp.float32, ops=plain.XLA)
    assert Runner(config, shapes).waits == layerwise

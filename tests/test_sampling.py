"""Sampling against transformers' live processors, OpenAI's penalty formula, and the statistics of many draws."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen3_jax import sampling
from qwen3_jax.sampling import Sampler
from qwen3_jax.sampling_params import SamplingError, SamplingParams

VOCAB = 300


def step(params, logits, *, prompts=None, generated=None, index=None, tokens=None, function=sampling.sample):
    """Run a sampling function on logits [B, V] for a batch of parameters; the test's way in."""
    batch, vocab = logits.shape
    sampler = Sampler.of(params, tokens=vocab if tokens is None else tokens)
    rows = sampler.rows(
        params, seeds=[p.seed or 0 for p in params], stop_ids=[[7]] * len(params), batch=batch, vocab_size=vocab
    )
    prompts = [[0]] * batch if prompts is None else prompts
    history = sampler.history(prompts, batch=batch, vocab_size=vocab)
    for token in np.asarray(generated if generated is not None else np.zeros((batch, 0), int)).T:
        history = sampling.remember(history, jnp.asarray(token, jnp.int32), jnp.ones(batch, bool))
    index = jnp.zeros(batch, jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    return jax.jit(function, static_argnums=0)(sampler, jnp.asarray(logits), rows, index, history)


def probabilities(params, logits, **options):
    """Scatter `sampling.distribution` over the vocabulary: [B, V]."""
    ids, p = (np.asarray(a) for a in step(params, logits, function=sampling.distribution, **options))
    dense = np.zeros(logits.shape, np.float32)
    np.put_along_axis(dense, ids, p, axis=-1)
    return dense


def transformers_probabilities(p: SamplingParams, logits, tokens, prompt_length):
    """The same distribution [B, V] by transformers' processors, on a row of tokens = prompt + generated."""
    processors = LogitsProcessorList()
    if p.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_length, p.min_tokens, [7]))
    if p.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        processors.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        processors.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        processors.append(MinPLogitsWarper(p.min_p))
    scores = processors(torch.LongTensor(tokens), torch.FloatTensor(logits.copy()))
    if p.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(-1), logits.shape[-1]).float().numpy()
    return scores.softmax(-1).numpy()


GRID = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=1.7, top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=100, top_p=0.9),
    SamplingParams(top_k=299),
    SamplingParams(top_k=1000),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=1e-6),
    SamplingParams(top_p=0.999, temperature=0.3),
    SamplingParams(min_p=0.1, temperature=1.3),
    SamplingParams(min_p=1.0),
    SamplingParams(repetition_penalty=1.5, temperature=0.9, top_k=30),
    SamplingParams(repetition_penalty=0.7, top_p=0.8),
    SamplingParams(repetition_penalty=1.3, temperature=0.0),
    SamplingParams(min_tokens=4, top_k=10),
    SamplingParams(min_tokens=3, top_k=10),
]


def test_distribution_equals_transformers_for_each_parameter_set():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCAB, (4, 9))
    generated = rng.integers(0, VOCAB, (4, 3))
    logits = (3 * rng.standard_normal((4, VOCAB))).astype(np.float32)
    logits[:, 7] += 9  # the stop id is attractive, so that min_tokens matters
    for p in GRID:
        ours = probabilities([p] * 4, logits, prompts=prompt, generated=generated, index=[3] * 4)
        theirs = transformers_probabilities(p, logits, np.concatenate([prompt, generated], 1), 9)
        np.testing.assert_array_equal(ours > 0, theirs > 0, err_msg=str(p))
        chex.assert_trees_all_close(ours, theirs, atol=2e-6, rtol=0)


def test_a_mixed_batch_gives_each_row_its_own_distribution():
    rng = np.random.default_rng(1)
    logits = (3 * rng.standard_normal((len(GRID), VOCAB))).astype(np.float32)
    prompt = rng.integers(0, VOCAB, (len(GRID), 5))
    ours = probabilities(GRID, logits, prompts=prompt, index=[0] * len(GRID))
    for b, p in enumerate(GRID):
        alone = transformers_probabilities(p, logits[b : b + 1], prompt[b : b + 1], 5)
        np.testing.assert_array_equal(ours[b] > 0, alone[0] > 0, err_msg=str(p))
        chex.assert_trees_all_close(ours[b], alone[0], atol=2e-6, rtol=0)


def test_presence_and_frequency_follow_the_openai_formula():
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counting generated tokens, not the prompt's."""
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((2, VOCAB)).astype(np.float32)
    generated = np.array([[5, 5, 9, 5], [1, 2, 3, 4]])
    p = SamplingParams(presence_penalty=1.5, frequency_penalty=-0.25)
    ours = probabilities([p, p], logits, prompts=[[8, 8]] * 2, generated=generated)
    counts = np.stack([np.bincount(row, minlength=VOCAB) for row in generated])
    expected = torch.tensor(logits - counts * -0.25 - (counts > 0) * 1.5).softmax(-1).numpy()
    chex.assert_trees_all_close(ours, expected.astype(np.float32), atol=1e-6)


def test_logit_bias_adds_and_padding_ids_are_never_drawn():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 290] = 50.0  # a padded row of the vocabulary that the model happens to like
    biased = SamplingParams(logit_bias={3: 2.0, 4: -100.0})
    ours = probabilities([biased, SamplingParams()], logits, tokens=280)
    expected = np.zeros(280)
    expected[3], expected[4] = 2, -100
    chex.assert_trees_all_close(ours[0, :280], torch.tensor(expected).softmax(-1).numpy().astype(np.float32), atol=1e-7)
    assert (ours[:, 280:] == 0).all()
    for p in (SamplingParams(temperature=0.0), SamplingParams(top_k=5), SamplingParams(top_p=0.5)):
        assert (np.asarray(step([p, p], logits, tokens=280)) < 280).all()
    with pytest.raises(SamplingError, match="logit_bias of token 280: the vocabulary has 280 tokens"):
        Sampler.of([SamplingParams(logit_bias={280: 1})], tokens=280)


@pytest.mark.parametrize("p", [SamplingParams(seed=5, temperature=0.8, top_k=6, top_p=0.95), SamplingParams(seed=6)])
def test_draws_follow_the_distribution(p):
    """Pearson's chi-square over 20,000 draws of one stream, below its 99.9th percentile; the seed is fixed."""
    draws, vocab = 20_000, 12
    logits = np.broadcast_to(np.linspace(-2, 2, vocab, dtype=np.float32), (draws, vocab))
    tokens = np.asarray(step([p] * draws, logits, index=np.arange(draws)))
    expected = transformers_probabilities(p, logits[:1], np.zeros((1, 1), int), 1)[0]
    counts = np.bincount(tokens, minlength=vocab)
    assert (counts[expected == 0] == 0).all()
    live = expected > 0
    chi2 = np.sum((counts[live] - draws * expected[live]) ** 2 / (draws * expected[live]))
    degrees = live.sum() - 1
    assert chi2 < degrees + 3.1 * math.sqrt(2 * degrees) + 4


def test_rare_tokens_keep_their_probability():
    """A token 2**15 times as probable as each of 2**17 others is drawn with probability 1/5."""
    logits = np.zeros((64, 2**17), np.float32)
    logits[:, 11] = math.log(2**15)
    p = SamplingParams(seed=1)
    hits = sum(int((np.asarray(step([p] * 64, logits, index=np.arange(64) + 64 * i)) == 11).sum()) for i in range(4))
    assert abs(hits - 256 / 5) < 4 * math.sqrt(256 * 0.2 * 0.8)


def test_a_row_depends_only_on_its_seed_and_index():
    """The same (seed, index, logits) draws the same token alone, in any batch, and from either program."""
    rng = np.random.default_rng(3)
    logits = (2 * rng.standard_normal((40, VOCAB))).astype(np.float32)
    params = [SamplingParams(seed=s, temperature=0.9, top_k=20, top_p=0.95) for s in range(40)]
    index = np.arange(40) % 7
    together = np.asarray(step(params, logits, index=index))
    order = rng.permutation(40)
    shuffled = step([params[i] for i in order], logits[order], index=index[order])
    np.testing.assert_array_equal(np.asarray(shuffled), together[order])
    whole = [*params, SamplingParams(seed=3, presence_penalty=1.0)]
    mixed = step(whole, np.concatenate([logits, logits[:1]]), index=[*index, 0])
    np.testing.assert_array_equal(np.asarray(mixed)[:40], together)
    for b in (0, 17):
        alone = step(params[b : b + 1], logits[b : b + 1], index=index[b : b + 1])
        assert int(alone[0]) == together[b]
    reseeded = [p.replace(seed=s + 2**32) for s, p in enumerate(params)]
    assert (np.asarray(step(reseeded, logits, index=index)) != together).any()
    assert (np.asarray(step(params, logits, index=index + 1)) != together).any()


def test_logprobs_are_the_raw_log_softmax():
    rng = np.random.default_rng(4)
    logits = (4 * rng.standard_normal((3, VOCAB))).astype(np.float32)
    token = np.array([5, 9, 200], np.int32)
    sampler = Sampler.of([SamplingParams(logprobs=5, temperature=0.2, presence_penalty=2.0)] * 3, tokens=290)
    got = jax.jit(sampling.logprobs, static_argnums=0)(sampler, logits, token)
    expected = torch.tensor(logits).log_softmax(-1)
    chex.assert_trees_all_close(np.asarray(got["logprob"]), expected.numpy()[np.arange(3), token], atol=1e-5)
    top = expected[:, :290].topk(20)
    np.testing.assert_array_equal(np.asarray(got["top_ids"]), top.indices.numpy())
    chex.assert_trees_all_close(np.asarray(got["top_logprobs"]), top.values.numpy(), atol=1e-5)


def test_broken_logits_are_an_error_for_their_row_only():
    logits = np.zeros((4, VOCAB), np.float32)
    logits[0, 3], logits[1, 3], logits[2, :] = np.nan, np.inf, -np.inf
    for p in (SamplingParams(temperature=0.0), SamplingParams(top_k=5), SamplingParams(top_p=0.9)):
        tokens = np.asarray(step([p] * 4, logits))
        assert (tokens[:3] == -1).all()
        assert tokens[3] >= 0


def test_the_programs_are_few():
    of = lambda *params: Sampler.of(params, tokens=VOCAB)  # noqa: E731
    greedy, usual = SamplingParams(temperature=0.0), SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert of(greedy).draw == "greedy"
    assert of(greedy, usual, usual.replace(temperature=1.0, top_k=64)).draw == "bounded"
    assert of(usual, usual.replace(top_k=65)).draw == "whole"
    assert of(usual, usual.replace(top_k=0)).draw == "whole"
    assert not of(usual).edits
    assert of(usual, greedy.replace(presence_penalty=0.1)).edits
    assert [of(usual.replace(logprobs=n)).logprobs for n in (None, 0, 1, 20)] == [None, 0, 20, 20]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 2.5, "temperature is 2.5: must be a finite number from 0 to 2"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", True, "temperature is True"),
        ("temperature", "1", "temperature is '1'"),
        ("top_p", 0, "top_p is 0: must be a finite number above 0 to 1"),
        ("top_p", 1.01, "top_p is 1.01"),
        ("top_k", -2, "top_k is -2: must be an integer from -1"),
        ("top_k", 1.5, "top_k is 1.5"),
        ("min_p", 1.5, "min_p is 1.5: must be a finite number from 0 to 1"),
        ("presence_penalty", -2.1, "presence_penalty is -2.1: must be a finite number from -2 to 2"),
        ("frequency_penalty", math.inf, "frequency_penalty is inf"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0: must be a finite number above 0"),
        ("repetition_penalty", math.inf, "repetition_penalty is inf"),
        ("seed", 2**63, "seed is 9223372036854775808: must be an integer from"),
        ("seed", 1.0, "seed is 1.0"),
        ("max_tokens", 0, "max_tokens is 0: must be an integer from 1"),
        ("max_tokens", 2**31, "max_tokens is 2147483648"),
        ("min_tokens", -1, "min_tokens is -1"),
        ("stop", ["a"] * 5, "stop has 5 strings: at most 4"),
        ("stop", [""], "must be strings that are not empty"),
        ("stop", 3, "stop is 3: must be a list"),
        ("stop_token_ids", [-1], "stop_token_ids is -1"),
        ("stop_token_ids", "12", "stop_token_ids is '12': must be a list"),
        ("logprobs", 21, "logprobs is 21: must be an integer from 0 to 20"),
        ("logit_bias", {1: 101}, "logit_bias of token 1 is 101: must be a finite number from -100 to 100"),
        ("logit_bias", {"1": 1}, "logit_bias token id is '1'"),
        ("logit_bias", [1], "must map token ids to numbers"),
        ("ignore_eos", 1, "ignore_eos is 1: must be true or false"),
        ("thinking_budget", -2, "thinking_budget is -2: must be an integer from -1"),
        ("thinking_budget", True, "thinking_budget is True"),
    ],
)
def test_a_bad_value_is_one_line_with_the_field_and_the_range(field, value, message):
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{field: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_normalised():
    p = SamplingParams(top_k=-1, thinking_budget=-1, temperature=1, seed=-1).replace(stop="end", stop_token_ids=[3])
    assert (p.top_k, p.thinking_budget, p.stop, p.stop_token_ids) == (0, None, ("end",), (3,))
    assert isinstance(p.temperature, float)
    with pytest.raises(SamplingError, match="min_tokens is 5: must not exceed max_tokens, 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(SamplingError, match="no sampling parameter temprature: the fields are"):
        p.replace(temprature=1)


def test_defaults_from_generation_config():
    released = json.loads(
        '{"bos_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643], "pad_token_id": 151643,'
        ' "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"}'
    )
    assert SamplingParams.from_generation_config(released) == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    base = {"do_sample": False, "max_new_tokens": 2048, "num_beams": 1, "eos_token_id": 151643}
    assert SamplingParams.from_generation_config(base) == SamplingParams(temperature=0.0, max_tokens=2048)
    assert SamplingParams.from_generation_config({}).temperature == 0.0
    with pytest.raises(SamplingError, match="num_beams is 4, which is not supported"):
        SamplingParams.from_generation_config({"num_beams": 4})
    with pytest.raises(SamplingError, match=r"generation_config.json: top_p is 3: must be a finite number"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 3})

"""Text generation: the released API on a tiny model with a real tokenizer, against transformers and by the rules."""

import json
import os
import shutil

import chex
import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qwen3_jax import compile_cache
from qwen3_jax.generate import GenerationError, Generator
from qwen3_jax.reply import Completion
from qwen3_jax.request import PromptError
from qwen3_jax.sampling_params import SamplingError, SamplingParams
from qwen3_jax.text.detokenize import Detokenizer
from qwen3_jax.text.template import TemplateError
from qwen3_jax.text.thinking import STOP_TEXT
from tests import tiny
from tests.text_folders import DEMO

TEXTS = ["The sky", "Once upon a time there was", "1 + 1 ="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that transformers saved, with the tokenizer of the demo and a greedy generation_config.json."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    end = ids["<|im_end|>"]
    tiny.save(path, vocab_size=2112, num_hidden_layers=2, tie_word_embeddings=True, eos_token_id=end, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, ids["<|endoftext|>"]]}))
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.from_folder(folder, dtype="float32", cache="off")


@pytest.fixture(scope="module")
def hf(folder):
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def text_of(completion: Completion) -> str:
    return completion.reasoning + completion.answer


def test_greedy_text_equals_transformers(generator, hf):
    """A ragged batch: what transformers generates for each prompt alone, decoded by its tokenizer."""
    model, tokenizer = hf
    outputs = generator.generate(TEXTS, max_tokens=16, logprobs=2)
    padding = list(range(generator.tokenizer.vocab_size, 2112))  # transformers would draw them, see the next test
    for text, ours in zip(TEXTS, outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        n = ids["input_ids"].shape[1]
        theirs = model.generate(**ids, do_sample=False, max_new_tokens=16, pad_token_id=0, suppress_tokens=padding)
        assert list(ours.token_ids) == theirs[0, n:].tolist()
        assert ours.text == tokenizer.decode(theirs[0, n:], skip_special_tokens=True)
        assert (ours.usage.prompt_tokens, ours.usage.completion_tokens) == (n, 16)
        assert (ours.finish_reason, ours.stop_reason, ours.usage.reasoning_tokens) == ("length", None, 0)
        full = torch.tensor(tiny.logits(model, theirs.numpy()))[0].log_softmax(-1)[n - 1 : -1].numpy()
        own = np.take_along_axis(full, np.array(ours.token_ids)[:, None], 1)[:, 0]
        assert ours.logprobs is not None
        chex.assert_trees_all_close(np.array([t.logprob for t in ours.logprobs], np.float32), own, atol=1e-5)
        assert all(len(t.top) == 2 and t.top[0] == (t.token_id, pytest.approx(t.logprob)) for t in ours.logprobs)


def test_padding_of_the_vocabulary_is_never_drawn(generator):
    used = generator.tokenizer.vocab_size
    assert used < generator.config.vocab_size
    outputs = generator.generate(TEXTS, max_tokens=16, temperature=2.0, seed=1)
    assert max(t for o in outputs for t in o.token_ids) < used


def test_streams_say_what_generate_says(generator):
    """The pieces of each row, joined by kind, are its completion; ends come once per row; wait-free of batch size."""
    settings = {"max_tokens": 16, "temperature": 1.0, "seed": 4}
    whole = generator.generate(TEXTS, batch_size=4, **settings)
    pieces = {(b, kind): "" for b in range(3) for kind in ("reasoning", "answer")}
    ends = {}
    for event in generator.stream(TEXTS, **settings):
        assert event.row not in ends
        if event.completion is not None:
            ends[event.row] = event.completion
        else:
            assert event.text
            pieces[event.row, event.kind] += event.text
    for b, completion in enumerate(whole):
        assert ends[b].token_ids == completion.token_ids
        assert (pieces[b, "reasoning"], pieces[b, "answer"]) == (completion.reasoning, completion.answer)
    one_by_one = generator.generate(TEXTS, batch_size=1, **settings)
    assert [c.token_ids for c in one_by_one] == [c.token_ids for c in whole]
    abandoned = generator.stream(TEXTS, **settings)
    next(abandoned)
    abandoned.close()
    again = generator.generate(TEXTS[1:2], max_tokens=16, temperature=1.0, seed=one_by_one[1].seed)
    assert again[0].token_ids == whole[1].token_ids


def test_stop_strings_cut_exactly(generator):
    """At every place of the text, within tokens and across them; the text before the stop, to the character."""
    free = generator.generate(TEXTS[:1], max_tokens=16)[0]
    text = free.text
    tried = 0
    for start in range(2, len(text) - 4, 5):
        stop = text[start : start + 3]
        if "\ufffd" in stop or not stop.strip():
            continue
        tried += 1
        cut = generator.generate(TEXTS[:1], max_tokens=16, stop=[stop])[0]
        assert (cut.answer, cut.finish_reason, cut.stop_reason) == (text[: text.index(stop)], "stop", stop)
        decoder, seen, n = Detokenizer(generator.tokenizer, skip_special_tokens=True), "", 0
        while stop not in seen:
            seen += decoder.feed([free.token_ids[n]])
            n += 1
        assert cut.token_ids == free.token_ids[:n]
        kept = generator.generate(TEXTS[:1], max_tokens=16, stop=[stop], include_stop_str_in_output=True)[0]
        assert kept.answer == text[: text.index(stop) + len(stop)]
        if tried == 3:
            break
    assert tried
    late = generator.generate(TEXTS[:1], max_tokens=16, stop=[text[:1]], min_tokens=16)[0]
    assert late.token_ids == free.token_ids


def test_stop_ids_and_eos(generator):
    free = generator.generate(TEXTS[1:2], max_tokens=16)[0]
    at = free.token_ids[5]
    n = free.token_ids.index(at) + 1
    stopped = generator.generate(TEXTS[1:2], max_tokens=16, stop_token_ids=[at])[0]
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (free.token_ids[:n], "stop", at)
    assert stopped.answer == generator.tokenizer.decode(free.token_ids[: n - 1], skip_special_tokens=True)
    end = generator.tokenizer.stop_ids[0]
    wanted = {"max_tokens": 5, "logit_bias": {end: 100.0}}
    assert generator.generate(TEXTS[:1], **wanted)[0].stop_reason == end
    ignored = generator.generate(TEXTS[:1], ignore_eos=True, **wanted)[0]
    assert (ignored.token_ids, ignored.finish_reason) == ((end,) * 5, "length")


def test_thinking_budget_cuts_and_tells_apart(generator):
    """A model made to open its thinking: after `budget` tokens comes the stop text, then the answer."""
    tags, stop = generator._tags, tuple(generator.tokenizer.encode(STOP_TEXT))
    opening = {tags.open_id: 100.0, tags.close_id: -100.0, generator.tokenizer.stop_ids[0]: -100.0}
    prompt = generator.prompt("Hi")
    for budget in (0, 1, 9):
        n = budget + len(stop) + 6
        reply = generator.generate([prompt], max_tokens=n, thinking_budget=budget, logit_bias=opening)[0]
        assert reply.token_ids[:budget] == (tags.open_id,) * budget
        assert reply.token_ids[budget : budget + len(stop)] == stop
        assert (tags.open_id not in stop, len(reply.token_ids)) == (True, n)
        assert reply.reasoning.endswith("directly now.")
        assert reply.usage.reasoning_tokens == budget + stop.index(tags.close_id) + 1
    text = "".join(e.text for e in generator.stream([prompt], max_tokens=4, thinking_budget=0) if e.kind == "reasoning")
    assert text == generator.tokenizer.decode(stop[:4]).strip("\n")


def test_thinking_already_open_or_closed_in_the_prompt(generator):
    tags, tokenizer = generator._tags, generator.tokenizer
    closed = generator.prompt("Hi", enable_thinking=False)
    assert tags.close_id in closed
    assert generator._asks.thinking(closed) == (False, 0)
    free = generator.generate([closed], max_tokens=12)[0]
    budgeted = generator.generate([closed], max_tokens=12, thinking_budget=3)[0]
    assert (budgeted.token_ids, budgeted.usage.reasoning_tokens) == (free.token_ids, 0)
    opened = generator.prompt("Hi") + tokenizer.encode("<think>\n")  # the form of the 2507-Thinking models
    used = len(tokenizer.encode("<think>\n"))
    assert generator._asks.thinking(opened) == (True, used)
    stop = tuple(tokenizer.encode(STOP_TEXT))
    reply = generator.generate([opened], max_tokens=12, thinking_budget=5)[0]
    assert reply.token_ids[5 - used : 12] == stop[: 12 - (5 - used)]
    assert (reply.answer, reply.usage.reasoning_tokens) == ("", 12)
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"}]
    assert generator._asks.thinking(generator.prompt([*history, {"role": "user", "content": "c"}])) == (True, 0)


def test_chat_is_generate_on_the_template(generator, hf):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    theirs = hf[1].apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    ids = theirs["input_ids"] if not isinstance(theirs, list) else theirs
    assert generator.prompt(messages) == list(ids)
    reply = generator.chat(messages, max_tokens=8)
    assert reply.token_ids == generator.generate([list(ids)], max_tokens=8)[0].token_ids
    streamed = [e.completion for e in generator.stream_chat(messages, max_tokens=8) if e.completion]
    assert streamed[0].token_ids == reply.token_ids
    assert generator.chat("Hi", max_tokens=4).token_ids == generator.chat(messages[1:], max_tokens=4).token_ids


def test_each_row_may_have_its_own_parameters(generator):
    params = [generator.defaults.replace(max_tokens=n) for n in (3, 5, 1)]
    outputs = generator.generate(TEXTS, params)
    assert [len(o.token_ids) for o in outputs] == [3, 5, 1]
    free = generator.generate(TEXTS, max_tokens=5)
    assert [o.token_ids for o in outputs] == [f.token_ids[:n] for f, n in zip(free, (3, 5, 1), strict=True)]


def test_what_cannot_be_run_is_refused_in_one_line(generator):
    long = [5] * 512
    for call, error, message in (
        (lambda: generator.generate([""]), PromptError, "prompt 0 is empty"),
        (
            lambda: generator.generate([[1], [2200]]),
            PromptError,
            "prompt 1 has token id 2200: the model has ids 0 to 2111",
        ),
        (lambda: generator.generate([long]), PromptError, "prompt 0 has 512 tokens, the context of the model is 512"),
        (lambda: generator.stream([long]), PromptError, "prompt 0 has 512 tokens"),
        (
            lambda: generator.generate([long[:500]], max_tokens=13),
            PromptError,
            "500 tokens and max_tokens is 13, together 513 of a context of 512: set max_tokens to 12 or less",
        ),
        (lambda: generator.generate("text"), PromptError, "prompts is a string"),
        (lambda: generator.generate(TEXTS, [SamplingParams()]), PromptError, "1 sampling parameters for 3 prompts"),
        (lambda: generator.chat("x", temperature=5), SamplingError, "temperature is 5"),
        (lambda: generator.chat("x", temprature=1), SamplingError, "no sampling parameter temprature"),
        (lambda: generator.generate(["x"], logit_bias={2100: 1}), SamplingError, "logit_bias of token 2100"),
        (lambda: generator.chat([]), TemplateError, "messages must be a non-empty list"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_whole_context_can_be_used(generator):
    reply = generator.generate([[5] * 509])[0]
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")


def test_broken_weights_are_an_error_that_names_the_row(generator):
    params = jax.tree.map(lambda x: x, generator.runner.params)
    params["norm"] = params["norm"] * np.float32("nan")
    broken = Generator(generator.config, params, generator.tokenizer)
    with pytest.raises(GenerationError, match="row 0: the logits are not finite after 0 generated tokens") as caught:
        broken.generate(["x"], max_tokens=3, temperature=0)
    assert caught.value.completions[0].finish_reason == "error"


def test_defaults_come_from_the_folder(folder, tmp_path):
    released = Generator.from_folder(DEMO, cache="off").defaults
    assert released == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    for name, message in (
        ("generation_config.json", "num_beams is 2, which is not supported"),
        ("tokenizer.json", "tokenizer.json"),
        ("model.safetensors", "model.safetensors"),
    ):
        copy = tmp_path / name.split(".")[0]
        shutil.copytree(folder, copy)
        (copy / name).write_text('{"num_beams": 2}')
        with pytest.raises(ValueError, match=message):
            Generator.from_folder(copy, cache="off")


def test_compile_cache_folder(tmp_path, monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "a" / "b"))
        assert compile_cache.enable() == tmp_path / "a" / "b"
        jax.jit(lambda x: x * 3 + 1)(np.float32(1))
        monkeypatch.setenv(compile_cache.VARIABLE, "off")
        assert compile_cache.enable() is None
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.warns(compile_cache.CompileCacheWarning, match=r"cannot be written \(Not a directory\)"):
            assert compile_cache.enable(blocked / "x") is None
    finally:
        compile_cache.enable(before)
    assert os.path.isdir(tmp_path / "a" / "b")

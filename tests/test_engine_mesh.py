"""The engine on a mesh says what it says on one device: on eight devices, and in two processes of four."""

import pytest

from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.generate import Generator
from qwen3_jax.loaded import load_model
from qwen3_jax.sampling_params import SamplingParams
from tests.engines import ask, write

TEXTS = ["The sky", "Once upon a time there was", "1 + 1 =", "x", "Hello, " * 9, "a"]
OPTIONS = EngineOptions(rows=4, page_tokens=8, chunk_tokens=32, cache_tokens=384, decode_tokens=4)
EACH = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=20, seed=3)] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write(path, moe=True, num_experts=4, num_key_value_heads=4)
    return path


def test_eight_devices_say_what_one_says(folder, tmp_path_factory):
    """Rows over `data` and `expert`, heads over `model`; the cache's pages are whole on every device, of its heads."""
    cache = tmp_path_factory.getbasetemp() / "xla"
    expected = Generator.from_folder(folder, dtype="float32", cache=cache).generate(TEXTS, EACH, max_tokens=12)
    engine = Engine(load_model(folder, dtype="float32", mesh="data=2,expert=2,model=2", cache=cache), OPTIONS)
    engine.start()
    compiled = engine.device.compiles
    try:
        ours = engine.generate(TEXTS, EACH, max_tokens=12)
        again = engine.generate(TEXTS, EACH, max_tokens=12)  # on cached prefixes
        scored = ask(engine, TEXTS[1], max_tokens=2, prompt_logprobs=1, logprobs=1).wait()
    finally:
        engine.stop()
    assert [c.token_ids for c in ours] == [c.token_ids for c in expected]
    assert [c.token_ids for c in again] == [c.token_ids for c in expected]
    assert scored.logprobs is not None
    assert engine.device.compiles == compiled
    pages = engine.device._cache[0]["k"]
    assert pages.sharding.shard_shape(pages.shape)[0] == 2  # of 4 heads

"""The demo checkpoint: what its script writes, and a folder that transformers takes for a released one."""

import json
import runpy
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tests.text_folders import DEMO, RELEASED, REPO, ours, released, template, theirs


def test_the_script_writes_the_committed_bytes(tmp_path):
    runpy.run_path(str(REPO / "scripts" / "make_demo_folder.py"))["write"](tmp_path)
    names = sorted(p.name for p in DEMO.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name
    assert sum(p.stat().st_size for p in DEMO.iterdir()) < 2**20


def test_transformers_loads_it_and_reads_the_same_prompt():
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(DEMO, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    config = model.config
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.vocab_size > ours().vocab_size == len(theirs())
    generation = model.generation_config
    assert generation.eos_token_id == [ours().eos_id, ours().pad_id] == list(ours().stop_ids)
    assert (generation.do_sample, generation.temperature, generation.top_p, generation.top_k) == (True, 0.6, 0.95, 20)
    messages = [{"role": "user", "content": "Hello! Привет 你好 😀"}]
    ids = ours().encode(template().render(messages))
    assert ids == theirs().apply_chat_template(messages, add_generation_prompt=True).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits.float().numpy()
    assert logits.shape == (1, len(ids), config.vocab_size)
    assert np.isfinite(logits).all()


def test_the_weights_look_untrained_and_are_as_the_config_says():
    config = json.loads((DEMO / "config.json").read_text())
    with safe_open(DEMO / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in f.keys()  # noqa: SIM118 (not a dict)
        assert f.get_slice("model.embed_tokens.weight").get_shape() == [config["vocab_size"], config["hidden_size"]]
        for name in f.keys():  # noqa: SIM118
            tensor = f.get_tensor(name).float()
            assert (tensor == 1).all() if tensor.ndim == 1 else abs(tensor.std() - config["initializer_range"]) < 1e-3


@released
def test_its_tokenizer_differs_from_the_released_one_only_in_its_tables():
    demo, real = (json.loads((f / "tokenizer.json").read_text(encoding="utf-8")) for f in (DEMO, RELEASED))
    offset = real["added_tokens"][0]["id"] - demo["added_tokens"][0]["id"]
    assert [t | {"id": t["id"] + offset} for t in demo["added_tokens"]] == real["added_tokens"]
    for spec in (demo, real):
        del spec["added_tokens"], spec["model"]["vocab"], spec["model"]["merges"]
    assert demo == real
    demo, real = (json.loads((f / "tokenizer_config.json").read_text(encoding="utf-8")) for f in (DEMO, RELEASED))
    for spec in (demo, real):
        del spec["added_tokens_decoder"], spec["model_max_length"]
    assert demo == real

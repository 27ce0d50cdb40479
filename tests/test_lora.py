"""Adapters against PEFT on tiny models: the same logits, gradients and files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen3_jax import checkpoint, model, ops
from qwen3_jax.checkpoint import names
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops import plain
from qwen3_jax.sharding import RULES, make_mesh
from qwen3_jax.train import config as configs
from qwen3_jax.train import loop, lora, lora_peft, stacked
from qwen3_jax.train.lora import TARGETS, Lora, LoraConfig, LoraError
from tests import tiny

TOKENS = np.random.default_rng(0).integers(0, 90, (2, 9)).astype(np.int32)


def save(folder: Path, **options: Any) -> Path:
    return tiny.save(folder, **options)[0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("moe") / "model", moe=True)


def torch_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def wrapped(folder: Path, **settings: Any) -> Any:
    """A model under PEFT's adapters, both halves random: as trained ones are."""
    config = peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **settings)
    torch.manual_seed(0)
    made = peft.get_peft_model(torch_model(folder), config)
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return made


def network(config: Qwen3Config) -> stacked.Network:
    return stacked.Network(
        config,
        dtype=jnp.dtype(jnp.float32),
        param_dtype=jnp.dtype(jnp.float32),
        ops=lora.adapted_ops(ops.for_platform("cpu")),
        resolve=lora.merge_experts,
    )


def logits_of(folder: Path, of: Lora, adapters: Any) -> Any:
    """Return a function of stacked adapters to logits, and those adapters."""
    config, params = checkpoint.load(folder, dtype="float32", progress=False)
    net, base = network(config), stacked.stack(config, params)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def logits(adapters):
        tree = of.assemble(adapters, base)
        hidden, _ = net.hidden(tree, jnp.asarray(TOKENS), positions, None)
        return jnp.einsum("BTD,VD->BTV", hidden, net.head(tree))

    return logits, stacked.stack(config, adapters)


def test_logits_and_gradients_are_those_of_peft(dense, tmp_path):
    theirs = wrapped(dense, target_modules=list(TARGETS))
    theirs.save_pretrained(tmp_path / "adapter")
    config = checkpoint.load(dense, progress=False)[0]
    of, adapters = lora_peft.load(tmp_path / "adapter", config)
    assert (of.config.rank, of.config.alpha, of.config.targets) == (3, 7.0, TARGETS)
    logits, adapters = logits_of(dense, of, adapters)
    out = theirs(input_ids=torch.as_tensor(TOKENS), use_cache=False).logits
    np.testing.assert_allclose(logits(adapters), out.detach().numpy(), atol=2e-5)
    out.square().mean().backward()
    grads = stacked.unstack(config, jax.grad(lambda a: jnp.mean(jnp.square(logits(a))))(adapters))
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            layer, block, target, side = name.replace(".default", "").split(".")[4:8]
            mine = np.asarray(names.get(grads, ("layers", int(layer), block, target))[side[-1].lower()])
            scale = np.abs(weight.grad.numpy()).max()
            np.testing.assert_allclose(mine.reshape(weight.shape), weight.grad.numpy(), atol=1e-5 * scale, err_msg=name)
        else:
            assert weight.grad is None  # the base is frozen there too


def test_peft_reads_what_we_write_and_the_bytes_come_back(dense, tmp_path):
    config = checkpoint.load(dense, progress=False)[0]
    of = Lora(LoraConfig(rank=2, alpha=5.0, targets=("q_proj", "o_proj", "down_proj"), rank_stabilized=True), config)
    adapters = jax.tree.map(
        lambda x: x + 0.1, stacked.unstack(config, of.init(jax.random.key(0)))
    )  # B is zero at first, and would hide it
    lora_peft.save(tmp_path / "ours", adapters, of, base="tiny")
    theirs = peft.PeftModel.from_pretrained(torch_model(dense), str(tmp_path / "ours"))
    logits, tree = logits_of(dense, of, adapters)
    np.testing.assert_allclose(logits(tree), tiny.logits(theirs, TOKENS), atol=2e-5)
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    back, tree = lora_peft.load(tmp_path / "again", config)
    assert back.config == of.config.__class__(**{**vars(of.config), "experts": back.config.experts})
    jax.tree.map(np.testing.assert_array_equal, tree, jax.tree.map(np.asarray, adapters))


@pytest.mark.parametrize("kind", ["each", pytest.param("shared", marks=pytest.mark.slow)])
def test_experts_one_by_one_load_into_peft(kind, moe, tmp_path):
    """PEFT fuses the experts' adapters for the stacked experts of transformers 5."""
    config = checkpoint.load(moe, progress=False)[0]
    targets = ("v_proj", "gate_proj", "up_proj", "down_proj")
    of = Lora(LoraConfig(rank=2, alpha=4.0, targets=targets, experts=kind), config)
    random = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.3 * random.standard_normal(x.shape), jnp.float32),
        stacked.unstack(config, of.init(jax.random.key(0))),
    )
    lora_peft.save(tmp_path / kind, adapters, of, base="tiny")
    theirs = peft.PeftModel.from_pretrained(torch_model(moe), str(tmp_path / kind))
    logits, tree = logits_of(moe, of, adapters)
    np.testing.assert_allclose(logits(tree), tiny.logits(theirs, TOKENS), atol=3e-5)


def test_stacked_experts_as_peft_saves_them_are_read(moe, tmp_path):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    theirs = wrapped(moe, target_modules=["q_proj"], target_parameters=targets)
    theirs.save_pretrained(tmp_path / "adapter")
    config = checkpoint.load(moe, progress=False)[0]
    of, adapters = lora_peft.load(tmp_path / "adapter", config)
    assert of.config.targets == ("q_proj", "gate_proj", "up_proj", "down_proj")
    logits, tree = logits_of(moe, of, adapters)
    np.testing.assert_allclose(logits(tree), tiny.logits(theirs, TOKENS), atol=3e-5)


@pytest.mark.parametrize("kind", ["moe", pytest.param("dense", marks=pytest.mark.slow)])
def test_merged_folder_is_peft_merged(kind, tmp_path, request):
    base = request.getfixturevalue(kind)
    config = checkpoint.load(base, progress=False)[0]
    of = Lora(LoraConfig(rank=2, alpha=4.0), config)
    adapters = jax.tree.map(lambda x: x + 0.05, stacked.unstack(config, of.init(jax.random.key(3))))
    lora_peft.save(tmp_path / "adapter", adapters, of, base="tiny")
    (base / "README.md").write_text("of the base")
    lora_peft.merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(torch_model(base), str(tmp_path / "adapter")).merge_and_unload()
    np.testing.assert_allclose(
        tiny.logits(torch_model(tmp_path / "merged"), TOKENS), tiny.logits(theirs, TOKENS), atol=3e-5
    )
    assert not (tmp_path / "merged" / "README.md").exists()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws(dense):
    config = checkpoint.load(dense, progress=False)[0]
    of = Lora(LoraConfig(rank=64, alpha=1.0, targets=("k_proj", "o_proj", "up_proj")), config)
    fresh = of.init(jax.random.key(0))
    layers = fresh["layers"][0]
    assert all(not np.any(leaf["b"]) for part in ("self_attn", "mlp") for leaf in layers[part].values())
    for site in of.sites:
        a = np.asarray(names.get(fresh, ("layers", 0, *site.path[2:]))["a"])
        bound = site.inputs**-0.5  # kaiming_uniform_(a=sqrt(5)) of an [r, in] matrix
        assert np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
    assert jax.tree.map(lambda x: x.shape, of.abstract()) == jax.tree.map(lambda x: x.shape, fresh)


def test_adapters_lie_on_a_mesh_as_their_weights(moe):
    config = checkpoint.load(moe, progress=False)[0]
    of = Lora(LoraConfig(rank=2, alpha=1.0), config)
    mesh = make_mesh(data=1, fsdp=2, expert=2, model=2)
    tree = of.init(jax.random.key(0))
    placed = of.shardings(mesh, RULES["train"])
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    jax.tree.map(jax.device_put, tree, placed)  # everything divides
    layer, axes = placed["layers"][0], model.parameter_axes(config, ops=plain.XLA)["layers"][0]
    assert axes["mlp"]["experts"]["gate_proj"] == "experts expert_mlp embed"
    assert tuple(layer["mlp"]["experts"]["gate_proj"]["a"].spec) == (None, ("expert", "model"), None, "fsdp")
    assert tuple(layer["self_attn"]["o_proj"]["a"].spec) == (None, None, "model", None)


def test_impossible_adapters_are_refused(dense, tmp_path):
    for settings, word in (
        ({"rank": 0}, "rank is 0"),
        ({"targets": ("lm_head",)}, "lm_head"),
        ({"targets": ()}, "at least one"),
        ({"experts": "some"}, "each, shared, none"),
    ):
        with pytest.raises(LoraError, match=word):
            LoraConfig(**{"rank": 2, "alpha": 1.0, **settings})
    config = checkpoint.load(dense, progress=False)[0]
    of = Lora(LoraConfig(rank=2, alpha=4.0, targets=("q_proj",)), config)
    adapters = stacked.unstack(config, of.init(jax.random.key(3)))
    lora_peft.save(tmp_path / "adapter", adapters, of, base="tiny")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for change, word in (
        ({"use_dora": True}, "use_dora is True"),
        ({"r": 3}, "the model and r give"),
        ({"r": "a"}, "r is 'a'"),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(LoraError, match=word):
            lora_peft.load(tmp_path / "adapter", config)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(LoraError, match=r"adapter_config\.json: cannot be read"):
        lora_peft.load(tmp_path / "adapter", config)


def test_a_run_trains_adapters_alone_and_leaves_what_peft_and_merge_take(dense, tmp_path):
    """The base stays as it was; the run's adapters merged into it are the model that the run exports."""
    random = np.random.default_rng(0)
    rows = [json.dumps({"tokens": random.integers(0, 90, 12).tolist()}) for _ in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    run = {
        "model": {"weights": str(dense)},
        "run": {"folder": str(tmp_path / "run")},
        "data": {"sources": [{"name": "rows", "path": str(tmp_path / "data.jsonl")}]},
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "down_proj"]},
        "schedule": {"kind": "constant", "peak": 0.01},
        "stages": [{"steps": 2, "batch": 2, "length": 16}],
    }
    loop.train(configs.from_dict(run))
    theirs = peft.PeftModel.from_pretrained(torch_model(dense), str(tmp_path / "run" / "adapter"))
    assert any(weight.abs().max() > 0 for name, weight in theirs.named_parameters() if "lora_B" in name)
    lora_peft.merge_folder(dense, tmp_path / "run" / "adapter", tmp_path / "merged")
    ours, exported = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", tmp_path / "run" / "model"))
    before = load_file(dense / "model.safetensors")
    assert ours.keys() == exported.keys() == before.keys()
    for name, weight in exported.items():
        torch.testing.assert_close(weight, ours[name], rtol=0, atol=1e-6)
        adapted = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(weight, before[name]) != adapted, name

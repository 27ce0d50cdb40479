"""The same logits on every mesh, against one device and against transformers, dense and MoE, under either rules."""

import math
from typing import Any

import chex
import jax
import numpy as np
import pytest

from qwen3_jax import sharding
from qwen3_jax.config import Qwen3Config
from qwen3_jax.sharding import AXES, RULES, ShardingError
from tests import tiny
from tests.run import Network

SETTINGS = {"num_attention_heads": 8, "num_key_value_heads": 2}  # model 4 and 8 exceed the kv heads
KINDS: dict[str, dict[str, Any]] = {"dense": {"num_hidden_layers": 2}, "moe": {"moe": True, "num_hidden_layers": 1}}
MESHES = [
    "data=2",
    "data=8",
    "model=2",
    "model=4",
    "model=8",
    "expert=2",
    "expert=8",
    "data=2,model=2",
    "data=3,model=2",
    "expert=2,model=4",
    "expert=4,model=2",
    "fsdp=4,model=2",
    "data=2,expert=2,model=2",
    "data=2,fsdp=2,model=2",
    "fsdp=2,expert=2,model=2",
]


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
    """A folder, tokens of an uneven batch, transformers' logits and this package's on one device."""
    folder, hf = tiny.save(tmp_path_factory.mktemp(request.param), **SETTINGS, **KINDS[request.param])
    tokens = np.random.default_rng(0).integers(0, 94, (3, 5)).astype(np.int32)
    return folder, tokens, tiny.logits(hf, tokens), Network(folder, formulation="xla").logits(tokens)


def mesh_of(text: str) -> jax.sharding.Mesh:
    sizes = sharding.parse_mesh(text)
    return sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("text", MESHES)
def test_same_logits_on_every_mesh(text, reference):
    folder, tokens, theirs, alone = reference
    logits = Network(folder, formulation="xla", mesh=mesh_of(text)).logits(tokens)
    chex.assert_trees_all_close(logits, alone, atol=1e-5, rtol=0)
    chex.assert_trees_all_close(logits, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("text", ["data=2,expert=2,model=2", "fsdp=8"])
def test_training_rules_give_the_same_logits(text, reference):
    folder, tokens, theirs, alone = reference
    logits = Network(folder, formulation="xla", mesh=mesh_of(text), purpose="train").logits(tokens)
    chex.assert_trees_all_close(logits, alone, atol=1e-5, rtol=0)
    chex.assert_trees_all_close(logits, theirs, atol=2e-5, rtol=0)


def test_cached_steps_on_a_mesh(reference):
    folder, tokens, theirs, _ = reference
    network = Network(folder, formulation="xla", mesh=mesh_of("data=2,expert=2,model=2"))
    logits = network.logits_in_pieces(tokens, [3, 1, 1], capacity=8)
    chex.assert_trees_all_close(logits, theirs, atol=2e-5, rtol=0)


def test_weights_are_where_the_rules_say(reference):
    """Every device holds its share and no more: the bytes per device times the ways of the split are the whole."""
    folder, *_ = reference
    mesh = mesh_of("expert=2,model=4")
    network = Network(folder, formulation="xla", mesh=mesh)
    layer = network.params["layers"][0]
    split = {"q_proj": 4, "o_proj": 4, "k_proj": 4, "q_norm": 1}
    for name, ways in split.items():
        array = layer["self_attn"][name]
        assert array.addressable_shards[0].data.nbytes * ways == array.nbytes, name
    if "experts" in layer["mlp"]:
        stack = layer["mlp"]["experts"]["down_proj"]
        assert stack.addressable_shards[0].data.shape[0] == 1  # 8 whole experts over expert × model = 8
        assert len({str(shard.index) for shard in stack.addressable_shards}) == 8


@pytest.mark.parametrize(
    ("mesh", "problems"),
    [
        ("model=32", ["num_attention_heads 16 does not divide over model 32: use 16"]),
        ("model=3", ["num_attention_heads 16 does not divide over model 3: use 2 or 4"]),
    ],
)
def test_what_does_not_divide_is_named_with_a_remedy(mesh, problems):
    config = Qwen3Config.from_name("Qwen3-0.6B")
    sizes = sharding.parse_mesh(mesh)
    abstract = jax.sharding.AbstractMesh(tuple(sizes.values()), AXES)
    found = sharding.check(config, abstract, RULES["serve"])
    assert set(problems) <= set(found)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B-Instruct", "Qwen3-14B"])
def test_divisibility_agrees_with_arithmetic(name):
    """Against the published sizes: tensor-parallel ways divide heads and vocabulary, expert ways the experts."""
    config = Qwen3Config.from_name(name)
    for expert in (1, 2, 4, 8, 16):
        for model in (1, 2, 4, 8, 16, 32):
            fits = config.num_attention_heads % model == 0 and config.vocab_size % model == 0
            heads = max(model, config.num_key_value_heads)
            fits = fits and heads % model == 0 and heads % config.num_key_value_heads == 0
            fits = fits and (config.num_experts or 0) % (expert * model) == 0
            fits = fits and (config.num_experts or config.intermediate_size % model == 0)
            abstract = jax.sharding.AbstractMesh((1, 1, expert, model), AXES)
            if config.num_experts or expert == 1:
                assert (sharding.check(config, abstract, RULES["serve"]) == []) == bool(fits), (expert, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=2", "mesh axis 'tensor' is unknown: use data, fsdp, expert, model"),
        ("model=0", "mesh axis model has size '0'"),
        ("model=two", "mesh axis model has size 'two'"),
        ("model=2,model=4", "mesh axis model is given twice"),
        ("", "mesh axis '' is unknown"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ShardingError, match=message):
        sharding.parse_mesh(text)


def test_a_mesh_of_another_size_than_the_machine_is_refused():
    with pytest.raises(ShardingError, match=r"data 3 .* = 3 devices, have 8"):
        sharding.make_mesh(data=3)

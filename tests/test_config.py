"""Config: released files pinned to published counts, both spellings against live transformers, every refusal."""

import copy
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from qwen3_jax import config as config_module
from qwen3_jax import model
from qwen3_jax.config import FIELD_CHECKS, INERT, OFF, OMITTABLE, ConfigError, Qwen3Config, RopeScaling
from qwen3_jax.ops.plain import ORACLE
from tests import tiny

# Published counts: total, non-embedding, one embedding matrix, active incl. embeddings, active non-embedding,
# KV-cache bytes per token in bfloat16.
COUNTS = {
    "0.6B": (596_049_920, 440_467_456, 155_582_464, 596_049_920, 440_467_456, 114_688),
    "1.7B": (1_720_574_976, 1_409_410_048, 311_164_928, 1_720_574_976, 1_409_410_048, 114_688),
    "4B": (4_022_468_096, 3_633_511_936, 388_956_160, 4_022_468_096, 3_633_511_936, 147_456),
    "8B": (8_190_735_360, 6_946_075_648, 622_329_856, 8_190_735_360, 6_946_075_648, 147_456),
    "14B": (14_768_307_200, 13_212_482_560, 777_912_320, 14_768_307_200, 13_212_482_560, 163_840),
    "32B": (32_762_123_264, 31_206_298_624, 777_912_320, 32_762_123_264, 31_206_298_624, 262_144),
    "30B-A3B": (30_532_122_624, 29_909_792_768, 311_164_928, 3_353_032_704, 2_730_702_848, 98_304),
    "235B-A22B": (235_093_634_560, 233_848_974_848, 622_329_856, 22_190_763_520, 20_946_103_808, 192_512),
    "480B-A35B": (480_154_875_392, 478_287_885_824, 933_494_784, 35_474_765_312, 33_607_775_744, 253_952),
}
PARTS = {"Qwen3", "Base", "Instruct", "Thinking", "2507", "Coder"}
CHAT_NAMES = [name for name in Qwen3Config.names() if "Embedding" not in name and "Reranker" not in name]

DENSE = Qwen3Config.from_name("Qwen3-0.6B").to_dict()
MOE = Qwen3Config.from_name("Qwen3-30B-A3B").to_dict()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(data: dict, **changes) -> Qwen3Config:
    return Qwen3Config.from_dict(data | changes)


def problems(data: object) -> list[str]:
    with pytest.raises(ConfigError) as info:
        Qwen3Config.from_dict(data)  # pyright: ignore[reportArgumentType]
    assert len(str(info.value).splitlines()) == len(info.value.problems) > 0
    return info.value.problems


# Released models


def test_every_released_text_model_is_there():
    sizes = [name.removeprefix("Qwen3-") for name in Qwen3Config.names()]
    dense = ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
    expected = dense + [f"{s}-Base" for s in [*dense[:-1], "30B-A3B"]] + ["30B-A3B", "235B-A22B"]
    expected += [f"{s}-{kind}-2507" for s in ("4B", "30B-A3B", "235B-A22B") for kind in ("Instruct", "Thinking")]
    expected += ["Coder-30B-A3B-Instruct", "Coder-480B-A35B-Instruct"]
    expected += [f"{kind}-{s}" for kind in ("Embedding", "Reranker") for s in ("0.6B", "4B", "8B")]
    assert sorted(sizes) == sorted(expected)


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_counts_are_the_published_ones(name):
    config = Qwen3Config.from_name(name)
    size = "-".join(part for part in name.split("-") if part not in PARTS)
    total, backbone, embedding, active, active_backbone, kv_bytes = COUNTS[size]
    assert config.num_parameters() == total
    assert config.num_parameters(embedding=False) == backbone
    assert config.vocab_size * config.hidden_size == embedding
    assert config.num_active_parameters() == active
    assert config.num_active_parameters(embedding=False) == active_backbone
    assert config.kv_bytes_per_token(2) == kv_bytes


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Qwen3-Embedding-0.6B", 595_776_512),
        ("Qwen3-Embedding-4B", 4_021_774_336),
        ("Qwen3-Embedding-8B", 8_188_515_328),
    ],
)
def test_embedding_counts_are_the_published_ones(name, total):
    assert Qwen3Config.from_name(name).num_parameters() == total


# max_position_embeddings, rope_theta, eos_token_id, tie_word_embeddings
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Qwen3-0.6B", (40960, 1e6, 151645, True)),
        ("Qwen3-8B", (40960, 1e6, 151645, False)),
        ("Qwen3-4B-Base", (32768, 1e6, 151643, True)),
        ("Qwen3-4B-Thinking-2507", (262144, 5e6, 151645, True)),
        ("Qwen3-30B-A3B", (40960, 1e6, 151645, False)),
        ("Qwen3-30B-A3B-Instruct-2507", (262144, 1e7, 151645, False)),
        ("Qwen3-235B-A22B-Thinking-2507", (262144, 5e6, 151645, False)),
        ("Qwen3-Coder-480B-A35B-Instruct", (262144, 1e7, 151645, False)),
        ("Qwen3-Embedding-0.6B", (32768, 1e6, 151643, True)),
    ],
)
def test_what_differs_between_variants(name, values):
    c = Qwen3Config.from_name(name)
    assert (c.max_position_embeddings, c.rope_theta, c.eos_token_id, c.tie_word_embeddings) == values
    assert c.norm_topk_prob == (c.num_experts > 0)
    assert c.head_dim == 128


@pytest.mark.parametrize("name", Qwen3Config.names())
def test_transformers_reads_every_released_file_the_same(name):
    path = config_module._models_folder() / f"{name}.json"
    data = json.loads(path.read_text())
    ours = Qwen3Config.from_file(path)
    theirs = transformers.AutoConfig.for_model(data["model_type"]).from_dict(copy.deepcopy(data))
    assert Qwen3Config.from_dict(theirs.to_dict()) == ours
    written = ours.to_dict()
    extra = {"qkv_bias", "use_qk_norm", "shared_expert_intermediate_size", "attention_bias", "max_window_layers"}
    assert {k for k in data | written if k not in data or k not in written or data[k] != written[k]} <= extra
    assert written == data or "Coder" in name


@pytest.mark.parametrize(
    "name", ["Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-Coder-480B-A35B-Instruct"]
)
def test_the_declared_network_has_as_many_parameters(name):
    config = Qwen3Config.from_name(name)
    _, params = model.declare(config, dtype=jnp.bfloat16, ops=ORACLE)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == config.num_parameters()


@pytest.mark.parametrize("moe", [False, True])
def test_flops_are_what_pytorch_counts(moe):
    hf = tiny.build(moe=True, decoder_sparse_step=2) if moe else tiny.build()
    hf.config._experts_implementation = "eager"
    config = Qwen3Config.from_dict(hf.config.to_dict())
    T = 11
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        hf(torch.arange(T)[None], use_cache=False)
    # Eager attention computes the full T x T square, so every token attends to T positions.
    assert counter.get_total_flops() == T * config.flops_per_token(T)


def test_names_are_found_in_any_case_and_with_owner():
    assert Qwen3Config.from_name("Qwen/qwen3-0.6b") == Qwen3Config.from_name("Qwen3-0.6B")
    with pytest.raises(ConfigError, match="no such model") as info:
        Qwen3Config.from_name("Qwen3-7B")
    assert len(str(info.value).splitlines()) == 1
    assert "Qwen3-8B" in str(info.value)


def test_names_are_found_in_an_installed_wheel(tmp_path, monkeypatch):
    folder = tmp_path / "qwen3_jax" / "configs" / "models"  # where pyproject.toml puts configs/ into the wheel
    folder.mkdir(parents=True)
    (folder / "Qwen3-Test.json").write_text(json.dumps(DENSE))
    monkeypatch.setattr(config_module, "__file__", str(tmp_path / "qwen3_jax" / "config.py"))
    assert Qwen3Config.names() == ("Qwen3-Test",)
    assert Qwen3Config.from_name("qwen3-test") == read(DENSE)
    (folder / "Qwen3-Test.json").unlink()
    folder.rmdir()
    with pytest.raises(ConfigError, match="reinstall"):
        Qwen3Config.names()


# Spellings

TINY = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "moe": {"moe": True},
    "moe, no renormalisation": {"moe": True, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    "yarn": {"rope_scaling": YARN | {"attention_factor": 1.25, "beta_fast": 16.0, "truncate": False}},
    "yarn, mscale": {"moe": True, "rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}},
    "yarn, factor from the lengths": {"rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 64}},
    "two stop tokens": {"eos_token_id": [95, 93]},
}


@pytest.mark.parametrize("case", TINY)
def test_live_transformers_configs_round_trip(case, tmp_path):
    hf = tiny.build(dtype=torch.bfloat16, **TINY[case]).config
    ours = Qwen3Config.from_dict(hf.to_dict())
    hf.save_pretrained(tmp_path)
    assert Qwen3Config.from_file(tmp_path) == Qwen3Config.from_file(tmp_path / "config.json") == ours
    assert Qwen3Config.from_dict(ours.to_dict()) == ours
    for field in dataclasses.fields(ours):
        if field.name not in ("rope_theta", "rope_scaling", "dtype") and hasattr(hf, field.name):
            theirs = getattr(hf, field.name)
            assert getattr(ours, field.name) == (tuple(theirs) if isinstance(theirs, list) else theirs), field.name
    assert ours.dtype == "bfloat16"
    assert ours.rope_theta == hf.to_dict()["rope_parameters"]["rope_theta"]
    # transformers reads what we write as the same model
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert Qwen3Config.from_dict(again.to_dict()) == ours


def test_yarn_in_both_spellings():
    config = read(DENSE, rope_scaling=YARN)
    assert config.rope_scaling == RopeScaling(**YARN)
    assert read(DENSE, rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}) == config
    new = {k: v for k, v in DENSE.items() if k not in ("rope_theta", "rope_scaling")}
    assert read(new, rope_parameters=YARN | {"rope_theta": 1e6}) == config
    assert read(new, rope_parameters=YARN, rope_theta=1e6) == config
    assert read(DENSE, rope_scaling=YARN, rope_parameters=YARN | {"rope_theta": 1e6}) == config
    assert read(DENSE, rope_scaling={"rope_type": "default"}) == read(DENSE)
    resolved = read(DENSE, rope_scaling=YARN | {"factor": None}).rope_scaling
    assert resolved is not None
    assert resolved.factor == 40960 / 32768


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, ["rope_theta is 1000000", "5000000.0"]),
        ({"rope_parameters": YARN}, ["rope_scaling is null", "rope_parameters is", "keep one"]),
        ({"rope_scaling": YARN | {"type": "linear"}}, ["rope_scaling.rope_type is 'yarn'", "'linear'"]),
        ({"dtype": "float32"}, ["torch_dtype is 'bfloat16'", "dtype is 'float32'"]),
    ],
)
def test_spellings_that_disagree_are_refused(changes, fragments):
    (line,) = problems(DENSE | changes)
    for fragment in fragments:
        assert fragment in line


def test_expert_spellings_that_disagree_are_refused():
    assert read(MOE, num_local_experts=128) == read(MOE)
    (line,) = problems(MOE | {"num_local_experts": 64})
    assert "num_local_experts is 64 but num_experts is 128" in line


# Refusals


def test_the_tables_do_not_overlap():
    fields = {field.name for field in dataclasses.fields(Qwen3Config)}
    assert set(FIELD_CHECKS) == fields
    assert not fields & (INERT.keys() | OFF.keys())
    assert not INERT.keys() & OFF.keys()
    assert OMITTABLE.keys() <= fields


@pytest.mark.parametrize("key", sorted(OFF))
def test_features_this_network_lacks_are_refused_by_name(key):
    neutral, remedy = OFF[key]
    for value in neutral:
        assert read(DENSE, **{key: value}) == read(DENSE)
    (line,) = problems(DENSE | {key: {"something": 1}})
    assert line.startswith(f"{key} is ")
    assert remedy in line


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"frobnicate": 1}, ["'frobnicate'", "unknown key"]),
        ({"num_experts": 8}, ["num_experts is 8", "qwen3_moe"]),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, ["architectures", "Qwen3ForCausalLM"]),
        ({"attention_bias": True}, ["attention_bias is true", "biases"]),
        ({"attention_bias": 0}, ["attention_bias is 0"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", '"silu"']),
        ({"use_sliding_window": True, "sliding_window": None}, ["use_sliding_window is true"]),
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, ["sliding_attention", "full_attention"]),
        ({"layer_types": ["full_attention"] * 27}, ["27", "num_hidden_layers is 28"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "not yet supported", "fp8"]),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, ["dual_chunk_attention_config", "config.json"]),
        ({"temperature": 0.6}, ["temperature is 0.6", "generation_config.json"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type is 'dynamic'", "yarn"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling.rope_type is missing"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["original_max_position_embeddings", "32768"]),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, ["is missing", "32768"]),
        ({"rope_scaling": {k: v for k, v in YARN.items() if k != "factor"}}, ["rope_scaling.factor is missing"]),
        ({"rope_scaling": YARN | {"factor": 0.5}}, ["rope_scaling.factor is 0.5", "at least 1"]),
        ({"rope_scaling": YARN | {"factor": "4"}}, ["rope_scaling.factor is '4'"]),
        ({"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 4096}, ["4096", "32768", "factor"]),
        ({"rope_scaling": YARN | {"beta_slow": 64}}, ["beta_fast 32.0", "64"]),
        ({"rope_scaling": YARN | {"finetuned": True}}, ["rope_scaling.finetuned", "unknown"]),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling is 'yarn'", "object"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0", "1..4096"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000", "1..4096"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers is -1"]),
        ({"num_hidden_layers": "28"}, ["num_hidden_layers is '28'", "whole number"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers is true"]),
        ({"num_hidden_layers": 28.0}, ["num_hidden_layers is 28.0"]),
        ({"num_hidden_layers": 10**5000}, ["num_hidden_layers is a number of more than 40 digits"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 16", "num_key_value_heads 3"]),
        ({"head_dim": 127}, ["head_dim is 127", "even"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps is 0"]),
        ({"rms_norm_eps": math.nan}, ["rms_norm_eps is nan"]),
        ({"rms_norm_eps": -1e-6}, ["rms_norm_eps is -1e-06"]),
        ({"rope_theta": 1}, ["rope_theta is 1", "above 1"]),
        ({"rope_theta": math.inf}, ["rope_theta is inf"]),
        ({"rope_theta": None}, ["rope_theta is null"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings is 1", "true or false"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["dtype is 'float8_e4m3fn'", "bfloat16"]),
        ({"eos_token_id": 151936}, ["eos_token_id has 151936", "151935"]),
        ({"eos_token_id": [151645, -1]}, ["eos_token_id is [151645, -1]"]),
        ({"pad_token_id": -1}, ["pad_token_id is -1"]),
    ],
)
def test_dense_values_that_cannot_be_honoured(changes, fragments):
    (line,) = problems(DENSE | changes)
    for fragment in fragments:
        assert fragment in line


def test_a_sliding_window_is_inert_only_when_it_is_switched_off():
    assert read(DENSE, sliding_window=4096) == read(DENSE)
    (line,) = problems({k: v for k, v in DENSE.items() if k != "use_sliding_window"} | {"sliding_window": 4096})
    assert "sliding_window is 4096" in line


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_experts_per_tok": 129}, ["num_experts_per_tok 129", "num_experts 128"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok is 0"]),
        ({"num_experts": 0}, ["num_experts is 0"]),
        ({"norm_topk_prob": None}, ["norm_topk_prob is null"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step is 0"]),
        ({"mlp_only_layers": [3, 48]}, ["mlp_only_layers has 48", "0..47"]),
        ({"mlp_only_layers": 3}, ["mlp_only_layers is 3", "list"]),
        ({"shared_expert_intermediate_size": 1024}, ["shared_expert_intermediate_size is 1024"]),
    ],
)
def test_moe_values_that_cannot_be_honoured(changes, fragments):
    (line,) = problems(MOE | changes)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize("data", [DENSE, MOE], ids=["dense", "moe"])
def test_no_field_is_defaulted_but_the_listed_ones(data):
    read(data)
    fields = [key for key in data if key in FIELD_CHECKS or key in ("rope_scaling", "torch_dtype")]
    for key in fields:
        rest = {k: v for k, v in data.items() if k != key}
        name = "dtype" if key == "torch_dtype" else key
        if name in OMITTABLE:
            assert getattr(read(rest), name) == OMITTABLE[name][0]
        else:
            (line,) = problems(rest)
            assert line.startswith(f"{key} is missing")


def test_all_problems_are_reported_at_once():
    bad = DENSE | {"num_attention_heads": 0, "attention_bias": True, "zzz": 1, "rope_scaling": {"type": "linear"}}
    del bad["hidden_size"]
    lines = problems(bad)
    assert len(lines) == 5
    for key in ("num_attention_heads", "attention_bias", "zzz", "rope_scaling.rope_type", "hidden_size"):
        assert sum(key in line for line in lines) == 1


@pytest.mark.parametrize("data", [[], None, "x", 3, {}, {"model_type": "llama"}, {"model_type": ["qwen3"]}])
def test_what_is_not_a_qwen3_config_gets_one_line(data):
    assert len(problems(data)) == 1


def test_direct_construction_and_replace_validate_too():
    config = read(DENSE)
    with pytest.raises(ConfigError, match="num_key_value_heads 5"):
        dataclasses.replace(config, num_key_value_heads=5)
    with pytest.raises(ConfigError, match="num_experts is 4"):
        dataclasses.replace(config, num_experts=4)
    with pytest.raises(ConfigError, match="original_max_position_embeddings is 0"):
        RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=0)
    assert dataclasses.replace(config, eos_token_id=[1, 2]).eos_token_id == (1, 2)  # pyright: ignore[reportArgumentType]
    assert hash(config) == hash(read(DENSE))


# Files


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"model_type": "qwen3", "model_type": "qwen3"}', "'model_type' appears twice"),
        (b'{"model_type": "qwen3", "rope_scaling": {"factor": 1, "factor": 2}}', "'factor' appears twice"),
        (b'{"model_type": "qwen3", "rms_norm_eps": NaN}', "NaN is not JSON"),
        (b'{"model_type": "qwen3", "rope_theta": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": ' * 100_000, "nested deeper"),
        (b'{"model_type": "qwen3", "id2label": ' + b"[" * 20 + b"]" * 20 + b"}", "nested deeper"),
        (b'{"model_type": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"model_type": "\\ud800"}', "model_type is"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b" " * (config_module.MAX_FILE_BYTES + 1), "not a config.json"),
        (b'{"' + b"x" * 100_000 + b'": 1, "model_type": "qwen2"}', "model_type is 'qwen2'"),
    ],
    ids=range(14),
)
def test_broken_files_get_one_line_each(content, fragment, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as info:
        Qwen3Config.from_file(tmp_path)
    (line,) = str(info.value).encode().decode().splitlines()
    assert fragment in line
    assert str(tmp_path) in line
    assert len(line) < len(str(tmp_path)) + 400


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "\0"):
        with pytest.raises(ConfigError) as info:
            Qwen3Config.from_file(path)
        assert len(str(info.value).splitlines()) == 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yarn", "default", "silu", "qwen3", "qwen3_moe", "full_attention", 2, 8, 1e6]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", *YARN]) | st.text(), inner)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(MOE.keys() | OFF.keys() | INERT.keys() | {"rope_parameters", "dtype", "layer_types"}))


@given(
    base=st.sampled_from([DENSE, MOE]),
    changes=st.dictionaries(KEYS | st.text(max_size=3), JSON, max_size=4),
    dropped=st.sets(KEYS, max_size=2),
)
def test_any_mutation_is_read_or_refused_with_a_typed_error(base, changes, dropped):
    data = {k: v for k, v in (base | changes).items() if k not in dropped}
    config = error = None
    try:
        config = Qwen3Config.from_dict(data)
    except ConfigError as caught:
        error = caught
    if error is not None:
        assert len(str(error).encode().splitlines()) == len(error.problems) > 0
    if config is not None:
        assert Qwen3Config.from_dict(config.to_dict()) == config
        assert config.num_parameters() >= config.num_active_parameters() > 0
        assert config.flops_per_token(1) > 0

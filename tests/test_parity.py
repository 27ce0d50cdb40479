"""The parity tool: green on folders that transformers saved, red at the right place for every planted fault.

Faults are planted from here, into our side's config, loaded parameters or functions; the library has no switch for it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen3_jax import model, parity, rope
from qwen3_jax.checkpoint import Checkpoint, CheckpointError
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops.plain import ORACLE
from qwen3_jax.parity import compare, page
from qwen3_jax.parity.reference import Reference
from qwen3_jax.parity.report import difference
from tests import tiny

DEMO = Path(parity.__file__).parents[1] / "demo"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    cases: dict[str, dict[str, Any]] = {
        "dense": {"num_hidden_layers": 3},
        "moe": {"moe": True, "num_hidden_layers": 3},
        "yarn": {"rope_scaling": YARN, "tie_word_embeddings": True},
        "mixed": {"moe": True, "decoder_sparse_step": 2, "norm_topk_prob": False, "num_hidden_layers": 4},
    }
    return {name: tiny.save(tmp_path_factory.mktemp(name), **options)[0] for name, options in cases.items()}


def check(folder: Path, **options: Any) -> parity.Report:
    return parity.run(folder, length=16, progress=False, **options)


# Green


@pytest.mark.parametrize(
    ("moe", "file_dtype", "shards"),
    [
        (False, "float32", "single"),
        (False, "bfloat16", "sharded"),
        (True, "float32", "sharded"),
        (True, "bfloat16", "single"),
    ],
)
def test_green_on_what_transformers_saved(moe, file_dtype, shards, tmp_path):
    hf = tiny.build(moe=moe, dtype=getattr(torch, file_dtype))
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "sharded" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "sharded")
    report = check(tmp_path)
    assert report.ok, report.verdict
    assert report.logits.difference.max_abs <= 2e-5
    assert report.logits.top1_agreement == 1.0
    assert report.positions == 511


@pytest.mark.parametrize("name", ["yarn", "mixed"])
def test_green_on_other_kinds(name, folders):
    for dtype in ("float32", "bfloat16"):
        report = check(folders[name], dtype=dtype)
        assert report.ok, report.verdict
    places = {measure.place for measure in report.measures}
    assert ("layers.0.mlp.router_logits" in places) is False
    assert ("layers.1.mlp.router_logits" in places) is (name == "mixed")


def test_a_bare_backbone_is_compared_too(folders, tmp_path):
    hf = transformers.AutoModel.from_pretrained(folders["yarn"], dtype=torch.float32)
    hf.save_pretrained(tmp_path)
    assert check(tmp_path).ok


@pytest.mark.parametrize("name", ["dense", "moe", "yarn", "mixed"])
def test_the_reference_is_transformers_own_forward(name, folders):
    config = transformers.AutoConfig.from_pretrained(folders[name])
    tokens, positions, segment_ids = compare.sample(config.vocab_size, 512, length=16, seed=3, padding=True)
    reference = Reference(folders[name], "float32")
    reference.embed(tokens, positions, segment_ids)
    for i in range(config.num_hidden_layers):
        reference.layer(i)
    reference.norm()
    hf = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    expected = tiny.logits(hf, tokens, attention_mask=segment_ids, position_ids=positions.astype(np.int64))
    kept = segment_ids > 0
    chex.assert_trees_all_close(reference.logits(0, config.vocab_size)[kept], expected[kept], atol=2e-5, rtol=0)


# Red


def with_config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let our side read another config than the folder's."""

    def inspect(folder: Path) -> Checkpoint:
        checkpoint = original(folder)
        return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **changes))

    original = compare.inspect
    monkeypatch.setattr(compare, "inspect", inspect)


def with_parameters(monkeypatch: pytest.MonkeyPatch, layer: int, change: Callable[[dict], None]) -> None:
    """Let our loader deliver one layer changed."""

    def load(self: Checkpoint, prefix: str = "", **options: Any) -> Any:
        params = original(self, prefix, **options)
        if prefix == f"layers.{layer}":
            change(params)
        return params

    original = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", load)


def norm_after_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    rms_norm, rotate, postponed = model.rms_norm, rope.rotate, []

    def no_norm_of_heads(x, weight, eps):
        if x.ndim == 3:
            return rms_norm(x, weight, eps)
        postponed.append((weight, eps))
        return x

    monkeypatch.setattr(model, "rms_norm", no_norm_of_heads)
    monkeypatch.setattr(rope, "rotate", lambda x, cos, sin: rms_norm(rotate(x, cos, sin), *postponed.pop()))


def bfloat16_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    def angles(positions, frequencies, factor):
        radians = (positions[..., None].astype(jnp.bfloat16) * frequencies.astype(jnp.bfloat16)).astype(jnp.float32)
        return jnp.cos(radians) * np.float32(factor), jnp.sin(radians) * np.float32(factor)

    monkeypatch.setattr(rope, "angles", angles)


def swap(tree: dict, one: str, other: str) -> None:
    tree[one], tree[other] = tree[other], tree[one]


def swap_rows(tree: dict) -> None:
    """Exchange experts 0 and 5, all three matrices of each."""
    order = np.array([5, 1, 2, 3, 4, 0, 6, 7])
    for name, weight in tree.items():
        tree[name] = weight[order]


def one_number(tree: dict, name: str) -> None:
    tree[name] = tree[name].at[(0,) * tree[name].ndim].add(0.01)


Fault = tuple[str, Callable[[pytest.MonkeyPatch], None], str]  # folder, how to plant it, the first place to be red
EVERYWHERE: dict[str, Fault] = {
    "wrong theta": ("dense", lambda m: with_config(m, rope_theta=1e4), "layers.0.self_attn.q"),
    "norm after rope": ("dense", norm_after_rope, "layers.0.self_attn.q"),
    "bfloat16 angles": ("dense", bfloat16_angles, "layers.0.self_attn.q"),
    "yarn dropped": ("yarn", lambda m: with_config(m, rope_scaling=None), "layers.0.self_attn.q"),
    "wrong eps": ("dense", lambda m: with_config(m, rms_norm_eps=1e-5), "layers.0.self_attn.input"),
    "renormalisation missing": ("moe", lambda m: with_config(m, norm_topk_prob=False), "layers.0.mlp.router_weights"),
    "renormalisation added": ("mixed", lambda m: with_config(m, norm_topk_prob=True), "layers.1.mlp.router_weights"),
    "one expert too few": ("moe", lambda m: with_config(m, num_experts_per_tok=2), "layers.0.mlp.router_experts"),
}


def in_layer(layer: int, folder: str, change: Callable[[dict], None], place: str) -> Fault:
    return folder, lambda m: with_parameters(m, layer, change), f"layers.{layer}.{place}"


ONE_LAYER: dict[str, Fault] = {
    "gate and up swapped": in_layer(1, "dense", lambda p: swap(p["mlp"], "gate_proj", "up_proj"), "mlp.output"),
    "gate and up of experts swapped": in_layer(
        1, "moe", lambda p: swap(p["mlp"]["experts"], "gate_proj", "up_proj"), "mlp.output"
    ),
    "two experts swapped": in_layer(2, "moe", lambda p: swap_rows(p["mlp"]["experts"]), "mlp.output"),
    "keys and values swapped": in_layer(2, "dense", lambda p: swap(p["self_attn"], "k_proj", "v_proj"), "self_attn.k"),
    "one number of o_proj": in_layer(1, "dense", lambda p: one_number(p["self_attn"], "o_proj"), "self_attn.output"),
    "one number of a router": in_layer(1, "moe", lambda p: one_number(p["mlp"], "router"), "mlp.router_logits"),
    "one number of an expert": in_layer(0, "moe", lambda p: one_number(p["mlp"]["experts"], "down_proj"), "mlp.output"),
    "not a number": in_layer(
        2, "dense", lambda p: p["mlp"].update(down_proj=p["mlp"]["down_proj"] * jnp.nan), "mlp.output"
    ),
}
FAULTS = EVERYWHERE | ONE_LAYER


@pytest.mark.parametrize("fault", FAULTS)
def test_red_at_the_right_place(fault, folders, monkeypatch):
    folder, plant, place = FAULTS[fault]
    plant(monkeypatch)
    report = check(folders[folder], ops=ORACLE)
    assert not report.ok
    assert report.first_failure == place
    json.dumps(report.to_dict(), allow_nan=False)
    page.render(report)
    assert report.verdict.startswith(f"FAIL at {place}: ")
    if fault in ONE_LAYER:  # the other layers agree, being fed with PyTorch's input
        layer = ".".join(place.split(".")[:2]) + "."
        assert all(measure.ok for measure in report.measures if not measure.place.startswith(layer))


@pytest.mark.parametrize(
    "fault", ["wrong theta", "bfloat16 angles", "yarn dropped", "two experts swapped", "one expert too few"]
)
def test_large_faults_are_red_in_bfloat16_too(fault, folders, monkeypatch):
    folder, plant, place = FAULTS[fault]
    plant(monkeypatch)
    assert check(folders[folder], dtype="bfloat16", ops=ORACLE).first_failure == place


def test_red_when_padding_is_seen(folders):
    blind = ORACLE._replace(attend=lambda q, k, v, segment_ids, scale: ORACLE.attend(q, k, v, None, scale))
    assert check(folders["dense"], ops=blind).first_failure == "layers.0.self_attn.output"
    assert check(folders["dense"], ops=blind, padding=False).ok


def test_a_near_tie_of_experts_is_no_fault(folders, monkeypatch, tmp_path):
    """Experts 0 and 1 score the same; ours prefers the other one by less than the tolerance."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(folders["moe"], dtype=torch.float32)
    router = hf.get_parameter("model.layers.1.mlp.gate.weight")
    router.data[1] = router.data[0]
    hf.save_pretrained(tmp_path)

    def nudge(params: dict) -> None:
        params["mlp"]["router"] = params["mlp"]["router"].at[1].multiply(1 + 1e-6).at[0].multiply(1 - 1e-6)

    with_parameters(monkeypatch, 1, nudge)
    report = check(tmp_path, ops=ORACLE)
    experts = report.layers[1]["mlp.router_experts"]
    assert experts.differing == experts.ties > 0
    assert all(measure.ok for measure in report.measures)


# What it measures


def test_differences_are_what_they_are_called():
    theirs = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    ours = np.array([[3.0, 4.5], [0.0, 2.0], [0.0, 0.0]], np.float32)
    found = difference(ours, theirs)
    assert found == parity.Difference(0.5, 4.0, found.cosine)
    assert found.relative == 0.125
    assert found.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)), rel=1e-12)
    assert difference(theirs, theirs).cosine == 1.0
    assert difference(theirs * np.nan, theirs).relative == float("inf")
    assert difference(theirs, theirs * 0).relative == float("inf")
    assert difference(theirs[:0], theirs[:0]).relative == 0.0


def test_the_logits_figures_are_those_of_torch(folders, monkeypatch):
    with_config(monkeypatch, rope_theta=1e5)
    tokens = np.arange(40).reshape(2, 20)
    report = check(folders["dense"], tokens=tokens)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folders["dense"], dtype=torch.float32)
    right = torch.from_numpy(tiny.logits(hf, tokens)).double()
    hf.model.rotary_emb.inv_freq = 1.0 / (1e5 ** (torch.arange(0, 16, 2) / 16))
    wrong = torch.from_numpy(tiny.logits(hf, tokens)).double()
    kl = torch.nn.functional.kl_div(wrong.log_softmax(-1), right.log_softmax(-1), log_target=True, reduction="none")
    figures = report.logits
    assert figures.kl_mean == pytest.approx(kl.sum(-1).mean().item(), rel=1e-3)
    assert figures.kl_max == pytest.approx(kl.sum(-1).max().item(), rel=1e-3)
    assert figures.difference.max_abs == pytest.approx((right - wrong).abs().max().item(), rel=1e-3)
    assert figures.top1_agreement == pytest.approx((right.argmax(-1) == wrong.argmax(-1)).double().mean().item())
    assert not figures.ok


def test_the_sample_reaches_across_the_context_and_is_fixed_by_its_seed():
    first, second = (compare.sample(100, 40960, length=32, seed=7, padding=True) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    tokens, positions, segment_ids = first
    chex.assert_shape([tokens, positions, segment_ids], (3, 32))
    assert positions[1].max() == 40959
    assert (np.diff(positions[1]) > 0).all()
    assert (positions[1] > 256).sum() > 20
    assert segment_ids[2].tolist() == [0] * 8 + [1] * 20 + [0] * 4
    assert positions[2][8:28].tolist() == list(range(20))


# What it shows


def test_the_page_is_self_contained_and_well_formed(folders, tmp_path, monkeypatch):
    strange = tmp_path / "<b>&amp;'x"
    shutil.copytree(folders["moe"], strange)
    with_parameters(monkeypatch, 1, lambda p: swap_rows(p["mlp"]["experts"]))
    report = check(strange, report=tmp_path / "out.html", ops=ORACLE)
    text = (tmp_path / "out.html").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "tmp"))] == ["out.html"]
    assert not any(word in text for word in ("http", "<script", "<link", "<b>", "url(", "src="))
    assert "prefers-color-scheme: dark" in text
    assert "FAIL at layers.1.mlp.output" in text
    tree = ElementTree.fromstring(
        text.removeprefix("<!doctype html>")
        .replace('<meta charset="utf-8">', "")
        .replace('<meta name="viewport" content="width=device-width, initial-scale=1">', "")
    )
    plots = tree.findall(".//svg")
    assert len(plots) == 2
    for plot in plots:
        assert len(plot.findall("polyline")) == 3
        assert len(plot.findall("circle")) == 3 * len(report.layers)
    assert len([c for c in plots[0].iter("circle") if "out" in c.attrib["class"].split()]) == 2


def test_the_command_reports_and_returns_an_exit_code(folders, tmp_path, monkeypatch, capsys):
    assert parity.main(folders["moe"], length=8, report=tmp_path / "out.html") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("layer 2", "experts", "KL", "top-1 agreement 100.0%", "ok: all", "out.html"):
        assert word in printed
    assert parity.main(folders["dense"], length=8, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["logits"]["top1_agreement"] == 1.0
    with_config(monkeypatch, rms_norm_eps=1e-3)
    assert parity.main(folders["dense"], length=8) == 1
    assert "FAIL at layers.0.self_attn.input" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"tokens": [1, 2, 96]}, "96: vocab_size is 96"),
        ({"tokens": [-1, 2]}, "-1..2"),
        ({"tokens": [0.5]}, "whole numbers"),
        ({"tokens": []}, "whole numbers"),
        ({"tokens": [1], "prompt": "x"}, "one of them"),
        ({"length": 513}, "length 513 does not fit: give 2..512"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"report": Path("/nowhere/out.html")}, "/nowhere/out.html"),
    ],
)
def test_bad_input_gets_one_line(options, fragment, folders):
    with pytest.raises(parity.ParityError) as info:
        parity.run(folders["dense"], progress=False, **options)
    assert fragment in str(info.value)
    assert len(str(info.value).splitlines()) == 1


def test_a_prompt_goes_through_the_folders_tokenizer():
    report = check(DEMO, prompt="Why is the sky blue?")
    assert report.ok, report.verdict
    assert report.tokens == len(transformers.AutoTokenizer.from_pretrained(DEMO)("Why is the sky blue?")["input_ids"])


def test_a_broken_folder_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(CheckpointError):
        parity.run(tmp_path / "nowhere", progress=False)


def test_without_pytorch_the_remedy_is_named(folders, monkeypatch):
    monkeypatch.delitem(sys.modules, "qwen3_jax.parity.reference")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(parity.ParityError, match=r"pip install 'qwen3-jax\[test\]'"):
        check(folders["dense"])


def test_the_library_imports_without_pytorch():
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import qwen3_jax.parity"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_size_folder_one_layer_at_a_time(dtype, tmp_path):
    """Random Qwen3-0.6B as transformers writes it, in a process of its own that watches its memory."""
    config = transformers.Qwen3Config(**Qwen3Config.from_name("Qwen3-0.6B").to_dict())
    torch.manual_seed(0)
    hf = transformers.Qwen3ForCausalLM(config).bfloat16()
    hf.save_pretrained(tmp_path)
    float32_bytes = 4 * hf.num_parameters()
    del hf
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path), dtype],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env=os.environ,
    )
    shutil.rmtree(tmp_path)  # 1.2 GB, which pytest would keep for three sessions
    report = json.loads(result.stdout)
    assert report["ok"], report["verdict"]
    assert report["logits"]["difference"]["max_abs"] / report["logits"]["difference"]["largest"] <= (
        1e-5 if dtype == "float32" else 2**-4
    )
    assert report["grown_bytes"] < float32_bytes / 2  # one layer of 28 on each side, and the logits of 84 tokens


WATCHED = """
import json, re, sys, threading, time
from pathlib import Path
import qwen3_jax.parity.reference
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
from qwen3_jax import parity
report = parity.run(sys.argv[1], dtype=sys.argv[2], progress=False)
json.dump(report.to_dict() | {"grown_bytes": peak - before}, sys.stdout)
"""

"""Whole runs from a TOML file: stages, records, held-out loss, refusals, resuming, export, plots, writers."""

import dataclasses
import json
import logging
import re
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from qwen3_jax import checkpoint
from qwen3_jax.config import Qwen3Config
from qwen3_jax.plan.chips import ChipError
from qwen3_jax.train import config as configs
from qwen3_jax.train import loop, lora, plot, progress, stacked, throughput, writers
from qwen3_jax.train.data import Loader
from qwen3_jax.train.goodput import summary
from tests import tiny
from tests import train_reference as reference

RUN = """
[model]
weights = "{model}"

[run]
folder = "{folder}"
save_every = 4
{run}

[schedule]
peak = 1e-2
warmup = 2

[refusal]
stop_after = 3

[data]
prefetch = 0
sources = [{{name = "counting", path = "{data}"}}]

[eval]
data = {{sources = [{{name = "held", path = "{held}"}}], prefetch = 0}}
every = 5
batches = 2

[[stages]]
name = "short"
steps = 8
batch = 4
length = 12
accumulation = 2
rope_theta = 1e4

[[stages]]
name = "long"
steps = 4
batch = 2
length = 24
"""


def counting(path, seed, count=60):
    """Write sequences in which each token follows from the one before."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            start, length = rng.integers(0, 80), rng.integers(4, 12)
            file.write(json.dumps({"tokens": [int((start + 3 * i) % 90) for i in range(length)]}) + "\n")
    return path


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Make the configuration of a run in a new folder."""
    root = tmp_path_factory.mktemp("runs")
    model, _ = tiny.save(root / "model", moe=False)
    shared = {"model": model, "data": counting(root / "data.jsonl", 0),
              "held": counting(root / "held.jsonl", 1)}  # fmt: skip

    def make(name, *changes, run=""):
        file = root / f"{name}.toml"
        file.write_text(RUN.format(folder=root / name, run=run, **shared))
        return configs.load(file, changes)

    return make


@pytest.fixture(scope="module")
def whole(make):
    """A run from beginning to end."""
    config = make("whole", run='writers = ["tensorboard"]')
    seen = []
    outcome = loop.train(config, observe=lambda step, metrics: seen.append((step, metrics)))
    return config, loop.Path(config.run.folder), outcome, seen


def steps_of(folder):
    """The lines of steps without what the clock says."""
    clock = ("step_s", "tokens_per_s")
    lines = (line for line in loop.records(folder) if "loss" in line)
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def test_a_run_learns_and_records_every_step(whole):
    config, folder, outcome, seen = whole
    assert (outcome.step, outcome.exit_code) == (12, 0)
    lines = steps_of(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["stage"] for line in lines] == ["short"] * 8 + ["long"] * 4
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["tokens_total"] == sum(line["tokens"] for line in lines)
    assert [step for step, metrics in seen if "loss" in metrics] == list(range(1, 13))
    held = [line for line in loop.records(folder) if "eval_cross_entropy" in line]
    assert [line["step"] for line in held] == [5, 10, 12]
    assert held[-1]["eval_cross_entropy"] < held[0]["eval_cross_entropy"]
    events = [json.loads(line) for line in (folder / loop.EVENTS).read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "evaluated", "evaluated", "evaluated", "done"]
    spent = summary(folder / loop.GOODPUT)
    assert sum(spent["seconds"].values()) == pytest.approx(spent["wall_s"], rel=1e-3)
    assert configs.load(folder / loop.CONFIG) == config


def test_what_was_trained_opens_in_transformers(whole):
    """The exported folder has the last stage's rope_theta, and transformers finds the held-out loss that we report."""
    config, folder, _, _ = whole
    found, params = checkpoint.load(folder / loop.MODEL, progress=False)
    assert found.rope_theta == 1e6
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / loop.MODEL, attn_implementation="eager")
    assert config.eval is not None
    loader = Loader(config.eval.data, None, None, batch=2, length=24, seed=0, vocab_size=96)
    total = weight = 0.0
    with torch.inference_mode():
        for _, batch in zip(range(2), loader, strict=False):
            sums = float(batch.arrays["weights"].sum())
            total += reference.loss(model, batch.arrays).item() * sums
            weight += sums
    held = [line for line in loop.records(folder) if "eval_cross_entropy" in line]
    assert held[-1]["eval_cross_entropy"] == pytest.approx(total / weight, rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits(whole, make):
    """SIGTERM in each stage; each time the run saves, says 143, and the next start goes on from there."""
    _, folder, _, _ = whole
    config = make("stopped")

    def until(last):
        return lambda step, metrics: signal.raise_signal(signal.SIGTERM) if step == last else None

    first = loop.train(config, observe=until(3))
    assert first.exit_code == loop.signals.EXIT_STOPPED
    assert 3 <= first.step < 5
    second = loop.train(config, observe=until(9))
    assert second.exit_code == loop.signals.EXIT_STOPPED
    assert loop.train(config).exit_code == 0
    other = loop.Path(config.run.folder)
    assert steps_of(other) == steps_of(folder)
    weights = "model.safetensors"
    assert (other / loop.MODEL / weights).read_bytes() == (folder / loop.MODEL / weights).read_bytes()
    assert loop.train(config).step == 12  # nothing left to do


def test_refused_steps_end_the_run_with_their_examples(make, caplog):
    """An infinite learning rate: the first update makes parameters infinite, every later step is refused."""
    config = make("refused", "schedule.peak=1e38", "schedule.warmup=0", "run.export=false", "stages.0.accumulation=1")
    config = dataclasses.replace(config, eval=None, stages=config.stages[:1])
    with caplog.at_level(logging.WARNING), pytest.raises(loop.RefusedError, match="3 steps in a row were refused") as e:
        loop.train(config)
    assert str(e.value).count("counting:") >= 3
    folder = loop.Path(config.run.folder)
    events = [json.loads(line) for line in (folder / loop.EVENTS).read_text().splitlines()]
    refused = [event for event in events if event["event"] == "refused"]
    assert len(refused) >= 3
    assert all(example in str(e.value) for example in refused[-1]["examples"])
    assert "not finite" in refused[-1]["why"]
    assert (folder / loop.CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["stages.1.length=600"], "stages.1.length 600 is above the model's max_position_embeddings 512"),
        (["objective.balance_groups=3"], "objective.balance_groups 3 does not divide the 2 rows of a micro-batch"),
        (["objective.balance_loss=0.1"], "objective.balance_loss and router_z_loss are for routers"),
        (["objective.name=dpo"], "objective.name 'dpo' is unknown: use pretrain, sft"),
        (["schedule.warmup=100"], "schedule.warmup 100 + decay 0 = 100 updates, the stage has 12: shorten them"),
        (["run.mesh='fsdp=8'"], "stages.0: 2 rows of a micro-batch do not divide over data × fsdp × expert 8"),
        (["run.mesh='model=4,fsdp=2'"], "num_key_value_heads 2 is below model 4"),
        (["model.tokenizer=/nowhere"], "model.tokenizer /nowhere: has no tokenizer.json"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(make, changes, says):
    config = make("refusals", *changes)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        loop.Build(config)
    assert type(caught.value) is not ValueError


def test_a_run_is_drawn(whole, tmp_path):
    _, folder, _, _ = whole
    assert plot.write([folder]) == folder / "plot.png"
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = plot.write([folder, folder], tmp_path / "x.html").read_text()
    assert "data:image/png;base64," in page
    assert "<td>12</td>" in page
    with pytest.raises(plot.PlotError, match=r"has no metrics\.jsonl"):
        plot.write([tmp_path])
    with pytest.raises(plot.PlotError, match=r"give a \.png or a \.html file"):
        plot.write([folder], tmp_path / "x.gif")


def test_runs_of_one_name_are_drawn_by_longer_ones(tmp_path):
    """A dense run and a mixture of experts in folders of the same name, over the one axis of steps."""
    for kind, load in (("dense", None), ("moe", [[0.5, 1.5], [1.0, 1.0]])):
        folder = tmp_path / kind / "pretrain"
        folder.mkdir(parents=True)
        more = {} if load is None else {"expert_load": load, "expert_load_max": 1.5, "expert_load_min": 0.5}
        lines = ({"step": i, "loss": 3 / i, "grad_norm": 1.0, "learning_rate": 1e-3, **more} for i in range(1, 201))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [tmp_path / kind / "pretrain" for kind in ("dense", "moe")]
    page = plot.write(runs, tmp_path / "both.html").read_text()
    assert "<td>dense/pretrain</td>" in page
    assert "<td>moe/pretrain</td>" in page
    assert plot.write(runs).read_bytes().startswith(b"\x89PNG")


def test_smoothing_is_the_mean_of_neighbours_and_reaches_both_ends():
    values = np.random.default_rng(0).normal(size=100)
    steps, smooth = plot._smooth((np.arange(100.0), values), reach=3)
    assert (steps[0], steps[-1]) == (0, 99)
    reaches = [min(3, i, 99 - i) for i in range(100)]
    expected = [values[i - reach : i + reach + 1].mean() for i, reach in enumerate(reaches)]
    np.testing.assert_allclose(smooth, expected, atol=1e-12)


def test_the_end_is_told(make):
    config = make("told")
    folder = config.run.folder
    assert progress.ending(config, loop.Outcome(12, 0, {})) == f"done after step 12, the model is in {folder}/model"
    assert "the same command goes on" in progress.ending(config, loop.Outcome(5, loop.signals.EXIT_STOPPED, {}))
    adapted = dataclasses.replace(config, lora=lora.LoraConfig(rank=2, alpha=2.0))
    assert progress.ending(adapted, loop.Outcome(12, 0, {})).endswith(f"by themselves in {folder}/adapter")


def test_tensorboard_has_the_numbers(whole):
    from tensorboardX.proto import event_pb2

    _, folder, _, _ = whole
    (file,) = (folder / "tensorboard").iterdir()
    data, at, losses = file.read_bytes(), 0, {}
    while at < len(data):  # TFRecord: length, its crc, the event, its crc
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
        at += 16 + size
        losses.update((event.step, value.simple_value) for value in event.summary.value if value.tag == "loss")
    assert losses == pytest.approx({line["step"]: line["loss"] for line in steps_of(folder)})


def wandb_says(folder):
    """The run's names, the configuration and the losses in what Weights & Biases wrote: LevelDB's log, its records."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    names, config, losses = set(), {}, {}
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        data, at, kept = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:  # no header fits into the rest of a block
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            kept, at = kept + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # whole, or the last piece
                record, kept = wandb_internal_pb2.Record.FromString(kept), b""
                if record.HasField("run"):
                    names.add(record.run.run_id)
                    config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses |= {values["_step"]: values["loss"]} if "loss" in values else {}
    return names, config["stages"][1]["steps"], losses


def mlflow_says(folder):
    import mlflow  # pyright: ignore[reportMissingImports]

    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    metrics = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, "loss")
    losses = {metric.step: metric.value for metric in metrics}
    return {run.info.run_id for run in runs}, int(runs[0].data.params["stages.1.steps"]), losses


@pytest.mark.parametrize(("name", "needs", "read"), [
    ("wandb", ["wandb"], wandb_says),
    ("mlflow", ["mlflow", "sqlalchemy", "alembic"], mlflow_says),
])  # fmt: skip
def test_services_have_the_numbers_of_a_run_that_was_stopped(make, tmp_path, monkeypatch, name, needs, read):
    """The services' own packages: one run in both starts, its configuration, every loss."""
    for package in needs:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {name}")
    monkeypatch.chdir(tmp_path)  # where MLflow puts its database
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    config = make(name, run=f"writers = ['{name}']")
    folder = loop.Path(config.run.folder)
    stopped = loop.train(config, observe=lambda step, _: signal.raise_signal(signal.SIGTERM) if step == 3 else None)
    assert stopped.exit_code == loop.signals.EXIT_STOPPED
    assert loop.train(config).exit_code == 0
    names, steps, losses = read(folder)
    assert names == {(folder / f"{name}.id").read_text()}
    assert steps == 4
    assert losses == pytest.approx({line["step"]: line["loss"] for line in steps_of(folder)})


class Failing:
    """A service that is lost after two steps, and then for ever."""

    def __init__(self):
        self.steps = []

    def write(self, step, values):
        if step > 2:
            raise ConnectionError("nobody\nlistens")
        self.steps.append(step)

    def close(self):
        raise AssertionError("asked again")


def test_a_service_that_fails_does_not_end_the_run(caplog):
    failing = Failing()
    service = writers.Service("mlflow", failing)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            service.write(step, {"loss": 1.0})
        service.close()
    assert failing.steps == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "mlflow records nothing from step 3 on, metrics.jsonl has it: nobody listens"
    ]


def test_a_writer_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(writers.WriterError, match=r"run\.writers names wandb.*pip install wandb"):
        writers.open_all(tmp_path, ["wandb"], {}, resume_from=0)
    absent = types.SimpleNamespace(set_experiment=lambda name: Failing().close())
    monkeypatch.setitem(sys.modules, "mlflow", absent)
    with pytest.raises(writers.WriterError, match=r"names mlflow, which cannot be opened: asked again"):
        writers.open_all(tmp_path, ["mlflow"], {}, resume_from=0)


def test_what_is_no_number_is_null():
    def refuse(word):
        raise ValueError(word)

    line = writers.as_json({"loss": float("nan"), "load": [[1.0, float("inf")]], "stage": "NaN", "step": 3})
    assert json.loads(line, parse_constant=refuse) == {"loss": None, "load": [[1.0, None]], "stage": "NaN", "step": 3}


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    lines = writers.JsonLines(path, resume_from=2)
    lines.write(3, {"again": True})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_utilisation_is_that_of_the_paper():
    """6 FLOPs per parameter and token, plus attention, over the chip's peak."""
    model = Qwen3Config.from_name("Qwen3-8B")
    meter = throughput.Meter(model, chip="v5p")
    assert meter.step(1000, 4096) == {}
    rates = meter.step(1000, 4096)
    weights = model.num_parameters(embedding=False) + model.vocab_size * model.hidden_size
    attention = 12 * 36 * 32 * 128 * 2048  # 6 · 2 · layers · heads · head_dim · context
    flops = 6 * weights + attention
    assert rates["mfu"] == pytest.approx(flops * rates["tokens_per_s"] / (459e12 * jax.device_count()), rel=1e-3)
    assert throughput.find("") is None  # a CPU
    with pytest.raises(ChipError, match="chip 'v9' is unknown"):
        throughput.find("v9")


def test_stacked_is_what_a_run_saves(whole):
    """Shapes of the state: what a checkpoint holds can be restored into what `abstract_state` says."""
    config, _, _, _ = whole
    build = loop.Build(config)
    state = build.step(0).abstract_state()
    assert state["params"]["layers"][0]["self_attn"]["q_proj"].shape == (2, 4, 16, 32)
    assert set(state) == {"params", "opt", "step", "rng"}
    assert stacked.runs(build.model) == {0: 2}

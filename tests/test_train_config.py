"""Runs as TOML files: what is refused, how keys are changed, and that the saved file is the run."""

import tomllib
from pathlib import Path

import pytest
import tyro

from qwen3_jax import cli_train
from qwen3_jax.train import config as configs

FILES = sorted((Path(__file__).parents[1] / "configs" / "train").glob("*.toml"))
RUN = """
[model]
config = "Qwen3-0.6B"

[run]
folder = "runs/x"

[schedule]
peak = 1e-3

[data]
sources = [{name = "a", path = "a.jsonl"}]

[[stages]]
steps = 10
batch = 4
length = 16

[[stages]]
name = "long"
steps = 5
batch = 2
length = 64
rope_theta = 1e6
schedule = {kind = "linear", peak = 1}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_runs_are_read(path):
    config = configs.load(path)
    assert configs.from_dict(tomllib.loads(configs.to_toml(config))) == config


def test_a_file_and_its_saved_form_are_the_same_run(file):
    config = configs.load(file, ["--run.writers=['tensorboard']", 'run.folder=a "b" \\ ü'])
    assert config.stages[1].schedule is not None
    assert config.stages[1].schedule.peak == 1.0
    assert config.run.folder == 'a "b" \\ ü'
    text = configs.to_toml(config)
    assert configs.from_dict(tomllib.loads(text)) == config
    assert "weight_decay = 0.1" in text  # defaults are written out


def test_keys_are_changed_from_the_command_line(file):
    argv = [
        "train", str(file), "--optimizer.clip=0.5", "--stages.1.steps=7", "--objective.balance=micro",
        "--run.export=false", "--quiet",
    ]  # fmt: skip
    command = tyro.cli(cli_train.Train, args=cli_train.set_flags(argv)[1:])
    config = configs.load(command.file, command.set)
    assert command.quiet
    assert (config.optimizer.clip, config.stages[1].steps, config.objective.balance) == (0.5, 7, "micro")
    assert config.run.export is False
    assert cli_train.set_flags(["plan", "--a.b=1"]) == ["plan", "--a.b=1"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("optimizer.weight_decy=1", "optimizer.weight_decy is unknown: did you mean optimizer.weight_decay"),
        ("optimiser.clip=1", "optimiser is unknown: did you mean optimizer"),
        ("run.weight_decay=1", "run.weight_decay is unknown: did you mean optimizer.weight_decay"),
        ("stages.0.lenght=1", "stages.0.lenght is unknown: did you mean stages.0.length"),
        ("data.suffle=true", "data.suffle is unknown: did you mean data.shuffle"),
        ("run.keep='2'", "run.keep is '2': expected a whole number"),
        ("run.keep=true", "run.keep is True: expected a whole number"),
        ("optimizer.clip=off", "optimizer.clip is 'off': expected a number"),
        ("model.dtype=float16", "model.dtype is 'float16': use float32, bfloat16"),
        ("run.writers=['wandb', 'x']", "run.writers.1 is 'x': use tensorboard, wandb, mlflow"),
        (
            "run.writers=wandb",
            "run.writers is 'wandb': expected a list of tensorboard, wandb, mlflow, as in ['tensorboard']",
        ),
        ("stages.0.batch=0", "stages.0.batch is 0: give at least 1"),
        ("stages.0.accumulation=3", "stages.0.batch 4 does not divide into 3 micro-batches"),
        ("model.weights=x", "model: give either weights (to begin from) or config (for random weights)"),
        ("stages.2.steps=1", "stages has 2 tables, from 0 on"),
        ("stages=1", "stages is 1: expected a list"),
        ("run=1", "run is 1: expected a table"),
        ("run.keep.x=1", ""),
        ("nothing", "'nothing' is not --section.key=value"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(file, change, says):
    with pytest.raises(configs.TrainConfigError) as caught:
        configs.load(file, [change])
    assert says in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nwieghts = 'x'\n[run]\n[[stages]]\nsteps = 1.5\n")
    with pytest.raises(configs.TrainConfigError) as caught:
        configs.load(path)
    assert caught.value.problems == [
        "model.wieghts is unknown: did you mean model.weights",
        "run.folder is missing",
        "stages.0.steps is 1.5: expected a whole number",
        "stages.0.batch is missing",
        "stages.0.length is missing",
    ]
    path.write_text("[model")
    with pytest.raises(configs.TrainConfigError, match="not valid TOML"):
        configs.load(path)
    with pytest.raises(configs.TrainConfigError, match="No such file"):
        configs.load(tmp_path / "missing.toml")

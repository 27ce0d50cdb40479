"""A training run as a TOML file: frozen dataclasses, read strictly, changed by `--section.key=value`.

TOML → dict → overrides → `TrainConfig`; every unknown key is refused by name with the nearest one that exists, every
value of another type too, all at once. `write` saves the resolved configuration, defaults included, as a TOML file that
gives the same run again. The fields' defaults stand here and nowhere below.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from qwen3_jax.train.data.config import DataConfig
from qwen3_jax.train.lora import LoraConfig
from qwen3_jax.train.objectives import ObjectiveConfig
from qwen3_jax.train.optim import OptimizerConfig, ScheduleConfig
from qwen3_jax.train.step import RefusalConfig


class TrainConfigError(ValueError):
    """A configuration that cannot be honoured; `problems` holds one line each."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained. Paths are relative to the working directory."""

    weights: str = ""
    """Model folder to begin from; empty: random weights for `config`."""
    config: str = ""
    """A released name or a config.json (or its folder), when there are no weights."""
    tokenizer: str = ""
    """Folder with the tokenizer's files; empty: that of weights or config."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters; moments are float32 always, see optimizer.master."""
    remat: str = "none"
    """What the backward pass finds kept: none (everything), dots (results of linear layers), full (layer inputs)."""
    unroll: int = 1
    """Layers per step of the scan over layers."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of the run with one shape of batch; stages follow one another on the same optimiser state."""

    name: str = "train"
    steps: int
    batch: int
    """Rows per step, over all devices and micro-batches."""
    length: int
    """Positions per row."""
    accumulation: int = 1
    """Micro-batches per step."""
    rope_theta: float | None = None
    """None: the model's."""
    schedule: ScheduleConfig | None = None
    """Of this stage by itself; None: the run's schedule goes on."""
    data: DataConfig | None = None
    """None: the run's."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Loss on held-out data."""

    data: DataConfig
    every: int
    """Steps between evaluations; one more follows the last step."""
    batches: int
    """Of the stage's batch and length, always the same ones."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how the loop runs."""

    folder: str
    """Of everything that the run writes; a run in it is resumed."""
    seed: int = 0
    mesh: str = ""
    """Axis sizes as in "data=2,fsdp=4"; empty: one device."""
    save_every: int = 500
    """Steps between checkpoints, and the most that a SIGKILL loses: since one that is being written is lost with the
    steps made meanwhile, another begins half-way; at 1 every step waits. One more follows the last step, and a SIGTERM.
    """
    keep: int = 2
    """Checkpoints that stay."""
    log_every: int = 1
    """Steps between records of metrics.jsonl."""
    writers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Besides metrics.jsonl."""
    chip: str = ""
    """A name of configs/chips.toml for model FLOPs utilisation; empty: what the device says it is."""
    export: bool = True
    """Write the trained model as a Hugging Face folder, `model`, at the end."""
    step_timeout_s: float = 1800.0
    """Longest that a batch or a step may take, compiling included, before the process ends itself; 0: any time."""
    compile_cache: str = ""
    """Folder of compiled programs, "off", or empty for the default."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run: one TOML file, a table per field."""

    model: ModelConfig
    run: RunConfig
    stages: tuple[StageConfig, ...]
    schedule: ScheduleConfig | None = None
    data: DataConfig | None = None
    eval: EvalConfig | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    refusal: RefusalConfig = field(default_factory=RefusalConfig)
    lora: LoraConfig | None = None
    """Train adapters of a frozen model."""

    def check(self) -> None:
        """Raise TrainConfigError for values that make no sense together."""
        problems = []
        if bool(self.model.weights) == bool(self.model.config):
            problems.append("model: give either weights (to begin from) or config (for random weights)")
        if not self.stages:
            problems.append("stages is empty: give at least one [[stages]] with steps, batch and length")
        for i, stage in enumerate(self.stages):
            for name in ("steps", "batch", "length", "accumulation"):
                if getattr(stage, name) < 1:
                    problems.append(f"stages.{i}.{name} is {getattr(stage, name)}: give at least 1")
            if stage.accumulation > 0 and stage.batch % stage.accumulation:
                problems.append(
                    f"stages.{i}.batch {stage.batch} does not divide into {stage.accumulation} micro-batches: change"
                    " one of them"
                )
            if stage.data is None and self.data is None:
                problems.append(f"stages.{i} has no data: give [data] or [stages.data]")
            if stage.schedule is None and self.schedule is None:
                problems.append(f"stages.{i} has no schedule: give [schedule] or [stages.schedule]")
        for name, least in {"save_every": 1, "keep": 1, "log_every": 1}.items():
            if getattr(self.run, name) < least:
                problems.append(f"run.{name} is {getattr(self.run, name)}: give at least {least}")
        if self.refusal.stop_after < 1 or self.refusal.window < 1:
            problems.append("refusal.stop_after and refusal.window: give at least 1")
        if problems:
            raise TrainConfigError("config", problems)
        for data in (self.data, *(stage.data for stage in self.stages), self.eval and self.eval.data):
            if data is not None:
                data.check()


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a run's TOML file.

    Args:
        path: the file.
        overrides: "section.key=value", with or without leading dashes; the value as in TOML, or a bare string. Tables
            of a list are numbered: "stages.0.steps=10".

    Raises:
        TrainConfigError: with every unknown key and wrong value.
    """
    try:
        with Path(path).open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise TrainConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
    except ValueError as error:
        raise TrainConfigError(str(path), [f"not valid TOML: {error}"]) from None
    for override in overrides:
        _put(data, override)
    return from_dict(data, source=str(path))


def from_dict(data: Mapping[str, Any], *, source: str = "config") -> TrainConfig:
    """Build a configuration from nested dicts and lists; raises TrainConfigError."""
    problems: list[str] = []
    built = _build(TrainConfig, data, "", problems)
    if problems:
        raise TrainConfigError(source, problems)
    built.check()
    return built


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested dicts and lists of everything that is not None."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]
        if value is not None:
            found[f.name] = value
    return found


def to_toml(config: TrainConfig) -> str:
    """Write a configuration, defaults included, as TOML that `load` reads back to the same."""
    return "\n".join(_tables("", to_dict(config))).strip() + "\n"


def _tables(path: str, table: Mapping[str, Any]) -> list[str]:
    def nested(value: Any) -> bool:
        return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))

    lines = [f"{key} = {_value(value)}" for key, value in table.items() if not nested(value)]
    for key, value in table.items():
        if nested(value):
            name = f"{path}.{key}" if path else key
            for one in value if isinstance(value, list) else [value]:
                header = f"[[{name}]]" if isinstance(value, list) else f"[{name}]"
                lines += ["", header, *_tables(name, one)]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf and nan are TOML's words too
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _put(data: dict[str, Any], override: str) -> None:
    """Set one "section.key=value" in the nested data."""
    name, equals, text = override.lstrip("-").partition("=")
    if not equals:
        raise TrainConfigError("command line", [f"{override!r} is not --section.key=value"])
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    place: Any = data
    *sections, key = name.strip().split(".")
    for i, section in enumerate(sections):
        if isinstance(place, list):
            if not section.isdecimal() or int(section) >= len(place):
                where = ".".join(sections[:i])
                raise TrainConfigError("command line", [f"{name}: {where} has {len(place)} tables, from 0 on"])
            place = place[int(section)]
        else:
            place = place.setdefault(section, {})
        if not isinstance(place, dict | list):
            raise TrainConfigError("command line", [f"{name}: {'.'.join(sections[: i + 1])} is no table"])
    if isinstance(place, list):
        raise TrainConfigError("command line", [f"{name}: {'.'.join(sections)} holds tables: number one of them"])
    place[key] = value


def _names(cls: Any, prefix: str = "") -> list[str]:
    """List every dotted name below a dataclass, tables of lists without their number."""
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        names.append(prefix + name)
        inner = [arg for arg in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(arg)]
        for one in inner:
            names += _names(one, f"{prefix}{name}.")
    return names


def _build(cls: Any, data: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        where = f"{path}{key}"
        if key in fields:
            values[key] = _convert(hints[key], value, where, problems)
            continue
        close = difflib.get_close_matches(key, fields, 1, 0.6)
        elsewhere = [n for n in _names(TrainConfig) if n.rpartition(".")[2] == key]
        if not close and not elsewhere:
            every = {n.rpartition(".")[2]: n for n in _names(TrainConfig)}
            elsewhere = [every[n] for n in difflib.get_close_matches(key, every, 1, 0.8)]
        hint = f"did you mean {path}{close[0]}" if close else f"did you mean {elsewhere[0]}" if elsewhere else ""
        problems.append(f"{where} is unknown: {hint or 'there are ' + ', '.join(fields)}")
    needed = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, f in fields.items() if (f.default, f.default_factory) == needed and n not in data]
    problems += [f"{path}{name} is missing" for name in missing]
    return None if problems else cls(**values)


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Return a TOML value as the type of its field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return _build(kind, value, f"{path}.", problems)
    elif origin in (Union, types.UnionType):
        options = [arg for arg in args if arg is not type(None)]
        if dataclasses.is_dataclass(options[0]):
            return _convert(options[0], value, path, problems)
        for option in options:
            attempt: list[str] = []
            found = _convert(option, value, path, attempt)
            if not attempt:
                return found
    elif origin is Literal:
        if value in args:
            return value
        problems.append(f"{path} is {value!r}: use {', '.join(map(str, args))}")
        return None
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(args[0], item, f"{path}.{i}", problems) for i, item in enumerate(value))
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    problems.append(f"{path} is {value!r}: expected {_called(kind)}")
    return None


def _called(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "a table"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "nothing"}
    if kind in names:
        return names[kind]
    args = [arg for arg in typing.get_args(kind) if arg not in (type(None), ...)]
    if args and typing.get_origin(args[0]) is Literal:
        choices = typing.get_args(args[0])
        return f"a list of {', '.join(choices)}, as in {list(choices[:1])}"
    inner = " or ".join(_called(arg) for arg in args)
    return f"a list of {inner.removeprefix('a ')}s" if typing.get_origin(kind) is tuple else inner

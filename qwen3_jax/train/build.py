"""From a run's configuration to what the loop drives: mesh, tokenizer, network and step of each stage, first state.

`Build(config)` opens model folder and tokenizer and checks that everything divides, before anything large is read.
`step(i)` is the jitted step of a stage (stages differ in rope_theta and shapes, never in the state's tree), `start()`
the state and the frozen weights, `export` writes the trained model as a Hugging Face folder.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3_jax import checkpoint, distributed, placement
from qwen3_jax.checkpoint import export
from qwen3_jax.checkpoint.folder import COMPANIONS, open_folder
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.ops import Ops, for_platform
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.plain import XLA
from qwen3_jax.sharding import RULES, ShardingError, check, make_mesh, parse_mesh, replicas_of_kv_heads
from qwen3_jax.text.template import ChatTemplate, NoTemplateError
from qwen3_jax.text.tokenizer import Tokenizer
from qwen3_jax.train import lora, lora_peft, objectives, optim, stacked
from qwen3_jax.train.config import StageConfig, TrainConfig, TrainConfigError
from qwen3_jax.train.data import DataConfig, Loader
from qwen3_jax.train.step import State, TrainStep

RULE = RULES["train"]
ADAPTER = "adapter"  # beside the model


class Build:
    """Everything of a run that does not change while it runs."""

    def __init__(self, config: TrainConfig):
        """Open and check.

        Raises:
            TrainConfigError, ShardingError, CheckpointError, ObjectiveError, OptimizerError, LoraError: whatever
                cannot be honoured, before weights are read or drawn.
        """
        self.config = config
        self.mesh: Mesh | None = make_mesh(**parse_mesh(config.run.mesh), devices=None) if config.run.mesh else None
        self.model, self.source = _model_of(config)
        folder = Path(config.model.tokenizer) if config.model.tokenizer else self.source
        self.companions = folder
        self.tokenizer = self.template = None
        if folder is not None and (folder / "tokenizer.json").is_file():
            self.tokenizer = Tokenizer.from_folder(folder)
            with contextlib.suppress(NoTemplateError):
                self.template = ChatTemplate.from_folder(folder)
        elif config.model.tokenizer:
            raise TrainConfigError("config", [f"model.tokenizer {folder}: has no tokenizer.json"])
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.model.vocab_size:
            raise TrainConfigError(
                "config",
                [
                    f"the tokenizer has {self.tokenizer.vocab_size} ids, the model's vocab_size is"
                    f" {self.model.vocab_size}: raise it"
                ],
            )
        self._require_lengths()
        self._require_divisible()
        self.ops = self._ops()
        self.lora = None if config.lora is None else lora.Lora(config.lora, self.model)
        if self.lora is not None and not config.model.weights:
            raise TrainConfigError("config", ["lora without model.weights: adapters need a trained model"])
        for i in range(len(config.stages)):  # a wrong name is found now, not when its stage begins
            self.step(i)

    @functools.cache  # noqa: B019 -- a Build lives as long as its run
    def network(self, theta: float) -> stacked.Network:
        """Return the network with a rope_theta."""
        config, settings = dataclasses.replace(self.model, rope_theta=theta), self.config.model
        return stacked.Network(
            config,
            dtype=jnp.dtype(settings.dtype),
            param_dtype=jnp.dtype(settings.param_dtype),
            ops=self.ops if self.lora is None else lora.adapted_ops(self.ops),
            remat=settings.remat,
            unroll=settings.unroll,
            groups=self.config.objective.balance_groups,
            resolve=(lambda tree: tree) if self.lora is None else lora.merge_experts,
        )

    def theta(self, stage: int) -> float:
        """Return the rope_theta of a stage."""
        theta = self.config.stages[stage].rope_theta
        return self.model.rope_theta if theta is None else theta

    def rate(self) -> optim.Schedule:
        """Return the learning rate over the whole run."""
        stages = self.config.stages
        total = sum(stage.steps for stage in stages)
        pieces, begin = [], 0
        for stage in stages:
            if stage.schedule is not None:
                piece = optim.schedule(stage.schedule, stage.steps)
            else:
                assert self.config.schedule is not None  # checked with the configuration
                piece = optim.later(optim.schedule(self.config.schedule, total), begin)
            pieces.append((piece, stage.steps))
            begin += stage.steps
        return optim.one_after_another(pieces)

    @functools.cache  # noqa: B019
    def step(self, stage: int) -> TrainStep:
        """Return the jitted step of a stage; nothing is compiled yet."""
        network = self.network(self.theta(stage))
        trained: Any = network if self.lora is None else self.lora
        more: dict[str, Any] = {} if self.lora is None else {"assemble": self.lora.assemble}
        return TrainStep(
            objectives.make(network, self.config.objective),
            optim.Optimizer(self.config.optimizer, self.rate()),
            self.config.refusal,
            abstract=trained.abstract(),
            shardings=None if self.mesh is None else trained.shardings(self.mesh, RULE),
            mesh=self.mesh,
            rules=None if self.mesh is None else RULE,
            **more,
        )

    def base(self) -> Params:
        """Read or draw the model's parameters, stacked."""
        network, settings = self.network(self.model.rope_theta), self.config.model
        placed: dict[str, Any] = {} if self.mesh is None else {"out_shardings": network.shardings(self.mesh, RULE)}
        if not settings.weights:
            return jax.jit(network.init, **placed)(jax.random.key(self.config.run.seed))
        if self.mesh is None:
            _, params = checkpoint.load(settings.weights, dtype=settings.dtype, param_dtype=settings.param_dtype)
        else:
            _, params = placement.load_sharded(
                settings.weights, self.mesh, RULE, dtype=settings.dtype, param_dtype=settings.param_dtype, ops=self.ops
            )
        return jax.jit(lambda tree: stacked.stack(self.model, tree), **placed)(params)

    def frozen(self) -> Params:
        """Return what the objective reads and nothing changes: the model under adapters, else nothing."""
        return {} if self.lora is None else self.base()

    def start(self) -> State:
        """Return the state before the first step."""
        step, seed = self.step(0), self.config.run.seed
        if self.lora is None:
            return step.init(self.base(), seed)
        return step.init(self.lora.init(jax.random.key(seed)), seed)

    def loader(self, data: DataConfig, stage: StageConfig, *, process: int, processes: int, anyone: Any) -> Loader:
        """Open a loader for a stage's shape of batch."""
        return Loader(
            data,
            self.tokenizer,
            self.template,
            batch=stage.batch,
            length=stage.length,
            process=process,
            processes=processes,
            seed=self.config.run.seed,
            vocab_size=self.model.vocab_size,
            anyone=anyone,
        )

    def export(self, folder: Path, state: State, frozen: Params, stage: int) -> None:
        """Write the trained model as a Hugging Face folder; all processes call this together.

        Adapters are merged, and lie beside it by themselves, in PEFT's form, in the folder `adapter`.
        """
        tree = state["params"] if self.lora is None else self.lora.assemble(state["params"], frozen)
        config = dataclasses.replace(self.model, rope_theta=self.theta(stage))
        params = stacked.unstack(config, distributed.fetch(tree))
        if self.lora is not None:
            adapters = stacked.unstack(config, distributed.fetch(state["params"]))
            distributed.once(lambda: self._write_adapters(folder.with_name(ADAPTER), adapters))
            params = lora.merge(params)
        distributed.once(lambda: self._write(folder, config, params))

    def _write_adapters(self, folder: Path, adapters: Params) -> None:
        assert self.lora is not None  # the caller's condition
        if folder.exists():
            shutil.rmtree(folder)
        lora_peft.save(folder, adapters, self.lora, base=self.config.model.weights)

    def _write(self, folder: Path, config: Qwen3Config, params: Params) -> None:
        if folder.exists():
            shutil.rmtree(folder)
        config = dataclasses.replace(config, dtype=jnp.dtype(params["embed_tokens"].dtype).name)
        with export.new_folder(folder) as partial:
            (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            export.write_weights(partial, config, params, progress=False)
            for name in COMPANIONS:
                if self.companions is not None and name != "README.md" and (self.companions / name).is_file():
                    (partial / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(self.companions / name, partial / name)

    def _require_lengths(self) -> None:
        most, groups = self.model.max_position_embeddings, self.config.objective.balance_groups
        problems = []
        for i, stage in enumerate(self.config.stages):
            rows = stage.batch // stage.accumulation
            if stage.length > most:
                problems.append(
                    f"stages.{i}.length {stage.length} is above the model's max_position_embeddings {most}: raise that"
                    " in config.json"
                )
            if groups < 1 or rows % groups:
                problems.append(
                    f"objective.balance_groups {groups} does not divide the {rows} rows of a micro-batch of stages.{i}"
                )
        if problems:
            raise TrainConfigError("config", problems)

    def _require_divisible(self) -> None:
        if self.mesh is None:
            return
        problems = undivided(self.model, self.mesh)
        ways = 1
        for axis in RULE["batch"]:
            ways *= self.mesh.shape[axis]
        for i, stage in enumerate(self.config.stages):
            if (stage.batch // stage.accumulation) % ways:
                problems.append(
                    f"stages.{i}: {stage.batch // stage.accumulation} rows of a micro-batch do not divide over"
                    f" {' × '.join(RULE['batch'])} {ways}: make batch a multiple of {ways * stage.accumulation}"
                )
        if problems:
            raise ShardingError(problems)

    def _ops(self) -> Ops:
        platform = jax.default_backend()
        return training_ops(platform) if self.mesh is None else mesh_ops(platform, self.mesh)


def undivided(model: Qwen3Config, mesh: Mesh) -> list[str]:
    """Return one line for each thing of the model that training cannot divide over a mesh; only its shape is asked."""
    problems = check(model, mesh, RULE)
    if replicas_of_kv_heads(model, mesh) > 1:
        problems.append(
            f"num_key_value_heads {model.num_key_value_heads} is below model {mesh.shape['model']}: heads are not"
            " repeated in training, lower model"
        )
    return problems


def mesh_ops(platform: str, mesh: Mesh) -> Ops:
    """Return the formulation that trains on a mesh of a platform; the CPU's own one is for one device."""
    return on_mesh(XLA if platform == "cpu" else training_ops(platform), mesh, RULE)


def training_ops(platform: str) -> Ops:
    """Return the formulation that trains on one device of a platform; TPUs have another attention for it."""
    if platform == "tpu":
        from qwen3_jax.ops import splash

        return for_platform(platform)._replace(attend=splash.attend)
    return for_platform(platform)


def _model_of(config: TrainConfig) -> tuple[Qwen3Config, Path | None]:
    """Return the model's configuration and the folder that it comes from, if any."""
    settings = config.model
    if settings.weights:
        folder = checkpoint.resolve(settings.weights)
        return open_folder(folder).config, folder
    path = Path(settings.config)
    if path.exists():
        return Qwen3Config.from_file(path), path if path.is_dir() else path.parent
    return Qwen3Config.from_name(settings.config), None

"""A model folder, loaded: what generation, the engine and the tools around them start from.

folder or hub id → config, tokenizer, chat template, sampling defaults → parameters, on one device or spread over a mesh
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen3_jax import checkpoint, compile_cache
from qwen3_jax.checkpoint import hf, orbax_folder
from qwen3_jax.checkpoint.folder import open_folder
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.ops import Ops, for_platform
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.plain import XLA
from qwen3_jax.placement import load_sharded, local_placer
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.sharding import RULES, Rules, make_mesh, parse_mesh
from qwen3_jax.text.template import ChatTemplate, NoTemplateError
from qwen3_jax.text.tokenizer import Tokenizer, read_json


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its text side.

    Attributes:
        name: the folder's name, or the hub id.
        params: nested dict of arrays, as `checkpoint.load` returns.
        template: None if the folder has none (a base model: raw prompts only).
        defaults: of generation_config.json; without one decoding is greedy.
        dtype: of activations.
        ops: the formulation the arrays are laid out for.
        prompt_ops: the one for few rows of many tokens: on a mesh, of the "prefill" rules and the same weights.
        mesh, rules: where the arrays lie, if they are spread over devices.
        load_s: seconds that loading took.
        backbone: the network alone, without lm_head: it embeds, and cannot generate.
    """

    name: str
    config: Qwen3Config
    params: Params
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: SamplingParams
    dtype: Any
    ops: Ops
    prompt_ops: Ops
    mesh: Mesh | None
    rules: Rules | None
    load_s: float
    backbone: bool = False


def load_model(
    folder: str | Path,
    *,
    dtype: str | None = None,
    param_dtype: str | None = None,
    mesh: str | None = None,
    backbone: bool | None = False,
    progress: bool = False,
    cache: str | Path | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder, or a hub id where a network is there.

    Args:
        folder: with config.json, weights (safetensors or Orbax), tokenizer.json, tokenizer_config.json;
            generation_config.json gives the `defaults`, without it decoding is greedy.
        dtype: "float32" or "bfloat16", what the network computes in; None is the file's (float32 for float16).
        param_dtype: what the parameters are kept in; None is `dtype`, "file" keeps the file's.
        mesh: spread the model over all devices: axis sizes as in "data=1,expert=4,model=4". Every process of the
            mesh makes the same calls and gets the same results.
        backbone: leave lm_head out, or do without it. None goes by the folder: an embedding model, saved as the network
            alone, loads as what it is. False refuses one that lacks the lm_head to generate with.
        progress: show a bar while loading.
        cache: folder of the persistent compile cache, "off", or None for the default; see `compile_cache.enable`.

    Raises:
        ValueError: a subclass that names the file and the problem, before anything large is read.
    """
    began = time.perf_counter()
    name, folder = str(folder), checkpoint.resolve(folder)
    name = folder.resolve().name if Path(name).exists() else name
    found = open_folder(folder, backbone=backbone)
    backbone = _is_backbone(found) if backbone is None else backbone
    dtype = dtype or ("bfloat16" if found.config.dtype == "bfloat16" else "float32")
    tokenizer = Tokenizer.from_folder(folder)
    settings = folder / "generation_config.json"
    generation = read_json(settings) if settings.is_file() else {}
    defaults = SamplingParams.from_generation_config(generation, settings)
    try:
        template = ChatTemplate.from_folder(folder)
    except NoTemplateError:  # a base model: raw prompts only
        template = None
    compile_cache.enable(cache)
    stored = None if param_dtype == "file" else param_dtype or dtype
    if mesh is None:
        devices = rules = None
        ops = prompt_ops = for_platform(jax.default_backend())
        place = local_placer(found.config, ops=ops)
        config, params = found.config, found.load(dtype=stored, place=place, progress=progress)
    else:
        devices, rules = make_mesh(**parse_mesh(mesh), devices=None), RULES["serve"]
        # The CPU's own formulation is for one device.
        local = XLA if jax.default_backend() == "cpu" else for_platform(jax.default_backend())
        ops, prompt_ops = on_mesh(local, devices, rules), on_mesh(local, devices, RULES["prefill"])
        config, params = load_sharded(
            folder, devices, rules, dtype=dtype, param_dtype=param_dtype, ops=ops, backbone=backbone, progress=progress
        )
    return LoadedModel(
        name=name,
        config=config,
        params=params,
        tokenizer=tokenizer,
        template=template,
        defaults=defaults,
        dtype=jnp.dtype(dtype),
        ops=ops,
        prompt_ops=prompt_ops,
        mesh=devices,
        rules=rules,
        load_s=time.perf_counter() - began,
        backbone=backbone,
    )


def _is_backbone(found: hf.Checkpoint | orbax_folder.Checkpoint) -> bool:
    """Tell whether a folder holds the network alone: no lm_head, and nothing that stands for it.

    Tied embeddings would do for a head, but not where the tensors' names are those of the network saved by itself: so
    come the embedding models, whose training has made them useless for it.
    """
    if any(entry.dotted == "lm_head" for entry in found.entries):
        return False
    return not found.config.tie_word_embeddings or (found.naming.bare and not found.naming.redundant_head)

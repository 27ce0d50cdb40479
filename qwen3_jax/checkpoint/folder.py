"""Load or convert a model folder of either kind: Hugging Face's, or the Orbax one written here."""

import shutil
from pathlib import Path
from typing import Any, Literal

from qwen3_jax.checkpoint import hf, orbax_folder
from qwen3_jax.checkpoint.export import MAX_SHARD_BYTES, new_folder, write_weights
from qwen3_jax.checkpoint.hf import CONFIG, CheckpointError, OutsideError, Params, Place, on_default_device
from qwen3_jax.config import Qwen3Config

# What travels with the weights, where it exists. Code (*.py) and pickles never do.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "README.md",
    "LICENSE",
    "modules.json",  # the last three: sentence-transformers, in the embedding models
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


def load(
    folder: Path | str,
    *,
    dtype: Any = None,
    param_dtype: Any = None,
    backbone: bool = False,
    place: Place = on_default_device,
    progress: bool = True,
) -> tuple[Qwen3Config, Params]:
    """Load a model folder, Hugging Face or Orbax: (config, parameters as a nested dict of arrays).

    Args:
        folder: holds config.json and the weights.
        dtype: the compute dtype, "float32", "bfloat16", or None for the file's.
        param_dtype: the parameters' dtype: None for `dtype`, "file" to keep each tensor's own.
        backbone: leave lm_head out, or do without it: embedding models.
        place: where a parameter goes, see `hf.on_default_device`.
        progress: show a bar on a terminal.

    Raises:
        CheckpointError: with every problem of the folder, before any parameter is read.
        ValueError: a dtype that is not supported.
    """
    hf.param_dtype_of(dtype)
    if param_dtype is not None:
        dtype = None if isinstance(param_dtype, str) and param_dtype == "file" else param_dtype
        hf.param_dtype_of(dtype)
    checkpoint = open_folder(Path(folder), backbone=backbone)
    return checkpoint.config, checkpoint.load(dtype=dtype, place=place, progress=progress)


def open_folder(folder: Path, *, backbone: bool | None = False) -> hf.Checkpoint | orbax_folder.Checkpoint:
    """Inspect a folder of either kind. Raises CheckpointError."""
    kind = orbax_folder if orbax_folder.is_one(folder) else hf
    return kind.inspect(folder, backbone=backbone)


def convert(
    source: Path | str,
    destination: Path | str,
    to: Literal["orbax", "hf"],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Write a model folder in the other form, byte for byte: dtypes, config.json and tokenizer files stay as they are.

    Hugging Face → Orbax → Hugging Face gives the same tensors under the same names, those that a tied model repeats in
    lm_head.weight included. What may differ is their division into files, and experts that were fused are written
    one by one, as released checkpoints have them.

    Args:
        source: a folder of either kind.
        destination: is made; it must not exist or be empty. It appears complete or not at all.
        to: the form to write.
        max_shard_bytes: to "hf": above this the weights are split, with an index.
        progress: show a bar on a terminal.

    Raises:
        CheckpointError: the source has problems, or the destination holds something.
    """
    source, destination = Path(source), Path(destination)
    if to not in ("orbax", "hf"):
        raise ValueError(f'cannot convert to {to!r}: give "orbax" or "hf"')
    with new_folder(destination) as partial:
        checkpoint = open_folder(source, backbone=None)
        _copy_companions(source, partial)
        # Numpy in and out: no device, no dtype but the file's.
        params = checkpoint.load(place=lambda path, tensor: tensor[...], progress=progress)
        if to == "orbax":
            orbax_folder.write(partial, checkpoint.config, params, naming=checkpoint.naming, progress=progress)
        else:
            write_weights(
                partial,
                checkpoint.config,
                params,
                naming=checkpoint.naming,
                max_shard_bytes=max_shard_bytes,
                progress=progress,
            )


def _copy_companions(source: Path, destination: Path) -> None:
    """Copy config.json and what else travels with the weights. Raises CheckpointError."""
    problems = []
    for name in (CONFIG, *COMPANIONS):
        if not (source / name).is_file():
            continue
        try:
            hf.require_inside(source, name)
        except OutsideError as error:
            problems.append(str(error))
            continue
        (destination / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, destination / name)
    if problems:
        raise CheckpointError(source, problems)

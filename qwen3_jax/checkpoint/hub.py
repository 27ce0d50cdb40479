"""From a name to a local folder: a path is itself, a Hugging Face id is downloaded once into that library's cache."""

import re
from pathlib import Path

from qwen3_jax.checkpoint.hf import CheckpointError

# What a model folder is made of here. Pickled weights are never fetched.
PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.txt"]


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a model, downloading "organisation/model" if no such folder exists.

    Needs the `hub` extra and a network only for a model that is not in the cache yet. Raises CheckpointError with one
    line when the folder or the id does not exist, the package is missing or the network cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(path, ["not a folder: give the folder that holds config.json"])
    name = str(name_or_path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", name, re.ASCII):
        raise CheckpointError(name, ["no such folder, and not the id of a model on the hub (organisation/model)"])
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        remedy = 'install it with: pip install "qwen3-jax[hub]"'
        raise CheckpointError(name, [f"no such folder, and huggingface_hub is missing: {remedy}"]) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError:  # a RepositoryNotFoundError too
        raise CheckpointError(name, ["access must be granted on the hub: log in with `hf auth login`"]) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CheckpointError(name, ["no such folder, and the hub has no such model (or it is private)"]) from None
    except Exception as error:  # offline, no route, timeout, full disk: the client libraries share no base class
        raise CheckpointError(name, [f"no such folder, and it cannot be downloaded: {_first_line(error)}"]) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]

"""Write the demo's Hugging Face folder from a trained one: bfloat16 weights, and the configuration that was asked for.

python scripts/demo_folder.py TRAINED START OUT      # START as scripts/demo_tokenizer.py writes it
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from qwen3_jax import checkpoint  # noqa: E402
from qwen3_jax.checkpoint.export import new_folder, write_weights  # noqa: E402
from qwen3_jax.config import Qwen3Config  # noqa: E402

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write(trained: Path, start: Path, out: Path) -> None:
    """Round the weights to bfloat16 and put them beside the files that training started from."""
    found, wanted = checkpoint.inspect(trained), Qwen3Config.from_file(start / "config.json")
    if dataclasses.replace(found.config, dtype=wanted.dtype) != wanted:
        raise ValueError(f"{trained}/config.json is not the configuration of {start}: train again from {start}")
    params = found.load(dtype=np.dtype(ml_dtypes.bfloat16), place=lambda path, tensor: tensor[...], progress=False)
    with new_folder(out) as partial:
        for name in FILES:
            shutil.copyfile(start / name, partial / name)
        write_weights(partial, found.config, params, progress=False)


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:4]))

"""A strict session: eight virtual devices, no implicit dtype promotion, nothing from a network.

The environment is set before jax is imported anywhere; pytest-xdist workers import this file too, and processes that
tests start inherit it. All of them keep what they compile in one folder, which is new for every session: a program is
compiled once, whoever needs it next. Set JAX_COMPILATION_CACHE_DIR to keep it from session to session.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process: workers find it set
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qwen3-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """Leave LLVM's optimiser out, two fifths of the time of modules whose programs run once.

    For comparisons within a tolerance, or of a program with itself. Collectives, copies and buffers stay: XLA decides
    on them before LLVM. Where different programs must give the same bits, and at real widths, users' programs run.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

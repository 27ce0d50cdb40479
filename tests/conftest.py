"""A strict session: eight virtual devices, no implicit dtype promotion, nothing from a network.

The environment is set before jax is imported anywhere; pytest-xdist workers import this file too, and processes that
tests start inherit it. All of them keep what they compile in one folder, which is new for every session: a program is
compiled once, whoever needs it next. Set JAX_COMPILATION_CACHE_DIR to keep it from session to session.

Programs are compiled in half of the time, for most run once: without LLVM's optimiser and, in the jaxlib that has both,
by XLA's older code generator for fusions. XLA decides on collectives, copies, fusions and buffers before either, so
those are users'. Modules marked `users_programs` keep the optimiser; with JAX_DISABLE_MOST_OPTIMIZATIONS=0, as `make
test-slow` runs those modules and the slow tests, every program is compiled as for users.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import jaxlib.version

os.environ["JAX_PLATFORMS"] = "cpu"
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0" and jaxlib.version.__version_info__ < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process: workers find it set
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qwen3-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def optimised(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave LLVM's optimiser on where the module asks for users' programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    if request.node.get_closest_marker("users_programs"):
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

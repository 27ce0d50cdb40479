"""The persistent compile cache: a second start of the same model skips XLA. On by default, see `enable`."""

import os
import warnings
from pathlib import Path

import jax

VARIABLE = "QWEN3_JAX_COMPILE_CACHE"  # a folder, or "off"


class CompileCacheWarning(UserWarning):
    """The compile cache cannot be used; programs are compiled anew."""


def enable(folder: str | Path | None = None) -> Path | None:
    """Keep compiled programs in a folder, for this process and the next ones.

    Args:
        folder: "off" leaves JAX as it is. None means the variable QWEN3_JAX_COMPILE_CACHE (a folder or "off"), else
            what JAX is configured to use already, else qwen3_jax/xla in the user's cache folder.

    Returns:
        The folder in use, or None. A folder that cannot be written is a `CompileCacheWarning` and no error.
    """
    chosen = folder if folder is not None else os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    current: str | None = jax.config.values["jax_compilation_cache_dir"]
    if chosen is None and current is not None:
        return Path(current)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(chosen).expanduser() if chosen is not None else Path(base) / "qwen3_jax" / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        message = f"no compile cache: {path} cannot be written ({error.strerror}); set {VARIABLE} to a folder or to off"
        warnings.warn(message, CompileCacheWarning, stacklevel=2)
        return None
    if str(path) != current:
        jax.config.update("jax_compilation_cache_dir", str(path))
        # JAX keeps only what took a second to compile; a first prefill is made of many smaller programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # JAX looks at the setting at its first compilation only; this makes it look again.
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
    return path

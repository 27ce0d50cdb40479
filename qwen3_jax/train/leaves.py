"""The leaves of a training state by dotted path: what is stored of each, and what it comes back as."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEYS = ("threefry2x32", "rbg", "unsafe_rbg")  # jax's PRNGs


def flat(tree: Any) -> dict[str, Any]:
    """Return the leaves by dotted path."""
    leaves = jax.tree.leaves_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        raise ValueError("two leaves of the state have the same dotted path: rename one")
    return found


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> Any:
    """Return what is stored of a leaf: PRNG keys as their words, Python's numbers as numpy's."""
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf)
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def stored_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding in which `stored` is to be read."""
    sharding = getattr(leaf, "sharding", None)
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    elif _is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(words.shape, words.dtype)  # read whole; `as_asked` places it
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def described(leaf: Any) -> list:
    """Return a leaf's dtype and shape as JSON."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return [str(leaf.dtype), list(leaf.shape)]


def as_asked(value: Any, wanted: Any) -> Any:
    """Return a leaf that was read as the kind that the abstract tree has in its place."""
    if not hasattr(wanted, "dtype"):
        return value.item()
    if isinstance(wanted, np.ndarray | np.generic):
        return np.asarray(value)
    if _is_key(wanted):
        [impl] = [
            name for name in KEYS if jax.eval_shape(lambda n=name: jax.random.key(0, impl=n)).dtype == wanted.dtype
        ]
        key = jax.random.wrap_key_data(jnp.array(value), impl=impl)
        return key if getattr(wanted, "sharding", None) is None else jax.device_put(key, wanted.sharding)
    return value if isinstance(value, jax.Array) else jnp.array(value)  # a copy: the host's memory is not ours to give


def differences(saved: Mapping[str, list], tree: Any) -> list[str]:
    """Return one line for each leaf that the saved state lacks, has besides, or has otherwise."""
    wanted = {path: described(leaf) for path, leaf in flat(tree).items()}
    lines = [f"{path} is missing" for path in sorted(wanted.keys() - saved.keys())]
    lines += [f"{path} is not of this run" for path in sorted(saved.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & saved.keys()):
        if saved[path] != wanted[path]:
            (stored, shape), (dtype, expected) = saved[path], wanted[path]
            lines.append(f"{path} is {stored} {shape}, this run has {dtype} {expected}")
    return lines

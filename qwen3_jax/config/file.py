"""The file: size, JSON, duplicate keys, depth."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3_jax.config.checks import ConfigError, show

MAX_FILE_BYTES = 4 << 20  # released files are ~1 KB, FP8 ones with their module lists ~30 KB
MAX_DEPTH = 16


def read_json(path: Path) -> tuple[Any, str]:
    """Read a config.json, given itself or its folder: (its value, its name for messages). Raises ConfigError."""
    try:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(str(file), ["no such file: expected a Hugging Face config.json or its folder"])
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigError(str(file), [f"{size} bytes, more than {MAX_FILE_BYTES}: not a config.json"])
        text = file.read_text(encoding="utf-8")
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(str(path), [f"nested deeper than {MAX_DEPTH} levels: not a config.json"]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a NUL in the path, an over-long number
        raise ConfigError(str(path), [f"not valid JSON: {show(str(error))}"]) from None
    return data, str(file)


def shallow(data: Mapping[str, Any]) -> bool:
    """Tell whether nothing lies deeper than MAX_DEPTH."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for item in (node.values() if isinstance(node, Mapping) else node)
        ]
    return not any(isinstance(node, Mapping | list | tuple) for node in level)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {show(twice)} appears twice")
    return data


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")

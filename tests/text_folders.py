"""Tokenizer folders that the text tests run on: the demo's, and the released one if it lies beside the repo."""

import functools
from pathlib import Path
from typing import Any

import pytest

from qwen3_jax.text.template import ChatTemplate
from qwen3_jax.text.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parent.parent
DEMO = REPO / "qwen3_jax" / "demo"
RELEASED = REPO.parent / "shared" / "tokenizer"
FOLDERS = {"demo": DEMO} | ({"released": RELEASED} if RELEASED.is_dir() else {})

each_folder = pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS.keys())
released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released tokenizer is not beside this repository")


@functools.cache
def ours(folder: Path = DEMO) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@functools.cache
def template(folder: Path = DEMO) -> ChatTemplate:
    return ChatTemplate.from_folder(folder)


@functools.cache
def theirs(folder: Path = DEMO) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)

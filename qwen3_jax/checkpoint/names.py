"""The one table between parameter paths and Hugging Face tensor names.

A parameter's path is the Hugging Face name minus `model.` and `.weight`; the table says where the two differ and how
the [out, in] tensor of the file becomes the parameter's axes: always a reshape, never a transpose, so that loading and
export are views. Loading, export and the parity report read this table and nothing else.

Axis letters: D hidden, N query heads, K key/value heads, H head_dim, F ffn width (of an expert on MoE layers),
E experts, V vocabulary.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from qwen3_jax.config import Qwen3Config

Path = tuple[str | int, ...]


class Layout(NamedTuple):
    """How a file tensor becomes a parameter: "file axes -> parameter axes" (one side when they are the same).

    `file` is the Hugging Face name where it is not the path; "{e}" in it stands for one tensor per expert, stacked on
    the leading E of the parameter.
    """

    spec: str
    file: str | None = None


EMBEDDING = {"embed_tokens": Layout("V D")}
ATTENTION = {
    "input_layernorm": Layout("D"),
    "self_attn.q_proj": Layout("N*H D -> N H D"),
    "self_attn.k_proj": Layout("K*H D -> K H D"),
    "self_attn.v_proj": Layout("K*H D -> K H D"),
    "self_attn.o_proj": Layout("D N*H -> D N H"),
    "self_attn.q_norm": Layout("H"),
    "self_attn.k_norm": Layout("H"),
    "post_attention_layernorm": Layout("D"),
}
DENSE = {
    "mlp.gate_proj": Layout("F D"),
    "mlp.up_proj": Layout("F D"),
    "mlp.down_proj": Layout("D F"),
}
MOE = {
    "mlp.router": Layout("E D", "mlp.gate"),
    "mlp.experts.gate_proj": Layout("F D -> E F D", "mlp.experts.{e}.gate_proj"),
    "mlp.experts.up_proj": Layout("F D -> E F D", "mlp.experts.{e}.up_proj"),
    "mlp.experts.down_proj": Layout("D F -> E D F", "mlp.experts.{e}.down_proj"),
}
FINAL = {"norm": Layout("D")}
HEAD = {"lm_head": Layout("V D")}  # the only tensor outside `model.`; absent when tied

LM_HEAD, EMBED_TOKENS = "lm_head.weight", "model.embed_tokens.weight"


class Entry(NamedTuple):
    """One row of the table: a parameter and the file tensor it is, or the E file tensors it stacks."""

    path: Path
    shape: tuple[int, ...]  # of the parameter
    names: tuple[str, ...]  # in the file
    file_shape: tuple[int, ...]  # of each of them
    stacked: bool

    @property
    def dotted(self) -> str:
        return ".".join(map(str, self.path))


class Naming(NamedTuple):
    """Two liberties that released files take, kept so that an export can repeat them."""

    bare: bool = False  # a backbone saved by itself (embedding models): no "model." prefix
    redundant_head: bool = False  # tied, yet lm_head.weight is written too (Qwen3-0.6B and 1.7B)

    def in_file(self, name: str) -> str:
        """Return what the table's `name` is called in such a file."""
        return name.removeprefix("model.") if self.bare else name

    def in_table(self, name: str) -> str:
        """Return the table's name for a tensor of such a file."""
        return f"model.{name}" if self.bare and name != LM_HEAD else name


PLAIN = Naming()


def uses_bare_names(names: Iterable[str]) -> bool:
    """Say whether a file's tensors are those of a backbone saved by itself."""
    names = list(names)
    return not any(name.startswith("model.") for name in names) and any(
        name.startswith(("layers.", "embed_tokens.", "norm.")) for name in names
    )


def table(config: Qwen3Config, *, backbone: bool = False) -> Iterator[Entry]:
    """Yield every parameter of the model; `backbone` leaves out lm_head."""
    yield from _rows(config, EMBEDDING, ())
    for i in range(config.num_hidden_layers):
        feed_forward = MOE if config.is_moe_layer(i) else DENSE
        yield from _rows(config, ATTENTION | feed_forward, ("layers", i))
    yield from _rows(config, FINAL, ())
    if not config.tie_word_embeddings and not backbone:
        yield from _rows(config, HEAD, ())


def count_tensors(config: Qwen3Config) -> int:
    """Return how many file tensors `table` speaks of, without building it."""
    moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    per_moe_layer = sum(config.num_experts if "{e}" in (row.file or "") else 1 for row in MOE.values())
    dense_layers = config.num_hidden_layers - moe_layers
    shared = config.num_hidden_layers * len(ATTENTION) + 2 + (not config.tie_word_embeddings)
    return shared + moe_layers * per_moe_layer + dense_layers * len(DENSE)


def _rows(config: Qwen3Config, rows: dict[str, Layout], prefix: Path) -> Iterator[Entry]:
    sizes = {
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "V": config.vocab_size,
        "F": config.moe_intermediate_size if rows.keys() >= MOE.keys() else config.intermediate_size,
    }
    for key, layout in rows.items():
        file_axes, _, axes = layout.spec.partition(" -> ")
        file_shape = tuple(math.prod(sizes[letter] for letter in axis.split("*")) for axis in file_axes.split())
        shape = tuple(sizes[letter] for letter in (axes or file_axes).split())
        name = ".".join(["model", *map(str, prefix), layout.file or key, "weight"])
        stacked = "{e}" in name
        names = tuple(name.replace("{e}", str(e)) for e in range(config.num_experts)) if stacked else (name,)
        if rows is HEAD:
            names = (LM_HEAD,)
        yield Entry((*prefix, *key.split(".")), shape, names, file_shape, stacked)


FUSED = re.compile(r"(model\.layers\.(\d{1,6})\.mlp\.experts)\.(gate_up_proj|down_proj)")


def unfuse(config: Qwen3Config, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], int]] | None:
    """Split an expert tensor as transformers 5 holds it in memory into the per-expert tensors it consists of.

    `gate_up_proj` is [E, 2F, D], rows below F gate, the rest up; `down_proj` is [E, D, F]; neither ends in `.weight`.
    Returns {per-expert name: (shape, first element)}, or None if `name` is no such tensor. Raises ValueError on a shape
    that the config does not give.
    """
    match = FUSED.fullmatch(name)
    if match is None or not config.num_experts:
        return None
    E, F, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
    prefix, _, kind = match.groups()
    members = {"gate_proj": (F, D), "up_proj": (F, D)} if kind == "gate_up_proj" else {"down_proj": (D, F)}
    expected = (E, 2 * F, D) if kind == "gate_up_proj" else (E, D, F)
    if shape != expected:
        raise ValueError(f"shape {list(shape)}, config.json gives {list(expected)}")
    step = F * D
    return {
        f"{prefix}.{e}.{member}.weight": (member_shape, (e * len(members) + k) * step)
        for e in range(E)
        for k, (member, member_shape) in enumerate(members.items())
    }


def get(tree: Any, path: Path) -> Any:
    """Return the leaf or subtree of a nested dict at a path."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: dict, path: Path, leaf: Any) -> None:
    """Set the leaf of a nested dict at a path, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf

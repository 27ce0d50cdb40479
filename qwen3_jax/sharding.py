"""Where every array lives: the mesh, one table of rules per purpose, and what does not divide.

A weight's line in `model.py` names the axes of its array; a RULES table maps those names to mesh axes; the two give a
`NamedSharding`. Serving and training differ by their table, not by code. Everything is checked before anything is
allocated: `check` collects what does not divide, with the numbers and the remedy.

The mesh axes always exist, length 1 is legal:
    data    copies of the model that see different rows
    fsdp    training: parameters and optimiser state are split here too, and gathered layer by layer; serving: rows as
            over `data`, and every expert's width, for models whose whole experts do not go into the chips' memory
    expert  rows are split here in attention, experts in the MoE layers
    model   heads, ffn width and vocabulary; in the MoE layers experts again
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwen3_jax.config import Qwen3Config

AXES = ("data", "fsdp", "expert", "model")
Rules = Mapping[str, tuple[str, ...]]

_SERVE: Rules = {
    "batch": ("data", "fsdp", "expert"),
    # The head is the largest weight that is read whole in every step: each chip reads its part for all rows.
    "vocab": ("expert", "model"),
    "head_batch": ("data", "fsdp"),
    "embed": (),
    "heads": ("model",),
    "kv_heads": ("model",),
    "head_dim": (),
    "mlp": ("model",),
    # Whole experts before slices of experts: half a 128-lane is wasted when 768 is cut into 192.
    "experts": ("expert", "model"),
    "expert_mlp": ("fsdp",),
    "router": (),  # small, and every row needs all of it
    "slots": (),
    "length": (),
    "head_length": (),
    "stream": (),
    "hidden": (),
}
RULES: dict[str, Rules] = {
    "serve": _SERVE,
    # Serving's weights, other activations: few rows of many tokens. `data` alone splits rows, `fsdp` and `expert` a
    # row's queries, and these with `model` the residual stream between the layers, with its norms, router and experts'
    # rows.
    "prefill": {
        **_SERVE,
        "batch": ("data",),
        "head_batch": ("data",),
        "length": ("fsdp", "expert"),
        "stream": ("fsdp", "expert", "model"),
    },
    "train": {
        **_SERVE,
        "head_batch": ("data", "fsdp", "expert"),
        "vocab": ("model",),
        "embed": ("fsdp",),
        "expert_mlp": (),
    },
}


class ShardingError(ValueError):
    """A model and a mesh that do not fit; `problems` holds one line each."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Make the device mesh; its product must be the number of devices.

    Raises:
        ShardingError: the product is another number.
    """
    shape = (data, fsdp, expert, model)
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(shape) != len(devices):
        wanted = " × ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise ShardingError(
            [f"mesh {wanted} = {math.prod(shape)} devices, have {len(devices)}: change an axis to make them equal"]
        )
    # Unlike jax.make_mesh on most slices this may cut an axis of the torus in two: expert=16,model=4 on 8x8.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Read "data=1,expert=4,model=4" into axis sizes; an axis left out has size 1.

    Raises:
        ShardingError: an unknown axis, a repeated axis, or a size that is not a positive whole number.
    """
    sizes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            problems.append(f"mesh axis {name!r} is unknown: use {', '.join(AXES)}, as in data=1,expert=4,model=4")
        elif name in sizes:
            problems.append(f"mesh axis {name} is given twice")
        elif not (size.isdecimal() and int(size) > 0):
            problems.append(f"mesh axis {name} has size {size!r}: give a whole number of at least 1")
        else:
            sizes[name] = int(size)
    if problems:
        raise ShardingError(problems)
    return dict.fromkeys(AXES, 1) | sizes


def spec(axes: str | Sequence[str], rules: Rules) -> PartitionSpec:
    """Map an array's logical axis names to a PartitionSpec."""
    names = axes.split() if isinstance(axes, str) else axes
    return PartitionSpec(*(rules[name] or None for name in names))


def replicas_of_kv_heads(config: Qwen3Config, mesh: Mesh | AbstractMesh) -> int:
    """Return how often each key/value head is stored when `model` exceeds their number, else 1."""
    return max(1, mesh.shape["model"] // config.num_key_value_heads)


def check(config: Qwen3Config, mesh: Mesh | AbstractMesh, rules: Rules) -> list[str]:
    """Return one line for each axis of the model that the mesh does not divide, with the sizes that would."""
    model = mesh.shape["model"]
    kv_heads = config.num_key_value_heads * replicas_of_kv_heads(config, mesh)
    divisions = [
        ("num_attention_heads", config.num_attention_heads, model, "model"),
        ("num_key_value_heads", kv_heads, model, "model"),
        ("vocab_size", config.vocab_size, *_ways(mesh, rules["vocab"])),
        (
            "hidden_size",
            config.hidden_size,
            math.prod(mesh.shape[a] for a in rules["embed"]),
            " × ".join(rules["embed"]),
        ),
    ]
    if config.num_experts:
        divisions.append(("num_experts", config.num_experts, *_ways(mesh, rules["experts"])))
        divisions.append(("moe_intermediate_size", config.moe_intermediate_size, *_ways(mesh, rules["expert_mlp"])))
    if not all(config.is_moe_layer(i) for i in range(config.num_hidden_layers)):
        divisions.append(("intermediate_size", config.intermediate_size, model, "model"))
    return [
        f"{key} {size} does not divide over {axes} {ways}: use {_nearest(size, ways)}"
        for key, size, ways, axes in divisions
        if size % ways
    ]


def _ways(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> tuple[int, str]:
    return math.prod(mesh.shape[axis] for axis in axes), " × ".join(axes)


def _nearest(size: int, ways: int) -> str:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    below = max((d for d in divisors if d < ways), default=None)
    above = min((d for d in divisors if d > ways), default=None)
    return " or ".join(str(d) for d in (below, above) if d is not None)


def shardings(axes: Any, mesh: Mesh, rules: Rules) -> Any:
    """Map a tree of logical axis names (strings as `spec` takes them) to a tree of NamedShardings."""
    return jax.tree.map(lambda names: NamedSharding(mesh, spec(names, rules)), axes)

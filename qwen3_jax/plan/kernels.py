"""What JAX's splash attention costs: the one kernel in our steps that states no CostEstimate.

Three kernels, told by their names: the forward pass, the gradient of the queries, and that of keys and values. Each
walks over blocks of queries and of keys, the blocks above the diagonal left out, because our training attention (see
`ops.splash`) is causal; block sizes stand in the kernel's metadata.
"""

import re
from typing import NamedTuple

from qwen3_jax.plan.hlo import HBM, Instruction, Shape

PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products for each pair of blocks, of 2 · block · block · H FLOPs: the gradients compute the scores again."""
BLOCKS = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq"), "dkv": ("block_q_dkv", "block_kv_dkv")}


class Estimate(NamedTuple):
    """What a kernel costs beside reading its operands and writing its results once."""

    flops: float
    read_again_bytes: float
    """Of HBM: what is fetched once for each pair of blocks, less the first time."""


def splash(instruction: Instruction, operands: list[Shape]) -> Estimate | None:
    """Price a splash attention kernel by its operands, None if the instruction is none.

    Args:
        instruction: a call of a Pallas kernel.
        operands: its operands; queries [.., T, H] are the first floating-point one, keys [.., S, H] the second.
    """
    named = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name)
    sizes = {name: int(size) for name, size in re.findall(r'\\"(\w+)\\": (\d+)', instruction.attributes)}
    matrices = [a for a in operands if a.dtype in ("bf16", "f32") and len(a.dims) > 1]
    if named is None or not sizes or len(matrices) < 3:
        return None
    kind = named[1]
    q, k = matrices[0], matrices[1]
    T, H = q.dims[-2:]
    rows, columns = (sizes[name] for name in BLOCKS[kind])
    pairs = sum(-(-(i + 1) * rows // columns) for i in range(T // rows))  # blocks on or below the diagonal
    heads = q.elements // (T * H)
    flops = PRODUCTS[kind] * 2 * heads * pairs * rows * columns * H
    # The forward pass and dq fetch keys and values for each block of queries, dkv queries and slopes for each of keys.
    again = k if kind != "dkv" else q
    visits = heads * pairs * (columns if kind != "dkv" else rows)
    once = k.elements // H if kind != "dkv" else heads * T
    item = again.bytes / max(1, again.elements)
    return Estimate(flops, 2 * max(0, visits - once) * H * item * (again.space == HBM))

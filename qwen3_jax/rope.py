"""Rotary position embedding, plain and YaRN.

`config.json` → `inverse_frequencies` (host, float32, once) → `angles` (positions to cos and sin, float32, once per
forward, shared by all layers) → `rotate` (queries and keys, in their own dtype).

At position 40,000 one unit in the last place of an inverse frequency moves an angle by 0.002 rad, far beyond the
parity bound, so the frequencies here follow PyTorch's float32 roundings step by step instead of being "more exact".
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.config import Qwen3Config, RopeScaling


def inverse_frequencies(*, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Return the rotation speeds [H/2] in radians per position (float32) and the factor on cos and sin.

    Source: transformers 5.23 `modeling_rope_utils._compute_yarn_parameters`; YaRN, arXiv 2309.00071 §3.
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # Correctly rounded float32 power, as PyTorch's; numpy's own float32 power is not.
    wavelength = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    unscaled = np.float32(1) / wavelength
    if scaling is None:
        return unscaled, 1.0
    low, high = _correction_range(head_dim, theta, scaling)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1) - ramp
    stretched = np.float32(1) / (np.float32(scaling.factor) * wavelength)
    return stretched * (np.float32(1) - keep) + unscaled * keep, _attention_factor(scaling)


def _correction_range(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """Return the channel indices between which YaRN blends from unscaled to fully interpolated."""

    def channel(rotations: float) -> float:
        periods = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(periods) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def _attention_factor(scaling: RopeScaling) -> float:
    """Return what YaRN multiplies cos and sin with; attention scores grow by its square."""

    def temperature(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def angles_of(config: Qwen3Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin [B, T, H/2] in float32 of a model at integer positions [B, T]."""
    frequencies, factor = inverse_frequencies(
        head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling
    )
    return angles(positions, frequencies, factor)


def angles(positions: jax.Array, frequencies: np.ndarray, factor: float) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin [B, T, H/2] in float32 for integer positions [B, T].

    The product is an elementwise float32 multiply: a matrix product in bfloat16 breaks beyond position 256.
    """
    radians = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(radians) * np.float32(factor), jnp.sin(radians) * np.float32(factor)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, heads, H] by the half-split rule (channel i pairs with i + H/2), in the dtype of x."""
    cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

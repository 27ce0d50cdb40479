"""The TPU's training attention, its kernel interpreted on the CPU, against the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.ops import plain, splash


def test_packed_rows_and_their_gradients_equal_the_definition():
    B, T, N, K, H = 1, 256, 4, 2, 128
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, slope = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K, N), strict=True))
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [70, 60, 100, 26])[None])

    def run(attend):
        def loss(q, k, v):
            out = attend(q, k, v, segments, H**-0.5)
            return jnp.sum(out * slope), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = run(lambda *args: splash.attend(*args, interpret=True))
    (_, expected), slopes = run(plain.attend)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for mine, theirs in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))

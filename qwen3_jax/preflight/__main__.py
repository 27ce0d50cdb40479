"""The worker's process: `python -m qwen3_jax.preflight PIPE`, as `supervisor` starts it."""

import sys

from qwen3_jax.preflight.worker import work

if __name__ == "__main__":
    work(int(sys.argv[1]))

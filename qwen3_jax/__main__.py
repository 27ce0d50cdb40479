"""`python -m qwen3_jax`: the same as the `qwen3-jax` command."""

import sys

from qwen3_jax.cli import main

sys.exit(main())

"""Proof that a checkpoint's numbers equal PyTorch's, one layer in memory at a time.

folder → `reference` (transformers' own layers, weights through safetensors' own reader) and `subject` (this package's
loader and layers) on the same tokens → `compare`: every named place of every layer against its tolerance →
`report`: a table in the terminal → `page`: a self-contained HTML page.

Each layer runs twice on our side: fed with PyTorch's input of that layer (isolated: a fault shows in its own layer and
nowhere else) and with our own stream (accumulated: what a user gets). torch and transformers are imported only when a
comparison starts.
"""

from qwen3_jax.parity.compare import main, run
from qwen3_jax.parity.report import TOLERANCES, Difference, Measure, ParityError, Report, Tolerances, show

__all__ = ["TOLERANCES", "Difference", "Measure", "ParityError", "Report", "Tolerances", "main", "run", "show"]

"""Count the bytes of checkpoint files that are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from qwen3_jax.checkpoint import hf
from qwen3_jax.checkpoint.safetensors_file import SafetensorsFile


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Collect the size of every read, for a load that converts no dtype.

    Whole rows are read; slices of rows go through the mapping, and there only `convert` touches their bytes.
    """
    counts: list[int] = []
    read_into, convert = SafetensorsFile.read_into, hf.convert

    def counted_read(file, out, start):
        counts.append(out.nbytes)
        read_into(file, out, start)

    def counted_convert(out, values):
        counts.append(values.nbytes)
        convert(out, values)

    with (
        mock.patch.object(SafetensorsFile, "read_into", counted_read),
        mock.patch.object(hf, "convert", counted_convert),
    ):
        yield counts

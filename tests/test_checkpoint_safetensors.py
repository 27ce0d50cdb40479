"""The safetensors reader and writer against the reference implementation, malformed files and mutations."""

import json
import os
import random
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from qwen3_jax.checkpoint import safetensors_file
from qwen3_jax.checkpoint.safetensors_file import SafetensorsError, SafetensorsFile


def encode(header, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin: int, end: int, dtype: str = "F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry([2, 3], 0, 24), "b": entry([4], 24, 32, "BF16")}
PAYLOAD = bytes(range(32))
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# name: (file content, what the message must contain)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "header length beyond the file": (encode(GOOD, PAYLOAD, length=10_000), "truncated"),
    "header length 2^64-1": (encode(GOOD, PAYLOAD, length=2**64 - 1), "beyond the limit"),
    "header length 0": (encode(b"", PAYLOAD), "does not begin"),
    "header cut": (encode(GOOD, PAYLOAD, length=20), "not valid JSON"),
    "header not JSON": (encode(b"{hello}", PAYLOAD), "not valid JSON"),
    "header a list": (encode(b"[1, 2]"), "does not begin"),
    "header not UTF-8": (encode(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "header with leading space": (encode(b" " + json.dumps(GOOD).encode(), PAYLOAD), "does not begin"),
    "header with a second value": (encode(json.dumps(GOOD).encode() + b"{}", PAYLOAD), "not valid JSON"),
    "nested too deeply": (encode(DEEP), "nested"),
    "duplicate name": (encode(b'{"a":%s,"a":%s}' % ((json.dumps(GOOD["a"]).encode(),) * 2), PAYLOAD[:24]), "twice"),
    "duplicate field": (encode(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}'), "twice"),
    "entry not an object": (encode({"a": 3}), "needs exactly"),
    "missing dtype": (encode({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"), "needs exactly"),
    "unknown field": (encode({"a": entry([1], 0, 4) | {"stride": 1}}, b"1234"), "needs exactly"),
    "unknown dtype": (encode({"a": entry([1], 0, 4, "F128")}, b"1234"), "unknown dtype 'F128'"),
    "dtype a list": (encode({"a": entry([1], 0, 4) | {"dtype": ["F32"]}}, b"1234"), "unknown dtype"),
    "negative size": (encode({"a": entry([-1, -1], 0, 4)}, b"1234"), "shape"),
    "size a float": (encode({"a": entry([1.0], 0, 4)}, b"1234"), "shape"),
    "size true": (encode({"a": entry([True], 0, 4)}, b"1234"), "shape"),
    "size NaN": (encode(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"), "shape"),
    "size of 5000 digits": (
        encode(b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,4]}}' % (b"0" * 5000)),
        "JSON",
    ),
    "product overflows": (encode({"a": entry([2**62, 2**62], 0, 4)}, b"1234"), "impossible"),
    "empty but impossible": (encode({"a": entry([0, 2**62, 2**62], 0, 0)}), "impossible"),
    "rank 40": (encode({"a": entry([1] * 40, 0, 4)}, b"1234"), "shape"),
    "one offset": (encode({"a": entry([1], 0, 4) | {"data_offsets": [0]}}, b"1234"), "data_offsets"),
    "negative offset": (encode({"a": entry([1], -4, 0)}, b"1234"), "data_offsets"),
    "offsets reversed": (encode({"a": entry([1], 4, 0)}, b"1234"), "data_offsets"),
    "shape needs more": (encode({"a": entry([2], 0, 4)}, b"1234"), "needs 8"),
    "shape needs less": (encode({"a": entry([1], 0, 8)}, b"12345678"), "needs 4"),
    "end beyond the file": (encode({"a": entry([2], 0, 8)}, b"1234"), "truncated"),
    "trailing byte": (encode(GOOD, PAYLOAD + b"!"), "1 bytes after"),
    "cut by one byte": (encode(GOOD, PAYLOAD[:-1]), "truncated"),
    "overlap": (encode({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"12345678"), "overlaps"),
    "same bytes twice": (encode({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"), "overlaps"),
    "hole": (encode({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"x" * 12), "hole"),
    "hole at the start": (encode({"a": entry([1], 4, 8)}, b"12345678"), "hole"),
    "metadata a number": (encode({"__metadata__": {"format": 1}}), "__metadata__"),
    "metadata a list": (encode({"__metadata__": []}), "__metadata__"),
    "tensors without end": (encode({str(i): entry([0], 0, 0) for i in range(100_001)}), "100000"),
    "brackets without end": (encode(b'{"a":[' + b"[]," * 300_001 + b"[]]}"), "100000"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_by_name(tmp_path: Path, case: str):
    content, told = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.startswith("model.safetensors: ")
    assert told in message
    assert len(message) < 700
    assert "\n" not in message


def test_what_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, told in (("absent", "cannot be read"), ("pipe.safetensors", "regular"), (".", "regular")):
        with pytest.raises(SafetensorsError, match=told):
            SafetensorsFile(tmp_path / name)


def test_names_of_a_hostile_file_do_not_reach_the_terminal(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode({"\x1b[31m\n" * 1000: entry([1], 0, 3)}, b"123"))
    with pytest.raises(SafetensorsError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def accepted(path: Path, content: bytes) -> dict | None:
    """Read every byte of a file through our reader; None if it refuses with its own error."""
    path.unlink(missing_ok=True)  # ext4 flushes a file that is truncated and rewritten
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except SafetensorsError:
        return None
    return {name: (info.shape, file[name].tobytes()) for name, info in file.tensors.items()}


def test_mutations_are_refused_or_read_as_the_reference_reads_them(tmp_path: Path):
    """Every file we accept is accepted by the reference with the same tensors; whatever we refuse is a typed error."""
    rng = random.Random(0)
    seeds = [
        encode(GOOD, PAYLOAD),
        encode({"__metadata__": {"format": "pt"}} | GOOD, PAYLOAD),
        encode(
            {"c": entry([0, 3], 0, 0), "d": entry([], 0, 8, "I64"), "e": entry([3, 1], 8, 11, "F8_E4M3")}, PAYLOAD[:11]
        ),
    ]
    fragments = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"-",
        b"9",
        b"e9",
        b"null",
        b"true",
        b"0",
        b" ",
        b"\0",
        b"\xff",
    ]
    path = tmp_path / "m.safetensors"
    read = refused = 0
    for _ in range(4000):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(content))
            match rng.randrange(5):
                case 0:
                    content[at] ^= 1 << rng.randrange(8)
                case 1:
                    del content[at : at + rng.choice((1, 1, 4, 20))]
                case 2:
                    content[at:at] = rng.choice(fragments)
                case 3:
                    content[at : at + 1] = rng.choice(fragments)
                case 4:
                    other = rng.randrange(len(content))
                    content[at:at] = content[other : other + rng.choice((1, 4, 30))]
            if not content:
                content = bytearray(b"x")
        ours = accepted(path, bytes(content))
        if ours is None:
            refused += 1
            continue
        read += 1
        reference = {
            name: (tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in safetensors.deserialize(bytes(content))
        }
        assert ours == reference
    assert read > 100, "the mutations no longer reach the data"
    assert refused > 1000


TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def test_every_dtype_of_a_file_that_torch_wrote(tmp_path: Path):
    bits = torch.arange(-64, 64).to(torch.int8).repeat(3, 8)
    tensors = {name: (bits.abs() % 2 if name == "BOOL" else bits).clone().view(dtype) for name, dtype in TORCH.items()}
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt", "note": "ü"})
    file = SafetensorsFile(tmp_path / "t.safetensors")
    assert file.metadata == {"format": "pt", "note": "ü"}
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = file[name]
        assert view.dtype == safetensors_file.DTYPES[name]
        assert view.shape == tuple(tensor.shape)
        assert view.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        assert not view.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = view[0, 1]


def test_torch_reads_what_we_write(tmp_path: Path):
    rng = np.random.default_rng(0)
    arrays = {
        "odd": rng.normal(size=(3,)).astype(ml_dtypes.bfloat16),
        "wide": rng.normal(size=(5, 2)).astype(np.float32),
        "half": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "scalar": np.float32(7.5),
        "empty": np.zeros((0, 4), np.float32),
    }
    path, count = tmp_path / "t.safetensors", []
    readers = {name: lambda array=array: np.asarray(array) for name, array in arrays.items()}
    infos = {name: (np.dtype(array.dtype), np.shape(array)) for name, array in arrays.items()}
    safetensors_file.write(path, readers, infos, count.append)
    assert sum(count) == sum(np.asarray(array).nbytes for array in arrays.values())
    read = safetensors.torch.load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(read[name].shape) == np.shape(array)
        assert read[name].reshape(-1).view(torch.uint8).numpy().tobytes() == np.asarray(array).tobytes()
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert all(info.start % info.dtype.itemsize == 0 for info in file.tensors.values())

"""One of several processes of tests/test_train_state.py: save a state, restore another's, agree to stop.

`python -m tests.state_job ours theirs`, with QWEN3_* saying which process this is: writes folder `ours`, and reads
`theirs`, which one process wrote.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import distributed
from qwen3_jax.sharding import make_mesh
from qwen3_jax.train import signals
from qwen3_jax.train.data import merge
from qwen3_jax.train.state import Checkpoints, gather


def values() -> dict[str, np.ndarray]:
    """What the tests save: bits that arithmetic would not give back."""
    draw = np.random.default_rng(5)
    return {
        "weight": draw.integers(0, 1 << 32, (16, 8), np.uint32).view(np.float32),
        "half": draw.integers(0, 1 << 16, (8, 4), np.uint16).view(jnp.bfloat16),
        "count": np.asarray(7, np.int32),
    }


def on(mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    return {"weight": split, "half": split, "count": whole}


def arrays(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    places = on(mesh)
    whole = {name: np.asarray(value) for name, value in values().items()}
    return {
        name: jax.make_array_from_callback(value.shape, places[name], value.__getitem__)
        for name, value in whole.items()
    }


def abstract(mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    places = on(mesh)
    return {
        name: jax.ShapeDtypeStruct(np.shape(value), value.dtype, sharding=places[name])
        for name, value in values().items()
    }


def main() -> None:
    ours, theirs = sys.argv[1:]
    with distributed.session(distributed.detect(), timeout_s=60):
        mesh = make_mesh(fsdp=jax.device_count())
        index = jax.process_index()
        found = Checkpoints(theirs, keep=1)
        step = found.latest(abstract(mesh))
        assert step == 3, step
        tree, meta = found.restore(step, abstract(mesh))
        for name, value in values().items():
            for shard in tree[name].addressable_shards:
                assert np.asarray(shard.data).tobytes() == np.asarray(value)[shard.index].tobytes()
        assert meta == {"from": "one"}

        state = {"format": "x", "recipe": {}, "batches": 4, "lanes": {str(index): [index]}}
        merged = merge(gather(state))
        with Checkpoints(ours, keep=2) as checkpoints:
            for at in (1, 2, 3):
                checkpoints.save(at, arrays(mesh), {"data": merged})
            checkpoints.wait()
            assert checkpoints.steps() == [3, 2]
            assert checkpoints.latest(abstract(mesh)) == 3

            # A damaged file is found by whichever process hashes it, and known to all.
            distributed.once(lambda: [p.write_bytes(b"x") for p in Path(ours).glob("step_00000003/state/d/*")])
            others = Checkpoints(ours, keep=2)
            assert others.latest() == 2
            assert "damaged" in others.skipped[3]

        with signals.watch() as stop:
            assert not stop.agreed()
            if index == 1:
                stop.request("SIGTERM")
            assert stop.agreed()
        Path(f"{ours}.{index}.json").write_text(json.dumps({"processes": jax.process_count(), "merged": merged}))


if __name__ == "__main__":
    main()

"""One of several processes of tests/test_distributed.py: load, prefill, decode, write results once.

`python -m tests.cluster_job order.json`, with QWEN3_* saying which process this is; the order is read by all.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import cache, distributed, model, placement
from qwen3_jax.checkpoint import orbax_sharded
from qwen3_jax.config import Qwen3Config
from qwen3_jax.ops.mesh import on_mesh
from qwen3_jax.ops.plain import XLA
from qwen3_jax.request import Request
from qwen3_jax.runner import Batch, Runner
from qwen3_jax.sampling_params import SamplingParams
from qwen3_jax.sharding import RULES, make_mesh, parse_mesh
from tests import counting

STEPS = 4  # decoded tokens


def logits_of(folder, text, tokens):
    """Return logits [B, T + STEPS, V] of prefill and greedy decoding, what was read, and what was needed."""
    mesh = make_mesh(**parse_mesh(text), devices=jax.devices())
    with counting.bytes_read() as read:
        config, params = placement.load_sharded(folder, mesh, RULES["serve"], dtype="float32", ops=XLA)

    ops = on_mesh(XLA, mesh, RULES["serve"])
    graphdef, _ = model.declare(config, dtype=jnp.dtype("float32"), ops=ops)
    everywhere = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, donate_argnums=1)
    def step(params, layers, tokens, start):
        if layers is None:
            capacity = tokens.shape[1] + STEPS
            layers = cache.init(config, batch=len(tokens), capacity=capacity, dtype=jnp.dtype("float32"), ops=ops)
            fresh = True
        else:
            fresh = False
        network = nnx.merge(graphdef, params)
        positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, layers = network(tokens, positions=positions, cache=layers, fresh=fresh)
        return jax.lax.with_sharding_constraint(network.logits(hidden), everywhere), layers

    outs, layers, start = [], None, 0
    for _ in range(1 + STEPS):
        logits, layers = step(params, layers, tokens, np.int32(start))
        outs.append(np.asarray(logits.addressable_data(0)))
        start += tokens.shape[1]
        tokens = outs[-1][:, -1:].argmax(-1).astype(np.int32)
    needed = 0
    for path, leaf in placement.dotted(params).items():
        repeats = mesh.shape["model"] // 2 if path.endswith(placement.REPEATED) and mesh.shape["model"] > 2 else 1
        shards = {
            tuple((s.start or 0) // repeats if i == 0 else (s.start or 0) for i, s in enumerate(shard.index)): shard
            for shard in leaf.addressable_shards
        }
        needed += sum(shard.data.nbytes for shard in shards.values())
    return np.concatenate(outs, axis=1), sum(read), needed, params


def sampled(config, params, ops, mesh=None):
    """Return the tokens [n, B] of `runner.Batch`, sampled with a seed per row; the mesh splits rows over processes."""
    runner = Runner(config, params, dtype="float32", ops=ops if mesh is None else on_mesh(ops, mesh, RULES["serve"]))
    settings = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    requests = [Request([5, 6, 7 + row, 9], settings, seed=row, stop_ids=(), limit=8) for row in range(3)]
    batch = Batch(runner, requests)
    calls = [batch.first, batch.decode(7)]
    return np.concatenate([distributed.fetch(emitted["token"]) for emitted in calls])


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    with distributed.session(distributed.detect(), timeout_s=60):
        tokens = np.asarray(distributed.share(order["tokens"] if distributed.is_main() else None), np.int32)
        for case in order["cases"]:
            logits, read, needed, params = logits_of(case["folder"], case["mesh"], tokens)
            mine = {"read": read, "needed": needed, "devices": jax.device_count(), "local": jax.local_device_count()}
            Path(f"{case['out']}.process{jax.process_index()}.json").write_text(json.dumps(mine))

            case_mesh = make_mesh(**parse_mesh(case["mesh"]), devices=jax.devices())
            config = placement.for_mesh(Qwen3Config.from_file(case["folder"]), case_mesh, RULES["serve"])
            drawn = sampled(config, params, XLA, case_mesh) if case["sampled"] else np.zeros(0)

            def write(case=case, logits=logits, drawn=drawn):
                with open(f"{case['out']}.log", "a") as log:
                    log.write(f"written by process {jax.process_index()}\n")
                np.save(f"{case['out']}.npy", logits)
                np.save(f"{case['out']}.tokens.npy", drawn)

            distributed.once(write)
            config = Qwen3Config.from_file(case["folder"])
            orbax_sharded.save(f"{case['out']}.orbax", config, placement.without_repeats(params, config))
            assert Path(f"{case['out']}.npy").exists()  # on every process, as soon as `once` returns
        if distributed.is_main():
            print(f"results of {len(order['cases'])} cases")
        try:
            distributed.once(lambda: Path("/nonexistent/x").write_text(""))
        except Exception as error:
            Path(f"{order['cases'][0]['out']}.failure{jax.process_index()}").write_text(
                f"{type(error).__name__}: {error}"
            )


if __name__ == "__main__":
    main()

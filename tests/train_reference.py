"""The PyTorch side of the training tests: transformers' models, torch's autograd, optimiser and formulas."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from qwen3_jax import checkpoint
from qwen3_jax.checkpoint import names
from qwen3_jax.config import Qwen3Config
from qwen3_jax.model import Params
from qwen3_jax.ops import for_platform
from qwen3_jax.train import objectives, optim, stacked
from qwen3_jax.train.step import RefusalConfig, TrainStep
from tests import tiny


def batch(rng: np.random.Generator, rows: int, length: int, vocab: int = 90) -> dict[str, np.ndarray]:
    """Draw rows of two segments and some padding, with weights that are not all one."""
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    weights = rng.choice(np.array([0, 0.5, 1, 1], np.float32), (rows, length))
    for row in range(rows):
        cut, end = length // 3 + row % 3, length - row % 4
        segments[row, cut:end], segments[row, end:] = 2, 0
        positions[row, cut:] -= cut
        weights[row, end:] = 0
    targets = np.roll(tokens, -1, axis=1)
    return {
        "tokens": tokens, "positions": positions, "segment_ids": segments, "targets": targets, "weights": weights,
    }  # fmt: skip


def load(folder: Path) -> tuple[Qwen3Config, Params]:
    """Read a folder of `tiny.save` as stacked float32 parameters."""
    config, params = checkpoint.load(folder, dtype="float32", progress=False)
    return config, stacked.stack(config, params)


def make_step(
    config: Qwen3Config,
    *,
    objective: objectives.ObjectiveConfig | None = None,
    optimizer: optim.OptimizerConfig | None = None,
    rate: optim.Schedule = lambda done: jnp.float32(1e-2),
    refusal: RefusalConfig | None = None,
    groups: int = 1,
    ops: Any = None,
    mesh: Any = None,
    rules: Any = None,
    remat: str = "none",
    dtype: str = "float32",
    param_dtype: str = "float32",
) -> tuple[stacked.Network, TrainStep]:
    """Make a network and its step."""
    network = stacked.Network(
        config,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        ops=for_platform("cpu") if ops is None else ops,
        groups=groups,
        remat=remat,
    )
    made = TrainStep(
        objectives.make(network, objective or objectives.ObjectiveConfig(chunk=5)),
        optim.Optimizer(optimizer or optim.OptimizerConfig(), rate),
        refusal or RefusalConfig(),
        abstract=network.abstract(),
        shardings=None if mesh is None else network.shardings(mesh, rules),
        mesh=mesh,
        rules=rules,
    )
    return network, made


def copy(tree: Any) -> Any:
    """Copy arrays, for what a step will consume."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def forward(model: Any, arrays: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Run transformers on packed rows, tokens see earlier tokens of their own segment: logits, router logits."""
    segments = torch.as_tensor(arrays["segment_ids"])
    length = segments.shape[1]
    allowed = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    more = {"output_router_logits": True} if hasattr(model.config, "num_experts_per_tok") else {}
    out = model.model(
        input_ids=torch.as_tensor(arrays["tokens"]),
        position_ids=torch.as_tensor(arrays["positions"]),
        attention_mask=mask,
        use_cache=False,
        **more,
    )
    return model.lm_head(out.last_hidden_state).float(), getattr(out, "router_logits", ())


def loss(model: Any, arrays: dict[str, np.ndarray], *, z: float = 0.0, balance: float = 0.0, router_z: float = 0.0):
    """Return the weighted mean cross-entropy with the auxiliary losses, by their formulas."""
    logits, all_router_logits = forward(model, arrays)
    weights = torch.as_tensor(arrays["weights"])
    targets = torch.as_tensor(arrays["targets"]).long()
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    each = each + z * torch.logsumexp(logits, -1) ** 2
    total = (each * weights).sum() / weights.sum()
    if balance or router_z:
        real = torch.as_tensor(arrays["segment_ids"]).reshape(-1) != 0
        top, layers = model.config.num_experts_per_tok, len(all_router_logits)
        for router_logits in all_router_logits:
            router_logits = router_logits.reshape(len(real), -1)[real]
            p = torch.softmax(router_logits, -1)
            chosen = torch.zeros_like(p).scatter(1, p.topk(top).indices, 1.0)
            total = total + balance / layers * p.shape[1] * (chosen.mean(0).detach() * p.mean(0)).sum()
            total = total + router_z / layers * (torch.logsumexp(router_logits, -1) ** 2).mean()
    return total


def gradients(model: Any, config: Qwen3Config) -> dict[str, np.ndarray]:
    """Return torch's gradients by the dotted path of the parameter here."""
    found: dict[str, np.ndarray] = {}
    for name, weight in model.named_parameters():
        grad = weight.grad.float().numpy()
        parts = names.unfuse(config, name, grad.shape)
        if parts is None:
            found[name] = grad
        else:
            flat = grad.reshape(-1)
            found |= {n: flat[at : at + shape[0] * shape[1]].reshape(shape) for n, (shape, at) in parts.items()}
    return {
        entry.dotted: np.stack([found[name] for name in entry.names]).reshape(entry.shape)
        if entry.stacked
        else found[entry.names[0]].reshape(entry.shape)
        for entry in names.table(config)
    }


def build(folder: Path, *, moe: bool) -> Any:
    """Save a tiny model and return the transformers side of it, in training mode, on one thread."""
    torch.set_num_threads(1)
    _, model = tiny.save(folder, moe=moe)
    return model.train()

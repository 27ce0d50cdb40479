"""Serve a Qwen3 model with Ray Serve: each replica is one engine behind the same HTTP routes as `qwen3-jax serve`.

    pip install 'qwen3-jax[ray]'
    cd scripts/launch && serve run serve_ray:app model=/models/Qwen3-8B gpus=1 max_replicas=4

Arguments, all optional but `model`: `gpus` or `tpus` per replica, `mesh`, `rows`, `cache_tokens`, `dtype`, `replicas`,
`max_replicas`, `queue` (requests per replica, running and waiting, that Ray scales by), `name`, `api_key`.
"""

import dataclasses
import os
import signal
import threading
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `serve run`, which come as text."""

    model: str
    name: str = ""
    mesh: str = ""
    dtype: str = ""
    api_key: str = ""
    gpus: float = 0
    tpus: float = 0
    rows: int = 16
    cache_tokens: int = 0
    replicas: int = 1
    max_replicas: int = 1
    queue: int = 24

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "Settings":
        """Read them; an unknown or malformed one is a ValueError."""
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        if unknown := sorted(arguments.keys() - kinds.keys()):
            raise ValueError(f"unknown arguments {', '.join(unknown)}: have {', '.join(kinds)}")
        if not arguments.get("model"):
            raise ValueError("give model=FOLDER")
        settings = cls(**{name: kinds[name](value) for name, value in arguments.items()})  # pyright: ignore[reportCallIssue]
        if not 1 <= settings.replicas <= settings.max_replicas:
            raise ValueError(f"replicas is {settings.replicas}: give 1 to max_replicas, {settings.max_replicas}")
        return settings


def app(arguments: dict[str, Any]) -> Any:
    """Return the application; Ray calls the function within on each replica."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    settings = Settings.of(arguments)

    def routes() -> Any:
        return build(settings)

    resources = {"TPU": settings.tpus} if settings.tpus else {}
    replica: Any = serve.deployment(
        serve.ingress(routes)(),
        name="qwen3-jax",
        max_ongoing_requests=1024,  # the engine queues, and refuses what is too much
        ray_actor_options={"num_gpus": settings.gpus, "resources": resources},
        autoscaling_config={
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.queue,
            "downscale_delay_s": 600,
        },
        graceful_shutdown_timeout_s=120,
    )
    return replica.bind()


def build(settings: Settings) -> Any:
    """Load the model, start its engine, and return the routes: what a replica does when it begins."""
    from qwen3_jax.engine.options import EngineOptions
    from qwen3_jax.loaded import load_model
    from qwen3_jax.server.app import create_app
    from qwen3_jax.server.engines import engine_for
    from qwen3_jax.server.metrics import Metrics
    from qwen3_jax.server.options import ServerOptions

    model = load_model(settings.model, dtype=settings.dtype or None, mesh=settings.mesh or None, backbone=None)
    metrics = Metrics(settings.name or model.name)
    engine_options = EngineOptions(rows=settings.rows, cache_tokens=settings.cache_tokens or None)
    engine = engine_for(model, engine_options, observer=metrics)
    metrics.watch(engine)
    engine.start()
    threading.Thread(target=_end_with, args=(engine,), daemon=True).start()
    keys = settings.api_key or os.environ.get("QWEN3_JAX_API_KEY", "")
    options = ServerOptions(names=(settings.name,) if settings.name else (), api_keys=(keys,) if keys else ())
    app = create_app(engine, options, metrics=metrics)
    app.state.serving.warm_up()
    return app


def _end_with(engine: Any) -> None:
    """End the process when its engine has failed; Ray starts another."""
    while engine.failure is None:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)

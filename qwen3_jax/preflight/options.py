"""What to check, and in which stages: what a supervisor and its worker agree on."""

import dataclasses

STAGES = ("importing JAX", "connecting", "listing devices", "running collectives", "checking memory", "finished")
BEAT_S = 1.0
"""Between signs of life."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        mesh: "data=1,expert=4,model=4"; None puts all devices on `model`.
        model: a folder or a released name, for divisibility and memory; None leaves both out.
        rules: a table of `sharding.RULES`.
        dtype: of parameters and cache, "float32" or "bfloat16".
        batch: rows of the cache; None for one per part.
        context: slots per row.
        memory_gib: of each device, where the platform does not tell.
        mib: size of the array that each device contributes to a collective.
        rounds: timed repetitions of each collective.
        start_timeout_s: how long to wait for processes to appear.
        stage_timeout_s: how long any stage of the checks may take.
        patience_s: silence after which a process counts as stopped.
    """

    mesh: str | None = None
    model: str | None = None
    rules: str = "serve"
    dtype: str = "bfloat16"
    batch: int | None = None
    context: int = 4096
    memory_gib: float | None = None
    mib: float = 4.0
    rounds: int = 10
    start_timeout_s: float = 300.0
    stage_timeout_s: float = 300.0
    patience_s: float = 20.0

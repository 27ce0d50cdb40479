"""What libtpu on this host compiles today: the calibration programs, and small plans end to end. No TPU is needed."""

import importlib.util

import pytest

from qwen3_jax.plan import chips, compile, cost, hlo
from tests.tpu_programs import CASES, compile_case

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'qwen3-jax[tpu]'"
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_the_compiler_at_hand_costs_what_a_hand_counts(name):
    case = CASES[name]
    text, memory = compile_case(case)
    slice_ = chips.topology(case.topology)
    found = cost.walk(hlo.parse(text), slice_.chip, partitions=slice_.devices)
    assert (found.flops, found.ici_bytes, found.unpriced) == (case.flops, case.ici_bytes, [])
    if case.hbm_bytes is not None:
        assert found.hbm_bytes == pytest.approx(case.hbm_bytes, rel=0.01)
    if name == "append":
        assert memory.alias_size_in_bytes == 512 << 20


@pytest.mark.parametrize(("model", "mesh"), [("Qwen3-0.6B", "model=4"), ("Qwen3-4B", "auto")])
def test_a_decode_step_copies_nothing_and_updates_its_cache_in_place(model, mesh):
    plan = compile.plan(model, "v5e:2x2", batch=8, context=1024, mesh=mesh, phases=("decode",), compile_best=1)
    assert plan.error is None
    step = plan.steps["decode"]
    assert step.cost.copied_bytes == 0
    assert not step.cost.gathered
    assert step.aliased_bytes == step.memory.cache
    assert not step.cost.unpriced
    # Weights (but for the embedding's rows) and cache are read once; all else is small.
    assert step.cost.hbm_bytes == pytest.approx(step.memory.weights + step.memory.cache, rel=0.08)


def test_a_program_that_does_not_fit_is_a_plan_that_says_so():
    plan = compile.plan("Qwen3-0.6B", "v5e:2x2", batch=8, context=40960, mesh="data=4", phases=("decode",))
    assert not plan.fits

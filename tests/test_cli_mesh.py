"""The subcommands about meshes and machines, as a user types them."""

import json

import pytest

from qwen3_jax import cli
from qwen3_jax.config import Qwen3Config


def test_shardings_sums_up_to_the_model(capsys):
    assert cli.main(["shardings", "Qwen3-30B-A3B", "--mesh", "data=1", "--json", "--all"]) == 0
    table = json.loads(capsys.readouterr().out)
    total = sum(row["bytes_per_device"] * row["times"] for row in table["rows"] if row["kind"] == "parameter")
    assert total == 2 * Qwen3Config.from_name("Qwen3-30B-A3B").num_parameters()


def test_shardings_of_what_does_not_divide(capsys):
    assert cli.main(["shardings", "Qwen3-0.6B", "--mesh", "model=3"]) == 1
    assert "num_attention_heads 16 does not divide over model 3" in capsys.readouterr().out


def test_fleet(capsys):
    assert cli.main(["plan", "Qwen3-8B", "--fleet", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (row,) = [r for r in rows if r["dtype"] == "bfloat16" and r["context"] == 4096]
    assert row["weights"] == 2 * 8_190_735_360
    assert row["smallest"]["H100"] == 1
    assert row["smallest"]["v5e"] == 4  # 16.4 GB do not fit one chip of 16 GB


def test_preflight_of_one_process(capsys):
    assert cli.main(["preflight", "--mesh", "data=2,model=4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert all(row["right"] for row in report["collectives"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["plan", "Qwen3-9B", "--topology", "v5e:2x2"], "no such model"),
        (["plan", "Qwen3-8B", "--topology", "v5e:3x3"], "topology 'v5e:3x3' does not exist: v5e has"),
        (["plan", "Qwen3-8B"], "--topology is missing"),
        (["shardings", "Qwen3-8B", "--mesh", "tensor=2"], "mesh axis 'tensor' is unknown"),
        (["shardings", "nowhere", "--mesh", "model=2"], "nowhere"),
        (["preflight", "--mesh", "model=0"], "mesh axis model has size '0'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(argv, says, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1

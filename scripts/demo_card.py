"""Write the demo's model card, README.md and budget.png, from what `qwen3-jax eval` measured.

python scripts/demo_card.py FOLDER EVAL [MOE_EVAL]      # as runs/demo/dense/eval, and runs/demo/moe/eval beside folder
"""

import json
import sys
from pathlib import Path
from typing import Any

from qwen3_jax.evaluate import report

CARD = """---
language: [en, ja, ko]
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---

# A tiny Qwen3 that reasons

{parameters:.1f} M parameters in Qwen3's architecture, trained from nothing on generated problems with answers that can
be checked: arithmetic with carries, comparing, sorting, counting, days and dates, stories and follow-up questions, in
English, Japanese and Korean. It thinks in `<think>`, digit by digit; `/no_think` or `enable_thinking=False` asks for
the answer alone; a thinking budget cuts the reasoning short. It knows nothing else.

Made by `scripts/make_demo.sh` of qwen3_jax: pre-training on plain text, long-thinking fine-tuning, fusion of thinking
and non-thinking. One problem in sixteen, chosen by a hash, is held out of every stage, in any language and phrasing.

## Held-out problems

Right answers in per cent, with 95% intervals (Wilson):
`qwen3-jax eval {model} --output DIR --problems {problems} --seed {seed}`.

{tables}
![Right answers by thinking budget](budget.png)
{sibling}
Limits: numbers longer than four digits, lists longer than six and everything outside these families are beyond it.
"""

SIBLING = """
## Dense and mixture of experts

A sibling whose layers have {experts} experts, {chosen} of them active, computes as much per token. It was trained
on the same data by the same script (`scripts/make_demo.sh OUT moe`) and answered the same problems; the curves above
show both. Right answers in per cent, greedy:

| | {names} |
| --- | {rule} |
{rows}"""


def rate(mode: dict[str, Any]) -> str:
    """Return the rate of all tasks in per cent, with its interval."""
    low, high = mode["interval"]
    return f"{100 * mode['rate']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def read(folder: Path) -> dict[str, Any]:
    """Return an evaluation's results; those written without the active parameters are of a dense model."""
    results = json.loads((folder / "results.json").read_text())
    results["settings"].setdefault("active_parameters", results["settings"]["parameters"])
    return results


def compare(models: dict[str, dict[str, Any]], config: dict[str, Any]) -> str:
    """Return the section that compares models of the same problems, a column each."""
    sizes = {"parameters, M": "parameters", "active per token, M": "active_parameters"}
    rows = {
        told: [f"{results['settings'][size] / 1e6:.2f}" for results in models.values()] for told, size in sizes.items()
    }
    found = [{mode["name"]: mode for mode in results["modes"] if not mode["sampled"]} for results in models.values()]
    for name in found[0]:
        told = name.removesuffix(", greedy").replace("thinking, budget", "thinking, at most")
        rows[told] = [rate(modes[name]) if name in modes else "" for modes in found]
    return SIBLING.format(
        experts=config["num_experts"],
        chosen=config["num_experts_per_tok"],
        names=" | ".join(models),
        rule=" | ".join(["---"] * len(models)),
        rows="".join(f"| {' | '.join([told, *cells])} |\n" for told, cells in rows.items()),
    )


def write(folder: Path, measured: Path, moe: Path | None) -> None:
    """Put the card and the curve into the model folder."""
    results, sibling = read(measured), ""
    settings = results["settings"]
    if moe is not None:
        models = {"dense": results, "mixture of experts": read(moe)}
        sibling = compare(models, json.loads((moe.parent / "folder" / "config.json").read_text()))
        report.plot(models, folder / "budget.png")
    else:
        report.plot({"thinking, by budget": results}, folder / "budget.png")
    card = CARD.format(
        parameters=settings["parameters"] / 1e6,
        model="qwen3_jax/demo",
        problems=settings["problems_per_task"],
        seed=settings["seed"],
        tables=(measured / "results.md").read_text(encoding="utf-8"),
        sibling=sibling,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)

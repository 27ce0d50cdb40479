"""Write the demo's model card, README.md and budget.png, from what `qwen3-jax eval` measured.

python scripts/demo_card.py FOLDER EVAL [MOE_EVAL]      # EVAL as in runs/demo/dense/eval
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

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

The same data and active size, trained by the same script (`scripts/make_demo.sh OUT moe`), greedy:

| | parameters, M | thinking | non-thinking |
| --- | --- | --- | --- |
{rows}"""


def rate(results: dict[str, Any], *, thinking: bool) -> str:
    """Return the greedy rate of all tasks without a budget, with its interval."""
    (mode,) = (m for m in results["modes"] if (m["thinking"], m["budget"], m["sampled"]) == (thinking, None, False))
    low, high = mode["interval"]
    return f"{100 * mode['rate']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def write(folder: Path, measured: Path, moe: Path | None) -> None:
    """Put the card and the curve into the model folder."""
    results = json.loads((measured / "results.json").read_text())
    settings, sibling = results["settings"], ""
    if moe is not None:
        rows = ""
        for name, found in (
            ("dense", results),
            ("8 experts, 2 active", json.loads((moe / "results.json").read_text())),
        ):
            size = found["settings"]["parameters"] / 1e6
            rows += f"| {name} | {size:.1f} | {rate(found, thinking=True)} | {rate(found, thinking=False)} |\n"
        sibling = SIBLING.format(rows=rows)
    card = CARD.format(
        parameters=settings["parameters"] / 1e6,
        model="qwen3_jax/demo",
        problems=settings["problems_per_task"],
        seed=settings["seed"],
        tables=(measured / "results.md").read_text(encoding="utf-8"),
        sibling=sibling,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(measured / "budget.png", folder / "budget.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)

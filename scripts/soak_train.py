"""Break training in every way of the fault table and check what must hold: T1 to T11, each with an exit code.

    python scripts/soak_train.py [--only T5] [--scale 0.1] [--folder DIR]

Runs `qwen3-jax train` on a tiny model, see `soak_lab`. A case prints one line with what it measured; the exit code is
0 when all hold, else 1. `--scale` multiplies the numbers of trials: 50 kills, 20 signals, 200 flipped bits.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.soak_lab import (
    BETWEEN_SAVES,
    EXIT_BAD,
    EXIT_HUNG,
    EXIT_REFUSED,
    EXIT_STOPPED,
    SAVE_EVERY,
    STEPS,
    Broken,
    Lab,
    Run,
    require,
)


def t1(lab: Lab) -> str:
    """SIGTERM at random steps: the current step is saved, exit 143 within 30 s; the run goes on bit-equal."""
    trials, draw = lab.trials(20), random.Random(1)
    steps = 12 * trials + 40  # more than the trials can use up
    straight, run, slowest = lab.reference(steps=steps), lab.run("term", steps=steps), 0.0
    for i in range(trials):
        at = max(run.metrics(), default=0) + draw.randint(1, 8)
        run.start(fault="slow 0.01")
        run.until(lambda at=at: max(run.metrics(), default=0) >= at)
        run.signal(signal.SIGTERM)
        asked = time.monotonic()
        code = run.wait(60)
        slowest = max(slowest, time.monotonic() - asked)
        require(code == EXIT_STOPPED, f"trial {i}: exit {code}, expected 143: {run.log()}")
        made, saved = max(run.metrics()), run.latest()
        require(saved == made, f"trial {i}: step {made} was made, {saved} saved")
    require(slowest < 30, f"{slowest:.1f} s from the signal to the end")
    require(run.start().wait() == 0, run.log())
    run.require_equal(straight, steps)
    return f"{trials} signals, slowest exit {slowest:.2f} s, no step lost, bit-equal at the end"


def t2(lab: Lab) -> str:
    """SIGKILL at random moments, half of them while files are being written: at most the save interval is lost."""
    kills, draw = lab.trials(50), random.Random(2)
    steps = 24 * kills + 40  # more than the trials can use up
    straight, run = lab.reference(steps=steps), lab.run("kill", steps=steps)
    folder, lost = run.folder / "checkpoints", {"between": [0], "during": [0]}

    def partial() -> set[str]:
        return {path.name for path in folder.glob("*.partial")}

    for i in range(kills):
        before, old, starts = max(run.metrics(), default=0), partial(), len(run.events("started"))
        run.start(fault="slow 0.005")
        if i % 2:  # at a random moment of a save
            run.until(lambda old=old: bool(partial() - old))
            time.sleep(draw.random() * 0.1)
            run.until(lambda: bool(partial()))
        elif i % 4:  # before the first step
            run.until(lambda starts=starts: len(run.events("started")) > starts)
            time.sleep(draw.random() * 0.2)
        else:
            at = before + draw.randint(1, 12)
            run.until(lambda at=at: max(run.metrics(), default=0) >= at)
            time.sleep(draw.random() * 0.01)
        run.signal(signal.SIGKILL)
        code = run.wait()
        require(code == -signal.SIGKILL, f"kill {i}: exit {code}, the run had ended: {run.log()}")
        when = "during" if partial() else "between"
        made, saved = max(run.metrics(), default=0), run.latest()
        lost[when].append(made - saved)
        require(made - saved <= SAVE_EVERY, f"kill {i}, {when} a save: step {made} was made, {saved} saved")
    during = len(lost["during"]) - 1
    require(during >= int(0.4 * kills), f"only {during} of {kills} kills came during a save")
    require(run.start().wait() == 0, run.log())
    require(not list(folder.glob("*.partial*")), "partial folders are left")
    run.require_equal(straight, steps)
    return (
        f"{kills} kills, {during} during a save; at most {max(lost['between'])} steps lost between saves,"
        f" {max(lost['during'])} during one, of every {SAVE_EVERY}; bit-equal at the end"
    )


def t3(lab: Lab) -> str:
    """Killed and resumed five times: losses, parameters, optimiser, RNG, data state and examples are bit-equal."""
    straight, run, draw = lab.reference(), lab.run("resume"), random.Random(3)
    for at in sorted(draw.sample(range(3, STEPS - 2), 5)):
        run.start(fault="slow 0.02")
        run.until(lambda at=at: max(run.metrics(), default=0) >= at)
        run.signal(signal.SIGKILL)
        code = run.wait()
        require(code == -signal.SIGKILL, f"exit {code}, the run had ended: {run.log()}")
    require(run.start().wait() == 0, run.log())
    run.require_equal(straight, STEPS)
    return f"killed and resumed 5 times, {STEPS} steps bit-equal"


def t4(lab: Lab) -> str:
    """1, 2, 4 devices, 2 processes, again 1 device: the same examples, the loss within 1e-6 after the first change."""
    straight, run = lab.reference(), lab.run("mesh")
    for processes, devices, at in ((1, 1, 8), (1, 2, 16), (1, 4, 24), (2, 2, 32), (1, 1, STEPS)):
        count = processes * devices
        mesh = [f"--run.mesh=fsdp={count}"] if count > 1 else []
        run.start(*mesh, devices=devices, processes=processes, fault="slow 0.05" if at < STEPS else "")
        if at < STEPS:
            run.until(lambda at=at: max(run.metrics(), default=0) >= at)
            os.kill(run.processes[-1].pid, signal.SIGTERM)  # one of them is asked, all stop
        require(run.wait() == (0 if at == STEPS else EXIT_STOPPED), run.log())
    mine, theirs = run.metrics(), straight.metrics()
    worst = max(abs(mine[s]["loss"] / theirs[s]["loss"] - 1) for s in theirs)
    starts = run.events("started")
    shared = range(starts[3]["step"] + 1, starts[4]["step"] + 1)
    run.require_equal(straight, STEPS, 1e-4, shared)  # rounding of other reductions grows over the steps
    counts = [event["devices"] for event in starts]
    require(counts == [1, 2, 4, 4, 1], f"devices {counts}")
    changed = starts[1]["step"] + 1
    first = abs(mine[changed]["loss"] / theirs[changed]["loss"] - 1)  # before it, both were one device
    require(first <= 1e-6, f"the first loss on another mesh is off by {first:.1e}")
    return f"devices {counts}, the same examples, first loss on a new mesh within {first:.1e}, all within {worst:.1e}"


def t5(lab: Lab) -> str:
    """Flipped bits, removed and cut files: all found and named, the step before is used, training goes on from it."""
    straight, draw = lab.reference(), random.Random(5)
    run = lab.run("damaged")
    shutil.copytree(straight.folder, run.folder)
    step = run.folder / "checkpoints" / f"step_{STEPS:08d}"
    paths = sorted(path for path in step.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in paths]
    flips = lab.trials(200)
    for i in range(flips):
        [path] = draw.choices(paths, sizes if i % 2 else [1 if size else 0 for size in sizes])
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        _require_found(run, path, step)
        path.write_bytes(good)
    for path in paths:
        good = path.read_bytes()
        for cut in (None, 0, len(good) // 2, len(good) - 1):
            if cut is None:
                path.unlink()
            elif good:
                path.write_bytes(good[:cut])
            else:
                continue
            _require_found(run, path, step)
            path.write_bytes(good)
    path = max(paths, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    require(run.start().wait() == 0, run.log())
    require("checkpoint skipped" in run.said(), f"nothing said of the damage: {run.log()}")
    require(run.events("started")[-1]["step"] == STEPS - BETWEEN_SAVES, "did not begin at the step before")
    run.require_equal(straight, STEPS)
    return f"{flips} flips and {4 * len(paths)} removals and cuts found, resumed from the step before, bit-equal"


def _require_found(run: Run, path: Path, step: Path) -> None:
    checkpoints = run.checkpoints()
    latest = checkpoints.latest()
    require(latest == STEPS - BETWEEN_SAVES, f"damage of {path.name} was not found: step {latest} is used")
    name = str(path.relative_to(step))
    require(name in checkpoints.skipped[STEPS] or name == "SHA256SUMS", f"{name} is not named")


def t6(lab: Lab) -> str:
    """No room during two saves: training goes on, bit-equal. No room any more: it stops, the last save is good."""
    straight = lab.reference()
    run = lab.run("full")
    require(run.start(fault="small_disk 3 4").wait() == 0, run.log())
    require(run.said().count("was not saved") == 2, f"expected two failed saves: {run.log()}")
    run.require_equal(straight, STEPS)
    run = lab.run("full-for-ever")
    code = run.start(fault="small_disk 3 1000").wait()
    require(code == EXIT_BAD, f"exit {code}, expected 2: {run.log()}")
    require("saves in a row failed" in run.said(), run.log())
    require(run.latest() == 2 * BETWEEN_SAVES, f"latest is {run.latest()}")
    require(run.start().wait() == 0, run.log())
    run.require_equal(straight, STEPS)
    return "2 failed saves passed over, bit-equal; with 3 in a row exit 2 and the last good checkpoint used"


def t7(lab: Lab) -> str:
    """A save at every step, and an end right after one: nothing torn, the end waits."""
    straight, run = lab.reference(), lab.run("every-step", save_every=2)  # every step, and at 1 it would wait
    require(run.start().wait() == 0, run.log())
    checkpoints = run.checkpoints()
    require(checkpoints.steps() == [STEPS, STEPS - 1, STEPS - 2], f"steps {checkpoints.steps()}")
    require(not any(map(checkpoints.verify, checkpoints.steps())), "a torn step")
    run.require_equal(straight, STEPS)
    return f"{STEPS} saves in {STEPS} steps, the last three verify, bit-equal"


def t8(lab: Lab) -> str:
    """A loss that is no number, or a spike: the step is refused, the state stays as it was; k in a row end the run."""
    run = lab.run("poison", steps=12, save_every=1, keep=12)
    require(run.start(fault="poison 6 7").wait() == 0, run.log())
    refused = run.events("refused")
    require([event["at"] for event in refused] == [6, 7], f"refused {refused}")
    before, after = run.state(5), run.state(7)
    trained = [name for name in before if name.startswith(("params", "opt", "step", "rng"))]
    changed = [name for name in trained if before[name] != after[name]]
    require(not changed, f"refused steps changed {changed}")
    require(run.metrics()[12]["refused_total"] == 2, "the counter is wrong")
    run = lab.run("spike", more="[refusal]\nspike_sigma = 6.0\nwindow = 8\n")
    require(run.start(fault="garble 31 31").wait() == 0, run.log())
    spikes = [event["at"] for event in run.events("refused")]
    require(spikes == [31], f"refused {spikes}, the spike is at 31")
    run = lab.run("poisoned", more="[refusal]\nstop_after = 3\n")
    code = run.start(fault="poison 6 1000").wait()
    require(code == EXIT_REFUSED, f"exit {code}, expected 3: {run.log()}")
    ids = [id_ for event in run.events("refused") for id_ in event["examples"]]
    require(len(run.events("refused")) == 3, "expected three refusals")
    require(ids and all(id_ in run.said() for id_ in ids), "the message does not name the examples")
    return (
        f"2 steps and a spike refused, {len(trained)} leaves as before; 3 in a row: exit 3, {len(ids)} examples named"
    )


def t9(lab: Lab) -> str:
    """Bad records: skipped, counted, named, no other moves; or the run stops. A missing file stops it."""
    from qwen3_jax.train.data import DataConfig, Loader, Source

    bad = [b'{"tokens": [1, 2', b'{"tokens": [1, 2], "x": "\xff"}', b"", b'{"tokens": []}', b'{"tokens": [1, 128]}']
    good, draw = lab.data.read_bytes().splitlines(), random.Random(9)
    path = lab.folder / "faults.jsonl"

    def read(lines: list[bytes]) -> tuple[list[str], int]:
        path.write_bytes(b"\n".join(lines) + b"\n")
        config = DataConfig((Source("a", str(path)),), epochs=2)
        with Loader(config, None, None, batch=1, length=1 << 15, seed=0, vocab_size=128) as loader:
            return [id_ for batch in loader for row in batch.ids for id_ in row], loader.skipped.total()

    expected, none = read(good)
    require(none == 0, "good records were skipped")
    trials, faults = lab.trials(100), 0
    for _ in range(trials):
        places = draw.sample(range(len(good)), draw.randint(1, 20))
        lines = list(good)
        for place in places:
            lines[place] = draw.choice(bad)
        found, skipped = read(lines)
        gone = {f"a:{place}@{epoch}" for place in places for epoch in (0, 1)}
        require(found == [id_ for id_ in expected if id_ not in gone], "another record moved")
        require(skipped == len(gone), f"{skipped} counted, {len(gone)} bad")
        faults += len(places)
    lines = list(good)
    lines[17] = bad[0]
    path.write_bytes(b"\n".join(lines) + b"\n")
    source = f'--data.sources.0.path="{path}"'
    run = lab.run("bad-records")
    require(run.start(source).wait() == 0, run.log())
    require("skipped a:17@0: not JSON" in run.said(), run.log())
    run = lab.run("bad-stops")
    require(run.start(source, "--data.bad_records=stop").wait() == EXIT_BAD, run.log())
    require("a:17@0: not JSON" in run.said(), run.log())
    run = lab.run("no-file")
    require(run.start(f'--data.sources.0.path="{path}x"').wait() == EXIT_BAD, run.log())
    require("no file is named" in run.said(), run.log())
    return f"{faults} bad records in {trials} files: each skipped and counted, no other moved; stop and missing: exit 2"


def t10(lab: Lab) -> str:
    """A step and a loader that hang: stacks are written, the process ends within the timeout and 10 s, with 124."""
    lab.reference()  # programs are in the compile cache
    timeout_s, told = 20.0, []
    for name, after, function in (
        ("hang_step", 6, "a_step_that_hangs"),
        ("hang_loader", 40, "a_loader_that_hangs"),
    ):
        run = lab.run(name).start(fault=f"{name} {after} {timeout_s}")
        run.until(lambda run=run: bool(run.metrics()))
        made, quiet = 0, time.monotonic()
        while run.process.exitcode is None:
            if len(run.metrics()) != made:
                made, quiet = len(run.metrics()), time.monotonic()
            require(time.monotonic() - quiet < timeout_s + 10, f"{name}: still there")
            time.sleep(0.05)
        told.append(f"{name} {time.monotonic() - quiet:.1f} s")
        require(run.wait() == EXIT_HUNG, f"{name}: exit {run.process.exitcode}: {run.log()}")
        require(f"in {function}" in (run.folder / "stacks.txt").read_text(), f"{name}: the stacks do not show it")
        require(run.start().wait() == 0, run.log())
        run.require_equal(lab.reference(), STEPS)
    return f"exit 124 after {' and '.join(told)} with a timeout of {timeout_s:g} s, stacks written, resumed bit-equal"


def t11(lab: Lab) -> str:
    """Ten kills in a run of 200 steps: the time adds up to the wall time within 1 %, goodput is at least 0.8.

    A step takes a second of processor time, as a larger model's would, and not a second asleep: whatever else runs on
    the machine makes steps and restarts slower by the same factor.
    """
    from qwen3_jax.train import goodput

    kills, steps, busy = lab.trials(10), 20 * lab.trials(10), "busy 1.0"
    run, draw = lab.run("goodput", steps=steps, save_every=2), random.Random(11)  # saves at every step, as in T7
    lab.reference()  # programs are in the compile cache
    began = time.time()
    for i in range(kills):
        at = i * 20 + draw.randint(6, 18)
        run.start(fault=busy)
        run.until(lambda at=at: max(run.metrics(), default=0) >= at, 600)
        run.signal(signal.SIGKILL)
        code = run.wait()
        require(code == -signal.SIGKILL, f"exit {code}, the run had ended: {run.log()}")
    require(run.start(fault=busy).wait(1800) == 0, run.log())
    wall_s = time.time() - began
    found = goodput.summary(run.folder / "goodput.jsonl")
    total = sum(found["seconds"].values())
    told = ", ".join(f"{name} {100 * value / total:.1f} %" for name, value in found["seconds"].items() if value)
    require(abs(total / found["wall_s"] - 1) < 0.01, f"categories add up to {total:.1f} s, wall {found['wall_s']:.1f}")
    require(abs(total / wall_s - 1) < 0.01 + 1 / wall_s, f"accounted for {total:.1f} s, seen from outside {wall_s:.1f}")
    require(found["processes"] == kills + 1, f"{found['processes']} processes are accounted for, not {kills + 1}")
    require(found["goodput"] >= 0.8, f"goodput {found['goodput']:.3f}: {told}")
    return f"goodput {found['goodput']:.3f} over {found['processes']} processes and {total:.0f} s ({told})"


CASES = {f"T{i}": case for i, case in enumerate((t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11), start=1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=CASES, help="a case; repeatable")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of trials")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.disable(logging.CRITICAL)  # of this process, which looks at what is damaged
    failed = []
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-train-")))
        lab = Lab(folder.absolute(), options.scale)
        for name in options.only or CASES:
            started = time.monotonic()
            try:
                told, good = CASES[name](lab), True
            except Broken as error:
                told, good = str(error), False
            except Exception:
                told, good = traceback.format_exc(), False
            failed += [] if good else [name]
            print(f"{name:4} {'holds' if good else 'FAILS'}  {told}  [{time.monotonic() - started:.0f} s]", flush=True)
    print(f"{len(failed)} of {len(options.only or CASES)} cases fail: {' '.join(failed)}" if failed else "all hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

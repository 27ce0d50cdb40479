"""What the processes found, merged and shown."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen3_jax.preflight.options import Options


def combine(options: Options, roster: list[dict[str, str]], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge what the processes found; "problems" holds one line each, naming the process."""

    def name(index: int) -> str:
        return f"process {index} ({roster[index]['host']})"

    problems = []
    first = reports[0]
    for index, report in enumerate(reports):
        if report["processes"] != len(roster) or report["process"] != index:
            problems.append(
                f"{name(index)} sees itself as {report['process']} of {report['processes']}, expected {index} of "
                f"{len(roster)}: the roll call and JAX disagree"
            )
        if report["all"] != first["all"]:
            problems.append(f"{name(index)} sees {len(report['all'])} devices otherwise than {name(0)}")
        if len(report["local"]) != len(first["local"]):
            problems.append(
                f"{name(index)} has {len(report['local'])} devices, {name(0)} has {len(first['local'])}: "
                "give every process as many"
            )
    timings = []
    for row in zip(*(report["collectives"] for report in reports), strict=True):
        slowest = max(range(len(row)), key=lambda i: row[i]["seconds"])
        for index, measured in enumerate(row):
            if measured["wrong"]:
                axes = " × ".join(measured["axes"])
                devices = ", ".join(measured["wrong"][:4])
                problems.append(f"{name(index)}: {measured['kind']} over {axes} is wrong on {devices}")
        kept = {key: row[slowest][key] for key in ("axes", "ways", "kind", "bytes", "seconds")}
        timings.append(kept | {"slowest_process": slowest, "right": not any(measured["wrong"] for measured in row)})
    problems += first["memory"]["problems"]
    need, least = first["memory"]["need_bytes_per_device"], None
    for index, report in enumerate(reports):
        for device, have in report["memory"]["have"]:
            if have is None:
                continue
            least = have if least is None else min(least, have)
            if need is not None and need > have:
                problems.append(
                    f"{name(index)}: {device} has {have / 2**30:.2f} GiB, parameters and cache need "
                    f"{need / 2**30:.2f}: use more devices, a smaller batch or a shorter context"
                )
    if need is not None and least is None:
        problems.append("this platform does not tell its memory: give it in GiB per device")
    return {
        "roster": roster,
        "platform": first["platform"],
        "device_kinds": first["kinds"],
        "devices": len(first["all"]),
        "devices_per_process": [len(report["local"]) for report in reports],
        "mesh": options.mesh or f"model={len(first['all'])}",
        "collectives": timings,
        "memory": {"need_bytes_per_device": need, "have_bytes_per_device": least},
        "problems": problems,
    }


def render(report: dict[str, Any], console: Console) -> None:
    """Print a report for people."""
    processes = Table(title="processes")
    for heading in ("process", "host", "devices", "jax", "jaxlib", "python", "code", "config"):
        processes.add_column(heading)
    counts = report.get("devices_per_process", ["?"] * len(report["roster"]))
    for index, (row, count) in enumerate(zip(report["roster"], counts, strict=True)):
        cells = (row[key] for key in ("jax", "jaxlib", "python", "code", "config"))
        processes.add_row(str(index), row["host"], str(count), *cells)
    console.print(processes)
    if "collectives" in report:
        table = Table(title=f"collectives over {report['mesh']}, {', '.join(report['device_kinds'])}")
        for heading in ("axes", "ways", "kind", "MiB per device", "ms", "GB/s per device", "slowest", "right"):
            table.add_column(heading, justify="left" if heading in ("axes", "kind", "right") else "right")
        for row in report["collectives"]:
            speed = row["bytes"] / row["seconds"] / 1e9 if row["seconds"] else math.nan
            table.add_row(
                " × ".join(row["axes"]),
                str(row["ways"]),
                row["kind"],
                f"{row['bytes'] / 2**20:.2f}",
                f"{row['seconds'] * 1e3:.3f}",
                f"{speed:.2f}",
                str(row["slowest_process"]),
                "yes" if row["right"] else "NO",
                style=None if row["right"] else "bold red",
            )
        console.print(table)
        need, have = report["memory"].values()
        told = "unknown" if have is None else f"{have / 2**30:.2f} GiB"
        if need is not None:
            console.print(f"memory per device: {need / 2**30:.2f} GiB of parameters and cache, {told} available")
    for problem in report["problems"]:
        console.print(problem, style="red", highlight=False, markup=False)
    console.print("preflight passed" if report["passed"] else "preflight FAILED", style="bold")

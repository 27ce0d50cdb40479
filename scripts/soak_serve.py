"""Break a live server in every way of the fault table and check what must hold: S1 to S10, each with an exit code.

    python scripts/soak_serve.py [--only S3 S9] [--scale 0.1]

Runs `qwen3-jax serve` on the embedded checkpoint, see `soak_server`. A case prints one line and what it measured; the
exit code is 0 when all hold, else 1. `--scale` multiplies the requests of S8 and S10. Everything listens on 127.0.0.1,
every wait is bounded; 15 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripts.soak_server import (
    CACHE_TOKENS,
    POISON,
    ROWS,
    WAITING,
    Bench,
    Broken,
    Streamed,
    head,
    require,
    stream,
    streamed,
    whole,
    words,
)

SILENCE_S = 1.0
Figures = dict[str, Any]


async def s1(bench: Bench) -> Figures:
    """Clients that leave: their requests end and their pages come back."""
    server = await bench.main()
    await server.idle(60)
    before = await server.metrics()

    async def leave(request: bytes, *, after_s: float, reset: bool) -> None:
        _, writer = await server.connect()
        writer.write(request)
        await asyncio.sleep(after_s)
        if reset:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    long = {"max_tokens": 3000, "ignore_eos": True}
    plain = head("POST", "/v1/completions", {"prompt": "Tell", **long})
    worst = 0.0
    for several in (
        [(stream(3000), False)], [(stream(3000), True)], [(plain, True)], [(plain, False)],
        [(stream(3000), True)] * (ROWS + 24), [(stream(3000), True), (plain, True)] * 40,
    ):  # fmt: skip
        await asyncio.gather(*(leave(request, after_s=0.5, reset=reset) for request, reset in several))
        worst = max(worst, await server.idle(5))
    after = await server.metrics()
    drift = after["kv_cache_usage_perc"] - before["kv_cache_usage_perc"]
    require(abs(drift) <= 0.02, f"KV use went from {before['kv_cache_usage_perc']} by {drift}")
    await asyncio.sleep(1)
    later = await server.metrics()
    require(
        later["generation_tokens_read_total"] == after["generation_tokens_read_total"], "tokens are still generated"
    )
    return {"clients": 4 + ROWS + 24 + 80, "worst_s": worst, "kv_drift": drift}


async def s2(bench: Bench) -> Figures:
    """More context than the cache holds: everything is answered, with the text it has alone."""
    server = await bench.main()
    rng = random.Random(2)
    prompts = [words(rng, 1200) for _ in range(24)]
    alone = [(await server.complete(p, 24))["choices"][0]["text"] for p in prompts]
    before = await server.metrics()
    together = await asyncio.gather(*(server.complete(p, 24, cache_salt=str(i)) for i, p in enumerate(prompts)))
    same = sum(a == t["choices"][0]["text"] for a, t in zip(alone, together, strict=True))
    tokens = sum(t["usage"]["prompt_tokens"] for t in together)
    long = await asyncio.gather(*(server.complete("Go", 900) for _ in range(ROWS)))  # grow past the cache
    preempted = (await server.metrics())["num_preemptions_total"] - before["num_preemptions_total"]
    require(same == 24, f"{24 - same} of 24 texts differ from those generated alone")
    require(len({answer["choices"][0]["text"] for answer in long}) == 1, "equal requests got different texts")
    require(tokens > CACHE_TOKENS, f"{tokens} tokens fit the cache of {CACHE_TOKENS}")
    require(preempted > 0, "nothing was preempted")
    return {"prompt_tokens": tokens, "cache_tokens": CACHE_TOKENS, "preemptions": int(preempted), "equal": same}


async def s3(bench: Bench) -> Figures:
    """400 requests at once: answered or refused, never lost; /health answers throughout."""
    server = await bench.main()
    over, worst = asyncio.Event(), 0.0

    async def watch() -> None:
        nonlocal worst
        while not over.is_set():
            began = time.monotonic()
            status, _ = await server.ask("GET", "/health", seconds=15)
            worst = max(worst, time.monotonic() - began)
            require(status == 200, f"/health said {status}")
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    body = {"prompt": "Count", "max_tokens": 64, "ignore_eos": True}
    answers = await asyncio.gather(*(server.ask("POST", "/v1/completions", body, seconds=180) for _ in range(400)))
    over.set()
    await watching
    by_status = {status: sum(a[0] == status for a in answers) for status in sorted({a[0] for a in answers})}
    require(set(by_status) <= {200, 429, 503}, f"statuses {by_status}")
    require(by_status.get(200, 0) >= WAITING, f"statuses {by_status}")
    require(all("error" in json.loads(said) for status, said in answers if status != 200), "a refusal without error")
    require(worst < 10, f"/health took {worst:.1f} s")
    await server.idle(10)
    return {"statuses": by_status, "health_worst_s": worst}


async def s4(bench: Bench) -> Figures:
    """SIGTERM under load: drained, or aborted at once when asked to; nothing stays behind."""
    server = await bench.main()
    pid = server.process.pid
    running = [asyncio.create_task(streamed(server, stream(400, temperature=0))) for _ in range(8)]
    while (await server.metrics())["num_requests_running"] < 8:
        require(not any(task.done() for task in running), "a stream ended before the signal")
        await asyncio.sleep(0.02)
    children = server.children()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    refused = 0
    with contextlib.suppress(OSError):
        refused = (await server.ask("POST", "/v1/completions", {"prompt": "x"}))[0]
    require(refused in (0, 503), f"new work was answered with {refused}")
    texts = [each.text for each in await asyncio.gather(*running)]
    require(all(text.startswith("HTTP/1.1 200") and whole(text) for text in texts), "a stream was cut")
    require(all('"finish_reason":"length"' in text for text in texts), "a stream was not finished")
    code, drained_s = await server.ended(30)
    require(code in (0, 143), f"exit code {code}")
    left = [child for child in [*children, pid] if Path(f"/proc/{child}").exists()]
    require(not left, f"processes {left} are still there")

    at_once = await bench.start("--shutdown-timeout", "0")
    running = [asyncio.create_task(streamed(at_once, stream(3000))) for _ in range(8)]
    while (await at_once.metrics())["num_requests_running"] < 8:
        await asyncio.sleep(0.02)
    at_once.process.send_signal(signal.SIGTERM)
    code, abort_s = await at_once.ended(30)
    require(code in (0, 143), f"exit code {code}")
    require(abort_s < 4, f"ending at once took {abort_s:.1f} s")
    for text in [each.text for each in await asyncio.gather(*running)]:
        require('"finish_reason":"abort"' in text or '"error"' in text, f"a stream ended with {text[-100:]!r}")
    return {"drained_s": drained_s, "abort_s": abort_s}


async def s5(bench: Bench) -> Figures:
    """An engine that raises, and a killed process: clients hear of it, nothing hangs."""
    trigger = bench.folder / "raise"
    trigger.unlink(missing_ok=True)
    server = await bench.start(trigger=trigger)
    running = [asyncio.create_task(streamed(server, stream(3000), seconds=20)) for _ in range(4)]
    plain = asyncio.create_task(server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 3000}, seconds=20))
    while (await server.metrics())["num_requests_running"] < 4:
        await asyncio.sleep(0.02)
    began = time.monotonic()
    trigger.touch()
    texts = [each.text for each in await asyncio.gather(*running)]
    told_s = time.monotonic() - began
    for text in texts:
        require('"error"' in text and whole(text), f"a stream ended with {text[-120:]!r}")
    status, said = await plain
    require(status in (500, 503) and "error" in json.loads(said), f"a plain request got {status}")
    health = 0
    with contextlib.suppress(OSError):
        health = (await server.ask("GET", "/health", seconds=5))[0]
    require(health == 0 or health >= 500, f"/health says {health} with a dead engine")
    code, _ = await server.ended(20)
    ended_s = time.monotonic() - began
    require(code not in (0, 143), f"exit code {code} after a failure")

    killed = await bench.start()
    running = [asyncio.create_task(streamed(killed, stream(3000), seconds=20)) for _ in range(4)]
    while (await killed.metrics())["num_requests_running"] < 4:
        await asyncio.sleep(0.02)
    killed.process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    await asyncio.gather(*running, return_exceptions=True)
    require(time.monotonic() - began < 5, "clients of a killed server hung")
    await killed.ended(5)
    return {"told_s": told_s, "ended_s": ended_s, "exit_code": code}


async def s6(bench: Bench) -> Figures:
    """Logits that are not finite: that request fails alone, and what it leaves in the cache hurts nobody."""
    server = await bench.main()
    rng = random.Random(6)
    prompts = [words(rng, 40) for _ in range(8)]
    calm = [(await server.complete(p, 48))["choices"][0]["text"] for p in prompts]
    before = await server.metrics()
    bad = {"prompt": [POISON] * 100, "max_tokens": 8, "temperature": 0}
    mixed: list[Awaitable[Any]] = [server.complete(p, 48, cache_salt="s6") for p in prompts]
    mixed[4:4] = [server.ask("POST", "/v1/completions", bad) for _ in range(3)]
    got = await asyncio.gather(*mixed)
    refused, texts = got[4:7], [g["choices"][0]["text"] for g in (*got[:4], *got[7:])]
    require(all(status == 500 for status, _ in refused), f"poisoned requests got {[status for status, _ in refused]}")
    require(texts == calm, "neighbours of a poisoned request got other texts")
    # Its pages hold NaN now, and are given to others.
    later = await asyncio.gather(*(server.complete(p, 48, cache_salt="again") for p in prompts * 3))
    require([a["choices"][0]["text"] for a in later] == calm * 3, "pages of a poisoned request changed other texts")
    counted = (await server.metrics())["corrupted_requests_total"] - before["corrupted_requests_total"]
    require(counted == 3, f"{counted:.0f} corrupted requests were counted, 3 were sent")
    return {"poisoned": 3, "counted": int(counted), "neighbours_equal": 8 + 24}


async def s7(bench: Bench) -> Figures:
    """No place to write: a compile cache that cannot be, and a disk that is full, are no reason not to serve."""
    nowhere = await bench.start("--compile-cache", "/proc/nowhere/cache")
    await nowhere.complete("a", 4)
    require("no compile cache" in nowhere.log.read_text(errors="replace"), "the missing cache was not reported")
    nowhere.kill()
    full = await bench.start("--compile-cache", str(bench.folder / "full"), limit_kib=4)
    await full.complete("a", 4)
    sizes = [f.stat().st_size for f in (bench.folder / "full").rglob("*") if f.is_file()]
    require(max(sizes, default=0) <= 4096, "the disk was not full")
    full.kill()
    return {"served_without_cache": True, "served_on_a_full_disk": True}


async def s8(bench: Bench) -> Figures:
    """Mixed requests after the warm-up compile nothing, and streams are never silent for long."""
    server = await bench.main()
    before = await server.metrics()
    rng = random.Random(8)
    count = max(20, int(1000 * bench.scale))
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
    streams: list[Streamed] = []
    queue = list(range(count))

    async def one(i: int) -> None:
        body: dict[str, Any] = {"prompt": words(rng, rng.choice((1, 5, 30, 200))), "max_tokens": rng.choice((1, 7, 40))}
        kind = i % 8
        body |= [
            {}, {"temperature": 0}, {"seed": i, "top_p": 0.9, "top_k": 5}, {"logprobs": 3}, {"n": 2},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5}, {"stop": ["the", "\n\n"], "min_p": 0.1},
            {"structured_outputs": {"json": schema}, "max_tokens": 60},
        ][kind]  # fmt: skip
        if i % 3 == 0:
            got = await streamed(server, head("POST", "/v1/completions", body | {"stream": True}, close=True))
            require(whole(got.text) and '"error"' not in got.text, f"a stream ended with {got.text[-200:]!r}")
            streams.append(got)
        else:
            status, said = await server.ask("POST", "/v1/completions", body)
            require(status == 200, f"{body} was answered with {status}: {said[:200]!r}")

    async def worker() -> None:
        while queue:
            await one(queue.pop())

    await asyncio.gather(*(worker() for _ in range(12)))
    after = await server.metrics()
    compiled = after["compilations_total"] - before["compilations_total"]
    require(compiled == 0, f"{compiled:.0f} programs were compiled under load")
    silence, wait = max(each.silence_s for each in streams), max(each.wait_s for each in streams)
    require(silence <= SILENCE_S, f"a stream was silent for {silence:.2f} s")
    require(wait <= SILENCE_S, f"a stream had its first token after {wait:.2f} s; longest silence {silence:.2f} s")
    return {"requests": count, "compiled": int(compiled), "longest_silence_s": silence, "longest_wait_s": wait}


async def s9(bench: Bench) -> Figures:
    """Slow, idle and senseless clients: others are served, unfinished requests are cut, files come back."""
    server = await bench.main()
    await server.idle(10)
    await asyncio.sleep(1)
    before = server.files()
    began = time.monotonic()
    cut: list[float] = []

    async def held(data: bytes, drip: bytes = b"") -> None:
        """Send, then a byte at a time, and wait to be cut."""
        reader, writer = await server.connect()
        try:
            writer.write(data)
            while time.monotonic() < began + 90:
                if drip:
                    writer.write(drip)
                with contextlib.suppress(TimeoutError):
                    if not await asyncio.wait_for(reader.read(1 << 16), 2):
                        break
        except ConnectionError:
            pass
        finally:
            cut.append(time.monotonic() - began)
            writer.close()

    half = head("POST", "/v1/completions", {"prompt": "x" * 1000})[:-500]
    rng = random.Random(9)
    kinds: list[tuple[bytes, bytes]] = [(b"", b"")] * 300
    kinds += [(b"POST /v1/completions HTTP/1.1\r\n", b"a")] * 100 + [(half, b"x")] * 50 + [(half, b"")] * 50
    kinds += [(rng.randbytes(500), b"")] * 50 + [(b"GET / HTTP/1.1\r\nh: " + b"a" * 300_000, b"")] * 20
    kinds += [(b"GET / HTTP/1.1\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(20_000)), b"")] * 10
    holding = [asyncio.create_task(held(*kind)) for kind in kinds]
    worst = 0.0
    for _ in range(10):
        at = time.monotonic()
        await server.complete("Hello", 4)
        worst = max(worst, time.monotonic() - at)
        await asyncio.sleep(1)
    require(worst < 15, f"others waited {worst:.1f} s")
    await asyncio.gather(*holding)
    require(max(cut) <= 60, f"an unfinished request was cut after {max(cut):.0f} s")
    await asyncio.sleep(1)
    require(server.files() <= before + 20, f"{server.files()} files are open, {before} were")
    return {
        "connections": len(kinds),
        "others_worst_s": worst,
        "last_cut_s": max(cut),
        "files": server.files() - before,
    }


async def s10(bench: Bench) -> Figures:
    """A day in ten minutes: many short requests; neither memory nor files nor times grow."""
    server = await bench.main()
    total, until = max(200, int(20_000 * bench.scale)), time.monotonic() + 330
    times: list[float] = []
    memory: list[tuple[int, float]] = []
    used: list[tuple[int, float]] = []
    files: list[int] = []
    rng = random.Random(10)

    async def worker() -> None:
        reader, writer = await server.connect()
        while len(times) < total and time.monotonic() < until:
            body = {"prompt": words(rng, 6), "max_tokens": rng.randint(1, 3), "ignore_eos": True}
            began = time.monotonic()
            writer.write(head("POST", "/v1/completions", body))
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            lines = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:-2])
            said = await asyncio.wait_for(reader.readexactly(int(lines[b"content-length"])), 60)
            require(answer.startswith(b"HTTP/1.1 200"), f"{answer[:40]!r} {said[:200]!r}")
            times.append(time.monotonic() - began)
            if len(times) % 100 == 0:
                memory.append((len(times), server.resident_mb()))
                used.append((len(times), server.cpu_s()))
                files.append(server.files())
        writer.close()

    await asyncio.gather(*(worker() for _ in range(8)))
    done, tenth = len(times), len(times) // 10
    settled = [(n, mb) for n, mb in memory if n >= done // 4]  # before, caches fill
    per_1000 = 1000 * slope(settled)
    first, last = (sorted(part)[int(0.99 * len(part))] for part in (times[tenth : 2 * tenth], times[-tenth:]))
    figures: Figures = {"requests": done, "mb_per_1000": per_1000, "p99_first_s": first, "p99_last_s": last}
    figures["files"] = max(files) - min(files)
    # A busy machine makes times longer, but not the work of a request.
    early, late = (slope(part) for part in (used[: len(used) // 3], used[-len(used) // 3 :]))
    figures |= {"cpu_ms_first": 1000 * early, "cpu_ms_last": 1000 * late}
    require(done >= total or bench.scale == 1, f"{done} of {total} requests in time")
    require(per_1000 < 1, f"memory grows by {per_1000:.2f} MB per 1000 requests: {figures}")
    require(max(files) - min(files) <= 16, f"open files went from {min(files)} to {max(files)}")
    require(last <= 1.2 * first or late <= 1.2 * early, f"requests became slower: {figures}")
    return figures


def slope(points: list[tuple[int, float]]) -> float:
    """Return the least-squares slope."""
    n = len(points)
    x, y = sum(p[0] for p in points) / n, sum(p[1] for p in points) / n
    spread = sum((p[0] - x) ** 2 for p in points)
    return sum((p[0] - x) * (p[1] - y) for p in points) / spread if spread else 0.0


# In this order they share one server; S4 ends it.
CASES: dict[str, tuple[Callable[[Bench], Awaitable[Figures]], float]] = {
    "S6": (s6, 120), "S8": (s8, 240), "S1": (s1, 120), "S3": (s3, 240), "S2": (s2, 240), "S9": (s9, 150),
    "S10": (s10, 420), "S4": (s4, 240), "S5": (s5, 240), "S7": (s7, 300),
}  # fmt: skip


async def run(names: list[str], scale: float) -> int:
    failed = 0
    with tempfile.TemporaryDirectory(prefix="soak-serve-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), scale)
        try:
            for name in names:
                case, seconds = CASES[name]
                began = time.monotonic()
                try:
                    figures = await asyncio.wait_for(case(bench), seconds + 600)  # and what servers take to start
                    said, holds = "  ".join(f"{k}={shown(v)}" for k, v in figures.items()), "holds"
                except (Broken, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                    said, holds = f"{type(error).__name__}: {error}", "BROKEN"
                    failed += 1
                print(f"{name:4} {holds:7} {time.monotonic() - began:6.1f} s  {said}", flush=True)
        finally:
            for server in bench.servers:
                server.kill()
    print(f"{len(names) - failed} of {len(names)} hold")
    return 1 if failed else 0


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES), metavar="S1")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests in S8 and S10")
    options = parser.parse_args()
    return asyncio.run(run([name for name in CASES if name in options.only], options.scale))


if __name__ == "__main__":
    sys.exit(main())

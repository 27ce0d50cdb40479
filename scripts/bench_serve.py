"""Time serving on CPU cores: the engine against itself one request at a time, and against transformers' `generate`.

    python scripts/bench_serve.py            # all of it, about 45 minutes on 2 cores; writes bench_serve.json
    python scripts/bench_serve.py --quick    # a few requests of everything, about 10 minutes
    python scripts/bench_serve.py --http     # our side behind `qwen3-jax serve`, streamed over HTTP
    python scripts/bench_serve.py --only host,prefix

transformers writes a folder of random Qwen3-0.6B weights → targets that answer one prompt at a time or many → a load of
requests, closed-loop (so many clients, each sends its next request when it has its answer) or Poisson arrivals → one
trace per request: when it was sent, and when how many tokens arrived. Targets take turns, round after round, so that
whatever else the machine does hits all of them. All of them decode greedily and never end early.

Throughput is generated tokens per second while the load lasts: from the first request to the first answer that no
further request follows, so with as many requests out as there are clients. TTFT is from sending to the first token, the
queue included. Inter-token latency is the time between two deliveries of a request divided by the
tokens of the second; every token counts once.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from bench_cpu import THREADS, Process, note, shapes, write_folder

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "qwen3_jax" / "demo"
IDS = 700  # prompts are drawn from ids below this: those that the tokenizer of the embedded model has
ROWS = 16
CACHE_TOKENS = 16384
LONG = 4096  # tokens of the prompt that is prefilled beside decoding rows
SETTLED = 40  # tokens that they have by then
AIMS = {
    "throughput": "≥ 4.0",
    "host": "≤ 1.0 ms",
    "prefix": "≤ 15%",
    "interference": "≤ 3.0",
    "logprobs": "≤ 1.2",
}
PARTS = ("closed", "poisson", "prefix", "interference", "host", "logprobs", "deterministic")


@dataclass
class Trace:
    """One request: when it was sent, and (when, how many) for every delivery of tokens; seconds of one clock."""

    sent: float = 0.0
    deliveries: list[tuple[float, int]] = field(default_factory=list)

    @staticmethod
    def begin(trace: "Trace | None") -> "Trace":
        """Return a trace, new or given, whose request is sent now."""
        trace = trace or Trace()
        trace.sent = time.perf_counter()
        return trace

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.deliveries)

    @property
    def first_s(self) -> float:
        return self.deliveries[0][0] - self.sent

    def gaps(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """Return seconds per token, once per token after the first delivery, of deliveries between two moments."""
        gaps = []
        for (before, _), (now, count) in itertools.pairwise(self.deliveries):
            if since <= now <= until:
                gaps += [(now - before) / count] * count
        return gaps


@dataclass(frozen=True)
class Job:
    """One request: token ids, how many to generate, and the alternatives per token of answer and prompt, if any."""

    prompt: list[int]
    tokens: int
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class Target(Protocol):
    """Something that continues prompts."""

    name: str

    async def ask(self, job: Job, trace: Trace | None = None) -> Trace:
        """Send a request and wait for all of its tokens; `trace` is filled as they come."""
        ...

    def close(self) -> None:
        """End whatever runs."""
        ...


class InProcess:
    """An engine of this process."""

    def __init__(self, name: str, model: Any, observer: Any = None, **options: Any):
        from qwen3_jax.engine.engine import Engine
        from qwen3_jax.engine.options import EngineOptions

        self.name = name
        self.engine = Engine(model, EngineOptions(**options), observer=observer)
        self.engine.start()

    async def ask(self, job: Job, trace: Trace | None = None) -> Trace:
        from qwen3_jax.sampling_params import SamplingParams

        loop, done = asyncio.get_running_loop(), asyncio.Event()
        params = SamplingParams(temperature=0.0, max_tokens=job.tokens, ignore_eos=True, logprobs=job.logprobs)
        request = self.engine.requests.make(job.prompt, params)
        trace = Trace.begin(trace)

        def hear(update: Any) -> None:
            if update.tokens:
                trace.deliveries.append((time.perf_counter(), len(update.tokens)))
            if update.completion is not None:
                loop.call_soon_threadsafe(done.set)

        self.engine.submit(request, hear, prompt_logprobs=job.prompt_logprobs)
        await done.wait()
        assert trace.tokens == job.tokens
        return trace

    def close(self) -> None:
        self.engine.stop()


class Http:
    """`qwen3-jax serve` in a process of its own."""

    def __init__(self, name: str, folder: Path, log: Path, **options: Any):
        self.name = name
        flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "qwen3_jax", "serve", str(folder), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=log.open("w"), cwd=ROOT)
        until = time.monotonic() + 900
        while not (found := [line for line in log.read_text().splitlines() if "http://127.0.0.1:" in line]):
            if self.process.poll() is not None or time.monotonic() > until:
                self.close()
                sys.exit(f"the server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        self.port = int(found[-1].split("http://127.0.0.1:")[1].split("/")[0].split('"')[0].split()[0])

    async def ask(self, job: Job, trace: Trace | None = None) -> Trace:
        body = {"prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0, "ignore_eos": True}
        data = json.dumps(body | {"stream": True, "return_token_ids": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
        )
        trace = Trace.begin(trace)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        writer.write(head.encode() + data)
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            if count := len(choice.get("token_ids") or ()):
                trace.deliveries.append((time.perf_counter(), count))
        writer.close()
        assert trace.tokens == job.tokens, f"{trace.tokens} of {job.tokens} tokens arrived"
        return trace

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Transformers:
    """transformers' `generate`, one request after the other, in a process of its own."""

    name = "transformers"

    def __init__(self, folder: Path, dtype: str):
        self.worker = Process(self.name, sys.executable, __file__, "--worker", str(folder), dtype)
        self.queue = ThreadPoolExecutor(1)
        self.worker.answer()

    async def ask(self, job: Job, trace: Trace | None = None) -> Trace:
        trace = Trace.begin(trace)
        times = await asyncio.get_running_loop().run_in_executor(self.queue, self.worker.ask, job.prompt, job.tokens)
        trace.deliveries = [(moment, 1) for moment in times]
        return trace

    def close(self) -> None:
        self.worker.close()


def work(folder: str, dtype: str) -> None:
    """Be the transformers process: answer each line [prompt, tokens] with the moments at which its tokens came."""
    import torch
    import transformers

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    torch.set_num_threads(THREADS)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    class Clock(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())  # the clock of all processes

        def end(self) -> None:
            pass

    print("[]", file=answers, flush=True)
    for line in sys.stdin:
        prompt, tokens = json.loads(line)
        clock, ids = Clock(), torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, streamer=clock, pad_token_id=0,
            )  # fmt: skip
        print(json.dumps(clock.times[1:]), file=answers, flush=True)  # the first is the prompt


def jobs(count: int, *, prefix: int, own: int, tokens: int, prefixes: int = 2, seed: int = 0) -> list[Job]:
    """Draw requests: one of a few shared prefixes, then tokens of their own."""
    chance = random.Random(seed)
    heads = [[chance.randrange(IDS) for _ in range(prefix)] for _ in range(prefixes)]
    return [
        Job(heads[i % prefixes] + [chance.randrange(IDS) for _ in range(own)], tokens) for i in range(count)
    ]  # fmt: skip


async def closed_loop(target: Target, work: list[Job], clients: int) -> list[Trace]:
    waiting = iter(work)

    async def client() -> list[Trace]:
        return [await target.ask(job) for job in waiting]

    return [trace for traces in await asyncio.gather(*(client() for _ in range(clients))) for trace in traces]


async def poisson(target: Target, work: list[Job], per_s: float) -> list[Trace]:
    chance, at, asked = random.Random(1), 0.0, []
    began = time.perf_counter()
    for job in work:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        asked.append(asyncio.create_task(target.ask(job)))
        at += chance.expovariate(per_s)
    return await asyncio.gather(*asked)


def quantile(values: Iterable[float], q: float) -> float:
    """Return the smallest value that at least the share q does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-q * len(ordered) // 1) - 1)]


def under_load(traces: list[Trace]) -> tuple[int, float]:
    """Return how many tokens came while the load lasted, and how many seconds that was."""
    last = max(trace.sent for trace in traces)
    until = min(end for trace in traces if (end := trace.deliveries[-1][0]) > last)
    tokens = sum(count for trace in traces for moment, count in trace.deliveries if moment <= until)
    return tokens, until - min(trace.sent for trace in traces)


def sums(rounds: list[list[Trace]]) -> dict[str, float]:
    """Sum up the rounds of one target under one load."""
    traces = [trace for traces in rounds for trace in traces]
    tokens, seconds = map(sum, zip(*map(under_load, rounds), strict=True))
    gaps = [gap for trace in traces for gap in trace.gaps()]
    return {
        "requests": len(traces),
        "tokens_per_s": tokens / seconds,
        "ttft_p50_s": quantile((t.first_s for t in traces), 0.5),
        "ttft_p99_s": quantile((t.first_s for t in traces), 0.99),
        "itl_p50_s": quantile(gaps, 0.5),
        "itl_p99_s": quantile(gaps, 0.99),
    }


class Bench:
    """What is measured, on which targets, and what came of it."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.began = args, folder, time.perf_counter()
        self.results: dict[str, Any] = {}
        self.options = {"cache_tokens": CACHE_TOKENS, "chunk_tokens": args.chunk_tokens}
        self.model: Any = None

    def note(self, text: str) -> None:
        note(self.began, text)

    def ours(self, name: str, observer: Any = None, **options: Any) -> Target:
        self.note(f"starting {name}: {options}")
        options = self.options | options
        if self.args.http and observer is None:
            options = {key: value for key, value in options.items() if value is not True}
            options = {f"no_{key}" if value is False else key: value for key, value in options.items()}
            return Http(name, self.folder, self.folder / f"{name.replace(' ', '_')}.log", **options)
        if self.model is None:
            from qwen3_jax.loaded import load_model

            self.model = load_model(self.folder, dtype=self.args.dtype)
        return InProcess(name, self.model, observer, **options)

    def shapes(self) -> dict[str, dict[str, int]]:
        quick = self.args.quick
        return {
            "no shared prefix": {"prefix": 0, "own": 64 if quick else 128},
            "shared prefix": {"prefix": 256 if quick else 512, "own": 32},
        }

    def closed(self) -> None:
        """Throughput and latency under closed-loop load: our batches, one at a time, and transformers."""
        quick = self.args.quick
        batched = self.ours("batch", rows=ROWS)
        alone = self.ours("one at a time", rows=1, cache_tokens=2048)
        theirs = Transformers(self.folder, self.args.dtype)
        tokens, rounds = (32, 2) if quick else (128, 2)
        for target in (batched, alone, theirs):
            asyncio.run(closed_loop(target, jobs(2, prefix=0, own=16, tokens=9, seed=99), 1))  # warm
        for shape, lengths in self.shapes().items():
            counts = {batched: (2 if quick else 3) * ROWS, alone: 2 if quick else 4, theirs: 2 if quick else 4}
            found: dict[str, list[list[Trace]]] = {target.name: [] for target in counts}
            for number in range(rounds):
                for target, count in counts.items():
                    self.note(f"closed loop, {shape}, round {number + 1} of {rounds}: {target.name}")
                    some = jobs(count, **lengths, tokens=tokens, seed=number)
                    clients = ROWS if target is batched else 1
                    found[target.name].append(asyncio.run(closed_loop(target, some, clients)))
            self.results[f"closed loop, {shape}"] = {name: sums(traces) for name, traces in found.items()}
            self.save()
        for target in (batched, alone, theirs):
            target.close()

    def poisson(self) -> None:
        """Latency under Poisson arrivals at 70% of the throughput of a closed loop. Our batches only: on the others so
        many requests would pile up."""
        quick = self.args.quick
        target, tokens = self.ours("batch", rows=ROWS), 32 if quick else 128
        for shape, lengths in self.shapes().items():
            self.note(f"Poisson, {shape}: how much a closed loop takes")
            full = sums([asyncio.run(closed_loop(target, jobs(2 * ROWS, **lengths, tokens=tokens, seed=40), ROWS))])
            per_s = 0.7 * full["tokens_per_s"] / tokens
            self.note(f"Poisson, {shape}: {per_s:.2f} requests/s")
            some = jobs(ROWS if quick else 3 * ROWS, **lengths, tokens=tokens, seed=50)
            found = sums([asyncio.run(poisson(target, some, per_s))])
            self.results[f"Poisson {per_s:.2f}/s, {shape}"] = {target.name: found}
            self.save()
        target.close()

    def deterministic(self) -> None:
        """What determinism costs: the same load with and without, in turn."""
        targets = [self.ours(f"deterministic {on}", rows=ROWS, deterministic=on) for on in (True, False)]
        rounds: dict[str, list[float]] = {target.name: [] for target in targets}
        for number in range(3 if self.args.quick else 7):
            for target in targets if number % 2 else reversed(targets):
                self.note(f"cost of determinism, round {number}: {target.name}")
                some = jobs(3 * ROWS, prefix=0, own=32, tokens=32, seed=number)
                traces = asyncio.run(closed_loop(target, some, ROWS))
                if number:  # the first warms
                    rounds[target.name].append(sums([traces])["tokens_per_s"])
        for target in targets:
            target.close()
        on, off = (statistics.median(rounds[target.name]) for target in targets)
        self.results["deterministic"] = {"tokens_per_s": on, "without": off, "cost": off / on - 1, "rounds": rounds}

    def prefix(self) -> None:
        """TTFT of a 2k prompt whose prefix is cached, against one whose is not."""
        target = self.ours("batch", rows=ROWS)
        first, again = [], []
        for seed in range(2 if self.args.quick else 5):
            self.note(f"prefix of 2048 tokens, {seed}")
            cold, warm = jobs(2, prefix=2048, own=32, tokens=2, prefixes=1, seed=100 + seed)
            first.append(asyncio.run(closed_loop(target, [cold], 1))[0].first_s)
            again.append(asyncio.run(closed_loop(target, [warm], 1))[0].first_s)
        target.close()
        cold_s, warm_s = statistics.median(first), statistics.median(again)
        self.results["prefix"] = {"uncached_s": first, "cached_s": again, "ratio": warm_s / cold_s}

    def interference(self) -> None:
        """Inter-token latency of running rows while a 4k prompt is prefilled, against before."""
        from qwen3_jax.engine.options import BUSY_TOKENS

        target = self.ours("batch", rows=ROWS)
        rows = ROWS // 2

        async def measure() -> tuple[list[float], list[float], float]:
            beside = -(-LONG // self.args.chunk_tokens) * BUSY_TOKENS["cpu"]
            some = jobs(rows, prefix=0, own=16, tokens=SETTLED + 4 * 8 + beside, seed=7)
            traces = [Trace() for _ in some]
            asked = [asyncio.create_task(target.ask(job, trace)) for job, trace in zip(some, traces, strict=True)]
            while any(not t.deliveries for t in traces):
                await asyncio.sleep(0.005)
            settled = time.perf_counter()
            while any(t.tokens < SETTLED for t in traces):
                await asyncio.sleep(0.005)
            began = time.perf_counter()
            trace = await target.ask(jobs(1, prefix=0, own=LONG, tokens=2, seed=8)[0])
            ended = trace.deliveries[0][0]
            await asyncio.gather(*asked)
            before = [gap for t in traces for gap in t.gaps(settled, began)]
            during = [gap for t in traces for gap in t.gaps(began, ended)]
            return before, during, ended - began

        self.note("4096-token prefill beside decoding rows")
        before, during, seconds = asyncio.run(measure())
        target.close()
        unloaded = statistics.median(before)
        self.results["interference"] = {
            "rows": rows,
            "prefill_s": seconds,
            "unloaded_p50_s": unloaded,
            "loaded_p50_s": quantile(during, 0.5),
            "loaded_p99_s": quantile(during, 0.99),
            "samples": [len(before), len(during)],
            "ratio": quantile(during, 0.99) / unloaded,
        }

    def host(self) -> None:
        """What a step costs the host at 32 rows, as the engine counts it: one token per call, and as many as it takes
        by default; and its scheduler's share alone."""
        from qwen3_jax.engine.observer import Observer
        from qwen3_jax.engine.options import EngineOptions

        seen: list[float] = []

        class Watch(Observer):
            def step(self, *, host_s: float, rows: int, prompt_tokens: int, generated_tokens: int) -> None:
                if rows == 32 and not prompt_tokens and generated_tokens:
                    seen.append(host_s * 32 / generated_tokens)

        for name, most in (("one", 1), ("many", EngineOptions.decode_tokens)):
            seen.clear()
            target = self.ours("32 rows", Watch(), rows=32, cache_tokens=4096, decode_tokens=most)
            self.note(f"32 rows, {most} tokens per call")
            asyncio.run(closed_loop(target, jobs(32, prefix=0, own=8, tokens=64, seed=3), 32))
            target.close()
            self.results.setdefault("host", {})[name] = {
                "tokens_per_call": most,
                "calls": len(seen),
                "p50_s": quantile(seen, 0.5),
                "p99_s": quantile(seen, 0.99),
            }
        self.results["host"]["scheduler_p50_s"] = scheduler_cost(32)

    def logprobs(self) -> None:
        """What log-probabilities cost, with 5 alternatives: of answers, per step of 16 rows; of a prompt of 512 tokens,
        the step that 15 rows take beside a chunk of it, and its TTFT when it is alone."""
        from qwen3_jax.engine.observer import Observer

        target = self.ours("logprobs", Observer(), rows=ROWS, prefix_cache=False)
        seconds: dict[str, dict[str, list[float]]] = {
            part: {"without": [], "with": []} for part in ("step", "beside", "prompt")
        }
        for seed in range(2 if self.args.quick else 5):
            self.note(f"log-probabilities, {seed}")
            for name, asked in (("without", None), ("with", 5)):
                some = jobs(ROWS, prefix=0, own=16, tokens=33, seed=seed)
                traces = asyncio.run(closed_loop(target, [replace(job, logprobs=asked) for job in some], ROWS))
                begun = max(trace.deliveries[0][0] for trace in traces)
                seconds["step"][name] += [gap for trace in traces for gap in trace.gaps(since=begun)]
                long = replace(jobs(1, prefix=0, own=512, tokens=1, seed=100 + seed)[0], prompt_logprobs=asked)
                seconds["prompt"][name].append(asyncio.run(target.ask(long)).first_s)
                seconds["beside"][name] += asyncio.run(self._gaps_beside(target, long, seed))
        target.close()
        medians = {
            f"{part}_{name}_s": statistics.median(found)
            for part, both in seconds.items()
            for name, found in both.items()
        }
        self.results["logprobs"] = medians | {
            f"{part}_ratio": medians[f"{part}_with_s"] / medians[f"{part}_without_s"] for part in seconds
        }

    async def _gaps_beside(self, target: Target, job: Job, seed: int) -> list[float]:
        """Return seconds per token of rows that decode while a job's prompt is prefilled."""
        traces = [Trace() for _ in range(ROWS - 1)]
        some = jobs(len(traces), prefix=0, own=16, tokens=80, seed=200 + seed)
        asked = [asyncio.create_task(target.ask(job, trace)) for job, trace in zip(some, traces, strict=True)]
        while any(not trace.deliveries for trace in traces):
            await asyncio.sleep(0.005)
        trace = await target.ask(job)
        await asyncio.gather(*asked)
        return [gap for other in traces for gap in other.gaps(trace.sent, trace.deliveries[0][0])]

    def run(self) -> None:
        for name in PARTS:
            if name in self.args.only:
                getattr(self, name)()
                self.save()

    def save(self) -> None:
        """Write what there is so far."""
        data = vars(self.args) | {"threads": THREADS, "rows": ROWS, "results": self.results}
        Path(self.args.out).write_text(json.dumps(data, indent=1, default=str) + "\n")


def speak(folder: Path) -> None:
    """Give a folder the text side of the embedded model: a vocabulary of 151936 rows of which few have a text."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder / name)
    ids = {
        key: value for key, value in json.loads((DEMO / "config.json").read_text()).items() if key.endswith("token_id")
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ids))


def scheduler_cost(rows: int, steps: int = 500) -> float:
    """Return the median seconds of one plan and one commit, rows decoding one token each, nothing else running."""
    from qwen3_jax.engine.scheduler import Scheduler
    from qwen3_jax.engine.sequence import Sequence

    scheduler = Scheduler(
        rows=rows, pages=rows * 64, page_tokens=16, chunk_tokens=256, decode_tokens=1, deterministic=True
    )  # fmt: skip
    for number in range(rows):
        scheduler.add(Sequence(number, [number] * 8, 2 * steps))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        tokens = {entry.sequence.id: [1] * entry.new for entry in (*plan.prefill, *plan.decode)}
        back = time.perf_counter()
        scheduler.commit(plan, tokens)
        if len(plan.decode) == rows:
            seconds.append(planned - began + time.perf_counter() - back)
    return statistics.median(seconds)


def table(results: dict[str, Any]) -> str:
    """Lay the results out in Markdown."""
    lines = [
        "| load | target | tokens/s | TTFT p50 | p99 | inter-token p50 | p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for load, targets in results.items():
        if not load.startswith(("closed", "Poisson")):
            continue
        for name, r in targets.items():
            times = [f"{r[k] * 1e3:.0f} ms" for k in ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s")]
            lines.append(f"| {load} | {name} | {r['tokens_per_s']:.1f} | {' | '.join(times)} |")
    rows = []
    for load, r in results.items():
        if load.startswith("closed"):
            ours, alone, theirs = (r[name]["tokens_per_s"] for name in ("batch", "one at a time", "transformers"))
            rows.append((f"throughput, {load}, over one at a time", f"{ours / alone:.2f}", AIMS["throughput"]))
            rows.append((f"throughput, {load}, over transformers", f"{ours / theirs:.2f}", ""))
    if r := results.get("host"):
        for name in ("one", "many"):
            what = f"host per step, 32 rows, p50; tokens per call: at most {r[name]['tokens_per_call']}"
            rows.append((what, f"{r[name]['p50_s'] * 1e3:.2f} ms", AIMS["host"]))
        rows.append(("the scheduler alone; tokens per call: 1", f"{r['scheduler_p50_s'] * 1e3:.2f} ms", ""))
    if r := results.get("prefix"):
        cached = f"{statistics.median(r['cached_s']):.2f} of {statistics.median(r['uncached_s']):.2f} s"
        rows.append(("TTFT with a cached 2k prefix", f"{r['ratio']:.1%}: {cached}", AIMS["prefix"]))
    if r := results.get("interference"):
        times = f"{r['loaded_p99_s'] * 1e3:.0f} over {r['unloaded_p50_s'] * 1e3:.0f} ms"
        rows.append(
            ("inter-token p99 beside a 4k prefill over p50 without", f"{r['ratio']:.2f}: {times}", AIMS["interference"])
        )
    if r := results.get("logprobs"):
        for name, what in (
            ("step", "step of 16 rows"),
            ("beside", "step of 15 rows beside a prompt"),
            ("prompt", "TTFT of a prompt of 512 tokens, alone,"),
        ):
            times = f"{r[f'{name}_with_s'] * 1e3:.0f} over {r[f'{name}_without_s'] * 1e3:.0f} ms"
            rows.append(
                (f"{what} with log-probabilities over without", f"{r[f'{name}_ratio']:.2f}: {times}", AIMS["logprobs"])
            )
    if r := results.get("deterministic"):
        rows.append(("throughput that determinism costs", f"{r['cost']:.1%}", ""))
    return "\n".join(
        [*lines, "", "| what | measured | aim |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    parser.add_argument("--only", type=lambda text: text.split(","), default=PARTS, help=",".join(PARTS))
    parser.add_argument("--http", action="store_true", help="our side over HTTP (host and logprobs: always in process)")
    parser.add_argument("--model", default="dense", help="Qwen3-0.6B by default, or the name of another released model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--chunk-tokens", type=int, default=64, help="prompt tokens per prefill call of our engines")
    parser.add_argument("--folder", help="keep the random weights here and use them again; 0.6B: 1.5 or 3 GB")
    parser.add_argument("--out", default="bench_serve.json")
    args = parser.parse_args()
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: one or more of {','.join(PARTS)}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        shapes(args.model)
    except ValueError as error:
        parser.error(f"--model {error}")
    place = Path(args.folder or tempfile.mkdtemp(prefix="bench_serve_"))
    try:
        folder = place / f"{args.model}-{args.dtype}"
        if not folder.exists():
            write_folder(folder, args.model, args.dtype)
        speak(folder)
        bench = Bench(args, folder)
        bench.run()
    finally:
        if not args.folder:
            shutil.rmtree(place, ignore_errors=True)
    print(table(bench.results))


if __name__ == "__main__":
    main()

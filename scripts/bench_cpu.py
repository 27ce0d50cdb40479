"""Time this package against transformers on CPU cores: the same random weights, dtype, threads and minutes.

    python scripts/bench_cpu.py            # all of it, about 30 minutes on 2 cores; writes bench_cpu.json
    python scripts/bench_cpu.py --quick    # fewer repetitions, 10 minutes
    python scripts/bench_cpu.py --models dense --dtypes bfloat16 --gguf model-bf16.gguf

transformers writes a folder of random weights → one worker process per engine loads it and waits → the cases are timed
in turn, engine after engine and round after round, so that whatever else the machine does hits all of them → medians,
and ratios to the faster of transformers' eager and sdpa attention. Load seconds and peak memory come from processes of
their own that load, prefill 512 tokens and decode 32: one that compiles, and one that finds its programs in the compile
cache, as every later start does.

Both sides run greedy decoding on token ids. transformers runs a loop around the model under `inference_mode`, cheaper
than its `generate`, with the cache (dynamic or static) that is faster in a trial, and its default experts. This
package runs `checkpoint.load` and `runner.Batch`, what `qwen3-jax generate` runs.
"""

import argparse
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = 2
CONTEXT = 512
CALL = 16  # tokens per timed decode sample

# What the project set out to reach: transformers' seconds over ours, at least.
TARGETS = {
    ("dense", "float32"): {"decode b1": 1.2, "decode b8": 1.4, "prefill 512": 0.85, "prefill 2048": 0.85},
    ("dense", "bfloat16"): {"decode b1": 1.3, "decode b8": 1.0, "prefill 512": 0.85, "prefill 2048": 0.85},
    ("moe", "float32"): {"decode b1": 1.25, "decode b8": 0.9, "prefill 512": 0.85},
    ("moe", "bfloat16"): {"decode b1": 1.25, "decode b8": 0.9, "prefill 512": 0.85},
}
MOE = {  # 2 GB in bfloat16
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 384,
    "tie_word_embeddings": True,
}


def shapes(model: str) -> dict[str, Any]:
    """Return the config.json of "dense", Qwen3-0.6B, of "moe", Qwen3-30B-A3B scaled down, or of a released model."""
    from qwen3_jax.config import Qwen3Config

    if model == "moe":
        return Qwen3Config.from_name("Qwen3-30B-A3B").to_dict() | MOE
    return Qwen3Config.from_name("Qwen3-0.6B" if model == "dense" else model).to_dict()


def prompt(batch: int, tokens: int) -> Any:
    """Draw token ids [batch, tokens]."""
    import numpy as np

    return np.random.default_rng(batch * tokens).integers(0, 150_000, (batch, tokens))


def compiled(folder: str | Path) -> Path:
    """Return where the compile cache of a benchmarked folder is."""
    return Path(folder) / "compiled"


class Ours:
    """This package: the same loader and jitted steps as `qwen3-jax generate`."""

    name = "qwen3_jax"

    def __init__(self, folder: str, dtype: str):
        import jax

        jax.config.update("jax_platforms", "cpu")
        from qwen3_jax import checkpoint, compile_cache
        from qwen3_jax.runner import Runner

        compile_cache.enable(compiled(folder))

        began = time.perf_counter()
        config, params = checkpoint.load(folder, dtype=dtype, progress=False)
        jax.block_until_ready(params)
        self.load_s = time.perf_counter() - began
        self.runner = Runner(config, params, dtype=dtype)

    def variants(self) -> list[str]:
        return [self.name]

    def batch(self, batch: int, tokens: int, limit: int) -> Any:
        from qwen3_jax.request import Request
        from qwen3_jax.runner import Batch
        from qwen3_jax.sampling_params import SamplingParams

        greedy = SamplingParams(temperature=0.0)
        return Batch(self.runner, [Request(row, greedy, 0, (), limit) for row in prompt(batch, tokens).tolist()])

    def prefill(self, variant: str, batch: int, tokens: int) -> None:
        started = self.batch(batch, tokens, 1)
        started.read(started.first)

    def start(self, variant: str, batch: int, tokens: int, most: int) -> None:
        self.running = self.batch(batch, tokens, most)
        self.running.read(self.running.first)

    def decode(self, variant: str, count: int) -> None:
        emitted = self.running.read(self.running.decode(count))
        assert (emitted["token"][:count] >= 0).all(), "a row stopped early"


class Transformers:
    """transformers, its eager and sdpa attention, each with a dynamic and a static cache."""

    name = "transformers"

    def __init__(self, folder: str, dtype: str):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(THREADS)
        began = time.perf_counter()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.load_s = time.perf_counter() - began
        self.running: dict[str, Any] = {}

    def variants(self) -> list[str]:
        return ["eager dynamic", "sdpa dynamic", "eager static", "sdpa static"]

    def cache(self, kind: str, batch: int, most: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if kind == "dynamic":
            return DynamicCache(config=self.model.config)
        return StaticCache(config=self.model.config, max_cache_len=most)

    def start(self, variant: str, batch: int, tokens: int, most: int) -> None:
        import torch

        attention, kind = variant.split()
        self.model.set_attn_implementation(attention)
        cache = self.cache(kind, batch, tokens + most)
        with torch.inference_mode():
            out = self.model(
                torch.as_tensor(prompt(batch, tokens)), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            self.running[variant] = (cache, out.logits.argmax(-1))

    def prefill(self, variant: str, batch: int, tokens: int) -> None:
        self.start(variant, batch, tokens, 1)
        self.running.clear()

    def decode(self, variant: str, count: int) -> None:
        import torch

        self.model.set_attn_implementation(variant.split()[0])
        cache, token = self.running[variant]
        with torch.inference_mode():
            for _ in range(count):
                out = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
        self.running[variant] = (cache, token)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file of the same shapes; one row only."""

    name = "llama.cpp"

    def __init__(self, gguf: str, dtype: str):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        began = time.perf_counter()
        self.model = llama_cpp.Llama(gguf, n_ctx=4096, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
        self.load_s = time.perf_counter() - began

    def variants(self) -> list[str]:
        return [self.name]

    def start(self, variant: str, batch: int, tokens: int, most: int) -> None:
        self.model.reset()
        self.model.eval(prompt(batch, tokens)[0].tolist())

    def prefill(self, variant: str, batch: int, tokens: int) -> None:
        self.start(variant, batch, tokens, 1)

    def decode(self, variant: str, count: int) -> None:
        for _ in range(count):
            self.model.eval([self.model.sample(temp=0.0)])


ENGINES = {engine.name: engine for engine in (Ours, Transformers, LlamaCpp)}


def work(engine_name: str, folder: str, dtype: str) -> None:
    """Load a model, then answer each line of stdin, [method, arguments...], with the seconds that it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    engine = ENGINES[engine_name](folder, dtype)
    print(json.dumps({"load_s": engine.load_s, "variants": engine.variants()}), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        began = time.perf_counter()
        getattr(engine, method)(*arguments)
        seconds = time.perf_counter() - began
        rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_rss_bytes": rss_bytes}), file=answers, flush=True)


class Process:
    """A program that answers each line of JSON with another, on THREADS threads and without a network."""

    def __init__(self, name: str, *command: str):
        env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env
        )

    def ask(self, *request: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        sys.exit(f"{self.name} stopped:\n{self.log.read()[-3000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


class Worker(Process):
    """An engine in a process of its own."""

    def __init__(self, engine: str, folder: Path, dtype: str):
        super().__init__(engine, sys.executable, __file__, "--worker", engine, str(folder), dtype)
        hello = self.answer()
        self.load_s, self.variants = hello["load_s"], hello["variants"]


@dataclass(frozen=True)
class Case:
    """What one number means: a prompt's prefill, or a decode step after CONTEXT tokens."""

    kind: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.tokens}" if self.kind == "prefill" else f"decode b{self.batch}"

    def text(self, seconds: float) -> str:
        if self.kind == "prefill":
            return f"{self.batch * self.tokens / seconds:.0f} tokens/s"
        return f"{seconds * 1e3:.0f} ms/step"


def cases(model: str) -> list[Case]:
    prefills = [Case("prefill", 1, 512), Case("prefill", 1, 2048)] if model == "dense" else [Case("prefill", 1, 512)]
    return [*prefills, Case("decode", 1, CONTEXT), Case("decode", 8, CONTEXT)]


def note(began: float, text: str) -> None:
    print(f"[{time.perf_counter() - began:5.0f} s] {text}", file=sys.stderr, flush=True)


def time_case(case: Case, workers: list[Worker], rounds: int) -> dict[str, list[float]]:
    """Return {engine variant: [seconds per prefill or decode step]}, taken in turn."""
    most = (rounds + 3) * CALL + 1
    chosen: list[tuple[Worker, str]] = []
    for worker in workers:
        if worker.name == LlamaCpp.name and case.batch > 1:
            continue
        if case.kind == "prefill":
            chosen += [(worker, v) for v in worker.variants if "static" not in v]
            continue
        trial = {}
        for variant in worker.variants:
            worker.ask("start", variant, case.batch, case.tokens, most)
            worker.ask("decode", variant, CALL)  # warm
            trial[variant] = worker.ask("decode", variant, CALL)["seconds"]
        best = {}  # the faster cache of each attention
        for variant in sorted(trial, key=trial.__getitem__):
            best.setdefault(variant.split()[0], variant)
        chosen += [(worker, variant) for variant in best.values()]
    samples: dict[str, list[float]] = {variant: [] for _, variant in chosen}
    for i in range(rounds + (case.kind == "prefill")):
        for worker, variant in chosen:
            if case.kind == "prefill":
                seconds = worker.ask("prefill", variant, case.batch, case.tokens)["seconds"]
            else:
                seconds = worker.ask("decode", variant, CALL)["seconds"] / CALL
            if i or case.kind == "decode":  # the first prefill compiles and warms
                samples[variant].append(seconds)
    return samples


def time_loading(engine: str, folder: Path, dtype: str, times: int) -> tuple[list[float], list[float]]:
    """Return load seconds of fresh processes, and peak bytes of the first two, which prefill and decode as well."""
    load_s: list[float] = []
    peaks: list[float] = []
    shutil.rmtree(compiled(folder), ignore_errors=True)
    for _ in range(max(2, times)):
        worker = Worker(engine, folder, dtype)
        load_s.append(worker.load_s)
        if len(peaks) < 2:
            variant = next(v for v in worker.variants if "eager" not in v)
            worker.ask("start", variant, 1, CONTEXT, 33)
            peaks.append(worker.ask("decode", variant, 32)["peak_rss_bytes"])
        worker.close()
    return load_s, peaks


def write_folder(folder: Path, model: str, dtype: str) -> None:
    """Let transformers draw and save random weights, in a process that ends."""
    config = shapes(model) | {"torch_dtype": dtype, "dtype": dtype}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    program = (
        "import sys, torch, transformers\n"
        "config = transformers.AutoConfig.from_pretrained(sys.argv[1])\n"
        "torch.set_default_dtype(getattr(torch, sys.argv[2])); torch.manual_seed(0)\n"
        "transformers.AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder), dtype], check=True, stderr=subprocess.DEVNULL)


def table(results: list[dict[str, Any]]) -> str:
    """Lay the results out in Markdown."""
    lines = [
        "| model | dtype | case | qwen3_jax | transformers eager | sdpa | best / ours | aim | llama.cpp |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        aim = "" if r["target"] is None else f"{r['target']:.2f}"
        mark = "" if r["target"] is None else " ✓" if r["ratio"] >= r["target"] else " ✗"
        cells = [r["text"].get(k, "") for k in ("qwen3_jax", "eager", "sdpa")]
        cells = [
            r["model"],
            r["dtype"],
            r["case"],
            *cells,
            f"{r['ratio']:.2f}{mark}",
            aim,
            r["text"].get("llama.cpp", ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def result(model: str, dtype: str, case: str, samples: dict[str, list[float]], text: Any, target: float | None):
    """Sum a case up: medians, and the ratio of the faster transformers variant to ours."""
    medians = {variant: statistics.median(s) for variant, s in samples.items()}
    theirs = min(s for v, s in medians.items() if v not in (Ours.name, LlamaCpp.name))
    return {
        "model": model,
        "dtype": dtype,
        "case": case,
        "median": medians,
        "best": {variant: min(s) for variant, s in samples.items()},
        "samples": samples,
        "text": {v.split()[0]: text(s) for v, s in medians.items()},
        "ratio": theirs / medians[Ours.name],
        "target": target,
    }


def bench(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    rounds = args.rounds or (3 if args.quick else 7)
    work_folder = Path(args.folder or tempfile.mkdtemp(prefix="bench_cpu_"))
    llama = None
    if importlib.util.find_spec("llama_cpp") is None:
        note(began, "llama.cpp: skipped, llama-cpp-python is not installed")
    elif args.gguf is None:
        note(began, "llama.cpp: skipped, give a GGUF file of the benchmarked shapes with --gguf")
    else:
        llama = args.gguf
    try:
        for model in args.models:
            for dtype in args.dtypes:
                folder = work_folder / f"{model}-{dtype}"
                if not folder.exists():
                    note(began, f"{model} {dtype}: writing random weights to {folder}")
                    write_folder(folder, model, dtype)
                targets = TARGETS[model, dtype]
                loads, peaks = {}, {}
                for engine in (Ours.name, Transformers.name) if {"", "load"} & set(args.cases) else ():
                    note(began, f"{model} {dtype}: load and memory of {engine}")
                    loads[engine], peaks[engine] = time_loading(engine, folder, dtype, 1 if args.quick else 3)
                note(began, f"{model} {dtype}: starting the engines")
                workers = [Worker(Ours.name, folder, dtype), Worker(Transformers.name, folder, dtype)]
                if llama and model == "dense":
                    workers.append(Worker(LlamaCpp.name, llama, dtype))
                for case in (c for c in cases(model) if str(c).startswith(tuple(args.cases))):
                    note(began, f"{model} {dtype}: {case}, {rounds} rounds")
                    samples = time_case(case, workers, rounds)
                    results.append(result(model, dtype, str(case), samples, case.text, targets[str(case)]))
                    note(began, f"    {results[-1]['text']}, ratio {results[-1]['ratio']:.2f}")
                for worker in workers:
                    worker.close()
                if not loads:
                    continue
                label = {Ours.name: Ours.name, Transformers.name: "sdpa"}
                load = {label[k]: v for k, v in loads.items()}
                results.append(result(model, dtype, "load", load, lambda s: f"{s:.1f} s", 1.0))
                for start, case in enumerate(("peak memory, first start", "peak memory")):
                    peak = {label[k]: [v[start]] for k, v in peaks.items()}
                    results.append(result(model, dtype, case, peak, lambda b: f"{b / 1e9:.2f} GB", 1.0))
                if not args.folder:
                    shutil.rmtree(folder)
                Path(args.out).write_text(json.dumps({"threads": THREADS, "results": results}, indent=1) + "\n")
    finally:
        if not args.folder:
            shutil.rmtree(work_folder, ignore_errors=True)
    print(table(results))
    note(began, f"wrote {args.out}")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7, one load")
    parser.add_argument("--rounds", type=int, help="timed repetitions of every case")
    parser.add_argument("--models", nargs="+", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases that begin so: load, decode …")
    parser.add_argument("--folder", help="keep the random weights here and use them again; 10 GB for everything")
    parser.add_argument("--gguf", help="run llama.cpp on this file too (needs llama-cpp-python)")
    parser.add_argument("--out", default="bench_cpu.json")
    bench(parser.parse_args())


if __name__ == "__main__":
    main()

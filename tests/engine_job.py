"""One of two processes with an engine over both: `python -m tests.engine_job FOLDER CACHE`, with QWEN3_* set.

Process 0 prints the tokens of a few prompts as a line of JSON, then begins a long one and prints what became of it.
"""

import json
import sys

from qwen3_jax import distributed
from qwen3_jax.engine.device import Device
from qwen3_jax.engine.engine import Engine
from qwen3_jax.engine.lockstep import follow
from qwen3_jax.engine.options import EngineOptions
from qwen3_jax.loaded import load_model
from tests.engines import ask

TEXTS = ["The sky", "Once upon a time there was", "1 + 1 =", "Hello, " * 9]
OPTIONS = EngineOptions(rows=4, page_tokens=8, chunk_tokens=8, cache_tokens=8 * 500, decode_tokens=1)


def main(folder: str, cache: str) -> None:
    Device.warm_up = lambda self, progress=None: None  # only what is used is compiled here
    with distributed.session(distributed.detect()):
        model = load_model(folder, dtype="float32", mesh="model=2", cache=cache)
        if not distributed.is_main():
            follow(model, OPTIONS)
            return
        engine = Engine(model, OPTIONS)
        engine.start()
        said = engine.generate(TEXTS, max_tokens=8)
        print(json.dumps([c.token_ids for c in said]), flush=True)
        if sys.argv[3:] == ["stay"]:
            heard = ask(engine, "x", max_tokens=400)
            heard.begun.wait()
            print("begun", flush=True)
            heard.wait()
            print(json.dumps([heard.updates[-1].error, str(engine.failure)]), flush=True)
            heard.begun.clear()
            heard.begun.wait()  # whoever lost the other ends this process
        engine.stop()


if __name__ == "__main__":
    main(*sys.argv[1:3])

"""Thousands of requests gone wrong: no fault of ours, no hang, always the error object."""

import asyncio
import dataclasses
import json
import time

import pytest

from qwen3_jax.server.app import create_app
from tests.asgi import Answer, call
from tests.fake_engine import FakeEngine
from tests.mutations import requests

MOST = 24  # tokens, whatever is asked for


class BriefEngine(FakeEngine):
    """Says little."""

    def submit(self, request, listener, **options):
        return super().submit(dataclasses.replace(request, limit=min(request.limit, MOST)), listener, **options)


def check(path: str, said: Answer) -> None:
    """Hold an answer against the contract."""
    assert said.status < 500, said.body[:500]
    if said.status >= 400:
        assert said.error["message"]
        assert said.error["type"]
    elif said.headers.get("content-type", "").startswith("text/event-stream"):
        if path == "/v1/responses":
            last = said.body.decode().rstrip().splitlines()[-2]
            assert last in ("event: response.completed", "event: response.incomplete")
        else:
            assert not [e for e in said.events() if "error" in e]
    elif said.body:
        json.loads(said.body)


def run(seed: int, count: int) -> dict[int, int]:
    engine = BriefEngine(lambda request: '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {}}')
    app = create_app(engine)
    statuses: dict[int, int] = {}

    async def all_of_them() -> None:
        for method, path, body, headers in requests(seed, count):
            said = await asyncio.wait_for(call(app, method, path, body, headers), 30)
            try:
                check(path, said)
            except AssertionError as error:
                raise AssertionError(f"{method} {path} {body[:2000]!r}") from error
            statuses[said.status] = statuses.get(said.status, 0) + 1

    asyncio.run(all_of_them())
    until = time.monotonic() + 5
    while engine.running:
        assert time.monotonic() < until
        time.sleep(0.01)
    return statuses


@pytest.mark.parametrize("seed", range(4))
def test_mutated_requests(seed):
    statuses = run(seed, 500)
    assert statuses[200] > 50  # some mutations are harmless: both sides are tried
    assert statuses[400] > 100


@pytest.mark.slow
def test_many_mutated_requests():
    run(1000, 20_000)

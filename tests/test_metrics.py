"""Metrics against the sum of the answers' `usage`, and the monitoring files against the live /metrics."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen3_jax.engine.updates import RequestStats
from qwen3_jax.server.app import create_app
from qwen3_jax.server.metrics import Metrics
from tests.fake_engine import FakeEngine

MONITORING = Path(__file__).parents[1] / "configs" / "monitoring"

# SERVING's list: what a server without speculation, adapters or images has.
GAUGES = (
    "num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc engine_sleep_state"
)
COUNTERS = """prompt_tokens generation_tokens request_success num_preemptions prefix_cache_queries prefix_cache_hits
    prompt_tokens_cached prompt_tokens_by_source corrupted_requests admission_rejections"""
HISTOGRAMS = """time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
    e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
    request_inference_time_seconds request_prompt_tokens request_generation_tokens request_params_n
    request_params_max_tokens request_max_num_generation_tokens iteration_tokens_total request_num_preemptions"""


class Telling(FakeEngine):
    """A scripted engine that tells its observer what the real one would of requests."""

    observer: Metrics

    def submit(self, request, listener, **options):
        def hear(update):
            if update.stats is not None:
                s = update.stats
                stats = RequestStats(
                    s.prompt_tokens, s.generated_tokens, s.reasoning_tokens, 2, 0.1, 0.2, 0.3, 0.3, 0.6, 1, s.limit,
                    request.choice, request.choices,
                )  # fmt: skip
                self.observer.finished(stats, finish_reason=update.completion.finish_reason)
            listener(update)

        return super().submit(request, hear, **options)


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics("demo")


@pytest.fixture(scope="module")
def client(metrics) -> TestClient:
    engine = Telling()
    engine.observer = metrics
    metrics.watch(engine)
    return TestClient(create_app(engine, metrics=metrics))


def samples(text: str) -> dict[str, float]:
    """Return the sum over labels of every sample, by name."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return dict(found)


def scraped(client: TestClient) -> dict[str, float]:
    said = client.get("/metrics")
    assert said.status_code == 200
    assert said.headers["content-type"].startswith("text/plain")
    return samples(said.text)


def test_every_name_is_there_from_the_start():
    fresh = Metrics("demo")
    fresh.watch(FakeEngine())
    names = samples(fresh.text().decode())
    for name in GAUGES.split():
        assert f"qwen3:{name}" in names
    for name in COUNTERS.split():
        assert names[f"qwen3:{name}_total"] == 0
    for name in HISTOGRAMS.split():
        assert names[f"qwen3:{name}_count"] == 0
    assert not [name for name in names if not name.startswith("qwen3:")]


def test_counters_equal_the_sum_of_usage(client):
    before = scraped(client)
    total: Counter = Counter()
    answers = 0
    for i in range(12):
        body = {
            "messages": [{"role": "user", "content": "word " * (i + 1)}],
            "max_tokens": 3 + i,
            "n": 1 + i % 3,
            "seed": i,
        }
        if i % 2:
            stream = body | {"stream": True, "stream_options": {"include_usage": True}}
            text = client.post("/v1/chat/completions", json=stream).text
            usage = json.loads(text.split("data: ")[-2])["usage"]
        else:
            usage = client.post("/v1/chat/completions", json=body).json()["usage"]
        total.update({k: v for k, v in usage.items() if isinstance(v, int)})
        total["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
        total["reasoning"] += usage["completion_tokens_details"]["reasoning_tokens"]
        answers += body["n"]
    after = scraped(client)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["qwen3:prompt_tokens_total"] == total["prompt_tokens"]
    assert grown["qwen3:generation_tokens_total"] == total["completion_tokens"]
    assert grown["qwen3:reasoning_tokens_total"] == total["reasoning"]
    assert grown["qwen3:request_success_total"] == answers
    assert grown["qwen3:prompt_tokens_by_source_total"] == total["prompt_tokens"]
    assert grown["qwen3:request_params_n_sum"] == answers
    assert grown["qwen3:request_params_n_count"] == 12
    assert grown["qwen3:request_generation_tokens_sum"] == total["completion_tokens"]
    assert grown["qwen3:request_queue_time_seconds_sum"] == pytest.approx(0.1 * answers)
    assert grown["qwen3:http_requests_total"] == 13  # the first scrape too


def test_what_the_engine_tells_is_counted(metrics):
    before = samples(metrics.text().decode())
    metrics.step(host_s=0.001, rows=3, prompt_tokens=32, generated_tokens=3)
    metrics.step(host_s=0.002, rows=3, prompt_tokens=0, generated_tokens=0)
    metrics.first_token(0.25)
    metrics.inter_token(0.8, 8)
    metrics.preempted()
    metrics.prefix(queried=100, hits=64)
    metrics.rejected("queue")
    metrics.compiled("decode", 1.5)
    metrics.corrupted()
    after = samples(metrics.text().decode())
    grown = {
        name: round(after[name] - before[name], 9) for name in after if not name.endswith(("_created", "bytes", "fds"))
    }
    expected = {
        "engine_steps_total": 2, "prompt_tokens_computed_total": 32, "generation_tokens_read_total": 3,
        "iteration_tokens_total_sum": 35, "iteration_tokens_total_count": 1, "step_host_time_seconds_count": 2,
        "step_host_time_seconds_sum": 0.003, "time_to_first_token_seconds_count": 1,
        "time_to_first_token_seconds_sum": 0.25,
        "inter_token_latency_seconds_count": 8, "inter_token_latency_seconds_sum": 0.8, "num_preemptions_total": 1,
        "prefix_cache_queries_total": 100, "prefix_cache_hits_total": 64, "admission_rejections_total": 1,
        "compilations_total": 1, "compilation_seconds_total": 1.5, "corrupted_requests_total": 1,
    }  # fmt: skip
    counted = {name: value for name, value in grown.items() if value and not name.endswith("_bucket")}
    assert counted == {f"qwen3:{name}": value for name, value in expected.items()}


def test_gauges_are_the_engines_load():
    metrics = Metrics("m")
    load = SimpleNamespace(running=3, waiting=5, waiting_tokens=70, pages_used=8, pages_total=32)
    metrics.watch(SimpleNamespace(load=lambda: load, failure=None))
    now = samples(metrics.text().decode())
    assert now["qwen3:num_requests_running"] == 3
    assert now["qwen3:num_requests_waiting"] == now["qwen3:num_requests_waiting_by_reason"] == 5
    assert now["qwen3:kv_cache_usage_perc"] == 0.25
    assert now["qwen3:engine_up"] == 1
    metrics.watch(SimpleNamespace(load=lambda: load, failure=RuntimeError()))
    assert samples(metrics.text().decode())["qwen3:engine_up"] == 0


def test_routes_are_patterns(client):
    client.get("/v1/models/demo")
    client.get("/no/such/route")
    client.post("/v1/chat/completions", json={})
    text = client.get("/metrics").text
    assert 'qwen3:http_requests_total{method="GET",route="/v1/models/{name:path}",status="200"}' in text
    assert 'qwen3:http_requests_total{method="GET",route="unmatched",status="404"}' in text
    assert 'qwen3:http_requests_total{method="POST",route="/v1/chat/completions",status="400"}' in text


# --- The files of configs/monitoring ----------------------------------------------------------------------------------


def expressions(value) -> list[str]:
    """Find the queries of a dashboard."""
    if isinstance(value, dict):
        own = [v for k, v in value.items() if k in ("expr", "query") and isinstance(v, str)]
        return own + [e for v in value.values() for e in expressions(v)]
    return [e for v in value for e in expressions(v)] if isinstance(value, list) else []


def test_the_dashboard_asks_only_for_metrics_that_exist(client):
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    asked = [e for e in expressions(dashboard) if "qwen3:" in e]
    names = {name for e in asked for name in re.findall(r"qwen3:[a-z0-9_]+", e)}
    client.get("/health")
    there = set(scraped(client))
    assert names <= there, names - there
    assert len(names) > 30
    labels = {label for e in asked for label in re.findall(r"([a-z_]+)=~", e)}
    assert labels == {"model_name", "instance"}
    for e in asked:
        assert e.count("(") == e.count(")")
        assert e.count("{") == e.count("}")


def test_the_dashboards_panels_stand_side_by_side():
    panels = json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"]
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    taken = np.zeros((height, 24), int)
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        taken[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]] += 1
    assert taken.max() == 1
    assert len({p["id"] for p in panels}) == len(panels)


def test_the_scrape_config_names_the_route(client):
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert client.get(job["metrics_path"]).status_code == 200
    assert re.fullmatch(r"[0-9.]+:\d+", job["static_configs"][0]["targets"][0])

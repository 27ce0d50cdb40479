"""Embeddings and scores against transformers, on tiny folders that it saved."""

import asyncio
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from starlette.testclient import TestClient
from transformers import Qwen3Model

from qwen3_jax import checkpoint
from qwen3_jax.cli import main
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.updates import EngineStopped, RequestStats
from qwen3_jax.loaded import LoadedModel, load_model
from qwen3_jax.pooling import Pooler, PoolingError, appends_end, embeddings, gather, judged, query_text, verdicts
from qwen3_jax.server.app import create_app
from qwen3_jax.server.engines import PoolingEngine
from qwen3_jax.text.tokenizer import Tokenizer
from tests import tiny
from tests.asgi import call
from tests.mutations import POOLED, requests
from tests.ports import free_port
from tests.server_process import started
from tests.text_folders import DEMO, ours, released

ROWS = 2048


def companions(folder: Path, *, ends: bool) -> None:
    """Give a folder the demo's tokenizer, which appends <|endoftext|> for embedding models."""
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    spec = json.loads((DEMO / "tokenizer.json").read_text())
    if ends:
        end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
            "pair": [],
            "special_tokens": {},
        }
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def saved(folder: Path, *, moe: bool, ends: bool):
    folder, model = tiny.save(folder, moe=moe, vocab_size=ROWS, eos_token_id=2006, pad_token_id=2006)
    companions(folder, ends=ends)
    return load_model(folder, cache="off"), model


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[LoadedModel, torch.nn.Module]:
    return saved(tmp_path_factory.mktemp("model"), moe=False, ends=True)


@pytest.fixture(scope="module")
def pooler(pair) -> Pooler:
    return Pooler(pair[0])


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, ROWS, n).tolist() for n in lengths]


def reference(model, prompts: list[list[int]], dimensions: int | None = None) -> np.ndarray:
    """As the example program of Qwen3-Embedding: left-padded batch, last position, cut, normalised."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[2006] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        last = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(last[:, :dimensions], p=2, dim=1).numpy()


def test_embeddings_equal_transformers_at_every_length(pair, pooler):
    given = prompts([1, 2, 15, 16, 17, 3, 32])
    got = pooler.embed(given)
    np.testing.assert_allclose(got, reference(pair[1], given), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(pooler.embed(given, dimensions=8), reference(pair[1], given, 8), atol=2e-6)


def test_experts_embed_too(tmp_path):
    loaded, model = saved(tmp_path, moe=True, ends=False)
    given = prompts([3, 16])
    np.testing.assert_allclose(Pooler(loaded).embed(given), reference(model, given), atol=2e-6)


def test_scores_equal_transformers(pair, pooler):
    given = prompts([4, 11, 7, 16], seed=1)
    yes, no = 17, 40
    with torch.inference_mode():
        logits = [pair[1](input_ids=torch.tensor([p])).logits[0, -1, [no, yes]] for p in given]
    expected = torch.softmax(torch.stack(logits), dim=-1)[:, 1].numpy()
    got = gather(pooler.parts(given), given, lambda part: pooler.scores(part, yes=yes, no=no))
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_one_program_per_length(pair):
    told: list[str] = []
    pooler = Pooler(pair[0], compiled=lambda name, seconds: told.append(name))
    for n in (1, 9, 16):
        pooler.embed(prompts([n, n, 5]))
    assert pooler.programs.keys() == {("embed", 16)}
    assert told == ["embed 16x16"]
    assert pooler.compile_s > 0
    sizes = [len(part) for part in pooler.parts(prompts([500] * 5 + [3] * 40))]
    assert sizes == [16, 16, 8, 2, 2, 1]
    pooler.context = 48  # a short one, to warm up for all of it
    announced: list[str] = []
    pooler.warm_up("embed", progress=announced.append)
    assert announced == ["embed 16x16", "embed 16x32", "embed 16x48"]
    assert told == announced
    pooler.embed(prompts([1, 17, 33, 48]))
    assert told == announced


def test_a_prompt_embeds_alike_in_any_company(pooler):
    given = prompts([12, 14, 9, 16, 3], seed=2)
    np.testing.assert_array_equal(pooler.embed(given)[1], pooler.embed([given[1]])[0])


def test_what_cannot_be_pooled(pooler):
    with pytest.raises(PoolingError, match="input 1 has 0 tokens: give 1 to 512"):
        pooler.parts([[1], []])
    with pytest.raises(PoolingError, match="input 0 has 513 tokens"):
        pooler.parts([[1] * 513])
    with pytest.raises(PoolingError, match="input 0 has token id 2048: the model has 0 to 2047"):
        pooler.parts([[2048]])
    with pytest.raises(PoolingError, match="dimensions is 33: the model has 1 to 32"):
        embeddings(np.ones((1, 32), np.float32), 33)
    with pytest.raises(PoolingError, match="at most 2"):
        pooler.hidden([[1] * 500] * 3)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A folder as the untied Qwen3-Embedding-8B may come: no lm_head, and names without `model.`."""
    folder, model = tmp_path_factory.mktemp("bare"), tiny.build(vocab_size=ROWS, eos_token_id=2006, pad_token_id=2006)
    assert isinstance(model.model, Qwen3Model)
    model.model.save_pretrained(folder)
    companions(folder, ends=True)
    return folder, model


def test_a_backbone_without_head_embeds(bare):
    folder, model = bare
    with pytest.raises(checkpoint.CheckpointError, match=r"lm_head.weight: missing"):
        load_model(folder, cache="off")  # to generate with
    loaded = load_model(folder, backbone=None, cache="off")
    assert loaded.backbone
    assert "lm_head" not in loaded.params
    given = prompts([5, 12])
    np.testing.assert_allclose(Pooler(loaded).embed(given), reference(model, given), atol=2e-6)
    spread = load_model(folder, mesh="model=2,data=4", backbone=None, cache="off")
    np.testing.assert_allclose(Pooler(spread).embed(given), reference(model, given), atol=2e-6)


@pytest.mark.parametrize(("tied", "alone"), [(True, False), (True, True), (False, False)])
def test_a_folder_says_whether_it_generates(tmp_path, tied, alone):
    """Tied embeddings are a head, except to a network that was saved by itself."""
    model = tiny.build(vocab_size=ROWS, tie_word_embeddings=tied, eos_token_id=2006, pad_token_id=2006)
    (model.model if alone else model).save_pretrained(tmp_path)
    companions(tmp_path, ends=True)
    assert load_model(tmp_path, backbone=None, cache="off").backbone == alone
    assert not load_model(tmp_path, cache="off").backbone


def test_the_tokenizer_says_how_inputs_end(pair):
    assert appends_end(pair[0].tokenizer)
    assert not appends_end(ours())
    assert pair[0].tokenizer.encode("Hi", add_special_tokens=True)[-1] == 2006


def test_texts():
    assert query_text("tea?", "Find tea") == "Instruct: Find tea\nQuery:tea?"
    whole = judged(ours(), "q", "d " * 50, context=4096, task="t")
    text = ours().decode(whole)
    assert text.startswith("<|im_start|>system\nJudge whether the Document")
    assert "<Instruct>: t\n<Query>: q\n<Document>: d d" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    cut = judged(ours(), "q", "d " * 50, context=len(whole) - 40, task="t")
    assert len(cut) == len(whole) - 40
    assert ours().decode(cut).endswith("</think>\n\n")
    with pytest.raises(PoolingError, match="the model's context is 8"):
        judged(ours(), "q", "d", context=8)


@released
def test_released_ids():
    from tests.text_folders import RELEASED

    tokenizer = Tokenizer.from_folder(RELEASED)
    assert verdicts(tokenizer) == (9693, 2152)
    assert judged(tokenizer, "q", "d", context=4096)[-4:] == [151667, 271, 151668, 271]


# --- Over HTTP --------------------------------------------------------------------------------------------------------


class Heard(Observer):
    """Remembers what the routes tell, and on which threads programs were compiled."""

    def __init__(self) -> None:
        self.finishes: list[RequestStats] = []
        self.compiles: list[tuple[str, str]] = []

    def finished(self, stats, *, finish_reason):
        self.finishes.append(stats)

    def compiled(self, name, seconds):
        self.compiles.append((name, threading.current_thread().name))


@pytest.fixture(scope="module")
def engine(pair) -> Iterator[PoolingEngine]:
    engine = PoolingEngine(pair[0], observer=Heard())
    yield engine
    engine.stop()
    with pytest.raises(EngineStopped, match="has been stopped"):
        engine.call(int)
    assert engine.load().running == engine.load().waiting == 0


@pytest.fixture(scope="module")
def client(engine) -> TestClient:
    return TestClient(create_app(engine))


@pytest.fixture(scope="module")
def openai_client(client) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)


def test_the_openai_client_gets_embeddings(pair, engine, openai_client):
    tokenizer = pair[0].tokenizer
    texts = ["tea", "a cup of té"]
    ids = [tokenizer.encode(t, add_special_tokens=True) for t in texts]
    expected = reference(pair[1], ids)
    name = openai_client.models.list().data[0].id
    packed = openai_client.embeddings.create(model=name, input=texts)  # base64, unpacked by the client
    np.testing.assert_allclose([d.embedding for d in packed.data], expected, atol=2e-6)
    assert [d.index for d in packed.data] == [0, 1]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == sum(map(len, ids))
    assert engine.observer.finishes[-1].prompt_tokens == packed.usage.prompt_tokens
    plain = openai_client.embeddings.create(model=name, input=ids, encoding_format="float", dimensions=8)
    np.testing.assert_allclose([d.embedding for d in plain.data], reference(pair[1], ids, 8), atol=2e-6)
    one = openai_client.embeddings.create(model=name, input=ids[0], encoding_format="float")
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=2e-6)


def test_an_embedding_model_reranks_by_cosine(pair, client):
    documents = ["green", "a", "bc"]
    tokenizer = pair[0].tokenizer
    texts = [query_text("which?"), *documents]
    vectors = reference(pair[1], [tokenizer.encode(t, add_special_tokens=True) for t in texts])
    expected = vectors[1:] @ vectors[0]
    said = client.post("/v1/rerank", json={"query": "which?", "documents": ["green", {"text": "a"}, "bc"], "top_n": 2})
    results = said.json()["results"]
    assert [r["index"] for r in results] == np.argsort(-expected)[:2].tolist()
    assert [r["document"]["text"] for r in results] == [documents[r["index"]] for r in results]
    np.testing.assert_allclose([r["relevance_score"] for r in results], np.sort(-expected)[:2] * -1, atol=2e-6)
    said = client.post("/v1/score", json={"text_1": "which?", "text_2": documents})
    np.testing.assert_allclose([d["score"] for d in said.json()["data"]], expected, atol=2e-6)


def test_a_reranker_judges(pair):
    """The demo's tokenizer has "no" and lacks "yes"; one that has both answers as transformers does."""
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    spec = json.loads((DEMO / "tokenizer.json").read_text())
    added = [t for t in spec["added_tokens"] if t["content"] != "<|fim_pad|>"]
    gone = [t for t in spec["added_tokens"] if t not in added]
    renamed = [t | {"content": word} for t, word in zip(gone, ("yes",), strict=True)]
    spec["added_tokens"] = sorted(added + renamed, key=lambda t: t["id"])
    for token in gone:
        settings["added_tokens_decoder"].pop(str(token["id"]))
    tokenizer = Tokenizer(spec, settings, (2008,))
    client = TestClient(create_app(PoolingEngine(LoadedModel(**{**vars(pair[0]), "tokenizer": tokenizer}))))
    ids = [judged(tokenizer, "q", d, context=512) for d in ("tea", "milk")]
    yes, no = verdicts(tokenizer)
    with torch.inference_mode():
        logits = torch.stack([pair[1](input_ids=torch.tensor([p])).logits[0, -1, [no, yes]] for p in ids])
    expected = torch.softmax(logits, dim=-1)[:, 1].numpy()
    said = client.post("/v1/score", json={"text_1": ["q", "q"], "text_2": ["tea", "milk"]}).json()
    np.testing.assert_allclose([d["score"] for d in said["data"]], expected, atol=2e-6)
    assert said["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_serve_offers_what_a_backbone_can_do(bare, tmp_path):
    """`qwen3-jax serve` and the openai client: embeddings and cosine scores without a compile; one clear refusal."""
    folder, model = bare
    tokenizer = Tokenizer.from_folder(folder)
    port = free_port()
    command = ["-m", "qwen3_jax", "serve", str(folder), "--port", str(port), "--served-model-name", "e"]
    with (
        started([*command, "--compile-cache", "off"], port, tmp_path / "log") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        compiled = re.findall(rb"\nqwen3:compilations_total.*", server.get("/metrics")[1])
        for text in ("tea", "a longer cup of tea, " * 5):
            ids = tokenizer.encode(text, add_special_tokens=True)
            said = client.embeddings.create(model="e", input=text)
            np.testing.assert_allclose(said.data[0].embedding, reference(model, [ids])[0], atol=2e-6)
        scored: Any = client.post("/score", cast_to=object, body={"text_1": "tea", "text_2": ["milk", "tea"]})
        texts = [query_text("tea"), "milk", "tea"]
        vectors = reference(model, [tokenizer.encode(t, add_special_tokens=True) for t in texts])
        np.testing.assert_allclose([d["score"] for d in scored["data"]], vectors[1:] @ vectors[0], atol=2e-6)
        assert re.findall(rb"\nqwen3:compilations_total.*", server.get("/metrics")[1]) == compiled != []
        for ask in (
            lambda: client.chat.completions.create(model="e", messages=[{"role": "user", "content": "Hi"}]),
            lambda: client.completions.create(model="e", prompt="Hi", stream=True),
            lambda: client.responses.create(model="e", input="Hi"),
        ):
            with pytest.raises(openai.BadRequestError, match="model is an embedding model") as refused:
                ask()
            assert refused.value.param == "model"
        assert server.get("/health")[0] == 200
        assert json.loads(server.get("/load")[1])["server_load"] == 0
        assert server.stop() == 0


def test_batch_embeds(bare, tmp_path):
    """`qwen3-jax batch` on lines of /v1/embeddings; a line that would generate is answered with the error."""
    folder, model = bare
    tokenizer = Tokenizer.from_folder(folder)
    texts = ["tea", "coffee", "a cup of tea"]
    lines = [{"custom_id": text, "method": "POST", "url": "/v1/embeddings", "body": {"input": text}} for text in texts]
    lines.append({"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["batch", str(source), str(target), "--model", str(folder), "--compile-cache", "off"]) == 1
    answers = {a["custom_id"]: a["response"] for a in map(json.loads, target.read_text().splitlines())}
    got = [answers[text]["body"]["data"][0]["embedding"] for text in texts]
    expected = reference(model, [tokenizer.encode(text, add_special_tokens=True) for text in texts])
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert answers["x"]["status_code"] == 400


def test_programs_of_a_generator_are_compiled_beside_its_engine(pair):
    """Nothing is warmed up for a model that generates; what it first needs is not compiled on the engine's thread."""
    loaded = LoadedModel(**{**vars(pair[0]), "tokenizer": ours()})
    heard = Heard()
    app = create_app(PoolingEngine(loaded, observer=heard))
    app.state.serving.warm_up()
    assert heard.compiles == []
    client = TestClient(app)
    for _ in range(2):
        assert client.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
    ((name, thread),) = heard.compiles
    assert name == "embed 16x16"
    assert thread.startswith("compiler")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": ""}, None),
        ("embeddings", {"input": ["a"] * 2049}, "input"),
        ("embeddings", {"input": [[1] * 600]}, "input"),
        ("embeddings", {"input": [1, 99999]}, "input"),
        ("embeddings", {"input": [1, "a"]}, "input"),
        ("embeddings", {"input": "a" * 100_000_0}, "input"),
        ("embeddings", {"input": "a", "dimensions": 64}, "dimensions"),
        ("embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("embeddings", {"input": "a", "truncate_prompt_tokens": 3}, None),
        ("embeddings", {}, "input"),
        ("rerank", {"query": "q", "documents": []}, "documents"),
        ("rerank", {"query": "q", "documents": [{"image": "http://127.0.0.1:1/"}]}, "documents"),
        ("score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, None),
    ],
)  # fmt: skip
def test_what_is_refused(client, path, body, param):
    said = client.post(f"/v1/{path}", json=body)
    if body == {"input": ""}:  # the appended end token is an input
        assert said.status_code == 200
        return
    assert said.status_code == 400
    assert len(said.content) < 3000
    error = said.json()["error"]
    assert param is None or error["param"] == param
    assert error["type"] == "BadRequestError"


def test_mutated_requests(client):
    """As in `test_server_fuzz`: no fault of ours, always the error object."""
    statuses: Counter[int] = Counter()
    for method, path, body, headers in requests(0, 400, seeds=POOLED):
        said = asyncio.run(asyncio.wait_for(call(client.app, method, path, body, headers), 60))
        statuses[said.status] += 1
        assert said.status < 500, (path, body)
        if said.status >= 400:
            assert said.error["message"], (path, body)
        elif said.body:
            json.loads(said.body, parse_constant=pytest.fail)  # no NaN
    assert min(statuses[200], statuses[400]) > 80


def test_the_wrong_model_is_not_found(client):
    said = client.post("/v1/embeddings", json={"model": "gpt-4", "input": "a"})
    assert said.status_code == 404
    assert "gpt-4" in said.json()["error"]["message"]

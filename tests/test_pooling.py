"""Embeddings and scores against transformers, on tiny folders that it saved."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from starlette.testclient import TestClient
from transformers import Qwen3Model

from qwen3_jax import checkpoint
from qwen3_jax.engine.observer import Observer
from qwen3_jax.engine.updates import RequestStats
from qwen3_jax.loaded import LoadedModel, load_model
from qwen3_jax.pooling import Pooler, PoolingError, appends_end, embeddings, gather, judged, query_text, verdicts
from qwen3_jax.server.app import create_app
from qwen3_jax.text.tokenizer import Tokenizer
from tests import tiny
from tests.text_folders import DEMO, ours, released

ROWS = 832


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
    folder, model = tiny.save(folder, moe=moe, vocab_size=ROWS, eos_token_id=768, pad_token_id=768)
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
    tokens = torch.tensor([[768] * (longest - len(p)) + p for p in prompts])
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


def test_a_prompt_embeds_alike_in_any_company(pooler):
    given = prompts([12, 14, 9, 16, 3], seed=2)
    np.testing.assert_array_equal(pooler.embed(given)[1], pooler.embed([given[1]])[0])


def test_what_cannot_be_pooled(pooler):
    with pytest.raises(PoolingError, match="input 1 has 0 tokens: give 1 to 512"):
        pooler.parts([[1], []])
    with pytest.raises(PoolingError, match="input 0 has 513 tokens"):
        pooler.parts([[1] * 513])
    with pytest.raises(PoolingError, match="input 0 has token id 832: the model has 0 to 831"):
        pooler.parts([[832]])
    with pytest.raises(PoolingError, match="dimensions is 33: the model has 1 to 32"):
        embeddings(np.ones((1, 32), np.float32), 33)
    with pytest.raises(PoolingError, match="at most 2"):
        pooler.hidden([[1] * 500] * 3)


def test_a_backbone_without_head_embeds(tmp_path):
    """As the untied Qwen3-Embedding-8B may come: no lm_head, and names without `model.`."""
    model = tiny.build(vocab_size=ROWS, eos_token_id=768, pad_token_id=768)
    backbone = model.model
    assert isinstance(backbone, Qwen3Model)
    backbone.save_pretrained(tmp_path)
    companions(tmp_path, ends=True)
    config, params = checkpoint.load(tmp_path, backbone=True, progress=False)
    whole = load_model(DEMO, cache="off")
    loaded = LoadedModel(
        **{**vars(whole), "config": config, "params": params, "tokenizer": ours(), "dtype": np.dtype("float32")}
    )
    given = prompts([5, 12])
    np.testing.assert_allclose(Pooler(loaded).embed(given), reference(model, given), atol=2e-6)


def test_the_tokenizer_says_how_inputs_end(pair):
    assert appends_end(pair[0].tokenizer)
    assert not appends_end(ours())
    assert pair[0].tokenizer.encode("Hi", add_special_tokens=True)[-1] == 768


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


class Stub:
    """What the routes ask of an engine, on a thread of its own."""

    failure = None

    def __init__(self, model: LoadedModel):
        self.model = model
        self.heard: list[RequestStats] = []
        self.observer = Observer()
        self.observer.finished = lambda stats, *, finish_reason: self.heard.append(stats)
        self._thread = ThreadPoolExecutor(1)

    def call(self, function):
        return self._thread.submit(function)


@pytest.fixture(scope="module")
def engine(pair) -> Stub:
    return Stub(pair[0])


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
    assert engine.heard[-1].prompt_tokens == packed.usage.prompt_tokens
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
    """The demo's tokenizer lacks "yes"; one that has it answers as transformers does."""
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    spec = json.loads((DEMO / "tokenizer.json").read_text())
    added = [t for t in spec["added_tokens"] if t["content"] not in ("<|fim_pad|>", "<|repo_name|>")]
    gone = [t for t in spec["added_tokens"] if t not in added]
    renamed = [t | {"content": word} for t, word in zip(gone, ("yes", "no"), strict=True)]
    spec["added_tokens"] = sorted(added + renamed, key=lambda t: t["id"])
    for token in gone:
        settings["added_tokens_decoder"].pop(str(token["id"]))
    tokenizer = Tokenizer(spec, settings, (770,))
    client = TestClient(create_app(Stub(LoadedModel(**{**vars(pair[0]), "tokenizer": tokenizer}))))
    ids = [judged(tokenizer, "q", d, context=512) for d in ("tea", "milk")]
    yes, no = verdicts(tokenizer)
    with torch.inference_mode():
        logits = torch.stack([pair[1](input_ids=torch.tensor([p])).logits[0, -1, [no, yes]] for p in ids])
    expected = torch.softmax(logits, dim=-1)[:, 1].numpy()
    said = client.post("/v1/score", json={"text_1": ["q", "q"], "text_2": ["tea", "milk"]}).json()
    np.testing.assert_allclose([d["score"] for d in said["data"]], expected, atol=2e-6)
    assert said["usage"]["prompt_tokens"] == sum(map(len, ids))


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


def test_the_wrong_model_is_not_found(client):
    said = client.post("/v1/embeddings", json={"model": "gpt-4", "input": "a"})
    assert said.status_code == 404
    assert "gpt-4" in said.json()["error"]["message"]

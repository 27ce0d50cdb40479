"""The contract, held by the openai client and plain sockets against `qwen3-jax serve` on the embedded checkpoint."""

import concurrent.futures
import http.client
import json
import re
import socket
import time
from typing import Any, Literal

import jsonschema
import openai
import psutil
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.mutations import requests
from tests.server_process import Server, answer, demo

KEY = "a-secret-key"
MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Look.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server, with a key."""
    log = tmp_path_factory.mktemp("live") / "log"
    arguments = [
        "--api-key",
        KEY,
        "--rows",
        "4",
        "--chunk-tokens",
        "64",
        "--cache-tokens",
        "8192",
        "--dtype",
        "float32",
    ]
    with demo(log, *arguments) as running:
        running.headers["authorization"] = f"Bearer {KEY}"
        yield running


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def chat(client: OpenAI, **fields):
    fields = {"model": "demo", "messages": MESSAGES, "max_tokens": 24} | fields
    return client.chat.completions.create(**fields)


def tokenize(client: OpenAI, server: Server, **body: Any) -> dict[str, Any]:
    said: Any = client.post(f"{server.url}/tokenize", cast_to=object, body=body)
    return said


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("demo", "model")
    assert client.models.retrieve("demo").model_extra["max_model_len"] == 4096
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        chat(client, model="gpt-9")


def test_chat(client):
    said = chat(client, seed=1, logprobs=True, top_logprobs=3)
    (choice,) = said.choices
    assert said.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert len(choice.logprobs.content) == said.usage.completion_tokens
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    message = choice.message.model_extra
    assert message["reasoning"] == message["reasoning_content"]


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "n": 3, "temperature": 1.5}])
def test_a_stream_says_what_the_plain_answer_says(client, fields):
    plain = chat(client, **fields)
    usage, texts, reasons, roles, ids = None, {}, {}, [], set()
    with chat(client, stream=True, stream_options={"include_usage": True}, **fields) as stream:
        for chunk in stream:
            ids.add((chunk.id, chunk.created, chunk.model))
            assert usage is None, "the usage comes last"
            if not chunk.choices:
                usage = chunk.usage
            for choice in chunk.choices:
                assert choice.index not in reasons, "nothing comes after the finish_reason"
                delta, extra = choice.delta, choice.delta.model_extra
                roles += [choice.index] if delta.role else []
                text = texts.setdefault(choice.index, {"content": "", "reasoning": "", "reasoning_content": ""})
                text["content"] += delta.content or ""
                for name in ("reasoning", "reasoning_content"):
                    text[name] += extra.get(name) or ""
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
    assert len(ids) == 1
    assert usage is not None
    assert roles == list(range(len(plain.choices)))
    assert usage.completion_tokens == plain.usage.completion_tokens
    assert usage.prompt_tokens == plain.usage.prompt_tokens
    for choice in plain.choices:
        assert texts[choice.index]["content"] == (choice.message.content or "")
        assert texts[choice.index]["reasoning"] == (choice.message.model_extra["reasoning"] or "")
        assert texts[choice.index]["reasoning"] == texts[choice.index]["reasoning_content"]
        assert reasons[choice.index] == choice.finish_reason


def said(choice) -> tuple[str, str]:
    """Return a choice's reasoning and answer."""
    return choice.message.model_extra["reasoning"], choice.message.content


def test_seeds(client):
    """The same seed says the same; the choices of a seed are those of the seeds that follow it."""
    wild = {"temperature": 2, "top_p": 1, "extra_body": {"top_k": -1, "min_tokens": 8}}
    three = [said(choice) for choice in chat(client, seed=40, n=3, **wild).choices]
    assert [said(chat(client, seed=40 + i, **wild).choices[0]) for i in range(3)] == three
    assert len(set(three)) == 3
    same = chat(client, temperature=0, n=4).choices
    assert len({c.message.content for c in same}) == 1


def test_raw_sse(server):
    with server.post(
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 5, "stream": True},
        connection="close",
        **server.headers,
    ) as connection:
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head.lower()
    assert b"transfer-encoding: chunked" in head.lower()
    events, at = b"", 0
    while True:  # unchunk
        size, _, rest = body[at:].partition(b"\r\n")
        if int(size, 16) == 0:
            break
        events += rest[: int(size, 16)]
        at += len(size) + 4 + int(size, 16)
    parts = events.decode().split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    for part in parts[:-2]:
        assert part.startswith("data: {")
        assert json.loads(part[6:])["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("budget", [0, 1, 7, 20])
def test_the_thinking_budget_is_exact(client, server, budget):
    """Counted from the start of the turn, `<think>` included; then the stop text, whose end is `</think>`."""
    opening = {"extra_body": {"thinking_token_budget": budget, "ignore_eos": True, "return_token_ids": True}}
    said = chat(client, seed=3, max_tokens=80, **opening)
    ids = said.choices[0].model_extra["token_ids"]
    stop = tokenize(client, server, prompt=STOP_TEXT, add_special_tokens=False)["tokens"]
    close = stop[-2]  # `</think>`, before the two line ends
    assert ids[budget : budget + len(stop)] == stop or close in ids[:budget]
    streamed = [c for c in chat(client, seed=3, max_tokens=80, stream=True, **opening) if c.choices]
    assert [t for c in streamed for t in (c.choices[0].model_extra or {}).get("token_ids") or []] == ids


STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)


def test_thinking_off(client, server):
    base = tokenize(client, server, messages=MESSAGES)["count"]
    off = tokenize(client, server, messages=MESSAGES, chat_template_kwargs=OFF)["count"]
    assert off > base
    for fields in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": OFF}}, {"extra_body": OFF}):
        assert chat(client, **fields).usage.prompt_tokens == off
    assert chat(client, reasoning_effort="high").usage.prompt_tokens == base


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]
    warm: bool


def test_parse(client):
    """The client's own helper: a pydantic model in, an object of it out."""
    said = client.chat.completions.parse(
        model="demo", messages=MESSAGES, response_format=Weather, max_tokens=400, seed=1, extra_body=OFF
    )
    assert isinstance(said.choices[0].message.parsed, Weather)


@pytest.mark.parametrize("temperature", [0, 1, 2])
@pytest.mark.parametrize(
    ("fields", "check"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "w", "schema": WEATHER, "strict": True},
                }
            },
            "w",
        ),
        ({"extra_body": {"structured_outputs": {"json": WEATHER}}}, "w"),
        ({"extra_body": {"guided_json": json.dumps(WEATHER)}}, "w"),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, "yes no"),
        ({"extra_body": {"guided_choice": ["yes", "no"]}}, "yes no"),
        ({"extra_body": {"guided_regex": "[0-9]{3}"}}, "digits"),
        ({"extra_body": {"guided_grammar": 'root ::= "yes" | "no"'}}, "yes no"),
    ],
    ids=["response_format", "json", "guided_json", "choice", "guided_choice", "regex", "grammar"],
)
def test_structure_is_forced_on_a_model_that_never_learned_it(client, fields, check, temperature):
    extra = fields.get("extra_body", {}) | OFF
    said = chat(client, max_tokens=200, temperature=temperature, seed=2, **fields | {"extra_body": extra})
    assert said.choices[0].finish_reason == "stop"
    text = said.choices[0].message.content
    if check == "w":
        jsonschema.validate(json.loads(text), WEATHER)
    elif check == "digits":
        assert len(text) == 3
        assert text.isdigit()
    else:
        assert text in check.split()


class TestTools:
    @pytest.mark.parametrize("temperature", [0, 1.5])
    def test_parallel_calls_follow_one_another(self, client, temperature):
        """Many calls, until the limit if need be; all but one that was cut are whole and valid."""
        fields = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200, "temperature": temperature, "seed": 1}
        choice = chat(client, extra_body=OFF, **fields).choices[0]
        assert choice.finish_reason in ("tool_calls", "length")
        assert choice.message.content in (None, "")
        whole = choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]
        assert whole
        for call in whole:
            tool = next(t["function"] for t in TOOLS if t["function"]["name"] == call.function.name)
            jsonschema.validate(json.loads(call.function.arguments), tool["parameters"])

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("temperature", [0, 1.5])
    def test_required(self, client, stream, temperature):
        fields = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300, "temperature": temperature, "seed": 1}
        fields |= {"parallel_tool_calls": False}  # a model that was never taught to call would not stop calling
        if stream:
            with client.chat.completions.stream(model="demo", messages=MESSAGES, extra_body=OFF, **fields) as events:
                assert [*events]
                choice = events.get_final_completion().choices[0]
        else:
            choice = chat(client, extra_body=OFF, **fields).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content in (None, "")
        for call in choice.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            tool = next(t["function"] for t in TOOLS if t["function"]["name"] == call.function.name)
            jsonschema.validate(arguments, tool["parameters"])
        assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)

    def test_named(self, client):
        choice = {"type": "function", "function": {"name": "get_time"}}
        said = chat(client, tools=TOOLS, tool_choice=choice, extra_body=OFF, max_tokens=100).choices[0]
        assert [call.function.name for call in said.message.tool_calls] == ["get_time"]
        assert said.finish_reason == "tool_calls"

    def test_one_at_a_time(self, client):
        fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 2}
        for seed in range(3):
            said = chat(client, max_tokens=300, seed=seed, extra_body=OFF, **fields).choices[0]
            assert len(said.message.tool_calls) == 1

    def test_a_result_goes_back(self, client):
        said = chat(client, tools=TOOLS, tool_choice="required", extra_body=OFF, max_tokens=300, seed=1).choices[0]
        results = [{"role": "tool", "tool_call_id": c.id, "content": "12 C"} for c in said.message.tool_calls]
        after = [*MESSAGES, said.message.model_dump(exclude_none=True), *results]
        again = chat(client, messages=after, tools=TOOLS, max_tokens=4)
        assert again.usage.prompt_tokens > 100


class TestCompletions:
    def test_text_and_ids(self, client, server):
        ids = tokenize(client, server, prompt="The sky is")["tokens"]
        texts = [
            client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=8)
            for prompt in ("The sky is", ids)
        ]
        assert texts[0].choices[0].text == texts[1].choices[0].text
        assert texts[0].usage == texts[1].usage
        many = client.completions.create(model="demo", prompt=["The sky is", "A"], n=2, temperature=0, max_tokens=8)
        assert [c.index for c in many.choices] == [0, 1, 2, 3]
        assert many.choices[0].text == many.choices[1].text == texts[0].choices[0].text
        assert many.usage.prompt_tokens == len(ids) + 1

    def test_echo_with_logprobs(self, client):
        said = client.completions.create(
            model="demo", prompt="The sky is", echo=True, logprobs=2, max_tokens=4, temperature=0
        )
        (choice,) = said.choices
        logprobs = choice.logprobs
        assert choice.text.startswith("The sky is")
        assert len(logprobs.tokens) == said.usage.total_tokens
        assert logprobs.token_logprobs[0] is None
        assert all(p <= 0 for p in logprobs.token_logprobs[1:])
        assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
        only = client.completions.create(model="demo", prompt="The sky is", echo=True, logprobs=2, max_tokens=0)
        n = len(only.choices[0].logprobs.tokens)
        assert only.choices[0].text == "The sky is"
        assert only.choices[0].finish_reason == "length"
        assert only.usage.completion_tokens == 0
        assert only.usage.prompt_tokens == n
        assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1:n], abs=1e-4)

    def test_a_prompt_is_read_without_a_token(self, client, server):
        """echo and max_tokens 0, over several chunks: the metrics, too, count no generated token."""

        def counted() -> list[float]:
            text: Any = client.get(f"{server.url}/metrics", cast_to=str)
            names = ("prompt_tokens", "generation_tokens", "generation_tokens_read")
            return [float(re.findall(rf"\nqwen3:{name}_total\S* (\S+)", text)[0]) for name in names]

        fields = {"model": "demo", "prompt": "One, two, three. " * 20, "echo": True, "logprobs": 1}
        before = counted()
        only = client.completions.create(**fields, max_tokens=0)
        after = counted()
        more = client.completions.create(**fields, max_tokens=1)
        n = only.usage.prompt_tokens
        assert n > 2 * 64
        assert [b - a for a, b in zip(before, after, strict=True)] == [n, 0, 0]
        assert only.choices[0].logprobs.token_logprobs[1:] == more.choices[0].logprobs.token_logprobs[1:n]
        chunks = [*client.completions.create(**fields, max_tokens=0, stream=True)]
        assert "".join(c.choices[0].text for c in chunks) == fields["prompt"]
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_streams_equal_plain(self, client):
        fields = {"model": "demo", "prompt": ["One", "Two"], "n": 2, "seed": 9, "max_tokens": 12, "echo": True}
        plain = client.completions.create(**fields)
        texts = [""] * 4
        for chunk in client.completions.create(stream=True, **fields):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [c.text for c in plain.choices]

    def test_stop(self, client):
        prompt = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
        fields = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 16}
        full = client.completions.create(**fields).choices[0].text
        stop = full[4:7]
        cut = client.completions.create(**fields, stop=[stop]).choices[0]
        assert cut.text == full[: full.index(stop)]
        assert cut.finish_reason == "stop"
        assert cut.model_extra["stop_reason"] == stop
        kept = client.completions.create(**fields, stop=[stop], extra_body={"include_stop_str_in_output": True})
        assert kept.choices[0].text == full[: full.index(stop) + 3]

    def test_logit_bias_and_token_ids(self, client):
        said = client.completions.create(
            model="demo", prompt="A", logit_bias={"65": 100}, max_tokens=4, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        assert said.choices[0].model_extra["token_ids"] == [65] * 4

    def test_allowed_token_ids_and_bad_words(self, client, server):
        ask = {"model": "demo", "prompt": "A", "max_tokens": 30, "seed": 1, "temperature": 2}

        def ids(**extra):
            said = client.completions.create(**ask, extra_body={"return_token_ids": True, "ignore_eos": True} | extra)
            return said.choices[0].model_extra["token_ids"]

        assert set(ids(allowed_token_ids=[64, 65, 66])) == {64, 65, 66}
        assert set(ids(allowed_token_ids=[64, 65, 66], bad_words=["a"])) == {65, 66}
        hello = tokenize(client, server, prompt="hello", add_special_tokens=False)["tokens"]
        mixed = ids(allowed_token_ids=[*hello, 64], bad_words=["hello"])
        text = client.post(f"{server.url}/detokenize", cast_to=object, body={"tokens": mixed})
        assert set(hello) <= set(mixed)
        assert "hello" not in str(text)

    def test_prompt_logprobs(self, client):
        said = client.completions.create(
            model="demo", prompt="The sky is", max_tokens=1, extra_body={"prompt_logprobs": 2}
        )
        entries = said.choices[0].model_extra["prompt_logprobs"]
        assert entries[0] is None
        assert len(entries) == said.usage.prompt_tokens
        assert all(2 <= len(entry) <= 3 for entry in entries[1:])


class TestResponses:
    def test_plain(self, client):
        said = client.responses.create(model="demo", input="Hi", instructions="Be brief.", max_output_tokens=400)
        assert said.object == "response"
        assert said.status in ("completed", "incomplete")
        assert said.usage.total_tokens == said.usage.input_tokens + said.usage.output_tokens
        assert said.output[-1].type in ("message", "reasoning")

    def test_stream_helper(self, client):
        fields = {"model": "demo", "input": [{"role": "user", "content": "Hi"}], "temperature": 0}
        form = {"format": {"type": "json_schema", "name": "w", "schema": WEATHER}}
        with client.responses.stream(**fields, text=form, extra_body=OFF) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
        assert kinds[-1] == "response.completed"
        assert kinds.count("response.output_text.done") == 1
        jsonschema.validate(json.loads(final.output_text), WEATHER)
        plain = client.responses.create(**fields, text=form, extra_body=OFF)
        assert plain.output_text == final.output_text

    def test_tools(self, client):
        tool = {"type": "function", "name": "get_weather", "parameters": WEATHER}
        fields = {"model": "demo", "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        question = {"role": "user", "content": "Oslo?"}
        with client.responses.stream(**fields, input=[question], extra_body=OFF) as stream:
            kinds = [event.type for event in stream]
            (call,) = stream.get_final_response().output
        assert "response.function_call_arguments.delta" in kinds
        assert "response.function_call_arguments.done" in kinds
        jsonschema.validate(json.loads(call.arguments), WEATHER)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 C"}
        turns = [question, call.model_dump(exclude={"parsed_arguments"}), result]
        after = client.responses.create(model="demo", input=turns, tools=[tool], max_output_tokens=4)
        assert after.usage.input_tokens > 60

    def test_nothing_is_stored(self, client):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_1")
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="demo", input="Hi", previous_response_id="resp_1")


def test_errors_are_typed(client, server):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, max_tokens=5000)
    body: Any = refused.value.body
    assert body["type"] == "BadRequestError"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=3)
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_prefix_cache_keeps_tenants_apart(client):
    long = [{"role": "user", "content": "tell me all of it, " * 20}]

    def cached(salt):
        said = chat(client, messages=long, max_tokens=1, extra_body={"cache_salt": salt})
        return said.usage.prompt_tokens_details.cached_tokens

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0


def test_many_at_once_say_what_each_says_alone(client):
    """Greedy and seeded text does not depend on who else is served."""
    asks = [{"seed": i, "temperature": i % 3 / 2, "max_tokens": 5 + 3 * i, "stream": False} for i in range(12)]
    alone = [chat(client, **ask).choices[0].message.content for ask in asks]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = [f.result() for f in [pool.submit(chat, client, **ask) for ask in asks]]
    assert [t.choices[0].message.content for t in together] == alone


def test_media_urls_are_not_fetched(client):
    """SSRF: a part with an address is refused, and nobody connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.3)
        address = f"127.0.0.1:{trap.getsockname()[1]}"
        for part in (
            {"type": "image_url", "image_url": {"url": f"http://{address}/a.png"}},
            {"type": "image_url", "image_url": f"http://{address}/a.png"},
            {"type": "video_url", "video_url": {"url": f"http://{address}/a.mp4"}},
            {"type": "input_audio", "input_audio": {"data": f"http://{address}/", "format": "wav"}},
            {"type": "file", "file": {"file_id": f"http://{address}/"}},
            {"type": "text", "text": "x", "image_url": 1} | {"type": f"http://{address}"},
        ):
            with pytest.raises(openai.BadRequestError):
                chat(client, messages=[{"role": "user", "content": [part]}])
        with pytest.raises(TimeoutError):
            trap.accept()


HOSTILE = {
    "n": {"n": 2**31 - 1},
    "many prompts": {"prompt": ["a"] * 100_000, "n": 128},
    "many stops": {"stop": ["a"] * 1_000_000},
    "long stop": {"stop": "a" * 10_000_000},
    "many biases": {"logit_bias": {str(i % 2048): 1 for i in range(100_000)}},
    "many stop ids": {"stop_token_ids": [5] * 500_000},
    "long word": {"prompt": "a" * 1_000_000},
    "long text": {"prompt": "a b " * 5_000_000},
    "deep schema": {"guided_json": '{"a":' * 3000 + "1" + "}" * 3000},
    "wide regex": {"guided_regex": "(a{1,1000}){1,1000}"},
    "slow regex": {"guided_regex": "(((a+)+)+)+$" * 100},
    "wide choice": {"guided_choice": ["x" * 1000] * 20_000},
    "endless grammar": {"guided_grammar": 'root ::= root root | ""'},
    "big numbers": {"seed": 10**4000},
    "logprobs": {"logprobs": 10**9},
    "bad words": {"bad_words": ["a"] * 1_000_000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_request_does_not_stop_the_others(server, name):
    """Refused or answered, while /health answers all the time and memory stays where it was."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    body = {"prompt": "a", "max_tokens": 2} | HOSTILE[name]
    with server.post("/v1/completions", body, connection="close", **server.headers) as connection:
        connection.settimeout(0.2)
        data = b""
        until = time.monotonic() + 60
        while True:
            assert server.get("/health")[0] == 200
            try:
                if not (chunk := connection.recv(65536)):
                    break
                data += chunk
            except TimeoutError:
                assert time.monotonic() < until
    assert int(data[9:12]) in (200, 400, 413)
    assert len(data) < 20_000
    assert process.memory_info().rss - before < 300 << 20


@pytest.mark.parametrize("seed", range(2))
def test_mutated_requests(server, seed):
    """As in `test_server_fuzz`, against a model."""
    for method, path, body, headers in requests(seed, 150, brief=True):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        headers = {"content-type": "application/json"} | headers | server.headers
        connection.request(method, path, body, {k: v.encode() for k, v in headers.items()})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        assert answer.status < 500, (method, path, body[:2000], data)
        if answer.status >= 400 and method != "HEAD":
            assert json.loads(data)["error"]["code"] == answer.status
        assert b'"error":{' not in data or answer.status >= 400 or b'"code":400' in data, data


def test_after_all_of_this_nothing_runs(server: Server):
    with server.send(f"GET /load HTTP/1.1\nhost: x\nconnection: close\nauthorization: Bearer {KEY}") as connection:
        load = json.loads(answer(connection)[1])
    assert load["running"] == load["waiting"] == 0
    assert not [line for line in server.lines() if line["level"] in ("error", "critical")]


def test_sigterm_lets_requests_end(server: Server):
    """The last of this module: what runs is answered in full, and nothing of the process is left."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    body = {"messages": MESSAGES, "max_tokens": 300, "ignore_eos": True}
    running = [server.post("/v1/chat/completions", body | {"stream": i % 2 == 0}, **server.headers) for i in range(6)]
    time.sleep(0.2)
    assert server.stop(timeout=60) == 0
    for connection in running:
        with connection:
            status, said = answer(connection)
        assert status == 200
        assert b'"finish_reason":"length"' in said
    assert not psutil.wait_procs(children, timeout=5)[1]

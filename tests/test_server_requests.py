"""Requests in, answers out, over an engine that says what it is told: fields and ranges, errors, the key, bounds."""

import base64
import json
import resource
import time

import pytest

from qwen3_jax.engine.updates import EngineStopped
from qwen3_jax.server.app import create_app
from qwen3_jax.server.options import ServerOptionError, ServerOptions
from tests.asgi import request
from tests.fake_engine import FakeEngine, Step
from tests.text_folders import theirs

MESSAGES = [{"role": "user", "content": "hi"}]
OPEN = [*MESSAGES, {"role": "assistant", "content": "Hello, wo"}]
KEY = "sk-correct"
CHAT = {"messages": MESSAGES, "max_tokens": 20}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def app(engine):
    return create_app(engine)


def chat(app, **fields):
    return request(app, "POST", "/v1/chat/completions", CHAT | fields)


def complete(app, **fields):
    return request(app, "POST", "/v1/completions", {"prompt": "Hello"} | fields)


GOOD = [
    {"temperature": 0}, {"temperature": 2}, {"temperature": 1}, {"top_p": 0.01}, {"top_p": 1}, {"top_k": -1},
    {"top_k": 0},
    {"top_k": 50}, {"min_p": 0}, {"min_p": 1}, {"presence_penalty": -2}, {"frequency_penalty": 2.0},
    {"repetition_penalty": 0.01}, {"repetition_penalty": 5}, {"n": 1}, {"n": 3}, {"n": 2, "temperature": 0},
    {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"logit_bias": {"5": -100, "2047": 100}}, {"stop": "x"},
    {"stop": ["a", "b", "c", "d"]}, {"stop": None}, {"stop": []}, {"stop_token_ids": [1]}, {"min_tokens": 20},
    {"ignore_eos": True}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}, {"prompt_logprobs": 0},
    {"priority": -3}, {"cache_salt": "a tenant"}, {"request_id": "mine.1"}, {"truncate_prompt_tokens": 3},
    {"truncate_prompt_tokens": -1}, {"return_token_ids": True},
    {"return_tokens_as_token_ids": True, "logprobs": True},
    {"response_format": {"type": "text"}}, {"response_format": {"type": "json_object"}}, {"response_format": SCHEMA},
    {"structured_outputs": {"regex": "a+"}}, {"guided_choice": ["a", "b"]}, {"tools": [TOOL]},
    {"tool_choice": "none"},
    {"tools": [TOOL], "tool_choice": "required"}, {"tools": [TOOL], "tool_choice": "auto"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    {"tools": [TOOL], "parallel_tool_calls": False}, {"chat_template_kwargs": {"enable_thinking": False}},
    {"reasoning_effort": "none"}, {"reasoning_effort": "low"}, {"include_reasoning": False},
    {"thinking_token_budget": 0}, {"thinking_token_budget": -1}, {"thinking_token_budget": None},
    {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}, {"stream_options": None},
    {"best_of": 10**9}, {"user": "me", "metadata": {"a": "b"}, "store": True, "nobody_knows": [1, {}]},
    {"model": "demo"},
    {"max_completion_tokens": 5}, {"max_tokens": 1}, {"skip_special_tokens": True}, {"service_tier": "auto"},
    {"skip_special_tokens": False}, {"add_generation_prompt": False},
    {"messages": OPEN, "continue_final_message": True, "add_generation_prompt": False},
]  # fmt: skip

BAD = [
    ({"temperature": 2.01}, "temperature"), ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"), ({"min_p": 1.1}, "min_p"), ({"min_p": -0.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"), ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"n": 0}, "n"), ({"n": 129}, "n"), ({"n": 2**31}, "n"), ({"n": "3"}, "n"), ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"), ({"logit_bias": {"2048": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"), ({"stop": list("abcde")}, "stop"), ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"), ({"stop": "x" * 2049}, "stop"),
    ({"stop": 5}, "stop"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"), ({"min_tokens": 21}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 4096}, None),
    ({"max_tokens": 2**40}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"), ({"logprobs": True, "top_logprobs": -1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": 3}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"), ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"allowed_token_ids": [10**9]}, "allowed_token_ids"), ({"bad_words": ["x"] * 129}, "bad_words"),
    ({"allowed_token_ids": []}, "allowed_token_ids"), ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": ["x"], "guided_regex": "a"}, "bad_words"),
    ({"bad_words": ["x"], "thinking_token_budget": 3}, "bad_words"),
    ({"bad_words": ["x" * 300]}, "bad_words"), ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"cache_salt": ""}, "cache_salt"), ({"cache_salt": "a@b"}, "cache_salt"), ({"cache_salt": "a/b"}, "cache_salt"),
    ({"cache_salt": "a\\b"}, "cache_salt"), ({"cache_salt": "a\0"}, "cache_salt"),
    ({"cache_salt": "a" * 129}, "cache_salt"),
    ({"request_id": "a b"}, "request_id"), ({"priority": "high"}, "priority"),
    ({"response_format": {"type": "xml"}}, "response_format"), ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"response_format": SCHEMA | {"json_schema": {"name": "x", "schema": {"type": "nonsense"}}}}, "response_format"),
    ({"response_format": SCHEMA, "guided_regex": "a"}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"), ({"guided_json": "{"}, "guided_json"),
    ({"guided_grammar": "root ::= ("}, "guided_grammar"),
    ({"guided_whitespace_pattern": "x"}, "guided_whitespace_pattern"),
    ({"tools": []}, "tools"), ({"tool_choice": "auto"}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"), ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"tools": [{"type": "function", "function": {}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": SCHEMA}, "response_format"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, None),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"), ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ({"thinking_token_budget": True}, "thinking_token_budget"),
    ({"thinking_token_budget": 3.0}, "thinking_token_budget"),
    ({"thinking_token_budget": "3"}, "thinking_token_budget"),
    ({"stream_options": {"include_usage": True}}, "stream_options"), ({"stream": "yes"}, "stream"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"messages": OPEN, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"messages": [*MESSAGES, {"role": "assistant"}], "continue_final_message": True}, "continue_final_message"),
    ({"messages": [*MESSAGES, OPEN[-1] | {"tool_calls": [{"function": {"name": "look"}}]}],
      "continue_final_message": True}, "continue_final_message"),
    ({"functions": [{}]}, "functions"), ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"audio": {"voice": "x"}}, "audio"), ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"use_beam_search": True}, "use_beam_search"), ({"logits_processors": ["os.system"]}, "logits_processors"),
    ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{}]}, None), ({"messages": [{"role": "user"}]}, "messages"), ({"messages": [5]}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, None),
    ({"messages": [{"role": "user", "content": 5}]}, None),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages"),
    ({"messages": [{"role": "user", "content": "long " * 5000}]}, None),
    ({"messages": [{"role": "user", "content": "x" * 3_000_000}]}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize("fields", GOOD, ids=lambda f: json.dumps(f)[:60])
def test_accepted(app, fields):
    said = chat(app, **fields)
    assert said.status == 200, said.body


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda f: json.dumps(f)[:60])
def test_refused(app, fields, param):
    said = chat(app, **fields)
    assert said.status == 400, said.body[:300]
    assert said.error["type"] == "BadRequestError"
    if param is not None:
        assert said.error["param"] == param
        assert param in said.error["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
def test_numbers_that_are_none(app, field, value):
    body = json.dumps(CHAT)[:-1] + f', "{field}": {value}}}'
    said = request(app, "POST", "/v1/chat/completions", body.encode())
    assert said.status == 400
    assert said.error


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200), ({"prompt": ["a", "b"]}, 200), ({"prompt": [1, 2]}, 200), ({"prompt": [[1], [2]]}, 200),
        ({"echo": True, "max_tokens": 0}, 200), ({"logprobs": 0}, 200), ({"logprobs": 20}, 200),
        ({"skip_special_tokens": False}, 200), ({"add_special_tokens": True}, 200),
        ({"max_tokens": 0}, 400), ({"suffix": "x"}, 400), ({"prompt": ""}, 400), ({"prompt": [""]}, 400),
        ({"prompt": []}, 400), ({"prompt": [[]]}, 400), ({"prompt": [1, "a"]}, 400), ({"prompt": 5}, 400),
        ({"prompt": None}, 400), ({"prompt": [2048]}, 400), ({"prompt": [-1]}, 400), ({"prompt": [10**30]}, 400),
        ({"prompt": ["a"] * 1025}, 400), ({"prompt": ["a"] * 20, "n": 100}, 400), ({"logprobs": 21}, 400),
        ({"logprobs": True}, 400), ({"prompt": "a" * 3_000_000}, 400), ({"prompt": [5] * 4096}, 400),
    ],
    ids=lambda f: json.dumps(f)[:60],
)  # fmt: skip
def test_completion_fields(app, fields, status):
    said = complete(app, **fields)
    assert said.status == status, said.body[:300]
    if status != 200:
        assert said.error


@pytest.mark.parametrize(
    "text", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "\0"]
)
def test_control_tokens_in_text_are_answered(app, text):
    assert complete(app, prompt=text).status == 200
    assert chat(app, messages=[{"role": "user", "content": text}]).status == 200


class TestErrors:
    def test_every_form(self, app):
        for method, path, status in (
            ("GET", "/nothing", 404), ("POST", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405),
            ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", "/v1/models/other", 404),
            ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/../../etc/passwd", 404),
        ):  # fmt: skip
            said = request(app, method, path)
            assert said.status == status, path
            assert said.error

    @pytest.mark.parametrize("path", ["pause", "sleep", "wake_up", "update_weights", "collective_rpc", "start_profile",
        "v1/load_lora_adapter", "reset_prefix_cache", "invocations", "server_info", "flush_cache"])  # fmt: skip
    def test_there_are_no_control_doors(self, app, path):
        assert request(app, "POST", f"/{path}", {}).status == 404

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b'{"messages": [NaN]}', b"[" * 100_000, b'{"a":' * 5000,
         b'{"messages": ' + b"9" * 10_000 + b"}", b"\x00", b"{'a': 1}", json.dumps(CHAT).encode("utf-16")],
        ids=lambda b: repr(b[:16]),
    )  # fmt: skip
    def test_bodies_that_are_no_request(self, app, body):
        said = request(app, "POST", "/v1/chat/completions", body)
        assert said.status == 400
        assert said.error

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_half_of_a_surrogate_pair_is_refused_wherever_it_stands(self, app, path, stream):
        said = {"prompt": "a", "input": "a", "messages": CHAT["messages"], "stream": stream, "max_tokens": 3}
        for field in ({"user": "\ud800"}, {"metadata": {"\udfff": "a"}}, {"prompt": "\udc00\ud800"}):
            body = json.dumps(said | field).encode()
            refused = request(app, "POST", path, body)
            assert refused.status == 400
            assert "surrogate" in refused.error["message"]
            raw = json.dumps(said | field, ensure_ascii=False).encode("utf-8", "surrogatepass")
            assert request(app, "POST", path, raw).status == 400

    def test_a_whole_surrogate_pair_is_a_character(self, app):
        messages = [{"role": "user", "content": "\U0001f600"}]
        body = json.dumps({"messages": messages, "max_tokens": 3}).encode()
        assert b"ud83d" in body
        assert request(app, "POST", "/v1/chat/completions", body).status == 200

    @pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
    def test_other_media_types(self, app, media):
        assert request(app, "POST", "/v1/chat/completions", CHAT, content_type=media).error["code"] == 400

    def test_media_type_with_parameters(self, app):
        said = request(app, "POST", "/v1/chat/completions", CHAT, content_type="Application/JSON; charset=utf-8")
        assert said.status == 200

    def test_answers_do_not_grow_with_what_is_wrong(self, app):
        """3000 bad messages, a long value, many fields: an answer of at most ten entries of 200 characters."""
        for fields in (
            {"messages": [{"role": 1, "content": {"x": "y" * 100}} for _ in range(3000)]},
            {"messages": list(range(3000))},
            {"stop": "x" * 5_000_000, "temperature": "y" * 1_000_000},
            {"model": "m" * 1_000_000}, {"tools": [5] * 200}, {"logit_bias": {"k" * 100_000: 1}},
            {"logit_bias": {f"k{i}": "v" for i in range(5000)}}, {"reasoning_effort": "x" * 100_000},
            {"stop": ["s" * 100_000] * 5}, {"tool_choice": {"a" * 100_000: 1}}, {"cache_salt": "@" * 128},
        ):  # fmt: skip
            said = chat(app, **fields)
            assert said.status in (400, 404)
            assert len(said.body) < 4_000
            assert said.error

    def test_too_many_values(self):
        app = create_app(FakeEngine(), ServerOptions(max_json_values=1000))
        assert "values" in complete(app, prompt=[1] * 2000).error["message"]

    def test_bodies_together(self):
        app = create_app(FakeEngine(), ServerOptions(max_held_bytes=2000))
        assert chat(app).status == 200
        assert complete(app, prompt="a" * 3000).status == 503
        assert chat(app).status == 200  # what was held has been given back

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", {"prompt": ["a"] * 300_000 + [1]}),
            ("/v1/completions", {"prompt": [[1], ["a"]] * 100_000}),
            ("/v1/completions", {"prompt": [1] * 300_000}),
            ("/v1/chat/completions", {"messages": MESSAGES * 60_000}),
            ("/v1/chat/completions", {"messages": [1] * 300_000}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 60_000}]},
            ),
            ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {str(i): "x" for i in range(200_000)}}),
            ("/v1/chat/completions", {"messages": MESSAGES, "stop": [1] * 300_000}),
            (
                "/v1/chat/completions",
                {"messages": MESSAGES, "chat_template_kwargs": {f"k{i}": 1 for i in range(100_000)}},
            ),
            ("/v1/responses", {"input": [1] * 300_000}),
            ("/v1/embeddings", {"input": [[1], ["a"]] * 100_000}),
            ("/v1/rerank", {"query": "a", "documents": [1] * 300_000}),
        ],
        ids=lambda value: value if isinstance(value, str) else str(value)[:30],
    )
    def test_hundreds_of_thousands_of_wrong_values(self, app, path, body):
        """A validator that lists them all would take minutes of the loop and gigabytes."""
        data = json.dumps(body).encode()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = request(app, "POST", path, data)
        assert said.status == 400
        assert said.error
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB

    def test_the_engine_says_no(self):
        engine = FakeEngine(lambda request: [Step(wait_s=0.5), "a"], room=1)
        app = create_app(engine)
        said = chat(app, n=3)
        assert said.status == 503
        assert said.headers["retry-after"]
        assert said.error["type"] == "ServiceUnavailableError"
        until = time.monotonic() + 5
        while engine.running:  # the choice that was taken was given up
            assert time.monotonic() < until
        engine.failure = EngineStopped("broken")
        assert chat(app).error["code"] == 503
        assert request(app, "GET", "/health").status == 503

    def test_logits_that_are_not_finite(self):
        app = create_app(FakeEngine(lambda request: ["abc", Step(broken=True)]))
        assert chat(app).error["type"] == "InternalServerError"
        events = chat(app, stream=True).events()
        assert events[-1]["error"]["code"] == 500

    def test_an_engine_that_fails_under_way(self):
        def broken():
            return create_app(FakeEngine(lambda request: ["abc", Step(error="the engine has failed", fatal=True)]))

        assert chat(broken()).error["code"] == 503
        assert complete(broken()).error["code"] == 503
        app = broken()
        assert chat(app, stream=True).events()[-1]["error"]["message"] == "the engine has failed"
        body = request(broken(), "POST", "/v1/responses", {"input": "hi", "stream": True}).body.decode()
        assert body.rstrip().splitlines()[-2] == "event: error"

    def test_an_answer_that_cannot_have_its_form(self):
        app = create_app(FakeEngine(lambda request: ["abc", Step(error="no text fits it")]))
        assert "no text fits it" in chat(app, guided_regex="a+").error["message"]
        assert chat(app, guided_regex="a+", stream=True).events()[-1]["error"]["code"] == 400

    def test_a_fault_of_ours_is_500_without_details(self, caplog):
        def script(request):
            return ["abc"]

        engine = FakeEngine(script)
        engine.submit = lambda *_, **__: 1 / 0  # pyright: ignore[reportAttributeAccessIssue]
        said = chat(create_app(engine))
        assert said.status == 500
        assert "division" not in said.error["message"]
        assert "ZeroDivisionError" in caplog.text

    def test_prompts_are_logged_only_if_asked_for(self, engine, caplog):
        caplog.set_level("INFO")
        chat(create_app(engine))
        assert "messages" not in str([vars(record) for record in caplog.records])
        chat(create_app(engine, ServerOptions(log_prompts=True)))
        assert "messages" in str([vars(record) for record in caplog.records])

    def test_request_ids(self, app):
        assert request(app, "GET", "/health", X_Request_Id="abc-1").headers["x-request-id"] == "abc-1"
        made = request(app, "GET", "/nothing", X_Request_Id="bad id\n").headers["x-request-id"]
        assert len(made) == 32

    def test_too_many_requests(self):
        engine = FakeEngine(lambda request: [Step(wait_s=2), "a"])
        app = create_app(engine, ServerOptions(max_requests=1))

        async def both():
            import asyncio

            from tests.asgi import call

            first = asyncio.create_task(call(app, "POST", "/v1/chat/completions", json.dumps(CHAT).encode()))
            while not engine.running:
                await asyncio.sleep(0.01)
            second = await call(app, "POST", "/v1/chat/completions", json.dumps(CHAT).encode())
            health = await call(app, "GET", "/health")
            first.cancel()
            return second, health

        import asyncio

        second, health = asyncio.run(both())
        assert second.error["code"] == 503
        assert health.status == 200


WRONG_KEYS = [
    {}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer sk-correc"},
    {"Authorization": "Bearer sk-correct "}, {"Authorization": "Bearer sk-correctx"}, {"Authorization": "sk-correct"},
    {"Authorization": "Basic sk-correct"}, {"Authorization": "Bearer SK-CORRECT"}, {"X-Api-Key": "sk-correct"},
    {"Authorization": "Basic " + base64.b64encode(b"user:sk-correct").decode()},
    {"Authorization": "Token sk-correct"},
    {"Authorization": "Bearer \xff\xfe"}, {"Authorization": "Bearer " + "x" * 60_000},
]  # fmt: skip


class TestKey:
    @pytest.fixture
    def locked(self, engine):
        return create_app(engine, ServerOptions(api_keys=("other", KEY)))

    @pytest.mark.parametrize("headers", WRONG_KEYS, ids=lambda h: str(h)[:40])
    def test_wrong(self, locked, headers):
        for method, path in PATHS:
            said = request(locked, method, path, None, **headers)
            assert said.status == 401, path
            assert said.error["type"] == "AuthenticationError"
            assert said.headers["www-authenticate"]

    def test_right(self, locked):
        for key in ("other", KEY):
            assert request(locked, "POST", "/v1/chat/completions", CHAT, Authorization=f"Bearer {key}").status == 200
            assert request(locked, "GET", "/load", Authorization=f"bearer {key}").status == 200

    def test_health_is_open(self, locked):
        assert request(locked, "GET", "/health").status == 200
        for path in ("/health/", "//health", "/health/x", "/Health", "/health%2f..%2fload"):
            assert request(locked, "GET", path).status == 401

    def test_a_browser_may_show_it_as_a_password_for_the_page(self, locked):
        password = base64.b64encode(f"anyone:{KEY}".encode()).decode()
        assert request(locked, "GET", "/", Authorization=f"Basic {password}").status != 401
        assert request(locked, "GET", "/").headers["www-authenticate"].startswith("Basic")

    @pytest.mark.parametrize("keys", [("",), ("a ",), ("ü",), (" ",)])
    def test_keys_that_no_header_can_carry(self, keys):
        with pytest.raises(ServerOptionError):
            ServerOptions(api_keys=keys)


PATHS = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("GET", "/v1/models"),
    ("GET", "/v1/models/demo"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/version"), ("GET", "/load"),
    ("GET", "/ping"), ("GET", "/metrics"), ("POST", "/v1/embeddings"), ("POST", "/v1/rerank"), ("POST", "/v1/score"),
    ("POST", "/pause"), ("GET", "/nothing"), ("GET", "/v1/responses/x"), ("OPTIONS", "/v1/models"),
]  # fmt: skip


def test_cors_is_off_unless_asked_for(app, engine):
    origin = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in request(app, "OPTIONS", "/v1/models", **origin).headers
    open_app = create_app(engine, ServerOptions(cors_origins=("https://a.example",), api_keys=("k",)))
    said = request(open_app, "OPTIONS", "/v1/models", **origin)
    assert said.headers["access-control-allow-origin"] == "https://a.example"
    other = request(open_app, "OPTIONS", "/v1/models", **origin | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


VARIABLES = {
    "tokenize": True, "return_tensors": "pt", "return_dict": True, "padding": "max_length", "max_length": 1,
    "truncation": True, "add_generation_prompt": False, "continue_final_message": True, "messages": [],
    "tools": [{}], "documents": [{}], "eos_token": "x", "namespace": 1, "range": 5, "tokenizer_kwargs": {},
    "raise_exception": 1, "strftime_now": "x", "conversation": [], "loop": 1, "self": 1, "nobody_reads_this": 1,
}  # fmt: skip
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch %s') }}",
    "{{ lipsum.__globals__['os'].popen('touch %s').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__.open('%s', 'w') }}",
    "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
]


class TestTemplates:
    @pytest.mark.parametrize("name", VARIABLES)
    def test_variables_do_not_steer_the_renderer(self, app, name):
        plain = request(app, "POST", "/tokenize", {"messages": MESSAGES}).json()
        body = {"messages": MESSAGES, "chat_template_kwargs": {name: VARIABLES[name]}}
        assert request(app, "POST", "/tokenize", body).json() == plain

    @pytest.mark.parametrize("payload", TEMPLATES)
    @pytest.mark.parametrize("trusting", [False, True])
    def test_templates_in_requests(self, engine, tmp_path, payload, trusting):
        """Refused; and where they are trusted, still sandboxed and bounded."""
        canary = tmp_path / "canary"
        app = create_app(engine, ServerOptions(trust_request_chat_template=trusting))
        source = payload.replace("%s", str(canary))
        for path in ("/v1/chat/completions", "/tokenize"):
            for body in ({"chat_template": source}, {"chat_template_kwargs": {"chat_template": source}}):
                said = request(app, "POST", path, CHAT | body)
                assert said.status == 400
                assert trusting or said.error["param"] == "chat_template"
        assert not canary.exists()

    def test_a_trusted_template_is_used(self, engine):
        app = create_app(engine, ServerOptions(trust_request_chat_template=True))
        said = request(app, "POST", "/tokenize", {"messages": MESSAGES, "chat_template": "{{ messages[0].content }}!"})
        back = request(app, "POST", "/detokenize", {"tokens": said.json()["tokens"]})
        assert back.json() == {"prompt": "hi!"}


class TestTokenize:
    def test_round_trip(self, app, engine):
        text = "Grüße, 世界 <|im_end|>"
        said = request(app, "POST", "/tokenize", {"prompt": text, "return_token_strs": True}).json()
        assert said["tokens"] == engine.model.tokenizer.encode(text)
        assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
        assert said["max_model_len"] == 4096
        assert request(app, "POST", "/detokenize", {"tokens": said["tokens"]}).json() == {"prompt": text}

    def test_a_conversation_is_what_chat_sees(self, app):
        body = {"messages": MESSAGES, "tools": [TOOL]}
        count = request(app, "POST", "/tokenize", body).json()["count"]
        assert request(app, "POST", "/v1/chat/completions", CHAT | body).json()["usage"]["prompt_tokens"] == count

    @pytest.mark.parametrize(
        "last",
        ["Hello, wo", "", " spaces \n ", "<think>\nhm\n</think>\n\nSo", {"reasoning_content": "hm", "content": "So "}],
        ids=str,
    )
    def test_a_final_message_is_continued_as_by_transformers(self, app, engine, last):
        last = {"role": "assistant"} | (last if isinstance(last, dict) else {"content": last})
        messages = [*MESSAGES, last]
        expected = theirs().apply_chat_template(messages, tokenize=False, continue_final_message=True)
        body = {"messages": messages, "continue_final_message": True}
        said = request(app, "POST", "/tokenize", body).json()
        assert engine.model.tokenizer.decode(said["tokens"]) == expected
        assert expected.endswith(last["content"])
        continued = request(app, "POST", "/v1/chat/completions", CHAT | body)
        assert continued.json()["usage"]["prompt_tokens"] == said["count"]
        assert list(engine.asked[-1].request.prompt) == said["tokens"]

    def test_a_message_that_the_template_changes_cannot_be_continued(self, app):
        """Transformers refuses it too: `<think>` alone is taken for the beginning of a block."""
        messages = [*MESSAGES, {"role": "assistant", "content": "a</think>\n\n\nb"}]
        with pytest.raises(ValueError, match="does not appear"):
            theirs().apply_chat_template(messages, tokenize=False, continue_final_message=True)
        body = {"messages": messages, "continue_final_message": True}
        assert "final message" in request(app, "POST", "/tokenize", body).error["message"]

    @pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": MESSAGES}, {"prompt": 5}, {"messages": []}])
    def test_refused(self, app, body):
        assert request(app, "POST", "/tokenize", body).error["code"] == 400

    def test_bad_ids(self, app):
        for tokens in ([2048], [-1], ["a"], [1.5], 5):
            assert request(app, "POST", "/detokenize", {"tokens": tokens}).error["code"] == 400


class TestAnswers:
    """Shapes that a random model cannot be made to show."""

    def test_reasoning_under_both_names(self, app):
        message = chat(app, max_tokens=100).json()["choices"][0]["message"]
        assert message["content"] == "An answer."
        assert message["reasoning"] == message["reasoning_content"] == "hm"
        events = chat(app, max_tokens=100, stream=True).events()
        deltas = [e["choices"][0]["delta"] for e in events]
        assert "".join(d.get("reasoning", "") for d in deltas) == "hm"
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm"
        usage = chat(app, max_tokens=100).json()["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 6
        without = chat(app, max_tokens=100, include_reasoning=False)
        assert without.json()["choices"][0]["message"]["reasoning"] is None
        assert "hm" not in json.dumps(chat(app, max_tokens=100, include_reasoning=False, stream=True).events())

    def test_stream_shape(self, app, engine):
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = chat(app, max_tokens=100, stream=True, stream_options=options, n=2).events()
        assert events[-1]["choices"] == []
        count = len(engine.model.tokenizer.encode("<think>\nhm\n</think>\n\nAn answer.")) + 1  # the end
        assert events[-1]["usage"]["completion_tokens"] == 2 * count
        assert all("usage" in event for event in events)
        for i in range(2):
            mine = [c for e in events for c in e["choices"] if c["index"] == i]
            assert [c["delta"].get("role") for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
        assert {(e["id"], e["created"], e["object"]) for e in events} == {
            (events[0]["id"], events[0]["created"], "chat.completion.chunk")
        }

    CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "a </tool_call> \\"x\\""}}\n</tool_call>'

    @pytest.mark.parametrize("stream", [False, True])
    def test_parallel_tool_calls_around_text(self, stream):
        app = create_app(FakeEngine(lambda request: f"Let me see.\n{self.CALL}\n{self.CALL}"))
        said = chat(app, max_tokens=400, tools=[TOOL], stream=stream)
        if stream:
            from qwen3_jax.server.chat import message

            choices = [c for e in said.events() for c in e["choices"]]
            got, reason = message([c["delta"] for c in choices]), choices[-1]["finish_reason"]
        else:
            got, reason = said.json()["choices"][0]["message"], said.json()["choices"][0]["finish_reason"]
        assert reason == "tool_calls"
        assert got["content"].strip() == "Let me see."
        assert [c["function"]["name"] for c in got["tool_calls"]] == ["look", "look"]
        assert [json.loads(c["function"]["arguments"]) for c in got["tool_calls"]] == [{"at": 'a </tool_call> "x"'}] * 2
        assert len({c["id"] for c in got["tool_calls"]}) == 2

    def test_one_call_only(self):
        app = create_app(FakeEngine(lambda request: f"{self.CALL}\n{self.CALL}"))
        said = chat(app, max_tokens=400, tools=[TOOL], parallel_tool_calls=False).json()
        assert len(said["choices"][0]["message"]["tool_calls"]) == 1

    def test_tools_that_may_not_be_called_stay_text(self):
        app = create_app(FakeEngine(lambda request: self.CALL))
        for fields in ({"tools": [TOOL], "tool_choice": "none"}, {}):
            said = chat(app, max_tokens=400, **fields).json()["choices"][0]
            assert said["message"]["content"] == self.CALL
            assert said["finish_reason"] == "stop"

    def test_stop_reasons(self, app):
        assert chat(app, stop=["answer"], max_tokens=100).json()["choices"][0]["stop_reason"] == "answer"
        token = app.state.serving.model.tokenizer.encode(".")[0]
        assert chat(app, stop_token_ids=[token], max_tokens=100).json()["choices"][0]["stop_reason"] == token
        assert chat(app, max_tokens=100).json()["choices"][0]["stop_reason"] is None
        assert chat(app, max_tokens=2).json()["choices"][0]["finish_reason"] == "length"

    def test_what_the_engine_is_asked(self, app, engine):
        chat(app, seed=7, n=3, priority=5, cache_salt="s", temperature=0.5, thinking_token_budget=9, request_id="r")
        asked = engine.asked[-3:]
        assert [a.request.seed for a in asked] == [7, 8, 9]
        assert {(a.priority, a.salt) for a in asked} == {(5, "s")}
        assert [a.id for a in asked] == [f"chatcmpl-r-{i}" for i in range(3)]
        assert asked[0].request.params.temperature == 0.5
        assert asked[0].request.params.top_k == 20  # the model's own default
        assert asked[0].request.params.thinking_budget == 9
        assert asked[0].request.limit == 20
        chat(app, **{"max_tokens": None})
        assert engine.asked[-1].request.limit == 4096 - len(engine.asked[-1].request.prompt)
        complete(app)
        assert engine.asked[-1].request.limit == 16
        chat(app, guided_regex="a+")
        assert engine.asked[-1].grammar is not None

    def test_content_parts_and_developers(self, app):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        as_parts = chat(app, messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
        as_text = chat(app, messages=[{"role": "system", "content": "x"}, {"role": "user", "content": "a\nb"}])
        assert as_parts.json()["usage"]["prompt_tokens"] == as_text.json()["usage"]["prompt_tokens"]

    def test_special_tokens_are_kept_if_asked_for(self):
        app = create_app(FakeEngine(lambda request: "<think>\n<|box_start|>\n</think>\n\na<|box_start|>b"))
        for kept, fields in (("", {}), ("<|box_start|>", {"skip_special_tokens": False})):
            message = chat(app, **fields).json()["choices"][0]["message"]
            assert (message["content"], message["reasoning"] or "") == (f"a{kept}b", kept)
            text = complete(app, max_tokens=100, **fields).json()["choices"][0]["text"]
            assert text == f"<think>\n{kept}\n</think>\n\na{kept}b"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_prompt_is_read_without_a_token(self, app, engine, stream):
        """echo, log-probabilities and max_tokens 0: nothing is generated, and nothing counted."""
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        fields = {"prompt": ["Hello", "you"], "n": 2, "echo": True, "max_tokens": 0, "logprobs": 1} | options
        said = complete(app, **fields)
        chunks = said.events() if stream else [said.json()]
        choices = [c for chunk in chunks for c in chunk["choices"]]
        assert ["".join(c["text"] for c in choices if c["index"] == i) for i in range(4)] == ["Hello"] * 2 + ["you"] * 2
        assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"] * 4
        for i, prompt in enumerate(["Hello", "Hello", "you", "you"]):
            ids = engine.model.tokenizer.encode(prompt)
            (found,) = [c["logprobs"]["tokens"] for c in choices if c["index"] == i and c["logprobs"]]
            assert found == [engine.model.tokenizer.decode([t]) for t in ids]
        usage = chunks[-1]["usage"]
        prompt_tokens = sum(len(engine.model.tokenizer.encode(p)) for p in ("Hello", "you"))
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, 0)
        assert [asked.request.limit for asked in engine.asked[-4:]] == [0] * 4

    def test_a_stop_string_may_span_the_tags(self, app):
        said = complete(app, max_tokens=100, stop=["m\n</think>"]).json()
        assert said["choices"][0]["text"] == "<think>\nh"
        assert said["choices"][0]["stop_reason"] == "m\n</think>"
        assert said["usage"]["completion_tokens"] < 10

    def test_completions_keep_the_tags(self, app):
        assert complete(app, max_tokens=100).json()["choices"][0]["text"] == "<think>\nhm\n</think>\n\nAn answer."

    def test_responses_items(self):
        app = create_app(FakeEngine(lambda request: f"<think>\nhm\n</think>\n\nSo.\n{self.CALL}"))
        tool = {"type": "function", "name": "look", "parameters": {"type": "object"}}
        said = request(app, "POST", "/v1/responses", {"input": "hi", "tools": [tool]}).json()
        assert [item["type"] for item in said["output"]] == ["reasoning", "message", "function_call"]
        assert said["output"][0]["content"][0]["text"] == "hm"
        assert said["status"] == "completed"
        cut = request(app, "POST", "/v1/responses", {"input": "hi", "max_output_tokens": 3}).json()
        assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})

    @pytest.mark.parametrize(
        "fields",
        [{"input": [{"type": "item_reference", "id": "x"}]}, {"tools": [{"type": "web_search"}]},
        {"background": True},
         {"previous_response_id": "x"}, {"input": 5}, {"n": 2}, {"text": {"format": {"type": "xml"}}}, {"input": []},
         {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}],
        ids=str,
    )  # fmt: skip
    def test_responses_refused(self, app, fields):
        assert request(app, "POST", "/v1/responses", {"input": "hi"} | fields).error["code"] == 400

"""The wire: slow and hostile clients, limits of heads and bodies, disconnects, the end of the process."""

import http.client
import json
import signal
import socket
import threading
import time

import pytest

from tests.server_process import Server, answer, fake

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
JSON_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SHORT = {"head_s": 0.6, "body_s": 0.8, "idle_s": 3.0, "write_s": 1.0, "drain_s": 0.5}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose clients must be quick."""
    with fake("answer", tmp_path_factory.mktemp("wire") / "log", **SHORT, max_body_bytes=200_000) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A server that answers for ever."""
    with fake("slow", tmp_path_factory.mktemp("slow") / "log", **SHORT) as running:
        yield running


def error_of(body: bytes) -> dict:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_answers_and_keeps_alive(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    sockets = []
    for _ in range(2):
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), {"content-type": "application/json"})
        sockets.append(connection.sock)
        said = connection.getresponse()
        assert said.status == 200
        assert json.load(said)["choices"][0]["message"]["content"] == "An answer."
    assert sockets[0] is sockets[1]
    connection.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 0),  # nothing at all: nothing to answer
        (b"POST /v1/chat/completions HT", 408),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-a: ", 408),
        (JSON_HEAD + b"content-length: 50\r\n\r\n{", 408),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc", 400),
        (b"\r\n\r\n", 408),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 400),
        (b"NONSENSE\r\n\r\n", 400),
    ],
)
def test_who_does_not_finish_is_cut(server, sent, status):
    with server.connect(20) as connection:
        connection.sendall(sent)
        got, body = answer(connection)
    assert got == status
    if status:
        assert error_of(body)["code"] == status


def test_a_trickle_is_cut_too(server):
    with server.connect(20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        got = b""
        connection.settimeout(0.1)
        for _ in range(80):
            try:
                connection.sendall(b"a")
                got += connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            if not got:
                break
    assert got.startswith(b"HTTP/1.1 408")


def test_idle_connections_are_closed(server):
    with server.send("GET /health HTTP/1.1\nhost: x") as connection:
        status, _ = answer(connection)  # ends only when the server closes
    assert status == 200


@pytest.mark.parametrize(
    "head",
    [
        "GET /health HTTP/1.1\nx-big: " + "a" * 100_000,
        "GET /health HTTP/1.1\nx-big: " + "a" * 3_000_000,
        "GET /" + "a" * 100_000 + " HTTP/1.1\nhost: x",
        "GET /health HTTP/1.1\n" + "\n".join(f"h{i}: 1" for i in range(200)),
        "GET /health HTTP/1.1\n" + "\n".join(f"h{i}: 1" for i in range(20_000)),
    ],
    ids=["100 kB", "3 MB", "path", "200 headers", "20000 headers"],
)
def test_heads_are_bounded(server, head):
    with server.connect() as connection:
        try:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        except OSError:
            return  # closed before all of it was sent
        status, body = answer(connection)
    assert status in (0, 431)
    if status:
        assert error_of(body)["type"] == "RequestTooLargeError"
    assert server.get("/health")[0] == 200


def test_bodies_are_bounded(server):
    """By their length, told or not."""
    big = b'{"messages": [{"role": "user", "content": "' + b"a" * 300_000
    head = "POST /v1/chat/completions HTTP/1.1\nhost: x\ncontent-type: application/json\nconnection: close\n"
    for told in (f"content-length: {len(big)}", "transfer-encoding: chunked"):
        data = big if "length" in told else b"%x\r\n%s\r\n0\r\n\r\n" % (len(big), big)
        with server.send(head + told, data) as connection:
            status, body = answer(connection)
        assert status == 413, told
        assert error_of(body)["code"] == 413
    with server.send(head + "content-length: 99999999999999999999999") as connection:
        assert answer(connection)[0] in (400, 413)


def test_hundreds_of_idle_and_slow_clients_do_not_matter(server):
    idle = [server.connect() for _ in range(300)]
    for connection in idle[::2]:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost")
    assert server.get("/health")[0] == 200
    with server.post("/v1/chat/completions", CHAT, connection="close") as connection:
        assert answer(connection)[0] == 200
    until = time.monotonic() + 10
    for connection in idle:  # every one of them is closed by the server
        connection.settimeout(max(0.1, until - time.monotonic()))
        answer(connection)
        connection.close()
    assert open_files(server) < 40


def open_files(server: Server) -> int:
    import psutil

    return psutil.Process(server.process.pid).num_fds()


def load(server: Server) -> int:
    return json.loads(server.get("/load")[1])["running"]


def wait_for(server: Server, running: int) -> None:
    until = time.monotonic() + 10
    while (now := load(server)) != running:
        assert time.monotonic() < until, f"{now} run, not {running}"
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_frees_its_rows(slow, stream, reset):
    connections = [slow.post("/v1/chat/completions", CHAT | {"stream": stream, "n": 2}) for _ in range(3)]
    connections.append(slow.post("/v1/completions", {"prompt": "a", "max_tokens": 4000, "stream": stream}))
    connections.append(slow.post("/v1/responses", {"input": "a", "stream": stream}))
    wait_for(slow, 8)
    for connection in connections:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()
    wait_for(slow, 0)


def test_a_client_that_does_not_read_is_dropped(tmp_path):
    with fake("long", tmp_path / "log", **SHORT) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps({"prompt": "a", "max_tokens": 4000, "stream": True, "logprobs": 20, "n": 4}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        until = time.monotonic() + 30
        while not any(line.get("path") == "/v1/completions" for line in server.lines()):
            assert time.monotonic() < until
            time.sleep(0.1)
        (line,) = [line for line in server.lines() if line.get("path") == "/v1/completions"]
        assert line["status"] == 499
        wait_for(server, 0)
        connection.close()


class TestTheEnd:
    """SIGTERM with work under way."""

    def streams(self, server: Server, n: int, results: list) -> list[threading.Thread]:
        def one() -> None:
            with server.post("/v1/chat/completions", CHAT | {"stream": True}) as connection:
                results.append(answer(connection))

        threads = [threading.Thread(target=one) for _ in range(n)]
        for thread in threads:
            thread.start()
        wait_for(server, n)
        return threads

    @pytest.mark.parametrize("drain_s", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
    def test_running_requests_end_cleanly(self, tmp_path, drain_s):
        results: list = []
        with fake("slow", tmp_path / "log", **SHORT | {"drain_s": drain_s}) as server:
            threads = self.streams(server, 6, results)
            assert server.stop() == 0
            for thread in threads:
                thread.join(10)
        assert len(results) == 6
        for status, body in results:
            assert status == 200
            assert b'"finish_reason":"abort"' in body
            assert b"data: [DONE]" in body

    @pytest.mark.slow
    def test_a_second_signal_does_not_wait(self, tmp_path):
        results: list = []
        with fake("silent", tmp_path / "log", **SHORT | {"drain_s": 600}) as server:
            threads = self.streams(server, 2, results)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert server.process.poll() is None
            with pytest.raises(ConnectionRefusedError):  # nobody listens any more
                server.connect(2).close()
            assert server.stop(timeout=10) == 0
            for thread in threads:
                thread.join(10)

    def test_a_failed_engine_ends_the_process(self, tmp_path):
        with fake("dies", tmp_path / "log", **SHORT) as server:
            with server.post("/v1/chat/completions", CHAT) as connection:
                status, body = answer(connection)
            assert status == 503
            assert "failed" in error_of(body)["message"]
            assert server.process.wait(20) == 1
            assert any(line["message"] == "the engine has failed" for line in server.lines())


def test_the_log_is_json_without_prompts(server):
    with server.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a secret"}]},
        X_Request_Id="my-own.id",
        connection="close",
    ) as connection:
        status, body = answer(connection)
    assert status == 200
    usage = json.loads(body)["usage"]
    until = time.monotonic() + 5
    while not (found := [line for line in server.lines() if line.get("request_id") == "my-own.id"]):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert found[0]["status"] == 200
    assert found[0]["completion_tokens"] == usage["completion_tokens"] > 0
    assert found[0]["prompt_tokens"] == usage["prompt_tokens"] > 0
    assert "secret" not in server.log.read_text()

"""`qwen3-jax serve`: what is refused before anything is loaded, and TLS."""

import json
import socket
import ssl
import subprocess
import urllib.request

import pytest

from qwen3_jax.cli import main
from tests.server_process import answer, fake


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--port", "x"], "port"),
        (["--host", "256.1.2.3"], "cannot listen on 256.1.2.3"),
        (["--rows", "0"], "rows is 0"),
        (["--cache-tokens", "5"], "cache_tokens is 5"),
        (["--chunk-tokens", "100", "--page-tokens", "16"], "chunk_tokens is 100"),
        (["--max-requests", "0"], "max_requests is 0"),
        (["--shutdown-timeout", "-1"], "drain_s is -1"),
        (["--api-key", "ü"], "API key"),
        (["--ssl-keyfile", "/nowhere"], "ssl_certfile"),
        (["--ssl-certfile", "/nowhere"], "/nowhere"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_refused_in_one_line(arguments, said, capsys):
    assert main(["serve", "/no/such/folder", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "/no/such/folder", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = capsys.readouterr().out
    for flag in (
        "--api-key",
        "--rows",
        "--mesh",
        "--trust-request-chat-template",
        "--shutdown-timeout",
        "--cors-origin",
    ):
        assert flag in said


def test_tls(tmp_path):
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with fake("answer", tmp_path / "log", tls=[str(key), str(certificate)]) as server:
        context = ssl.create_default_context(cafile=certificate)
        body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
        request = urllib.request.Request(
            f"https://127.0.0.1:{server.port}/v1/chat/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, context=context, timeout=30) as said:
            assert json.load(said)["choices"][0]["message"]["content"] == "An answer."
        with server.send("GET /health HTTP/1.1\nhost: x") as plain:
            assert answer(plain)[0] == 0

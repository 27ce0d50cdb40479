"""The chat page: what it may load, by text and headers; in a headless Chromium, a chat held and a stream stopped."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from qwen3_jax.server.app import create_app
from qwen3_jax.server.options import ServerOptions
from qwen3_jax.server.page import PAGE
from tests.browser import CHROMIUM, Browser, browser
from tests.fake_engine import FakeEngine
from tests.server_process import Server, fake

VOID = {"meta", "link", "input"}


class Outline(HTMLParser):
    """Collects elements, and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    outline = Outline()
    outline.feed(PAGE)
    assert not outline.open
    return outline.elements


def test_the_page_is_served_under_a_strict_policy():
    said = TestClient(create_app(FakeEngine())).get("/")
    assert said.status_code == 200
    assert said.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in said.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for rule, tag in (("script-src", "script"), ("style-src", "style")):
        text = said.text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        assert policy[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert "unsafe" not in said.headers["content-security-policy"]
    assert said.headers["x-content-type-options"] == "nosniff"


def test_the_page_stands_behind_the_key():
    client = TestClient(create_app(FakeEngine(), ServerOptions(api_keys=("secret",))))
    assert client.get("/").status_code == 401
    assert client.get("/", auth=("anyone", "secret")).status_code == 200


def test_the_page_names_no_outside_address_and_makes_no_markup_of_text(elements):
    addresses = re.findall(r"https?://[^\s'\"]+", PAGE)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a namespace, nothing is fetched
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|@import|url\(", PAGE
    )
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "style" not in attributes  # the policy would refuse it
        assert not (attributes.get("src") or "").strip()
        assert tag not in ("iframe", "object", "embed", "base")


def test_everything_that_can_be_used_has_a_name(elements):
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r'\$\("([a-z_A-Z]+)"\)', PAGE)) <= set(ids)
    for attributes, content in re.findall(r"<button([^>]*)>(.*?)</button>", PAGE, re.DOTALL):
        assert "aria-label" in attributes or re.sub(r"<[^>]*>", "", content).strip()
        assert 'type="' in attributes
    labelled = re.sub(r"<label.*?</label>", "", PAGE, flags=re.DOTALL)
    assert not re.findall(r"<(?:input|textarea)(?![^>]*aria-label)[^>]*>", labelled)
    assert 'lang="en"' in PAGE
    assert 'name="viewport"' in PAGE


# --- In a browser -----------------------------------------------------------------------------------------------------

BUTTONS = "[...document.querySelectorAll('.meta button')]"
TALK = "document.getElementById('talk').innerText"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def serve(tmp_path):
    """Return a context: a server that plays a script."""

    return lambda script, **options: fake(script, tmp_path / "log", **options)


def opened(page: Browser, server: Server, **window: Any) -> None:
    page.window(window.pop("width", 1200), window.pop("height", 800), **window)
    page.events.clear()
    page.open(server.url)
    page.until("document.getElementById('dot').dataset.state === 'up' && document.title === 'demo'")


def say(page: Browser, text: str) -> None:
    page.evaluate("document.getElementById('prompt').focus()")
    page.write(text)
    page.press("Enter")


def sent(page: Browser) -> list[dict]:
    """Return the requests that the page sent."""
    return [e["params"]["request"] for e in page.events if e["method"] == "Network.requestWillBeSent"]


def requests(page: Browser) -> list[dict]:
    """Return the chat requests among them, with their bodies."""
    return [r | {"body": json.loads(r["postData"])} for r in sent(page) if r["url"].endswith("/v1/chat/completions")]


def placed(page: Browser, name: str) -> dict[str, float]:
    """Return where an element lies in the window."""
    return page.evaluate(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")


def put(page: Browser, name: str, value: str) -> None:
    """Put a value into a control, as its user would."""
    found = f"document.getElementById('{name}')"
    page.evaluate(f"{found}.value = {json.dumps(value)}; {found}.dispatchEvent(new Event('input'))")


def running(server: Server) -> int:
    return json.loads(server.get("/load")[1])["running"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
class TestBrowser:
    def test_a_chat_is_held(self, page, serve, tmp_path):
        with serve("answer") as server:
            opened(page, server)
            say(page, "Hello <b>there</b>")
            page.until("document.querySelector('.reply[data-finish=stop]')")
            assert "Hello <b>there</b>" in page.evaluate(TALK)  # as text
            assert "An answer." in page.evaluate(TALK)
            assert page.evaluate("document.querySelector('.think .inner').textContent") == "hm"
            assert page.evaluate("document.querySelector('.think').open") is False
            assert re.search(r"\d+ tokens?$", page.evaluate("document.querySelector('.think summary').textContent"))
            page.evaluate("document.querySelector('.think summary').click()")
            assert page.evaluate("document.querySelector('.think').open") is True
            assert "tokens/s" in page.evaluate("document.querySelector('.meta').textContent")
            say(page, "And more?")
            page.until("document.querySelectorAll('.reply[data-finish=stop]').length === 2")
            roles = [m["role"] for m in requests(page)[-1]["body"]["messages"]]
            assert roles == ["user", "assistant", "user"]
            page.evaluate(
                "[...document.querySelectorAll('.meta button')].findLast(b => b.textContent === 'Regenerate').click()"
            )
            page.until("document.querySelectorAll('.reply[data-finish=stop]').length === 2")
            assert len(requests(page)) == 3
            assert requests(page)[-1]["body"]["messages"] == requests(page)[-2]["body"]["messages"]
            page.press("n", code="KeyN", modifiers=1)
            page.until("!document.querySelector('.reply') && !document.getElementById('empty').hidden")
            assert page.complaints() == []
            hosts = {
                e["params"]["request"]["url"].split("/")[2]
                for e in page.events
                if e["method"] == "Network.requestWillBeSent" and e["params"]["request"]["url"].startswith("http")
            }
            assert hosts == {f"127.0.0.1:{server.port}"}

    def test_a_stream_is_stopped(self, page, serve):
        with serve("slow") as server:
            opened(page, server)
            say(page, "Go on")
            page.until("document.querySelector('.reply .body').textContent.length > 3")
            assert running(server) == 1
            assert page.evaluate("document.getElementById('send').getAttribute('aria-label')") == "Stop"
            page.press("Escape")
            page.until("document.querySelector('.reply[data-finish=stopped]')")
            assert "stopped" in page.evaluate("document.querySelector('.meta').textContent")
            assert any(not running(server) for _ in range(200))
            assert page.evaluate("document.getElementById('send').getAttribute('aria-label')") == "Send"
            assert page.complaints() == []

    def test_controls_reach_the_request(self, page, serve):
        with serve("answer", api_keys=["secret"]) as server:
            page.window(1200, 800)
            page.events.clear()
            page.open(f"http://me:secret@127.0.0.1:{server.port}/")
            page.until("!document.getElementById('panel').hidden && document.activeElement.id === 'key'")
            page.write("secret")
            page.evaluate("document.getElementById('key').dispatchEvent(new Event('change'))")
            page.until("document.title === 'demo'")
            values = {"temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7}
            values["presence_penalty"] = 1
            for name, value in {**values, "system": "Be brief.", "budget": 4}.items():
                put(page, name, str(value))
            assert page.evaluate("document.getElementById('budgettext').textContent") == "128 tokens"
            say(page, "Hi")
            page.until("document.querySelector('.reply[data-finish=stop]')")
            made = requests(page)[-1]
            assert {k.lower(): v for k, v in made["headers"].items()}["authorization"] == "Bearer secret"
            expected = {**values, "thinking_token_budget": 128, "chat_template_kwargs": {"enable_thinking": True}}
            assert {k: made["body"][k] for k in expected} == expected
            assert made["body"]["messages"][0] == {"role": "system", "content": "Be brief."}
            page.evaluate("document.getElementById('thinking').click()")
            say(page, "Again")
            page.until("document.querySelectorAll('.reply[data-finish=stop]').length === 2")
            assert requests(page)[-1]["body"]["chat_template_kwargs"] == {"enable_thinking": False}
            assert "thinking_token_budget" not in requests(page)[-1]["body"]
            page.evaluate(
                "document.getElementById('temperature').value = '1.5'; document.getElementById('top_p').value = '7'"
            )
            say(page, "Third")
            page.until("document.querySelectorAll('.reply[data-finish=stop]').length === 3")
            assert "top_p" not in requests(page)[-1]["body"]  # out of range: not sent

    def test_errors_are_shown(self, page, serve):
        with serve("dies") as server:
            opened(page, server)
            say(page, "Hi")
            page.until("document.querySelector('.reply .error')")
            assert "the engine has failed" in page.evaluate("document.querySelector('.reply .error').textContent")

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    @pytest.mark.parametrize("phone", [False, True], ids=["desk", "phone"])
    def test_it_fits_light_and_dark_desk_and_phone(self, page, serve, tmp_path, phone, dark):
        size: dict[str, Any] = {"width": 390, "height": 780, "phone": True} if phone else {"width": 1200, "height": 800}
        with serve("answer") as server:
            opened(page, server, dark=dark, **size)
            say(page, "Hello " * 40 + "x" * 300)
            page.until("document.querySelector('.reply[data-finish=stop]')")
            image = page.screenshot(tmp_path / "page.png")
            assert image[:8] == b"\x89PNG\r\n\x1a\n"
            assert len(image) > 5000
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            levels = [int(n) for n in re.findall(r"\d+", ground)[:3]]
            assert max(levels) < 60 if dark else min(levels) > 200
            box = page.evaluate(
                "(b => [b.left, b.right, b.bottom])(document.getElementById('send').getBoundingClientRect())"
            )
            assert box[0] >= 0
            assert box[1] <= size["width"]
            assert box[2] <= size["height"]
            page.evaluate("document.getElementById('settings').click()")
            panel = page.evaluate(
                "(b => [b.left, b.right, b.top])(document.getElementById('panel').getBoundingClientRect())"
            )
            assert panel[0] >= 0
            assert panel[1] <= size["width"]
            assert panel[2] >= 0
            page.press("Escape")
            page.until("document.getElementById('panel').hidden")
            page.evaluate("document.getElementById('theme').click()")
            assert page.evaluate("document.documentElement.dataset.theme") == "light"
            page.evaluate("localStorage.clear()")
            assert page.complaints() == []

"""How a server is set up. Pure data, no JAX import."""

from dataclasses import dataclass, fields


class ServerOptionError(ValueError):
    """An option of the server out of range."""


@dataclass(frozen=True)
class ServerOptions:
    """What a server allows; checked on construction.

    Attributes:
        names: what the model is called by requests; () is the model's own name.
        api_keys: any of them opens everything; () leaves the server open. /health is always open.
        cors_origins: web pages that may call the server, "*" for all; () for none.
        trust_request_chat_template: run a chat template that comes with a request.
        max_body_bytes: of a request; a longer one is answered with 413.
        max_held_bytes: of the bodies of all requests at work together; more are answered with 503.
        max_header_bytes, max_headers: of a request's head.
        max_json_depth, max_json_values: of a body: nesting, and objects, lists and their elements together.
        max_choices: completions per prompt (`n`), and prompts times `n` of one request is at most 8 times this.
        max_requests: HTTP requests at work at once; more are answered with 503.
        max_connections: open sockets; more are closed.
        head_s, body_s: how long a client may take to send the head and the body of a request.
        idle_s: how long a connection may stay open without a request.
        write_s: how long a client may leave what was sent to it unread.
        drain_s: how long requests may run on after SIGTERM; 0 ends them at once.
        log_prompts: write prompts and replies into the log.

    Raises:
        ServerOptionError: a value out of range.
    """

    names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    trust_request_chat_template: bool = False
    max_body_bytes: int = 32 * 2**20
    max_held_bytes: int = 512 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_headers: int = 128
    max_json_depth: int = 96
    max_json_values: int = 1_000_000
    max_choices: int = 128
    max_requests: int = 1024
    max_connections: int = 4096
    head_s: float = 10.0
    body_s: float = 45.0
    idle_s: float = 5.0
    write_s: float = 45.0
    drain_s: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ServerOptionError(f"{field.name} is {value!r}: must be a positive integer")
            if field.type is float:
                least = 0.0 if field.name == "drain_s" else 0.05
                if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 86_400:
                    raise ServerOptionError(f"{field.name} is {value!r}: must be a number from {least:g} to 86400")
        for name in ("names", "api_keys", "cors_origins"):
            if not all(isinstance(text, str) and text for text in getattr(self, name)):
                raise ServerOptionError(f"{name} must be strings that are not empty")
        if any(not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ServerOptionError(
                "an API key must be ASCII text without blanks around it: HTTP headers carry no other"
            )

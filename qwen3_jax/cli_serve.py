"""The subcommand `serve`: a model folder behind the OpenAI API. See `cli` for the rest."""

import dataclasses
import os
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from qwen3_jax import cli_options as flags
from qwen3_jax.engine.options import EngineOptions

KEY = "QWEN3_JAX_API_KEY"


class ServeError(ValueError):
    """A server that cannot be started as asked."""


def _file(help: str) -> Any:
    return arg(metavar="FILE", help=help, help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class Door:
    """What is served where, and to whom."""

    folder: Positional[
        Annotated[
            str,
            arg(metavar="[DIR]", help="model folder or hub id", help_behavior_hint="(default: the one in the package)"),
        ]
    ] = ""
    host: Annotated[str, arg(metavar="ADDRESS", help="to listen on; 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, arg(metavar="N", help="to listen on; 0 for a free one, which the log names")] = 8000
    api_key: Annotated[
        tuple[str, ...],
        arg(metavar="KEY [KEY ...]", help=f"any of them opens the server; better in ${KEY}", help_behavior_hint=""),
    ] = ()


@dataclasses.dataclass(frozen=True)
class Serve(flags.Served, Door):
    """Serve a model over HTTP, with the OpenAI API and a chat page at /.

    SIGTERM lets requests end, then the server; exit code 0. If the engine fails, /health is 503 and the exit code 1.
    Everything but /health needs the API key when one is set.
    """

    max_waiting: Annotated[int, arg(metavar="N", help="queued requests; more get 503")] = EngineOptions.max_waiting
    max_waiting_tokens: Annotated[
        int | None, arg(metavar="N", help="queued prompt tokens", help_behavior_hint="(default: unlimited)")
    ] = None
    no_prefix_cache: Annotated[bool, arg(help="compute every prompt from its beginning", help_behavior_hint="")] = False
    no_deterministic: flags.NoDeterministic = False

    trust_request_chat_template: Annotated[
        bool, arg(help="run chat templates that come with requests (sandboxed)", help_behavior_hint="")
    ] = False
    cors_origin: Annotated[
        tuple[str, ...],
        arg(metavar="URL [URL ...]", help="web pages that may call the server, * for all", help_behavior_hint=""),
    ] = ()
    max_requests: Annotated[int, arg(metavar="N", help="HTTP requests at work; more get 503")] = 1024
    shutdown_timeout: Annotated[float, arg(metavar="S", help="for running requests after SIGTERM; 0 aborts them")] = 30
    log_level: Annotated[Literal["debug", "info", "warning", "error"], arg(help="of the JSON log on stderr")] = "info"
    log_prompts: Annotated[bool, arg(help="write requests into the log", help_behavior_hint="")] = False
    ssl_keyfile: Annotated[str | None, _file("private key for HTTPS")] = None
    ssl_certfile: Annotated[str | None, _file("certificate for HTTPS")] = None
    ssl_ca_certs: Annotated[str | None, _file("certificates of clients' authorities")] = None
    ssl_ciphers: Annotated[
        str | None, arg(metavar="TEXT", help="of OpenSSL", help_behavior_hint="(default: OpenSSL's)")
    ] = None

    def run(self) -> int:
        try:
            from qwen3_jax.server.run import Tls, bind
        except ImportError as error:
            raise ServeError(f"{error.name} is missing: pip install 'qwen3-jax[serve]'") from None
        options, engine_options = self._server_options(), self._engine_options()
        if not 0 <= self.port <= 65535:
            raise ServeError(f"port is {self.port}: must be from 0 to 65535")
        tls = Tls(self.ssl_keyfile, self.ssl_certfile, self.ssl_ca_certs, self.ssl_ciphers)
        tls.check()
        from qwen3_jax import distributed

        cluster = None if self.mesh is None else distributed.detect()
        if cluster is None or cluster.num_processes == 1:
            with bind(self.host, self.port) as listener:  # before minutes of loading
                return self._serve(listener, options, engine_options, tls)
        if cluster.process_id == 0:
            with bind(self.host, self.port) as listener, distributed.session(cluster):
                return self._serve(listener, options, engine_options, tls)
        with distributed.session(cluster):
            return self._follow(engine_options)

    def _follow(self, engine_options: EngineOptions) -> int:
        """Do what process 0 does, until it ends; signals to the whole group are its to answer."""
        import logging
        import logging.config
        import signal

        from qwen3_jax.engine.lockstep import follow
        from qwen3_jax.server import logs

        logging.config.dictConfig(logs.config(self.log_level))
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, signal.SIG_IGN)
        follow(self._load(progress=False), engine_options)
        return 0

    def _load(self, *, progress: bool) -> Any:
        import jax

        model = self.load(self.folder, progress=progress)
        if model.backbone and jax.process_count() > 1:
            raise ServeError(
                f"{model.name} is an embedding model: serve it from one process, not {jax.process_count()}"
            )
        return model

    def _serve(self, listener: Any, options: Any, engine_options: EngineOptions, tls: Any) -> int:
        import logging
        import logging.config

        from qwen3_jax.server import logs
        from qwen3_jax.server.app import create_app
        from qwen3_jax.server.engines import engine_for
        from qwen3_jax.server.metrics import Metrics
        from qwen3_jax.server.run import end, run

        logging.config.dictConfig(logs.config(self.log_level))
        model = self._load(progress=True)
        logs.log(logging.INFO, "loaded", model=model.name, seconds=round(model.load_s, 2))
        metrics = Metrics(options.names[0] if options.names else model.name)
        engine = engine_for(model, engine_options, observer=metrics)
        metrics.watch(engine)
        engine.start(lambda line: logs.log(logging.INFO, line))
        try:
            return run(
                create_app(engine, options, metrics=metrics), listener, options, tls=tls, log_level=self.log_level
            )
        finally:
            end(engine)

    def _server_options(self) -> Any:
        from qwen3_jax.server.options import ServerOptions

        keys = self.api_key or tuple(filter(None, [os.environ.get(KEY)]))
        return ServerOptions(
            names=self.served_model_name,
            api_keys=keys,
            cors_origins=self.cors_origin,
            trust_request_chat_template=self.trust_request_chat_template,
            max_requests=self.max_requests,
            drain_s=float(self.shutdown_timeout),
            log_prompts=self.log_prompts,
        )

    def _engine_options(self) -> EngineOptions:
        return self.engine_options_with(
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            prefix_cache=not self.no_prefix_cache,
            deterministic=not self.no_deterministic,
        )

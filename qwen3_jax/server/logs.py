"""Structured logs: one JSON object per line on stderr."""

import json
import logging
import time
import traceback
from typing import Any

LOGGER = logging.getLogger("qwen3_jax.server")


class JsonFormatter(logging.Formatter):
    """Write a record as JSON: time, level, logger, message, and the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))[-8000:]
        return json.dumps(entry, ensure_ascii=False, default=str).replace("\u2028", "\\u2028")


def log(level: int, message: str, **fields: Any) -> None:
    """Write one line with fields of its own."""
    LOGGER.log(level, message, extra={"fields": fields})


def config(level: str = "info") -> dict[str, Any]:
    """Return the configuration of `logging.config.dictConfig` under which everything goes out as JSON."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{__name__}.JsonFormatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "loggers": {
            name: {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
            for name in ("qwen3_jax", "uvicorn", "uvicorn.error")
        },
    }

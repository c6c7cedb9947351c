"""Log lines as text or JSON: one line an event, whatever is in it.

What comes from users (paths, ids, messages of errors) cannot break a line, forge another, or send
control sequences to a terminal: characters that are not printable are escaped.
"""

import json
import logging
import sys
from collections.abc import Collection
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

from jaxserve.errors import ConfigError

LOG_FORMATS = ("text", "json")
HIDDEN = "***"
MIN_SECRET_CHARS = 4  # a shorter one would blot out half of the log
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

# Whose request the running code serves; lines logged meanwhile carry it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def escape(text: str) -> str:
    r"""Everything that is not printable as \n, \x1b, \u2028, ...; also half characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Formatter(logging.Formatter):
    """Knows the fields of a line: its own, the request's id, and what came in `extra`."""

    def __init__(self, secrets: Collection[str] = ()) -> None:
        super().__init__()
        # The longest first, for one may hold another.
        self._secrets = sorted((s for s in secrets if len(s) >= MIN_SECRET_CHARS), key=len)[::-1]

    def hide(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        extra = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        known = extra.pop("request_id", None) or request_id.get()
        return {**({} if known is None else {"request_id": known}), **extra}

    def traceback(self, record: logging.LogRecord) -> str:
        """The exception's, or nothing."""
        parts = []
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)


class TextFormatter(_Formatter):
    """2026-11-25 14:03:07.123Z INFO jaxserve.server [id] message key=value

    The lines of a traceback follow, each indented.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        shown_id = fields.pop("request_id", None)
        line = f"{_time(record)} {record.levelname} {record.name} "
        if shown_id is not None:
            line += f"[{shown_id}] "
        line += record.getMessage()
        for name, value in fields.items():
            line += f" {name}={value!r}" if isinstance(value, str) else f" {name}={value}"
        lines = [line, *("  | " + part for part in self.traceback(record).splitlines())]
        return "\n".join(escape(self.hide(part)) for part in lines)


class JSONFormatter(_Formatter):
    """One JSON object a line, in ASCII: time, level, logger, message, request_id, and the rest."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in self.fields(record).items():
            line.setdefault(name, value)
        if traceback := self.traceback(record):
            line["exception"] = traceback
        return json.dumps(self._hidden(line), default=str)

    def _hidden(self, value: object) -> object:
        """`value` without secrets, with its numbers as they are."""
        match value:
            case str():
                return self.hide(value)
            case bool() | int() | None:
                return value
            case float():
                return value if abs(value) < float("inf") else str(value)  # JSON has no infinity
            case dict():
                return {self.hide(str(k)): self._hidden(v) for k, v in value.items()}
            case list() | tuple():
                return [self._hidden(v) for v in value]
            case _:
                return self.hide(str(value))


def _time(record: logging.LogRecord) -> str:
    when = datetime.fromtimestamp(record.created, UTC)
    return when.isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "Z")


def configure_logging(
    *,
    level: str = "info",
    log_format: Literal["text", "json"] = "text",
    secrets: Collection[str] = (),
    stream: TextIO | None = None,
) -> logging.Handler:
    """Give the process one handler, in place of those that are there; returns it.

    jaxserve and uvicorn log from `level` on, other packages warnings only. uvicorn's access log is
    off, for `AccessLog` writes one. Start uvicorn with `log_config=None`.

    Args:
        secrets: API keys and tokens; each is *** wherever it would appear.
        stream: None: standard error.

    Raises:
        ConfigError: No such level or format.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(
            f"log_level={level!r} is unknown; use debug, info, warning, error or critical"
        )
    if log_format not in LOG_FORMATS:
        raise ConfigError(f"log_format={log_format!r} is unknown; use {' or '.join(LOG_FORMATS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter((JSONFormatter if log_format == "json" else TextFormatter)(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    for name in ("jaxserve", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(number)
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    return handler

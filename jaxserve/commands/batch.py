"""OpenAI's batch format: a file of requests, and a file of answers in the same order.

A line in: {"custom_id", "method": "POST", "url", "body"}. A line out: {"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error": {"code", "message"}}; `response` is null
where the line was no request, and `error` is null where it was answered with success.
"""

import asyncio
import json
import os
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jaxserve.commands.in_process import post
from jaxserve.commands.parser import UsageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class BadLineError(ValueError):
    """A line is no request.

    Args:
        code: Machine-readable reason.
        custom_id: As far as it could be read.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]

    @classmethod
    def parse(cls, line: bytes, seen: set[str]) -> "BatchRequest":
        """Reads a line, and adds its custom_id to those that were `seen`.

        Raises:
            BadLineError: It is no request that a batch may hold.
        """
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise BadLineError("invalid_json_line", "it is not JSON") from None
        if not isinstance(value, dict):
            raise BadLineError("invalid_json_line", "it is not a JSON object")
        name = value.get("custom_id")
        if not isinstance(name, str) or not name:
            raise BadLineError("missing_required_parameter", "custom_id is missing, or no text")
        if name in seen:
            raise BadLineError("duplicate_custom_id", "custom_id came before", name)
        seen.add(name)
        if value.get("method", "POST") != "POST":
            raise BadLineError("invalid_method", "method is not POST", name)
        url, body = value.get("url"), value.get("body")
        if url not in URLS:
            raise BadLineError("invalid_url", f"url is none of {', '.join(URLS)}", name)
        if not isinstance(body, dict):
            raise BadLineError("missing_required_parameter", "body is no JSON object", name)
        if body.get("stream"):
            raise BadLineError("unsupported_parameter", "a batch has no streams", name)
        return cls(name, url, body)


async def answers(
    app: "ASGIApp", lines: Iterable[bytes], max_concurrency: int
) -> AsyncGenerator[dict[str, Any]]:
    """The lines of the output, in the order of the input; empty lines have none.

    Args:
        max_concurrency: Requests at a time.
    """
    places = asyncio.Semaphore(max_concurrency)
    running: deque[asyncio.Task[dict[str, Any]]] = deque()
    seen: set[str] = set()

    async def one(number: int, line: bytes) -> dict[str, Any]:
        try:
            return await _answer(app, number, line, seen)
        finally:
            places.release()

    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            await places.acquire()
            running.append(asyncio.create_task(one(number, line)))
            while running and running[0].done():
                yield running.popleft().result()
        while running:
            yield await running[0]
            running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A file that is there under its name only when it is whole.

    Raises:
        UsageError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)


async def _answer(app: "ASGIApp", number: int, line: bytes, seen: set[str]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": None,
        "response": None,
        "error": None,
    }
    try:
        request = BatchRequest.parse(line, seen)
    except BadLineError as error:
        result["custom_id"] = error.custom_id
        result["error"] = {"code": error.code, "message": f"line {number}: {error}"}
        return result
    answer = await post(app, request.url, json.dumps(request.body).encode())
    result["custom_id"] = request.custom_id
    result["response"] = {
        "status_code": answer.status,
        "request_id": answer.request_id,
        "body": answer.body,
    }
    if answer.status >= 400:
        error = answer.body.get("error", {})
        result["error"] = {
            "code": error.get("code") or str(answer.status),
            "message": error.get("message", ""),
        }
    return result

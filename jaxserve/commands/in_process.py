"""Calls an ASGI application as a server would, without a network."""

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message


@dataclass(frozen=True, slots=True)
class AppAnswer:
    status: int
    request_id: str
    body: Any  # JSON


async def post(app: "ASGIApp", path: str, body: bytes) -> AppAnswer:
    """What the application answers to a POST of JSON. Cancelling ends its work."""
    given = False
    status, request_id = 500, ""
    pieces: list[bytes] = []

    async def receive() -> "Message":
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.Future()  # the client stays: it is in this process

    async def send(message: "Message") -> None:
        nonlocal status, request_id
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = dict(message.get("headers", ()))
            request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        else:
            pieces.append(message.get("body", b""))

    await app(_scope(path, len(body)), receive, send)
    return AppAnswer(status, request_id, json.loads(b"".join(pieces)))


def _scope(path: str, num_bytes: int) -> dict[str, Any]:
    """Of ASGI 3.0, section HTTP."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(num_bytes).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", 80),
    }

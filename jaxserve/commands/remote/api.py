"""OpenAI's API of a running server, as far as the commands need it."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxserve.commands.parser import UsageError
from jaxserve.commands.remote.events import EventReader
from jaxserve.commands.remote.http_client import Answer, ConnectionFailed, HttpClient
from jaxserve.errors import JaxserveError

DEFAULT_URL = "http://127.0.0.1:8000"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_KEYS = ("JAXSERVE_API_KEY", "OPENAI_API_KEY")


class AnswerError(JaxserveError):
    """The server answered with an error.

    Args:
        status: HTTP status; 200 where the error came within a stream.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Chunk(NamedTuple):
    """One event of a streamed completion or chat."""

    at_s: float  # time.perf_counter() when it arrived
    text: str  # of the answer proper
    is_output: bool  # brings text, reasoning or a tool call
    is_choice: bool  # belongs to the answer; else it only tells the usage
    finish_reason: str | None
    usage: dict[str, Any] | None


class Api:
    """A server that speaks OpenAI's API.

    Args:
        url: With or without /v1 at its end.
        api_key: Default: $JAXSERVE_API_KEY, then $OPENAI_API_KEY.
        headers: Of every request; they win.

    Raises:
        UsageError: The URL or a header has the wrong form.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        key = api_key or next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)
        own = {"user-agent": "jaxserve", "accept": "*/*"}
        if key:
            own["authorization"] = f"Bearer {key.replace(',', ' ').split()[0]}"
        own |= {name.lower(): value for name, value in (headers or {}).items()}
        if not all(f"{name}{value}".isprintable() for name, value in own.items()):
            raise UsageError("a header or the API key holds a control character; take it out")
        self._client = HttpClient(url.rstrip("/").removesuffix("/v1"), own)
        self.url = self._client.url

    async def first_model(self) -> str:
        """The name that the server serves its model under.

        Raises:
            AnswerError, ConnectionFailed: The server does not say.
        """
        answer = await self._client.get("/v1/models")
        try:
            if answer.status == 200:
                return str(json.loads(answer.body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise AnswerError(
                200, f"{self.url}/v1/models does not list a model; name one with --model-name"
            ) from None
        raise _error(answer)

    async def stream(
        self,
        path: str,
        body: bytes,
        on_chunk: Callable[[Chunk], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Calls `on_chunk` with each chunk as it arrives. Cancelling ends the request.

        Raises:
            AnswerError: The server refused, or told an error within the stream.
            ConnectionFailed: There was no answer, or not the whole of it.
        """
        reader = EventReader()
        ended = False

        def on_piece(piece: bytes, at_s: float) -> None:
            nonlocal ended
            for data in reader.feed(piece):
                if data == b"[DONE]":
                    ended = True
                    continue
                chunk = read_chunk(data, at_s)
                ended = ended or chunk.finish_reason is not None
                on_chunk(chunk)

        answer = await self._client.post(path, body, headers, on_piece)
        if answer.status != 200:
            raise _error(answer)
        if not ended:
            raise ConnectionFailed(f"{self.url}{path} ended its stream before the answer was whole")

    def close(self) -> None:
        self._client.close()


def read_chunk(data: bytes, at_s: float) -> Chunk:
    """One chunk of a stream.

    Raises:
        AnswerError: It is an error, or no chunk.
    """
    try:
        value = json.loads(data)
        if "error" in value:
            raise AnswerError(200, _message(value))
        choices = value["choices"]
        if not choices:
            return Chunk(at_s, "", False, False, None, value.get("usage"))
        choice = choices[0]
        delta = choice.get("delta")
        if delta is None:
            text = choice["text"]
            is_output = bool(text)
        else:
            text = delta.get("content") or ""
            is_output = bool(
                text
                or delta.get("reasoning")
                or delta.get("reasoning_content")
                or delta.get("tool_calls")
            )
        return Chunk(at_s, text, is_output, True, choice.get("finish_reason"), value.get("usage"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise AnswerError(200, f"the stream holds what is no chunk: {data[:100]!r}") from None


def _error(answer: Answer) -> AnswerError:
    text = answer.body.decode("utf-8", "replace")
    try:
        text = _message(json.loads(text))
    except ValueError:
        text = text.strip()[:200]
    hint = ""
    if answer.status == 401:
        hint = "; set JAXSERVE_API_KEY or OPENAI_API_KEY to a key of the server"
    return AnswerError(answer.status, f"the server answered {answer.status}: {text}{hint}")


def _message(value: Any) -> str:
    """The message of an error in OpenAI's shape, or of one near it."""
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or error)[:500]
    return str(error)[:500]

"""Streams answers of a server, with the figures of each."""

import json
import time
from collections.abc import Callable
from typing import Any

from jaxserve.commands.remote.api import CHAT, COMPLETIONS, Api, Chunk
from jaxserve.commands.streams import Figures, Messages


class RemoteStreamer:
    """Answers by a server; cancelling an answer hangs up, and the server ends its work.

    Args:
        model: Default: the server's first.
        fields: Of every request besides.
    """

    def __init__(self, api: Api, model: str | None, fields: dict[str, Any]) -> None:
        self._api = api
        self._model = model
        self._fields = fields

    async def chat(self, messages: Messages, write: Callable[[str], None]) -> Figures:
        """Calls `write` with each new piece of the answer to a conversation.

        Raises:
            AnswerError, ConnectionFailed: See `Api.stream`.
        """
        return await self._stream(CHAT, {"messages": list(messages)}, write)

    async def complete(self, prompt: str, write: Callable[[str], None]) -> Figures:
        """The same for a text to continue."""
        return await self._stream(COMPLETIONS, {"prompt": prompt}, write)

    async def _stream(
        self, path: str, body: dict[str, Any], write: Callable[[str], None]
    ) -> Figures:
        if self._model is None:
            self._model = await self._api.first_model()
        body = {"model": self._model, "stream": True, **self._fields, **body}
        body["stream_options"] = {"include_usage": True}
        start = time.perf_counter()
        first: float | None = None
        reason = ""
        num_chunks = 0
        usage: dict[str, Any] = {}

        def on_chunk(chunk: Chunk) -> None:
            nonlocal first, reason, num_chunks, usage
            if chunk.is_output:
                first = first or chunk.at_s
                num_chunks += 1
            reason = chunk.finish_reason or reason
            usage = chunk.usage or usage
            if chunk.text:
                write(chunk.text)

        await self._api.stream(path, json.dumps(body).encode(), on_chunk)
        end = time.perf_counter()
        return Figures(
            num_prompt_tokens=usage.get("prompt_tokens", 0),
            num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            num_output_tokens=usage.get("completion_tokens", num_chunks),
            finish_reason=reason,
            ttft_s=(first or end) - start,
            total_s=end - start,
        )

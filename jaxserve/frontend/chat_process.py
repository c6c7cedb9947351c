"""`ChatProcess`: chat templates rendered where they can neither hang nor exhaust the server.

A template is downloaded code. The sandbox keeps it from the system, but not from looping or from
building gigabytes; in a process of its own it can be killed.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.errors import EngineDeadError, RequestError

TIMEOUT_S = 5.0


class ChatProcess:
    """Renders one conversation at a time. Thread-safe; starts again after a kill.

    Args:
        timeout_s: For one conversation.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        """Starts the process now, so that the first conversation need not wait for it."""
        with self._lock:
            self._running()

    def render(
        self, template: str | None, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """As `frontend.chat.render_chat`; the messages and options must be plain JSON.

        Raises:
            RequestError: As that; or it took too long, or too much memory.
        """
        job = {"template": template, "messages": messages, "options": options}
        line = json.dumps(job).encode() + b"\n"
        with self._lock:
            answer = self._ask(self._running(), line)
        if "text" in answer:
            return answer["text"]
        raise RequestError(
            answer["error"], param=answer.get("param", "messages"), code=answer.get("code")
        )

    def close(self) -> None:
        """Ends the process. May be called again."""
        with self._lock:
            self._closed = True
            self._kill()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._closed:
            raise EngineDeadError("the process that renders chat templates has been shut down")
        if self._process is None or self._process.poll() is not None:
            self._kill()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxserve.frontend.chat_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for us alone
                bufsize=0,
            )
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    os.set_blocking(pipe.fileno(), False)
        return self._process

    def _ask(self, process: "subprocess.Popen[bytes]", line: bytes) -> dict[str, Any]:
        """Writes and reads under one deadline, for either can block."""
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the process has no pipes")
        deadline = time.monotonic() + self._timeout_s
        received = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    self._kill()
                    return {
                        "error": f"the chat template takes longer than {self._timeout_s:g} s; send "
                        "a shorter conversation"
                    }
                for key, _ in ready:
                    try:
                        if key.fileobj is stdin:
                            line = line[os.write(stdin.fileno(), line[: 1 << 16]) :]
                            if not line:
                                selector.unregister(stdin)
                            continue
                        piece = os.read(stdout.fileno(), 1 << 20)
                    except BrokenPipeError:
                        piece = b""
                    if not piece:
                        self._kill()
                        return {"error": "the chat template takes too much memory"}
                    received += piece
        return json.loads(received)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

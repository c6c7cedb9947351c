"""The process that renders chat templates: `python -m jaxserve.frontend.chat_worker`.

One JSON object a line: {"template", "messages", "options"} in, {"text"} or {"error", "param",
"code"} out. Its memory is bounded; its time is its parent's business.
"""

import json
import os
import resource
import signal
import sys

from jaxserve.errors import RequestError
from jaxserve.frontend.chat import render_chat

MAX_BYTES = 1 << 30  # of address space, beyond what the start takes


def answer(line: bytes) -> dict[str, object]:
    """What one line of input asks for."""
    job = json.loads(line)
    try:
        return {"text": render_chat(job["template"], job["messages"], **job["options"])}
    except RequestError as error:
        return {"error": str(error), "param": error.param, "code": error.code}
    except MemoryError:
        return {"error": "the chat template takes too much memory", "param": "messages"}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := sys.stdin.buffer.readline():
        data = json.dumps(answer(line)).encode() + b"\n"
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()

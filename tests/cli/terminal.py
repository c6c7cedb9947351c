"""A process in a pseudo-terminal: what is on the screen, and keys to press."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent.parent
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
START = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the process as SIGINT
from jaxserve.cli import main
sys.exit(main())
"""
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


class Terminal:
    """Runs `jaxserve ARGUMENTS` with a terminal as its stdin, stdout and stderr."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 100))
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._raw = ""
        self._seen = 0  # characters of the screen that `wait_for` has passed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    @property
    def screen(self) -> str:
        """All text so far, without colours and cursor movements."""
        return ESCAPES.sub("", self._raw)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, timeout_s: float = 120.0) -> str:
        """Text from the last match up to and with the next one of a regular expression."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = re.search(pattern, self.screen[self._seen :])
            if found:
                text = self.screen[self._seen : self._seen + found.end()]
                self._seen += found.end()
                return text
            if not self._read(end) and self.process.poll() is not None:
                break
        raise AssertionError(f"{pattern!r} did not come; the screen is:\n{self.screen}")

    def wait(self, timeout_s: float = 60.0) -> int:
        """The exit code."""
        end = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < end:
            self._read(time.monotonic() + 0.2)
        return self.process.wait(timeout=1)

    def _read(self, end: float) -> bool:
        """Takes what has been written; False if nothing came."""
        ready, _, _ = select.select(
            [self._master], [], [], max(0.0, min(0.5, end - time.monotonic()))
        )
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux: the other side has closed
            return False
        self._raw += data.decode(errors="replace")
        return bool(data)

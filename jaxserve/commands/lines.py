"""Lines that a user types, or that come through a pipe."""

import sys
from collections.abc import Callable


def line_reader(hint: str | None) -> Callable[[], str | None]:
    """A function that returns the next line, or None at the end.

    Args:
        hint: Told first, where someone types.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_plain
    if hint:
        note(hint)
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    hit = 0  # Ctrl-C at an empty prompt, in a row

    def read() -> str | None:
        nonlocal hit
        while True:
            try:
                line = session.prompt("> ")
            except EOFError:
                return None
            except KeyboardInterrupt:
                hit = 0 if session.default_buffer.text else hit + 1
                if hit > 1:
                    raise
                note("(Ctrl-D ends; Ctrl-C once more, too)")
                continue
            hit = 0
            return line

    return read


def note(text: str) -> None:
    """A line on stderr, beside the answers."""
    print(text, file=sys.stderr, flush=True)


def _read_plain() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None

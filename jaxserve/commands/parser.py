"""An argparse parser whose errors are one line that says what to do."""

import argparse
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from jaxserve.errors import ConfigError

_SUFFIXES = {
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40,
}  # fmt: skip
_WIDTH = 96


class UsageError(ConfigError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Accepts `--max_model_len` for `--max-model-len`, and flags between positional arguments."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The values of a command line.

        Raises:
            UsageError: A flag is unknown, or a value has the wrong form.
        """
        end = arguments.index("--") if "--" in arguments else len(arguments)
        known = [_with_dashes(word) for word in arguments[:end]]
        args, rest = self.parse_known_intermixed_args(known + arguments[end:])
        rest = [word for word in rest if word != "--"]
        if rest:
            word = rest[0].partition("=")[0]
            kind = "flag" if word.startswith("-") else "argument"
            hint = nearest(word, self._option_string_actions) if kind == "flag" else ""
            self.error(f"unknown {kind} {word}{hint}; see {self.prog} --help")
        return args

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Flags on the left, what they do on the right, defaults where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing if no known word is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def _with_dashes(word: str) -> str:
    """`--max_model_len=1` as `--max-model-len=1`."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def whole_number(text: str) -> int:
    """`512`, `1k` (1,000), `1K` (1,024) or `25.6k`; a fraction must come out whole."""
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip().replace("_", ""))
    value = float(match[1]) * _SUFFIXES.get(match[2], 1) if match else math.nan
    if match is None or not value.is_integer():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number; use digits, with k, m, g for powers of 1000 "
            "or K, M, G for powers of 1024"
        )
    return int(match[1]) if not match[2] and match[1].lstrip("+-").isdigit() else int(value)


def number(text: str) -> float:
    """A finite or infinite number; the engine says which range is allowed."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

"""Talk with a model in the terminal; answers are streamed.

Ctrl-C stops an answer, Ctrl-D or /exit ends the conversation, /help lists what else there is. Where
neither a flag nor the model says otherwise, the temperature is 0.7 and an answer as long as fits.
"""

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING

from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.sampling_args import (
    SINGLE_ANSWER,
    add_sampling_arguments,
    given_fields,
    sampling_params,
)
from jaxserve.errors import EngineDeadError, JaxserveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxserve.commands.streams import Figures, Streamer

USAGE = "[MODEL] [-q MESSAGE] [--system TEXT] [flags]"
HELP = """/exit   end (or Ctrl-D)
/reset  forget the conversation, keep the system message
/help   show this
Ctrl-C stops an answer; the part that was written stays in the conversation."""
DEFAULTS = {"temperature": 0.7, "max_tokens": None}  # under the model's own and the flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="answer this one message and end")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--stats", action="store_true", help="a line of figures after each answer")
    parser.add_argument("--quiet", action="store_true", help="no start-up table, no hints")
    add_sampling_arguments(parser, without=SINGLE_ANSWER)
    add_engine_arguments(parser, without={"seed"})


def run(args: argparse.Namespace) -> int:
    from jaxserve.commands.session import open_streamer

    config = engine_config(args)
    sampling_params(args, {})  # wrong values are told before the model loads
    with asyncio.Runner() as runner, open_streamer(config, quiet=args.quiet) as streamer:
        defaults = given_fields(streamer.default_sampling)
        chat = Conversation(streamer, runner, args.system, stats=args.stats)
        chat.sampling = sampling_params(args, DEFAULTS | defaults)
        if args.quick is not None:
            return chat.answer(args.quick)
        return chat.repeat(_line_reader(hints=not args.quiet))


class Conversation:
    """The messages so far, and the means to go on."""

    def __init__(
        self, streamer: "Streamer", runner: asyncio.Runner, system: str | None, *, stats: bool
    ) -> None:
        from jaxserve.sampling_params import SamplingParams

        self.streamer = streamer
        self.sampling = SamplingParams()
        self._runner = runner
        self._stats = stats
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._system)

    def repeat(self, read: "Callable[[], str | None]") -> int:
        """Reads and answers until the user ends it."""
        while (line := read()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit":
                    break
                case "/reset":
                    self.messages = list(self._system)
                    _note("the conversation starts anew")
                case "/help":
                    _note(HELP)
                case text if text.startswith("/") and " " not in text:
                    _note(f"unknown command {text}; use /exit, /reset or /help")
                case _:
                    try:
                        self.answer(line)
                    except KeyboardInterrupt:
                        _note("\n(stopped)")
                    except EngineDeadError:
                        raise
                    except JaxserveError as error:
                        _note(f"error: {error} (/reset starts a new conversation)")
        return 0

    def answer(self, text: str) -> int:
        """Streams the answer to one message to stdout.

        Raises:
            RequestError: The conversation has grown longer than the model's context.
            KeyboardInterrupt: Ctrl-C; the request has been aborted.
        """
        written: list[str] = []
        self.messages.append({"role": "user", "content": text})

        def write(piece: str) -> None:
            written.append(piece)
            print(piece, end="", flush=True)

        try:
            figures = self._runner.run(self.streamer.stream(self.messages, self.sampling, write))
        finally:
            if written:
                self.messages.append({"role": "assistant", "content": "".join(written)})
            else:
                self.messages.pop()
        print(flush=True)
        if self._stats:
            _note(_stats_line(figures))
        return 0


def _stats_line(f: "Figures") -> str:
    return (
        f"[{f.num_prompt_tokens} tokens in, {f.num_cached_tokens} of them cached, "
        f"{f.num_output_tokens} out, {f.finish_reason}; first after {f.ttft_s * 1000:.0f} ms, "
        f"then {f.tokens_per_s:.1f} tokens/s]"
    )


def _line_reader(*, hints: bool) -> "Callable[[], str | None]":
    """A function that returns the next message, or None at the end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_plain
    if hints:
        _note("Write a message. /help lists commands, Ctrl-D ends.")
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
                _note("(Ctrl-D or /exit ends; Ctrl-C once more, too)")
                continue
            hit = 0
            return line

    return read


def _read_plain() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

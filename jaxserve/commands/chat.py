"""Talk with a model in the terminal; answers are streamed.

The model runs in this process, or with --url on a server. Ctrl-C stops an answer, Ctrl-D or /exit
ends the conversation, /help lists what else there is. Where neither a flag nor the model says
otherwise, the temperature is 0.7 and an answer as long as fits; a server has its own defaults.
"""

import argparse
import asyncio
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.lines import line_reader, note
from jaxserve.commands.parser import UsageError
from jaxserve.commands.remote.arguments import add_remote_arguments
from jaxserve.commands.sampling_args import (
    SINGLE_ANSWER,
    add_sampling_arguments,
    given_fields,
    request_fields,
    sampling_params,
)
from jaxserve.config import EngineConfig
from jaxserve.errors import EngineDeadError, JaxserveError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from jaxserve.commands.streams import Figures, Messages

USAGE = "[MODEL | --url URL] [-q MESSAGE] [--system TEXT] [flags]"
HINT = "Write a message. /help lists commands, Ctrl-D ends."
type Stream = Callable[[Messages, Callable[[str], None]], Coroutine[None, None, Figures]]
HELP = """/exit   end (or Ctrl-D)
/reset  forget the conversation, keep the system message
/help   show this
Ctrl-C stops an answer; the part that was written stays in the conversation."""
DEFAULTS = {"temperature": 0.7, "max_tokens": None}  # under the model's own and the flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="answer this one message and end")
    parser.add_argument("--system", "--system-prompt", metavar="TEXT", help="system message")
    parser.add_argument("--stats", action="store_true", help="a line of figures after each answer")
    parser.add_argument("--quiet", action="store_true", help="no start-up table, no hints")
    add_remote_arguments(parser, default_url=None)
    add_sampling_arguments(parser, without=SINGLE_ANSWER)
    add_engine_arguments(parser, without={"seed"})


def run(args: argparse.Namespace) -> int:
    if args.url is not None:
        return _run_remote(args)
    if args.model_name is not None or args.api_key is not None:
        raise UsageError("--model-name and --api-key need --url; add it, or name a MODEL")
    from jaxserve.commands.session import open_streamer

    config = engine_config(args)
    sampling_params(args, {})  # wrong values are told before the model loads
    with asyncio.Runner() as runner, open_streamer(config, quiet=args.quiet) as streamer:
        defaults = given_fields(streamer.default_sampling)
        sampling = sampling_params(args, DEFAULTS | defaults)
        return _converse(args, runner, partial(streamer.stream, sampling))


def _run_remote(args: argparse.Namespace) -> int:
    names = {field.name for field in fields(EngineConfig)}
    given = names.intersection(vars(args)) - {"model"} - request_fields(args).keys()
    if args.model is not None or args.model_flag is not None:
        raise UsageError("with --url the model is the server's; take MODEL out, or --url")
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise UsageError(f"with --url the engine is the server's; take {flags} out, or --url")
    from jaxserve.commands.remote.opening import open_api

    api = open_api(args.url, api_key=args.api_key)

    from jaxserve.commands.remote.streamer import RemoteStreamer

    streamer = RemoteStreamer(api, args.model_name, request_fields(args))
    with asyncio.Runner() as runner:
        return _converse(args, runner, streamer.chat)


def _converse(args: argparse.Namespace, runner: asyncio.Runner, stream: Stream) -> int:
    chat = Conversation(stream, runner, args.system, stats=args.stats)
    if args.quick is not None:
        return chat.answer(args.quick)
    return chat.repeat(line_reader(None if args.quiet else HINT))


class Conversation:
    """The messages so far, and the means to go on."""

    def __init__(
        self, stream: Stream, runner: asyncio.Runner, system: str | None, *, stats: bool
    ) -> None:
        self._stream = stream
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
                    note("the conversation starts anew")
                case "/help":
                    note(HELP)
                case text if text.startswith("/") and " " not in text:
                    note(f"unknown command {text}; use /exit, /reset or /help")
                case _:
                    try:
                        self.answer(line)
                    except KeyboardInterrupt:
                        note("\n(stopped)")
                    except EngineDeadError:
                        raise
                    except JaxserveError as error:
                        note(f"error: {error} (/reset starts a new conversation)")
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
            figures = self._runner.run(self._stream(self.messages, write))
        finally:
            if written:
                self.messages.append({"role": "assistant", "content": "".join(written)})
            else:
                self.messages.pop()
        print(flush=True)
        if self._stats:
            note(figures.line())
        return 0

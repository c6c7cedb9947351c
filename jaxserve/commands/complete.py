"""Complete prompts on a running server; answers are streamed.

Without -q each line of stdin is a prompt. Ctrl-C stops an answer, Ctrl-D ends.
"""

import argparse
import asyncio
import sys

from jaxserve.commands.lines import line_reader, note
from jaxserve.commands.remote.arguments import add_remote_arguments
from jaxserve.commands.sampling_args import SINGLE_ANSWER, add_sampling_arguments, request_fields
from jaxserve.errors import JaxserveError

USAGE = "[--url URL] [-q PROMPT] [flags]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_remote_arguments(parser, default_url="http://127.0.0.1:8000")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="complete this one prompt and end")
    parser.add_argument("--stats", action="store_true", help="a line of figures after each answer")
    parser.add_argument("--quiet", action="store_true", help="no hints")
    add_sampling_arguments(parser, without=SINGLE_ANSWER)


def run(args: argparse.Namespace) -> int:
    from jaxserve.commands.remote.opening import open_api

    fields = request_fields(args)
    api = open_api(args.url, api_key=args.api_key)

    from jaxserve.commands.remote.streamer import RemoteStreamer

    streamer = RemoteStreamer(api, args.model_name, fields)
    with asyncio.Runner() as runner:

        def answer(prompt: str) -> None:
            figures = runner.run(streamer.complete(prompt, _write))
            print(flush=True)
            if args.stats:
                note(figures.line())

        if args.quick is not None:
            answer(args.quick)
            return 0
        read = line_reader("Write a text to complete. Ctrl-D ends." if not args.quiet else None)
        failed = False
        while (line := read()) is not None:
            if not line.strip():
                continue
            try:
                answer(line)
            except KeyboardInterrupt:
                note("\n(stopped)")
            except JaxserveError as error:
                failed = True
                note(f"error: {error}")
    return 1 if failed and not sys.stdin.isatty() else 0


def _write(piece: str) -> None:
    print(piece, end="", flush=True)

"""Answer a file of requests in OpenAI's batch format, without a server.

Each line holds custom_id, method, url and body; the answers have the same order. A line that is
wrong is answered with an error and does not end the run.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.parser import UsageError, whole_number
from jaxserve.commands.server_args import add_answer_arguments, server_config

if TYPE_CHECKING:
    from jaxserve.server.app import Application

USAGE = "-i IN.jsonl -o OUT.jsonl [MODEL] [flags]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("-i", "--input-file", metavar="FILE", required=True, help="the requests")
    parser.add_argument(
        "-o", "--output-file", metavar="FILE", required=True, help="where the answers go"
    )
    parser.add_argument(
        "--max-concurrency",
        type=whole_number,
        default=256,
        metavar="N",
        help="requests that the engine has at a time",
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    add_answer_arguments(parser)
    add_engine_arguments(parser, without={"served_model_name"})


def run(args: argparse.Namespace) -> int:
    if args.max_concurrency < 1:
        raise UsageError(f"--max-concurrency {args.max_concurrency} is too small; use 1 or more")
    config = server_config(vars(args))
    engine = engine_config(args)
    lines = _read(args.input_file)
    output = Path(args.output_file).expanduser()
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise UsageError(f"--output-file {output}: its folder does not exist, or it is a folder")

    from jaxserve.async_llm import AsyncLLM
    from jaxserve.commands.session import show, with_progress
    from jaxserve.server.app import make_app

    llm = AsyncLLM.from_engine_args(with_progress(engine, quiet=args.quiet))
    try:
        show(llm, args.quiet)
        app = make_app(llm, config)
        try:
            with asyncio.Runner() as runner:
                num_failed, num = runner.run(
                    answer_file(app, lines, output, args.max_concurrency, args.quiet)
                )
        finally:
            app.context.close()
        alive = llm.is_running
    finally:
        llm.shutdown()
    if not args.quiet or num_failed:
        _say(f"{num} requests, {num_failed} of them failed: {output}")
    if not alive:
        _say("error: the engine died; what came before is in the file")
    return 0 if alive else 1


async def answer_file(
    app: "Application", lines: Sequence[bytes], output: Path, max_concurrency: int, quiet: bool
) -> tuple[int, int]:
    """Writes the answers; how many failed, and of how many.

    Raises:
        UsageError: The file cannot be written.
    """
    import json
    from contextlib import aclosing

    from tqdm import tqdm

    from jaxserve.commands.batch import answers, whole_file

    num = num_failed = 0
    shown = sys.stderr.isatty() and not quiet
    with whole_file(output) as file, tqdm(total=len(lines), disable=not shown) as bar:
        async with aclosing(answers(app, lines, max_concurrency)) as results:
            async for result in results:
                num += 1
                num_failed += result["error"] is not None
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
                bar.update()
    return num_failed, num


def _read(path: str) -> list[bytes]:
    try:
        return Path(path).expanduser().read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"--input-file {path} cannot be read ({error.strerror})") from None


def _say(text: str) -> None:
    print(f"jaxserve: {text}", file=sys.stderr, flush=True)

"""Ask the demo model several things at once, streamed to the terminal."""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.parser import whole_number
from jaxserve.commands.sampling_args import (
    SINGLE_ANSWER,
    add_sampling_arguments,
    given_fields,
    sampling_params,
)

if TYPE_CHECKING:
    from jaxserve.commands.streams import Figures, Streamer
    from jaxserve.sampling_params import SamplingParams
    from jaxserve.step import StepStats

USAGE = "[MODEL] [flags]"
QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences what a computer's memory is.",
    "Write a haiku about rain.",
    "Name three fruits that are yellow.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Answer briefly.",
    "Write a Python function that adds two numbers.",
    "Give one tip for sleeping well.",
)
DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "seed": 1, "max_tokens": 80}
# Few programs, compiled as a loop over layers: the first answer comes sooner.
SIZES = {
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "layer_loop": "scan",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument(
        "--num-prompts",
        type=whole_number,
        default=len(QUESTIONS),
        metavar="N",
        help="questions, asked all at once",
    )
    parser.add_argument("--quiet", action="store_true", help="no start-up table")
    add_sampling_arguments(parser, without=SINGLE_ANSWER)
    add_engine_arguments(parser, without={"seed"})


def run(args: argparse.Namespace) -> int:
    from jaxserve.commands.parser import UsageError
    from jaxserve.commands.session import open_streamer

    if args.num_prompts < 1:
        raise UsageError(f"--num-prompts {args.num_prompts} is too small; use 1 or more")
    config = engine_config(args, **SIZES)
    sampling_params(args, {})  # wrong values are told before the model loads
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(args.num_prompts)]
    with asyncio.Runner() as runner, open_streamer(config, quiet=args.quiet) as streamer:
        defaults = given_fields(streamer.default_sampling)
        sampling = sampling_params(args, DEFAULTS | defaults)
        start = time.perf_counter()
        show = _show_live if sys.stdout.isatty() else _show_plain
        figures = runner.run(show(streamer, sampling, questions))
        elapsed_s = time.perf_counter() - start
        llm = streamer.llm
        print(closing_line(figures, elapsed_s, llm.engine_stats(), llm.summary()))
    return 0


async def _show_plain(
    streamer: "Streamer", sampling: "SamplingParams", questions: list[str]
) -> "list[Figures]":
    """Prints each answer when it is complete."""

    async def ask(i: int, question: str) -> "Figures":
        pieces: list[str] = []
        figures = await streamer.stream(sampling, _message(question), pieces.append)
        print(f"[{i + 1}] {question}\n{''.join(pieces).strip()}\n", flush=True)
        return figures

    return await asyncio.gather(*(ask(i, question) for i, question in enumerate(questions)))


async def _show_live(
    streamer: "Streamer", sampling: "SamplingParams", questions: list[str]
) -> "list[Figures]":
    """Draws all answers at once, as they grow."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console()
    answers: list[list[str]] = [[] for _ in questions]

    def table(*, whole: bool) -> Table:
        grid = Table(show_lines=True, expand=True)
        grid.add_column("Question", ratio=1)
        grid.add_column("Answer", ratio=3)
        lines = max(1, (console.height - 4) // len(questions) - 1)
        width = max(20, console.width * 3 // 4 - 6)
        for question, pieces in zip(questions, answers, strict=True):
            text = "".join(pieces).strip()
            shown = text if whole else _last_lines(text, lines, width)
            grid.add_row(Text(question), Text(shown))
        return grid

    async def draw(live: Live) -> None:
        while True:
            live.update(table(whole=False), refresh=True)
            await asyncio.sleep(0.1)

    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        drawing = asyncio.create_task(draw(live))
        try:
            figures = await asyncio.gather(
                *(
                    streamer.stream(sampling, _message(question), pieces.append)
                    for question, pieces in zip(questions, answers, strict=True)
                )
            )
        finally:
            drawing.cancel()
        live.update(Text(""), refresh=True)
    console.print(table(whole=True))
    return figures


def _message(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _last_lines(text: str, lines: int, width: int) -> str:
    """The end of a text that is still being written, as far as it fits."""
    wrapped = [
        line[i : i + width] for line in text.splitlines() for i in range(0, len(line) or 1, width)
    ]
    return "\n".join(wrapped[-lines:])


def closing_line(
    figures: "Sequence[Figures]",
    elapsed_s: float,
    steps: "Sequence[StepStats]",
    summary: Mapping[str, Any],
) -> str:
    """The figures of the run, all measured: tokens, rates, waiting time, KV, compilation."""
    tokens_in = sum(f.num_prompt_tokens for f in figures)
    tokens_out = sum(f.num_output_tokens for f in figures)
    ttft_ms = statistics.median(f.ttft_s for f in figures) * 1000
    parts = [
        f"{len(figures)} requests in {elapsed_s:.1f} s",
        f"{tokens_in} tokens in, {tokens_out} out",
        f"{tokens_out / elapsed_s:.1f} output tokens/s",
        f"first token after {ttft_ms:.0f} ms (median)",
    ]
    allocated = sum(step.num_allocated_slots for step in steps)
    if allocated:
        waste = 1 - sum(step.num_written_slots for step in steps) / allocated
        most = max(step.num_running for step in steps)
        parts += [f"{len(steps)} steps, up to {most} rows", f"KV waste {waste:.1%}"]
    parts.append(f"compile {summary['compile s']:.1f} s")
    return " | ".join(parts)

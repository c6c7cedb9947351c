"""What the benchmarks share: flags, the engine, random prompts, the JSON file."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.parser import UsageError, whole_number

if TYPE_CHECKING:
    from jaxserve.llm import LLM


def add_common_arguments(
    parser: argparse.ArgumentParser, *, input_len: int, output_len: int
) -> None:
    """Adds the model, lengths, --json and the engine's flags."""
    add_model_argument(parser)
    for flag, default, text in (
        ("--input-len", input_len, "tokens of a prompt"),
        ("--output-len", output_len, "tokens of an answer"),
    ):
        parser.add_argument(flag, type=whole_number, default=default, metavar="N", help=text)
    parser.add_argument("--json", "--output-json", metavar="FILE", help="write the figures there")
    parser.add_argument("--quiet", action="store_true", help="print the figures only")
    add_engine_arguments(parser)


def open_llm(args: argparse.Namespace) -> "LLM":
    """The engine of a benchmark, after a check of its figures."""
    from jaxserve.commands.session import open_llm as open_engine

    for name in ("input_len", "output_len", "num_prompts", "batch_size", "num_iters"):
        value = getattr(args, name, 1)
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is too small; use 1 or more")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: its folder does not exist; make it first")
    wanted = args.input_len + args.output_len
    config = engine_config(args)
    if config.max_model_len is not None and wanted > config.max_model_len:
        raise UsageError(
            f"--input-len {args.input_len} and --output-len {args.output_len} make {wanted} tokens "
            f"a request, more than --max-model-len {config.max_model_len}; lower the first two or "
            "raise the last"
        )
    return open_engine(config, quiet=args.quiet)


def shows_progress(args: argparse.Namespace) -> bool:
    """Whether someone watches."""
    return sys.stderr.isatty() and not args.quiet


def random_prompts(
    args: argparse.Namespace, llm: "LLM", num: int, *, salt: int = 0
) -> list[dict[str, list[int]]]:
    """Prompts of random token ids; equal for equal seeds and salts, else with no common prefix."""
    import numpy as np

    rng = np.random.default_rng([getattr(args, "seed", 0) & (2**63 - 1), salt + 2**20])
    ids = rng.integers(0, llm.vocab_size, (num, args.input_len))
    return [{"prompt_token_ids": row.tolist()} for row in ids]


def write_json(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Writes the figures to the file of --json, if one is given."""
    if args.json is not None:
        text = json.dumps(result | {"input_len": args.input_len, "output_len": args.output_len})
        Path(args.json).write_text(text + "\n")

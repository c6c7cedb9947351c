"""Write a model as an Orbax checkpoint, with its configs and tokenizer.

The folder is served as it is, or from a bucket: `jaxserve serve gs://BUCKET/FOLDER`. A device reads
only its own slices of it. Without --dtype, weights keep their type; those of quantised GGUF files
become bfloat16.
"""

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

from jaxserve.commands.engine_args import add_engine_arguments, engine_config
from jaxserve.config import EngineConfig

USAGE = "MODEL FOLDER [flags]"
_FLAGS = {
    "dtype",
    "load_format",
    "revision",
    "download_dir",
    "tokenizer",
    "tokenizer_revision",
    "hf_overrides",
    "rope_scaling",
    "rope_theta",
    "show_progress",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="what `jaxserve serve` takes")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to make; must not exist")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    parser.set_defaults(model_flag=None)
    without = {field.name for field in fields(EngineConfig)} - _FLAGS
    add_engine_arguments(parser, without=without)


def run(args: argparse.Namespace) -> int:
    from jaxserve.convert import convert

    config = engine_config(args)
    show = config.show_progress and not args.quiet and sys.stderr.isatty()
    start = time.perf_counter()
    result = convert(config, args.folder, show_progress=show)
    if not args.quiet:
        seconds = time.perf_counter() - start
        print(
            f"{result.num_tensors} tensors, {result.nbytes / 1e9:.2f} GB in {result.num_parts} "
            f"Orbax checkpoints, {seconds:.1f} s: {args.folder}"
        )
    return 0

"""Serve a model over HTTP, with OpenAI's API.

Flags can also stand in a YAML file (--config) and in the environment (JAXSERVE_MAX_MODEL_LEN=4096);
the command line wins over the environment, and that over the file.
"""

import argparse
import os
import sys

from jaxserve.commands.compat_args import add_compat_arguments, check_compat_arguments
from jaxserve.commands.engine_args import add_engine_arguments, add_model_argument, engine_config
from jaxserve.commands.parser import Parser
from jaxserve.commands.server_args import add_server_arguments, server_config

USAGE = "[MODEL] [flags]"
MAX_QUEUED = 1024  # requests; a server without a bound answers late instead of not at all
_OF_SERVER = frozenset({"max_num_queued_reqs", "disable_log_stats"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--config", metavar="FILE", help="a YAML file with flags")
    parser.add_argument(
        "--print-config", action="store_true", help="show every setting and where it is from; end"
    )
    add_server_arguments(parser)
    add_engine_arguments(parser, of_server=_OF_SERVER, without={"served_model_name"})
    add_compat_arguments(parser)


def run_arguments(parser: Parser, arguments: list[str]) -> int:
    """Runs the command; it needs the parser itself, to read the other places by."""
    from jaxserve.commands.settings import merge

    args, origins = merge(parser, arguments, os.environ)
    check_compat_arguments(vars(args))
    if getattr(args, "print_config", False):
        return _print_config(args, origins)
    config = server_config(vars(args))
    engine = engine_config(args, max_num_queued_reqs=MAX_QUEUED)

    from jaxserve.commands.server_session import serve_model

    return serve_model(engine, config)


def _print_config(args: argparse.Namespace, origins: dict[str, str]) -> int:
    from dataclasses import asdict

    server = asdict(server_config(vars(args)))
    server.pop("api_keys")
    limits = server.pop("limits")
    engine = asdict(engine_config(args, max_num_queued_reqs=MAX_QUEUED))
    engine.pop("served_model_name")
    for name, value in (engine | server | limits).items():
        print(f"{name}: {value!r}  # {origins.get(name, 'default')}")
    sys.stdout.flush()
    return 0

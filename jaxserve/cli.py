"""The command line: `jaxserve serve`, `generate`, `chat`, `bench` and the others of COMMANDS.

Nothing heavy is imported here: the help of a command needs its flags only, and a command imports
JAX when it runs.
"""

import os
import sys
from types import ModuleType

COMMANDS = {
    "serve": "an OpenAI-compatible HTTP server",
    "generate": "complete one or several prompts",
    "chat": "talk with a model, or with a server, in the terminal",
    "complete": "complete prompts on a running server",
    "run-batch": "answer a file of requests, in OpenAI's batch format",
    "demo": "several prompts at once on the demo model",
    "bench serve": "how fast a running server answers, under a load",
    "bench throughput": "how many tokens a second, with many requests at once",
    "bench latency": "how long one batch takes",
    "convert": "write a model's weights as an Orbax checkpoint, for fast and sharded loading",
    "collect-env": "versions, devices and settings, for a bug report",
}
GREETING = "A vLLM-like LLM server in JAX: paged attention and continuous batching."
BROKEN_PIPE = 128 + 13  # what a shell shows for SIGPIPE
INTERRUPTED = 128 + 2


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    from jaxserve.errors import ConfigError, JaxserveError

    arguments = sys.argv[1:] if argv is None else argv
    _quiet_libraries()
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # `jaxserve ... | head`; later writes must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("\njaxserve: interrupted", file=sys.stderr)
        return INTERRUPTED
    except JaxserveError as error:
        if _log_level() == "DEBUG":
            import traceback

            traceback.print_exc()
        print(f"jaxserve: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return code


def _run(arguments: list[str]) -> int:
    from jaxserve.commands.parser import Parser, UsageError, nearest

    words = arguments[:1]
    if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        words = arguments[:2]
    name = " ".join(words)
    if name in COMMANDS:
        module = _command(name)
        prog = f"jaxserve {name}"
        parser = Parser(prog=prog, usage=f"{prog} {module.USAGE}", description=module.__doc__)
        module.add_arguments(parser)
        if name == "serve":  # reads the environment and a file by the same parser
            return module.run_arguments(parser, arguments[len(words) :])
        return module.run(parser.parse(arguments[len(words) :]))
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"jaxserve {_version()}")
        return 0
    if words[-1] in ("-h", "--help") or name == "bench":
        print(_overview(prefix=words[0]))
        return 0 if len(words) > 1 else 2
    hint = nearest(name, COMMANDS)
    raise UsageError(
        f"unknown command {name!r}{hint}; use one of {', '.join(COMMANDS)} (see jaxserve --help)"
    )


def _command(name: str) -> ModuleType:
    match name:
        case "serve":
            from jaxserve.commands import serve as module
        case "generate":
            from jaxserve.commands import generate as module
        case "chat":
            from jaxserve.commands import chat as module
        case "complete":
            from jaxserve.commands import complete as module
        case "run-batch":
            from jaxserve.commands import run_batch as module
        case "demo":
            from jaxserve.commands import demo as module
        case "bench serve":
            from jaxserve.commands import bench_serve as module
        case "bench throughput":
            from jaxserve.commands import bench_throughput as module
        case "bench latency":
            from jaxserve.commands import bench_latency as module
        case "convert":
            from jaxserve.commands import convert as module
        case _:
            from jaxserve.commands import collect_env as module
    return module


def _overview(prefix: str = "") -> str:
    """The list of commands."""
    lines = [f"  {name:18}{what}" for name, what in COMMANDS.items() if name.startswith(prefix)]
    return "\n".join(
        [
            f"usage: jaxserve {prefix or 'COMMAND'} ...",
            "",
            GREETING,
            "",
            "commands:",
            *lines,
            "",
            "`jaxserve COMMAND --help` lists the flags of a command.",
            "A model is 'demo', a Hugging Face folder, a .gguf file, or a hub name: org/name.",
        ]
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jaxserve-llm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def _log_level() -> str:
    return os.environ.get("JAXSERVE_LOG_LEVEL", "WARNING").upper()


def _quiet_libraries() -> None:
    """Before jax or transformers is imported: no chatter between the lines of a terminal."""
    import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="jaxserve: %(levelname)s: %(message)s", level="WARNING")
    levels = logging.getLevelNamesMapping()
    logging.getLogger("jaxserve").setLevel(levels.get(_log_level(), logging.WARNING))

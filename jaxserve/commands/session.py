"""Opens an engine for a command: progress and the start-up table go to stderr."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.commands.streams import Streamer
    from jaxserve.llm import LLM


def open_llm(config: EngineConfig, *, quiet: bool = False) -> "LLM":
    """The synchronous engine, ready to serve.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: See `Engine`.
    """
    from jaxserve.llm import LLM

    llm = LLM.from_engine_args(with_progress(config, quiet))
    show(llm, quiet)
    return llm


@contextmanager
def open_streamer(config: EngineConfig, *, quiet: bool = False) -> "Iterator[Streamer]":
    """The same for a command that streams; the engine stops at the end of the block."""
    from jaxserve.async_llm import AsyncLLM
    from jaxserve.commands.streams import Streamer

    llm = AsyncLLM.from_engine_args(with_progress(config, quiet))
    try:
        show(llm, quiet)
        yield Streamer(llm)
    finally:
        llm.shutdown()


def with_progress(config: EngineConfig, quiet: bool) -> EngineConfig:
    """The same with progress bars only where someone sees them."""
    return replace(config, show_progress=config.show_progress and not quiet and sys.stderr.isatty())


def show(llm: Any, quiet: bool) -> None:
    """The start-up table on stderr."""
    from rich.console import Console

    from jaxserve.commands.startup_table import print_startup_table

    if not quiet:
        console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
        print_startup_table(llm.summary(), console)

"""Settings of every test: the CPU, no network, one compile cache, reproducible examples."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

CACHE = Path(__file__).parent.parent / ".cache"

# Before the first import of jax or transformers. What is set already stays, so that a machine
# with an accelerator can run the same tests: JAX_PLATFORMS=cuda make unit
for name, value in {
    "HF_HUB_OFFLINE": "1",
    "JAXSERVE_CACHE_DIR": str(CACHE),
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PLATFORMS": "cpu",
    # Threads of XLA's CPU client: each warpgroup of an interpreted GPU kernel blocks one.
    "NPROC": str(max(8, os.cpu_count() or 1)),
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

# A shell starts what runs in the background deaf to Ctrl-C: the commands under test would be too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: runs with --slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)

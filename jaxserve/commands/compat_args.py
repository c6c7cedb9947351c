"""Flags of `vllm serve` that have no meaning here, so that its command lines work unchanged.

Those that would change what is served are accepted with the value that holds anyway, and else
refused: nothing is silently ignored that matters.
"""

import argparse
import json
from typing import Any

_SHORT = {
    "tensor_parallel_size": "-tp",
    "pipeline_parallel_size": "-pp",
    "data_parallel_size": "-dp",
    "enable_expert_parallel": "-ep",
    "quantization": "-q",
    "compilation_config": "-cc",
    "speculative_config": "-sc",
}
# Of the server; as those of the engine in `frontend/engine_args.py`.
_NO_EFFECT = """
    api_server_count disable_frontend_multiprocessing disable_uvicorn_access_log
    enable_log_deltas enable_request_id_headers enable_server_load_tracking
    enable_tokenizer_info_endpoint h11_max_header_count h11_max_incomplete_event_size
    log_config_file log_error_stack tool_strict_level uvicorn_log_level
"""
_SWITCHES = ("disable_", "enable_", "fail_on_", "log_error_", "trust_", "use_", "worker_use_")
_PREFIX = "compat_"


def add_compat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them, hidden from the help; a flag that the parser has already stays as it is."""
    from jaxserve.frontend.engine_args import NO_EFFECT, ONLY

    for name in sorted(NO_EFFECT | set(ONLY) | set(_NO_EFFECT.split())):
        flag = f"--{name.replace('_', '-')}"
        if flag in parser._option_string_actions:
            continue
        flags = [_SHORT[name], flag] if name in _SHORT else [flag]
        options: dict[str, Any] = {
            "dest": f"{_PREFIX}{name}",
            "default": argparse.SUPPRESS,
            "help": argparse.SUPPRESS,
        }
        if name.startswith(_SWITCHES):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _value
        parser.add_argument(*flags, **options)


def check_compat_arguments(values: dict[str, Any]) -> None:
    """Raises UnsupportedError for a value that asks for something that is not there."""
    from jaxserve.frontend.engine_args import ONLY, engine_config

    given = {name.removeprefix(_PREFIX): v for name, v in values.items() if name[:7] == _PREFIX}
    engine_config("demo", {name: value for name, value in given.items() if name in ONLY})


def _value(text: str) -> Any:
    """`1`, `0.5`, `{"a": 1}` and `null` as JSON; anything else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text

"""Flags of `vllm serve` that have no meaning here, so that its command lines work unchanged.

Those that would change what is served are accepted with the value that holds anyway, and else
refused: nothing is silently ignored that matters.
"""

import argparse
import json
from typing import Any

from jaxserve.commands.parser import UsageError

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
    disable_frontend_multiprocessing enable_log_deltas enable_offline_docs
    enable_request_id_headers log_error_stack structured_outputs_config.backend
"""
_ONLY: dict[str, tuple[Any, ...]] = {
    "api_server_count": (1,),
    "enable_per_request_metrics": (False,),
    "enable_server_load_tracking": (False,),
    "enable_tokenizer_info_endpoint": (False,),
    "fingerprint_mode": (None, "hash"),
    "log_config_file": (None,),
    "middleware": (None, []),
    "reasoning_config": (None, {}),
    "reasoning_effort_map": (None, {}),
    "reasoning_parser_plugin": (None, ""),
    "tool_parser_plugin": (None, ""),
    "tool_server": (None,),
    "trust_request_mm_kwargs": (False,),
}
_INSTEAD = {  # what does some of it
    "log_config_file": "; use --log-level and --log-format",
    "middleware": "; put a proxy in front",
    "reasoning_parser_plugin": "; --reasoning-parser names those there are",
    "tool_parser_plugin": "; --tool-call-parser names those there are",
}
_OTHER_NAMES = {  # vLLM's name: ours
    "disable_fastapi_docs": "disable_docs",
    "disable_uvicorn_access_log": "disable_access_log",
    "h11_max_header_count": "max_headers",
    "h11_max_incomplete_event_size": "max_header_bytes",
    "shutdown_timeout": "shutdown_timeout_s",
    "uvicorn_log_level": "log_level",
}
_SWITCHES = ("disable_", "enable_", "fail_on_", "trust_", "use_", "worker_use_")
_PREFIX = "compat_"


def add_compat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds them, hidden from the help; a flag that the parser has already stays as it is."""
    from jaxserve.frontend.engine_args import NO_EFFECT, ONLY

    options: dict[str, Any]
    for name, own in _OTHER_NAMES.items():
        action = parser._option_string_actions[f"--{own.replace('_', '-')}"]
        options = {"dest": own, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if isinstance(action, argparse.BooleanOptionalAction):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = action.type
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    others = {"structured_outputs_config", *_NO_EFFECT.split(), *_ONLY}
    for name in sorted(NO_EFFECT | ONLY.keys() | others):
        flag = f"--{name.replace('_', '-')}"
        if flag in parser._option_string_actions:
            continue
        flags = [_SHORT[name], flag] if name in _SHORT else [flag]
        options = {
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

    given = {
        name.removeprefix(_PREFIX): value
        for name, value in values.items()
        if name.startswith(_PREFIX)
    }
    for name, allowed in _ONLY.items():
        if name in given and given[name] not in allowed:
            raise UsageError(
                f"--{name.replace('_', '-')} {given[name]} is not supported; leave it out"
                f"{_INSTEAD.get(name, '')}"
            )
    checked = ONLY.keys() | {"structured_outputs_config"}
    engine_config("demo", {name: value for name, value in given.items() if name in checked})


def _value(text: str) -> Any:
    """`1`, `0.5`, `{"a": 1}` and `null` as JSON; anything else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text

"""Settings from four places: the command line, the environment, a YAML file, the defaults.

The first that has a value wins. Each place is read as flags, by the command's own parser, so that
all of them know the same names and the same rules.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.commands.parser import Parser, UsageError, nearest

PREFIX = "JAXSERVE_"
MAX_FILE_BYTES = 1 << 20
_NOT_FROM_ENV = {"config", "model", "help"}


def merge(
    parser: Parser, arguments: list[str], environ: Mapping[str, str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """All settings, and where each that was given comes from.

    Raises:
        UsageError: A name or a value is not allowed; the message names the place.
    """
    line = parser.parse(arguments)
    layers = []
    path = getattr(line, "config", None)
    if path is not None:
        layers.append((path, _parse(parser, _of_file(parser, path), path)))
    layers.append(("environment", _parse(parser, _of_environment(parser, environ), "environment")))
    layers.append(("command line", {k: v for k, v in vars(line).items() if v is not None}))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        if "model" in layer or "model_flag" in layer:
            values.pop("model", None)
            values.pop("model_flag", None)
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    return argparse.Namespace(**({"model": None, "model_flag": None} | values)), origins


def _parse(parser: Parser, arguments: list[str], origin: str) -> dict[str, Any]:
    try:
        found = vars(parser.parse(arguments))
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from None
    return {name: value for name, value in found.items() if value is not None}


def _actions(parser: Parser) -> dict[str, argparse.Action]:
    """Long flags without their dashes, with _ for -."""
    return {
        flag.removeprefix("--").replace("-", "_"): action
        for flag, action in parser._option_string_actions.items()
        if flag.startswith("--") and not flag.startswith("--no-")
    }


def _of_environment(parser: Parser, environ: Mapping[str, str]) -> list[str]:
    """JAXSERVE_MAX_MODEL_LEN=4096 as --max-model-len 4096; what is no flag is left alone."""
    arguments: list[str] = []
    for name, action in _actions(parser).items():
        text = environ.get(f"{PREFIX}{name.upper()}")
        if not text or name in _NOT_FROM_ENV:
            continue
        if name == "port" and text.startswith("tcp://"):
            continue  # Kubernetes sets this for a service of our name
        if isinstance(action, argparse.BooleanOptionalAction):
            arguments += _switch(name, _truth(f"{PREFIX}{name.upper()}", text))
        elif action.nargs == "+":
            arguments += [_flag(name), *text.replace(",", " ").split()]
        else:
            arguments += [f"{_flag(name)}={text}"]
    return arguments


def _of_file(parser: Parser, path: str) -> list[str]:
    values = _read_yaml(path)
    known = _actions(parser)
    arguments: list[str] = []
    model = None
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in ("model", "model_tag"):
            model = value
            continue
        if name not in known or name in ("config", "help"):
            raise UsageError(
                f"{path}: unknown key {str(key)!r}{nearest(name, known)}; keys are the flags of "
                f"{parser.prog} without their dashes"
            )
        if value is None:
            continue
        if isinstance(known[name], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise UsageError(f"{path}: {key}={value!r} is neither true nor false")
            arguments += _switch(name, value)
        elif known[name].nargs == "+":
            items = value if isinstance(value, list) else [value]
            arguments += [_flag(name), *map(str, items)]
        else:
            text = json.dumps(value) if isinstance(value, dict | list) else str(value)
            arguments += [f"{_flag(name)}={text}"]
    return arguments if model is None else [*arguments, f"--model={model}"]


def _read_yaml(path: str) -> dict[Any, Any]:
    import yaml

    place = Path(path).expanduser()
    try:
        if place.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
        values = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config {path!r} cannot be read ({error})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"--config {path!r} does not hold keys and values, one flag a line")
    return values


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _switch(name: str, on: bool) -> list[str]:
    return [_flag(name) if on else f"--no-{name.replace('_', '-')}"]


def _truth(name: str, text: str) -> bool:
    match text.strip().lower():
        case "1" | "true" | "yes" | "on":
            return True
        case "0" | "false" | "no" | "off":
            return False
    raise UsageError(f"{name}={text!r} is neither true nor false; use 1 or 0")

"""Which family serves which architecture."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.models import llama
from jaxserve.models.spec import DecoderSpec

FAMILIES: dict[str, ModuleType] = dict.fromkeys(llama.ARCHITECTURES, llama)


def architecture(config: Mapping[str, Any]) -> str:
    """The architecture that a config.json names.

    Raises:
        CheckpointError: It names none.
        UnsupportedError: It names one that no family serves.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError("config.json names no architecture; 'architectures' is needed")
    if names[0] not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(f"architecture {names[0]!r} is not supported; these are: {known}")
    return names[0]


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder that a config.json describes."""
    return FAMILIES[architecture(config)].spec_from_config(config)

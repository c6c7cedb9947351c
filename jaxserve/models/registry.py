"""Which family serves which architecture."""

import pkgutil
from importlib import import_module
from types import ModuleType

from jaxserve.errors import CheckpointError, JaxserveError, UnsupportedError
from jaxserve.models import families
from jaxserve.models.config_fields import Config
from jaxserve.models.names import WeightNames
from jaxserve.models.spec import DecoderSpec

MAX_MESSAGE_CHARS = 1000  # of a config's field

FAMILIES: dict[str, ModuleType] = {
    architecture: module
    for found in pkgutil.iter_modules(families.__path__)
    for module in (import_module(f"{families.__name__}.{found.name}"),)
    for architecture in module.ARCHITECTURES
}


def architecture(config: Config) -> str:
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
        raise UnsupportedError(
            f"architecture {names[0][:100]!r} is not supported; these are: {known}"
        )
    return names[0]


def spec_from_config(config: Config) -> DecoderSpec:
    """The decoder that a config.json describes.

    Raises:
        CheckpointError: A field is missing, or of the wrong kind.
        UnsupportedError: It asks for something that is not implemented.
    """
    family = FAMILIES[architecture(config)]
    try:
        return family.spec_from_config(config)
    except JaxserveError as error:
        text = str(error)
        if len(text) <= MAX_MESSAGE_CHARS:
            raise
        raise type(error)(f"{text[:MAX_MESSAGE_CHARS]} ...") from None  # a field may be megabytes
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # A family reads plain fields; what a hostile file puts there need not be what it expects.
        raise CheckpointError(
            f"config.json has a value of the wrong kind ({type(error).__name__}: "
            f"{str(error)[:200]}); check the file"
        ) from error


def weight_names(config: Config, spec: DecoderSpec) -> WeightNames:
    """Where checkpoints of the config's architecture keep the weights of `spec`."""
    return FAMILIES[architecture(config)].weight_names(spec)

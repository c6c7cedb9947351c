"""Sampling defaults from a model's generation_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError, ConfigError, RequestError
from jaxserve.sampling_params import SamplingParams

MAX_JSON_BYTES = 1 << 20
# Key of generation_config.json -> field of SamplingParams
_FIELDS = {
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
    "skip_special_tokens": "skip_special_tokens",
}


def read_generation_config(choice: str, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The generation config that holds: "auto" the model's own, "vllm" none, else a folder's.

    Raises:
        ConfigError: The folder has none.
    """
    if choice == "auto":
        return own
    if choice == "vllm":
        return {}
    path = Path(choice).expanduser()
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it does not hold an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"generation_config={choice!r} cannot be read ({error}); use 'auto', 'vllm', or a "
            "folder with generation_config.json"
        ) from None
    return found


def default_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a generation config sets, by the names of `SamplingParams`.

    Raises:
        CheckpointError: A value is not allowed.
    """
    found = {
        field: generation_config[key]
        for key, field in _FIELDS.items()
        if generation_config.get(key) is not None
    }
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise CheckpointError(
            f"the model's generation_config.json: {error}. Correct it, or pass "
            "generation_config='vllm' (--generation-config vllm) to ignore it"
        ) from None
    return found

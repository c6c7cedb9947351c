"""What a model brings for sampling: defaults of generation_config.json, and tokens that end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError, ConfigError, RequestError
from jaxserve.frontend.tokenizer import Tokenizer
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """The tokens that end an output: EOS, and further ones of the generation config."""

    eos_token_id: int | None
    extra: tuple[int, ...]


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


def default_sampling(
    generation_config: Mapping[str, Any], override: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values that a generation config sets, by the names of `SamplingParams`.

    Args:
        override: The operator's, laid over it.

    Raises:
        ConfigError: A key or a value of `override` is not allowed.
        CheckpointError: A value is not allowed.
    """
    override = override or {}
    unknown = sorted(override.keys() - _FIELDS.keys())
    if unknown:
        raise ConfigError(
            f"override_generation_config sets {unknown[0]!r:.80}; use {', '.join(_FIELDS)}"
        )
    try:
        SamplingParams(**_sampling_fields(override))
    except RequestError as error:
        raise ConfigError(f"override_generation_config: {error}") from None
    found = _sampling_fields({**generation_config, **override})
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise CheckpointError(
            f"the model's generation_config.json: {error}. Correct it, or pass "
            "generation_config='vllm' (--generation-config vllm) to ignore it"
        ) from None
    return found


def _sampling_fields(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field: generation_config[key]
        for key, field in _FIELDS.items()
        if generation_config.get(key) is not None
    }


def end_tokens(
    generation_config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> EndTokens:
    """EOS is the tokenizer's; the generation config's others end an output like stop tokens."""
    extra = [*_ids(generation_config.get("eos_token_id"))]
    if tokenizer is not None:
        extra += tokenizer.stop_token_ids
    eos = None if tokenizer is None else tokenizer.eos_token_id
    if eos is None:
        eos = next(iter([*extra, *_ids(model_config.get("eos_token_id"))]), None)
    extra = [i for i in dict.fromkeys(extra) if i != eos and 0 <= i < vocab_size]
    return EndTokens(
        eos_token_id=eos if eos is not None and 0 <= eos < vocab_size else None,
        extra=tuple(extra),
    )


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool)]

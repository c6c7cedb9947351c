"""A user's changes to a model's config.json: `hf_overrides`, `rope_scaling` and `rope_theta`."""

from collections.abc import Mapping
from typing import Any

# By these a model's context grows. Models with `llama3` or `longrope` count it already.
_EXTENDING = ("linear", "dynamic", "yarn")
MAX_FACTOR = 1e6


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `overrides` laid over it; a sub-config such as text_config is merged."""
    result = dict(config)
    for key, value in overrides.items():
        old = result.get(key)
        if key.endswith("_config") and isinstance(old, dict) and isinstance(value, Mapping):
            value = overridden(old, value)
        result[key] = value
    return result


def with_rope(
    config: Mapping[str, Any],
    *,
    scaling: Mapping[str, Any] | None = None,
    theta: float | None = None,
) -> dict[str, Any]:
    """`config` with another rotary embedding, whichever way it writes the old one.

    Where layers of several kinds have rotary embeddings of their own, the one of full attention
    changes. A scaling that stretches positions also stretches `max_position_embeddings`, by its
    factor, as in vLLM.
    """
    result = dict(config)
    text = result.get("text_config")
    if isinstance(text, dict) and "max_position_embeddings" not in result:
        return result | {"text_config": with_rope(text, scaling=scaling, theta=theta)}
    parameters = result.get("rope_parameters")
    parameters = dict(parameters) if isinstance(parameters, Mapping) else {}
    by_kind = isinstance(parameters.get("full_attention"), Mapping)
    own = dict(parameters["full_attention"] if by_kind else parameters)
    if scaling is not None:
        scaling = dict(scaling)
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        old = result.get("rope_scaling")
        result |= _stretched(result, own or (old if isinstance(old, Mapping) else {}), scaling)
        kept = ("rope_theta", "partial_rotary_factor")
        own = {name: own[name] for name in kept if name in own} | scaling
        result["rope_scaling"] = scaling
    if theta is not None:
        result["rope_theta"] = own["rope_theta"] = theta
    if by_kind:
        result["rope_parameters"] = {**parameters, "full_attention": own}
    elif parameters:
        result["rope_parameters"] = own
    return result


def _stretched(
    config: Mapping[str, Any], old: Mapping[str, Any], scaling: dict[str, Any]
) -> dict[str, Any]:
    """The longer `max_position_embeddings`; `scaling` is told the one before, if it lacks it."""
    context, factor = config.get("max_position_embeddings"), scaling.get("factor")
    original = scaling.get("original_max_position_embeddings") or old.get(
        "original_max_position_embeddings", context
    )
    if scaling["rope_type"] not in _EXTENDING or not isinstance(original, int):
        return {}
    if not isinstance(factor, int | float) or not 1 <= factor <= MAX_FACTOR:
        return {}
    scaling.setdefault("original_max_position_embeddings", original)
    return {"max_position_embeddings": int(original * factor)}

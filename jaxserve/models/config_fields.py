"""Reading config.json: fields that many families share, checked."""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.layers.ffn import ACTIVATIONS
from jaxserve.layers.rope import KINDS, RopeSpec

type Config = Mapping[str, Any]

MAX_LAYERS = 1024
MAX_SIZE = 1 << 24  # of any width, count of heads, or vocabulary


def positive(config: Config, name: str, default: int | None = None) -> int:
    """The whole number `name` of a config, at least 1."""
    value = config.get(name)
    if value is None:
        value = default
    limit = MAX_LAYERS if name in ("num_hidden_layers", "n_layer", "n_layers") else MAX_SIZE
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise CheckpointError(
            f"config.json has {name}={value!r}; a whole number from 1 to {limit} is needed"
        )
    return value


def number(config: Config, name: str, default: float | None = None) -> float:
    """The number `name` of a config."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise CheckpointError(f"config.json has {name}={value!r}; a number is needed")
    return float(value)


def flag(config: Config, name: str, default: bool = False) -> bool:
    """The yes or no `name` of a config."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {name}={value!r}; true or false is needed")
    return value


def activation(config: Config, *names: str, default: str | None = None) -> str:
    """The activation under the first of `names` that is there."""
    value = next((config[n] for n in names if config.get(n) is not None), default)
    if value not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedError(f"{names[0]}={value!r} is not supported; these are: {known}")
    return value


def heads(config: Config) -> tuple[int, int, int]:
    """Query heads, kv heads and columns of a head, under Llama's names."""
    num_heads = positive(config, "num_attention_heads")
    num_kv_heads = positive(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}; check config.json"
        )
    head_dim = positive(config, "head_dim", positive(config, "hidden_size") // num_heads)
    return num_heads, num_kv_heads, head_dim


def layer_kinds(config: Config, default: list[str]) -> list[str]:
    """The kind of attention of each layer: "full_attention", "sliding_attention", ..."""
    kinds = config.get("layer_types")
    if kinds is None:
        return default
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise CheckpointError(
            f"config.json has layer_types={str(kinds)[:200]}; a list of {len(default)} is needed, "
            "one for each layer"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
            raise UnsupportedError(f"layer_types has {str(kind)[:80]!r}, which is not supported")
    return kinds


def refuse(config: Config, **expected: object) -> None:
    """Raises UnsupportedError for a field that asks for something else than what is computed."""
    for name, value in expected.items():
        given = config.get(name)
        if given is not None and given != value:
            raise UnsupportedError(f"config.json has {name}={given!r}; only {value!r} is supported")


def rope_parameters(config: Config, kind: str | None = None) -> Mapping[str, Any]:
    """The rotary parameters of layers of a kind, from any form that config.json knows.

    Those are `rope_parameters`, flat or by kind of layer, and the older `rope_theta`,
    `rope_scaling` and `partial_rotary_factor`.
    """
    given = dict(config.get("rope_scaling") or {})
    newer = config.get("rope_parameters") or {}
    if not isinstance(newer, Mapping):
        raise CheckpointError(f"config.json has rope_parameters={newer!r}; an object is needed")
    by_kind = newer.get(kind) if kind is not None else None
    given.update(by_kind if isinstance(by_kind, Mapping) else newer)
    for name in ("rope_theta", "partial_rotary_factor"):
        if given.get(name) is None and config.get(name) is not None:
            given[name] = config[name]
    return given


def rope_from_config(
    config: Config,
    *,
    head_dim: int,
    context: int,
    kind: str | None = None,
    theta: float = 10000.0,
    partial: float = 1.0,
    interleaved: bool = False,
) -> RopeSpec:
    """The rotary embedding of a layer of `kind`, of heads of `head_dim` columns.

    `context` is max_position_embeddings; `theta` and `partial` (the share of the columns that is
    rotated) are what the family takes where config.json is silent.
    """
    given = rope_parameters(config, kind)
    scaling = given.get("rope_type", given.get("type", "default")) or "default"
    if scaling == "su":
        scaling = "longrope"
    if scaling not in KINDS:
        raise UnsupportedError(f"rope scaling {scaling!r} is not supported; {', '.join(KINDS)} are")
    share = given.get("partial_rotary_factor", partial)

    def real(name: str, default: float | None) -> float | None:
        value = given.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise CheckpointError(f"config.json has {name}={value!r}; a number is needed")
        return float(value)

    def factors(name: str) -> tuple[float, ...]:
        return tuple(float(f) for f in given.get(name) or ())

    original = given.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    factor = real("factor", None)
    if scaling == "longrope" and factor is None and original:
        factor = context / original
    return RopeSpec(
        head_dim=int(head_dim * share) // 2 * 2,
        theta=real("rope_theta", theta) or theta,
        interleaved=interleaved,
        kind=scaling,
        factor=factor or 1.0,
        low_freq_factor=real("low_freq_factor", 1.0) or 1.0,
        high_freq_factor=real("high_freq_factor", 4.0) or 4.0,
        original_max_position_embeddings=int(original or context),
        beta_fast=real("beta_fast", 32.0) or 32.0,
        beta_slow=real("beta_slow", 1.0) or 1.0,
        attention_factor=real("attention_factor", None),
        mscale=real("mscale", None),
        mscale_all_dim=real("mscale_all_dim", None),
        truncate=bool(given.get("truncate", True)),
        short_factor=factors("short_factor"),
        long_factor=factors("long_factor"),
    )

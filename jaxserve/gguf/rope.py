"""Rope scaling of a GGUF file as config.json has it.

Linear and yarn are keys. Llama 3's scaling is a tensor of factors whose parameters are recovered
here; Phi-3's ("longrope") are two tensors, one for short and one for long contexts.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import UnsupportedError
from jaxserve.gguf.keys import GGUFKeys, rounded

LLAMA3_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS)  # no Hugging Face tensors

_YARN = {  # config.json's name -> GGUF key
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def rope_scaling(
    keys: GGUFKeys, factors: Mapping[str, np.ndarray], *, theta: float, rotated: int
) -> dict[str, Any] | None:
    """config["rope_scaling"].

    Args:
        keys: Of the file.
        factors: Contents of those of `ROPE_FACTORS` that are there.
        theta: The rotation's base.
        rotated: Columns of a head that are rotated.

    Raises:
        UnsupportedError: A scaling that is not known.
    """
    original = "rope.scaling.original_context_length"
    if LONG_FACTORS in factors and SHORT_FACTORS in factors:
        return {
            "rope_type": "longrope",
            "short_factor": [rounded(f) for f in factors[SHORT_FACTORS].tolist()],
            "long_factor": [rounded(f) for f in factors[LONG_FACTORS].tolist()],
            "original_max_position_embeddings": keys.integer(original),
        }
    if LLAMA3_FACTORS in factors:
        return _llama3(keys, factors[LLAMA3_FACTORS], theta, rotated)
    if "rope.scale_linear" in keys:  # files of 2023
        factor = keys.number("rope.scale_linear")
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    kind = keys.get("rope.scaling.type")
    if kind is None or kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": keys.number("rope.scaling.factor"),
            "original_max_position_embeddings": keys.integer(original),
            **{name: keys.number(key) for name, key in _YARN.items() if key in keys},
        }
    raise UnsupportedError(
        f"{keys.header.path} has rope scaling {str(kind)[:40]!r}; supported: none, linear, yarn, "
        "longrope with its factors. Use the model's Hugging Face folder"
    )


def _llama3(
    keys: GGUFKeys, factors: np.ndarray, theta: float, rotated: int
) -> dict[str, Any] | None:
    """Recover Llama 3's scaling parameters from the factors, and check that they give them."""
    largest = float(factors.max())
    if (factors == 1).all():
        return None
    if factors.shape == (rotated // 2,) and math.isfinite(largest) and largest > 1:
        low, high, original = 1.0, 4.0, 8192  # of every Llama 3 release
        wavelength = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        if np.allclose(1 / factors, (1 - smooth) / largest + smooth, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": round(largest, 4),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(
        f"{keys.header.path}: {LLAMA3_FACTORS} holds rope factors that are not Llama 3's; "
        "use the model's Hugging Face folder"
    )

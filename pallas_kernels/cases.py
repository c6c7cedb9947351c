"""Shapes of real models' attention layers by name, shared by tests, benchmarks and tile tuning."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.types import AttentionSpec, KVSpec


class _Case(NamedTuple):
    num_heads: int  # on one device
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None  # None: head_dim ** -0.5
    value_dim: int | None = None  # of a latent cache


_CASES = {
    "tiny": _Case(4, 2, 8),
    "tiny-mha": _Case(3, 3, 16),
    "tiny-mqa": _Case(5, 1, 24),
    "tiny-sinks": _Case(4, 2, 16, window=20, sinks=True),
    "tiny-latent": _Case(4, 1, 24, value_dim=16),
    "smollm2-135m": _Case(9, 3, 64),
    "qwen3-0.6b": _Case(16, 8, 128),
    "qwen3-30b-a3b": _Case(32, 4, 128),
    "llama-3.2-1b": _Case(32, 8, 64),
    "llama-3.2-1b/tp8": _Case(4, 1, 64),
    "llama-3.1-8b": _Case(32, 8, 128),
    "llama-3.1-8b/tp8": _Case(4, 1, 128),
    "llama-3.1-70b": _Case(64, 8, 128),
    "llama-3.1-70b/tp8": _Case(8, 1, 128),
    "phi-3-mini": _Case(32, 32, 96),
    "stablelm-3b": _Case(32, 32, 80),
    "gemma-2b": _Case(8, 1, 256),
    "gemma-2-9b": _Case(16, 8, 256, window=4096, soft_cap=50.0, scale=256**-0.5),
    "gemma-3-270m": _Case(4, 1, 256, window=512, scale=256**-0.5),
    "gemma-3-4b": _Case(8, 4, 256, window=1024, scale=256**-0.5),
    "gpt-oss-20b": _Case(64, 8, 64, sinks=True),
    "gpt-oss-20b/window": _Case(64, 8, 64, window=128, sinks=True),
    "deepseek-v3": _Case(128, 1, 576, scale=192**-0.5, value_dim=512),
    "deepseek-v3/tp8": _Case(16, 1, 576, scale=192**-0.5, value_dim=512),
}
CASES = tuple(_CASES)


def attention_case(
    name: str,
    *,
    page_size: int = 16,
    dtype: jax.typing.DTypeLike = jnp.float32,
    window: int | None = None,
    soft_cap: float | None = None,
) -> AttentionSpec:
    """The attention layer of the named model; raises KeyError for a name not in CASES.

    `dtype` is the cache's. A window or soft cap given here replaces the model's own.
    """
    case = _CASES[name]
    kv = KVSpec(
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=page_size,
        dtype=dtype,
        kind="heads" if case.value_dim is None else "latent",
        value_dim=case.value_dim,
    )
    return AttentionSpec(
        kv=kv,
        num_heads=case.num_heads,
        scale=case.scale or case.head_dim**-0.5,
        window=window or case.window,
        soft_cap=soft_cap or case.soft_cap,
        sinks=case.sinks,
    )

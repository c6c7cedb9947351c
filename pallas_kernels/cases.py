"""Shapes of real models' attention layers by name, shared by tests, benchmarks and tile tuning."""

import jax
import jax.numpy as jnp

from pallas_kernels.types import AttentionSpec, KVSpec

# name: (query heads, kv heads, head_dim), on one device
_HEADS = {
    "tiny": (4, 2, 8),
    "tiny-mha": (3, 3, 16),
    "tiny-mqa": (5, 1, 24),
    "smollm2-135m": (9, 3, 64),
    "qwen3-0.6b": (16, 8, 128),
    "llama-3.2-1b": (32, 8, 64),
    "llama-3.2-1b/tp8": (4, 1, 64),
    "llama-3.1-8b": (32, 8, 128),
    "llama-3.1-8b/tp8": (4, 1, 128),
    "llama-3.1-70b": (64, 8, 128),
    "llama-3.1-70b/tp8": (8, 1, 128),
    "gemma-2b": (8, 1, 256),
}
CASES = tuple(_HEADS)


def attention_case(
    name: str,
    *,
    page_size: int = 16,
    dtype: jax.typing.DTypeLike = jnp.float32,
    window: int | None = None,
    soft_cap: float | None = None,
) -> AttentionSpec:
    """The attention layer of the named model; raises KeyError for a name not in CASES."""
    num_heads, num_kv_heads, head_dim = _HEADS[name]
    kv = KVSpec(num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    scale = head_dim**-0.5
    return AttentionSpec(kv=kv, num_heads=num_heads, scale=scale, window=window, soft_cap=soft_cap)

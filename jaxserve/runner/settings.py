"""The engine's arguments with every default filled in, from the model and the device."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.spec import DecoderSpec
from jaxserve.runner.device import DeviceInfo

DTYPES = {
    "half": jnp.float16,
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "float": jnp.float32,
    "float32": jnp.float32,
}
KV_DTYPES = {
    **DTYPES,
    "fp8": jnp.float8_e4m3fn,
    "fp8_e4m3": jnp.float8_e4m3fn,
    "fp8_e5m2": jnp.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Resolved sizes. All in tokens, rows or bytes."""

    dtype: np.dtype
    kv_dtype: np.dtype
    page_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    scan_layers: bool


def resolve(
    config: EngineConfig, spec: DecoderSpec, device: DeviceInfo, *, model_dtype: str | None
) -> Settings:
    """Fills in what the config leaves open.

    Args:
        model_dtype: What config.json says the weights are; used by dtype "auto" off the CPU.
    """
    if config.max_model_len is not None and config.max_model_len > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is more than the model's "
            f"max_position_embeddings={spec.max_position_embeddings}. Use at most that, "
            "or stretch the context by rope_scaling (--rope-scaling)"
        )
    max_model_len = config.max_model_len or spec.max_position_embeddings
    max_num_seqs = config.max_num_seqs or device.max_num_seqs
    tokens = config.max_num_batched_tokens or device.max_num_batched_tokens
    if config.max_num_batched_tokens is None:
        tokens = max(tokens, max_num_seqs)
        if not config.enable_chunked_prefill:
            tokens = max(tokens, max_model_len)
    if tokens < max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is less than max_num_seqs={max_num_seqs}: "
            "a step could not advance every row. Raise the first or lower the second"
        )
    if not config.enable_chunked_prefill and tokens < max_model_len:
        raise ConfigError(
            f"enable_chunked_prefill=False needs max_num_batched_tokens of at least "
            f"max_model_len={max_model_len}, not {tokens}"
        )
    top = spec.vocab_size if config.max_logprobs == -1 else config.max_logprobs
    loop = config.layer_loop
    dtype = _dtype(config.dtype, device, model_dtype)
    kv_dtype = config.kv_cache_dtype
    return Settings(
        dtype=dtype,
        kv_dtype=dtype if kv_dtype == "auto" else jnp.dtype(KV_DTYPES[kv_dtype]),
        page_size=config.block_size or device.page_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        max_logprobs=min(top, spec.vocab_size),
        scan_layers=device.scan_layers if loop == "auto" else loop == "scan",
    )


def _dtype(name: str, device: DeviceInfo, model_dtype: str | None) -> np.dtype:
    if name != "auto":
        return jnp.dtype(DTYPES[name])
    if device.platform == "cpu":  # XLA:CPU multiplies float32 several times faster than bfloat16
        return jnp.dtype(jnp.float32)
    # As vLLM: float32 checkpoints are served in 16 bits; float16 stays what it is.
    return jnp.dtype(jnp.float16 if model_dtype == "float16" else jnp.bfloat16)

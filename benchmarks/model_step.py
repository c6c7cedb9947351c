"""A whole step of a model, abstractly: what is compiled for a token bucket, without weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.layers.kernels import Backend, Kernels, kv_pages_shape
from jaxserve.models.registry import spec_from_config
from jaxserve.runner.batch import Layout
from jaxserve.runner.model import split_model
from jaxserve.runner.row_state import RowShapes
from jaxserve.runner.step import DeviceState, make_step

_LLAMA: dict[str, Any] = {"vocab_size": 128256, "max_position_embeddings": 8192, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def model_step(
    model: str,
    num_tokens: int,
    *,
    backend: Backend,
    dtype: jax.typing.DTypeLike,
    scan: bool,
    page_size: int = 16,
    num_pages: int = 2048,
    num_layers: int | None = None,  # fewer than the model has, for a chip that is small
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Callable, tuple[Any, Any, Any, Any], RowShapes]:
    """The step of one token bucket, its abstract arguments, and the sizes of its rows.

    The arguments are the weights, the state, which is to be donated, the upload, and the masks of
    grammars.
    """
    spec = spec_from_config({"architectures": ["LlamaForCausalLM"], **MODELS[model]})
    spec = replace(spec, layers=spec.layers[:num_layers])
    shapes = RowShapes(
        max_num_seqs=64,
        max_model_len=1024,
        page_size=page_size,
        vocab_size=spec.vocab_size,
        num_groups=len(spec.kv_groups),
    )
    split = split_model(
        spec,
        page_size=page_size,
        kernels=Kernels(backend),
        dtype=dtype,
        kv_dtype=kv_dtype,
        scan_layers=scan,
    )
    layout = Layout(num_tokens, shapes)
    caches: Any = tuple(
        kv_pages_shape(
            group.attention.attention(page_size=page_size, dtype=kv_dtype or dtype).kv,
            group.num_layers,
            num_pages,
            backend=backend,
        )
        for group in spec.kv_groups
    )
    state = DeviceState(caches, shapes.abstract())
    blob = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    masks = jax.ShapeDtypeStruct((layout.num_rows, shapes.mask_words), jnp.uint32)
    step = make_step(layout, split, num_pages=(num_pages,) * len(caches), max_logprobs=20)
    return step, (list(split.shapes), state, blob, masks), shapes

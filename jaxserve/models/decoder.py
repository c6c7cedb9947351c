"""The one decoder: pre-norm transformer blocks over paged KV."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.layers.attention import Attention
from jaxserve.layers.ffn import SwiGLU
from jaxserve.layers.kernels import AttentionSpec, Kernels, PageMetadata
from jaxserve.layers.linear import Embedding, Linear
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.rope import angles
from jaxserve.models.spec import DecoderSpec, ModelBatch


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        attention: AttentionSpec,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
    ) -> None:
        self.input_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps, dtype=dtype)
        self.attention = Attention(
            spec.hidden_size,
            spec=attention,
            kernels=kernels,
            use_bias=spec.attention_bias,
            use_output_bias=spec.attention_output_bias,
            dtype=dtype,
        )
        self.ffn_norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps, dtype=dtype)
        self.ffn = SwiGLU(
            spec.hidden_size, spec.intermediate_size, use_bias=spec.mlp_bias, dtype=dtype
        )

    def __call__(
        self,
        x: Array,
        kv_pages: Array,
        pages: PageMetadata,
        cos_sin: tuple[Array, Array],
        layer: int | Array,
    ) -> tuple[Array, Array]:
        attended, kv_pages = self.attention(self.input_norm(x), kv_pages, pages, cos_sin, layer)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), kv_pages


class Decoder(nnx.Module):
    """A causal language model.

    With `scan_layers` the layers' weights are stacked [L, ...] and one compiled body runs L times;
    without, each layer has arrays of its own and is compiled in line. The numbers are the same.
    The cache is a carry, never an input and output of the scan: that would copy all of it.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        attention: AttentionSpec,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
        scan_layers: bool,
    ) -> None:
        def make_layer() -> DecoderLayer:
            return DecoderLayer(spec, attention=attention, kernels=kernels, dtype=dtype)

        self.spec = spec
        self.scan_layers = scan_layers
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        if scan_layers:
            self.layers = nnx.vmap(make_layer, axis_size=spec.num_layers)()
        else:
            self.layers = nnx.List([make_layer() for _ in range(spec.num_layers)])
        self.norm = RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if spec.tie_word_embeddings
            else Linear(spec.hidden_size, spec.vocab_size, dtype=dtype)
        )

    def __call__(
        self, batch: ModelBatch, kv_pages: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """Hidden states [T, D] after the last norm, and the cache with this step's tokens in it."""
        x = self.embedding(batch.token_ids)  # [T, D]
        cos_sin = angles(self.spec.rope, batch.positions)
        (pages,), (kv,) = batch.pages, kv_pages
        numbers = jnp.arange(self.spec.num_layers, dtype=jnp.int32)
        if isinstance(self.layers, DecoderLayer):  # stacked
            graph, states = nnx.split(self.layers)

            def body(carry: tuple[Array, Array], scanned: Any) -> tuple[tuple[Array, Array], None]:
                state, number = scanned
                return _run_layer(graph, state, carry, pages, cos_sin, number), None

            (x, kv), _ = jax.lax.scan(body, (x, kv), (states, numbers))
        else:
            for number, layer in zip(numbers, self.layers, strict=True):
                graph, state = nnx.split(layer)
                x, kv = _run_layer(graph, state, (x, kv), pages, cos_sin, number)
        return self.norm(x), (kv,)

    def logits(self, hidden: Array) -> Array:
        """Hidden states [R, D] to logits [R, V], float32."""
        if self.head is None:
            return self.embedding.attend(hidden)
        return jnp.matmul(hidden, self.head.weight[...], preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef,
    state: nnx.State,
    carry: tuple[Array, Array],
    pages: PageMetadata,
    cos_sin: tuple[Array, Array],
    number: Array,
) -> tuple[Array, Array]:
    """One layer. A function of its own, so that all layers are traced and lowered once."""
    x, kv_pages = carry
    return nnx.merge(graph, state)(x, kv_pages, pages, cos_sin, number)

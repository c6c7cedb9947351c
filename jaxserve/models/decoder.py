"""The one decoder: transformer blocks over paged KV, as their spec says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxserve.layers.attention import HeadAttention
from jaxserve.layers.ffn import FFN
from jaxserve.layers.kernels import Kernels, PageMetadata
from jaxserve.layers.latent_attention import LatentAttention, LatentAttentionSpec
from jaxserve.layers.linear import Embedding, Linear
from jaxserve.layers.moe import MoE, MoESpec
from jaxserve.layers.norm import Norm
from jaxserve.layers.rope import angles
from jaxserve.models.spec import DecoderSpec, LayerSpec, ModelBatch, Section

type CosSin = tuple[Array, Array]  # [T, H / 2] float32 each
type Caches = tuple[Array, ...]  # one a KV group


class DecoderLayer(nnx.Module):
    """Attention and feed-forward with their norms; see `BlockSpec`."""

    def __init__(
        self,
        layer: LayerSpec,
        spec: DecoderSpec,
        *,
        page_size: int,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
        kv_dtype: jax.typing.DTypeLike,
    ) -> None:
        def norm(wanted: bool) -> Norm | None:
            return Norm(spec.hidden_size, spec=spec.norm, dtype=dtype) if wanted else None

        self.block = spec.block
        self.input_norm = norm(spec.block.attention_in)
        attention = layer.attention.attention(page_size=page_size, dtype=kv_dtype)
        size = spec.hidden_size
        if isinstance(layer.attention, LatentAttentionSpec):
            self.attention = LatentAttention(
                size, spec=layer.attention, attention=attention, kernels=kernels, dtype=dtype
            )
        else:
            self.attention = HeadAttention(
                size, spec=layer.attention, attention=attention, kernels=kernels, dtype=dtype
            )
        self.attention_out_norm = norm(spec.block.attention_out)
        self.ffn_norm = norm(spec.block.ffn_in)
        if isinstance(layer.ffn, MoESpec):
            self.ffn = MoE(size, spec=layer.ffn, kernels=kernels, dtype=dtype)
        else:
            self.ffn = FFN(size, spec=layer.ffn, dtype=dtype)
        self.ffn_out_norm = norm(spec.block.ffn_out)

    def __call__(
        self,
        x: Array,  # [T, D]
        kv_pages: Array,
        pages: PageMetadata,
        cos_sin: CosSin | None,
        positions: Array,  # [T]
        layer: int | Array,  # within its KV group
    ) -> tuple[Array, Array]:
        normed = _apply(self.input_norm, x)
        attended, kv_pages = self.attention(normed, kv_pages, pages, cos_sin, positions, layer)
        attended = self._scaled(_apply(self.attention_out_norm, attended))
        if self.block.parallel:
            ffn_in = normed if self.ffn_norm is None else self.ffn_norm(x)
            return x + attended + self._scaled(
                _apply(self.ffn_out_norm, self.ffn(ffn_in))
            ), kv_pages
        x = x + attended
        ffn_out = self.ffn(_apply(self.ffn_norm, x))
        return x + self._scaled(_apply(self.ffn_out_norm, ffn_out)), kv_pages

    def _scaled(self, x: Array) -> Array:
        scale = self.block.residual_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


class Decoder(nnx.Module):
    """A causal language model.

    With `scan_layers` the weights of layers that repeat a pattern are stacked [repeats, ...] and
    one compiled body runs that often; without, each layer has arrays of its own and is compiled in
    line. The numbers are the same. The caches are a carry, never an input and output of the scan:
    that would copy all of them.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        page_size: int,
        kernels: Kernels,
        dtype: jax.typing.DTypeLike,
        kv_dtype: jax.typing.DTypeLike,
        scan_layers: bool,
    ) -> None:
        def make_period(section: Section) -> nnx.List[DecoderLayer]:
            return nnx.List(
                DecoderLayer(
                    layer,
                    spec,
                    page_size=page_size,
                    kernels=kernels,
                    dtype=dtype,
                    kv_dtype=kv_dtype,
                )
                for layer in spec.layers[section.first : section.first + section.period]
            )

        def make_section(section: Section) -> nnx.List[DecoderLayer]:
            make = functools.partial(make_period, section)
            return nnx.vmap(make, axis_size=section.repeats)() if section.is_stacked else make()

        self.spec = spec
        self.sections = spec.sections(scan=scan_layers)
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, dtype=dtype)
        self.position_embedding = (
            Embedding(spec.position_rows, spec.hidden_size, dtype=dtype)
            if spec.position_rows
            else None
        )
        self.embedding_norm = (
            Norm(spec.hidden_size, spec=spec.norm, dtype=dtype) if spec.embedding_norm else None
        )
        self.layers = nnx.List([make_section(section) for section in self.sections])
        self.norm = Norm(spec.hidden_size, spec=spec.norm, dtype=dtype)
        self.head = (
            None
            if spec.tie_word_embeddings
            else Linear(spec.hidden_size, spec.vocab_size, use_bias=spec.head_bias, dtype=dtype)
        )

    def __call__(self, batch: ModelBatch, kv_pages: Caches) -> tuple[Array, Caches]:
        """Hidden states [T, D] after the last norm, and the caches with this step's tokens."""
        x = self._embed(batch)
        angles_of = {rope: angles(rope, batch.positions) for rope in self.spec.ropes}
        carry = (x, kv_pages)
        for section, layers in zip(self.sections, self.layers, strict=True):
            carry = self._run_section(section, layers, carry, batch, angles_of)
        x, kv_pages = carry
        return self.norm(x), kv_pages

    def _embed(self, batch: ModelBatch) -> Array:  # [T, D]
        x = self.embedding(batch.token_ids)
        if self.spec.embedding_scale != 1:
            x = x * jnp.asarray(self.spec.embedding_scale, x.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding(batch.positions + self.spec.position_offset)
        return _apply(self.embedding_norm, x)

    def _run_section(
        self,
        section: Section,
        layers: nnx.List[DecoderLayer],
        carry: tuple[Array, Caches],
        batch: ModelBatch,
        angles_of: dict,
    ) -> tuple[Array, Caches]:
        places = self.spec.kv_places
        split = [nnx.split(layer) for layer in layers]

        def run_period(
            carry: tuple[Array, Caches], states: list[nnx.State], repeat: int | Array
        ) -> tuple[Array, Caches]:
            x, caches = carry[0], list(carry[1])
            for i, (graph, _) in enumerate(split):
                group, number = places[section.first + i]
                # Layers of the group in one period: how far a repeat moves on within the cache.
                step = sum(
                    places[j][0] == group
                    for j in range(section.first, section.first + section.period)
                )
                rope = self.spec.layers[section.first + i].attention.rope
                x, caches[group] = _run_layer(
                    graph,
                    states[i],
                    (x, caches[group]),
                    batch.pages[group],
                    None if rope is None else angles_of[rope],
                    batch.positions,
                    jnp.int32(number) + step * repeat,
                )
            return x, tuple(caches)

        states = [state for _, state in split]
        if not section.is_stacked:
            return run_period(carry, states, 0)

        def body(carry: tuple[Array, Caches], scanned: Any) -> tuple[tuple[Array, Caches], None]:
            return run_period(carry, *scanned), None

        repeats = jnp.arange(section.repeats, dtype=jnp.int32)
        carry, _ = jax.lax.scan(body, carry, (states, repeats))
        return carry

    def logits(self, hidden: Array) -> Array:
        """Hidden states [R, D] to logits [R, V], float32."""
        if self.head is None:
            logits = self.embedding.attend(hidden)
        else:
            logits = jnp.matmul(hidden, self.head.weight[...], preferred_element_type=jnp.float32)
            if self.head.bias is not None:
                logits = logits + self.head.bias[...].astype(jnp.float32)
        if self.spec.logit_scale != 1:
            logits = logits * self.spec.logit_scale
        cap = self.spec.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graph: nnx.GraphDef,
    state: nnx.State,
    carry: tuple[Array, Array],
    pages: PageMetadata,
    cos_sin: CosSin | None,
    positions: Array,
    number: Array,
) -> tuple[Array, Array]:
    """One layer. A function of its own, so that layers of a kind are traced and lowered once."""
    x, kv_pages = carry
    return nnx.merge(graph, state)(x, kv_pages, pages, cos_sin, positions, number)

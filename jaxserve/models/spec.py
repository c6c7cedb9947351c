"""What a decoder is made of, and what one step feeds it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import jax
from jax import Array

from jaxserve.layers.attention import HeadAttentionSpec
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.kernels import AttentionSpec, PageMetadata
from jaxserve.layers.latent_attention import LatentAttentionSpec
from jaxserve.layers.moe import MoESpec
from jaxserve.layers.norm import NormSpec
from jaxserve.layers.rope import RopeSpec

MAX_PERIOD = 16  # layers after which a pattern may repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer. Layers of a model may differ."""

    attention: HeadAttentionSpec | LatentAttentionSpec
    ffn: FFNSpec | MoESpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """How attention and feed-forward are put together; the same in all layers.

    Sequential: x += attention_out(attention(attention_in(x))), then the same with ffn. Parallel:
    both read x, and without a norm of its own ffn reads what attention reads.
    """

    attention_in: bool = True
    attention_out: bool = False
    ffn_in: bool = True
    ffn_out: bool = False
    parallel: bool = False
    residual_scale: float = 1.0  # of what is added to x


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Consecutive layers `first` .. `stop` in which a pattern of `period` layers repeats."""

    first: int
    period: int = 1
    repeats: int = 1

    @property
    def stop(self) -> int:
        return self.first + self.period * self.repeats

    @property
    def is_stacked(self) -> bool:
        """Whether the weights of the repeats are one array [repeats, ...] each."""
        return self.repeats > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KVGroupSpec:
    """The layers that share a cache, page tables and blocks: all cache alike and see as far."""

    attention: HeadAttentionSpec | LatentAttentionSpec  # of its first layer
    window: int | None
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Everything that shapes a decoder, taken from a checkpoint's config. Static."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    block: BlockSpec = BlockSpec()
    tie_word_embeddings: bool
    head_bias: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    position_rows: int = 0  # rows of a table of learned positions; 0: there is none
    position_offset: int = 0  # the table's row of position 0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None  # logits = cap * tanh(logits / cap)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary embeddings of the layers."""
        found = (layer.attention.rope for layer in self.layers)
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @property
    def kv_groups(self) -> tuple[KVGroupSpec, ...]:
        """The groups, in the order of their first layers."""
        first: dict[tuple, HeadAttentionSpec | LatentAttentionSpec] = {}
        for layer in self.layers:
            first.setdefault(_kv_key(layer), layer.attention)
        keys = [_kv_key(layer) for layer in self.layers]
        return tuple(
            KVGroupSpec(attention=spec, window=spec.window, num_layers=keys.count(key))
            for key, spec in first.items()
        )

    @property
    def kv_places(self) -> tuple[tuple[int, int], ...]:
        """Of each layer its group, and its number within the group."""
        order: dict[tuple, int] = {}
        counts: dict[int, int] = {}
        places = []
        for layer in self.layers:
            group = order.setdefault(_kv_key(layer), len(order))
            number = counts.get(group, 0)
            counts[group] = number + 1
            places.append((group, number))
        return tuple(places)

    def attentions(
        self, *, page_size: int, dtype: jax.typing.DTypeLike
    ) -> tuple[AttentionSpec, ...]:
        """The distinct kinds of attention, for caches that store `dtype`."""
        return tuple(
            dict.fromkeys(
                layer.attention.attention(page_size=page_size, dtype=dtype) for layer in self.layers
            )
        )

    def for_context(self, max_len: int) -> Self:
        """The decoder as it is for sequences of up to `max_len` tokens.

        A window that no sequence outgrows is none, and rotary embeddings may depend on the length.
        """
        return replace(self, layers=tuple(_for_context(layer, max_len) for layer in self.layers))

    def sections(self, *, scan: bool) -> tuple[Section, ...]:
        """The layers cut up: into patterns that repeat, as long as can be, or one by one."""
        if not scan:
            return tuple(Section(first=i) for i in range(self.num_layers))
        return tuple(self._repeating())

    def _repeating(self) -> Iterator[Section]:
        at, layers = 0, self.layers
        while at < len(layers):
            best = Section(first=at)
            for period in range(1, min(MAX_PERIOD, (len(layers) - at) // 2) + 1):
                end = at + period
                while end < len(layers) and layers[end] == layers[end - period]:
                    end += 1
                repeats = (end - at) // period
                section = Section(first=at, period=period, repeats=repeats)
                if repeats > 1 and section.stop > best.stop:
                    best = section
            yield best
            at = best.stop


def _kv_key(layer: LayerSpec) -> tuple:
    """Layers with equal keys share a cache."""
    kv = layer.attention.attention(page_size=16, dtype="float32").kv
    return kv, layer.attention.window


def _for_context(layer: LayerSpec, max_len: int) -> LayerSpec:
    attention = layer.attention
    if isinstance(attention, LatentAttentionSpec):
        return replace(
            layer, attention=replace(attention, rope=attention.rope.for_context(max_len))
        )
    if attention.window is not None and attention.window >= max_len:
        attention = replace(attention, window=None, chunked=False)
    if attention.rope is not None:
        attention = replace(attention, rope=attention.rope.for_context(max_len))
    return replace(layer, attention=attention)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """One step's tokens, packed row after row. Padding tokens have id 0 and position 0."""

    token_ids: Array  # [T] int32
    positions: Array  # [T] int32
    pages: tuple[PageMetadata, ...]  # one per KV group

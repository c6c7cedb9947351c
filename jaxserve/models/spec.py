"""What a decoder is made of, and what one step feeds it."""

from dataclasses import dataclass

import jax
from jax import Array

from jaxserve.layers.kernels import AttentionSpec, KVSpec, PageMetadata
from jaxserve.layers.rope import RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Everything that shapes a decoder, taken from a checkpoint's config. Static."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False

    def attention(self, *, page_size: int, dtype: jax.typing.DTypeLike) -> AttentionSpec:
        """The attention of a layer whose cache stores `dtype`."""
        kv = KVSpec(
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=page_size,
            dtype=dtype,
        )
        return AttentionSpec(kv=kv, num_heads=self.num_heads, scale=self.head_dim**-0.5)

    @property
    def num_parameters(self) -> int:
        """Weights, biases included; a tied head counts once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        ffn = 3 * self.hidden_size * self.intermediate_size
        heads = 1 if self.tie_word_embeddings else 2
        norms = self.hidden_size * (2 * self.num_layers + 1)
        biases = 0
        if self.attention_bias:
            biases += self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        if self.attention_output_bias:
            biases += self.hidden_size
        if self.mlp_bias:
            biases += 2 * self.intermediate_size + self.hidden_size
        return (
            self.num_layers * (attention + ffn + biases)
            + heads * self.vocab_size * self.hidden_size
            + norms
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ModelBatch:
    """One step's tokens, packed row after row. Padding tokens have id 0 and position 0."""

    token_ids: Array  # [T] int32
    positions: Array  # [T] int32
    pages: tuple[PageMetadata, ...]  # one per KV group

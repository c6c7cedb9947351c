"""The types that cross into this package: what the cache holds, and which page belongs to whom."""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSpec:
    """What one layer's share of the KV cache holds. Static, hashable.

    `kind` "heads" keeps a key and a value for each kv head. "latent" is multi-head latent attention
    (DeepSeek-V2, arXiv 2405.04434) with its up-projections absorbed into the query and the output:
    one row a token serves all query heads, all of it as the key and its first `value_dim` columns
    as the value, so num_kv_heads is 1.
    """

    num_kv_heads: int  # on this device
    head_dim: int  # of a key; of a latent row: its rank and the rotary part, 512 + 64 in DeepSeek
    page_size: int  # tokens a page
    dtype: jax.typing.DTypeLike  # of what is stored
    kind: Literal["heads", "latent"] = "heads"
    value_dim: int | None = None  # latent only; a head's value is as wide as its key

    @property
    def out_dim(self) -> int:
        """Columns of a value, and so of a query head's output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def num_scales(self) -> int:
        """Scales of a quantized cache: a key's and a value's for each head, or the latent row's."""
        return 1 if self.kind == "latent" else 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One kind of attention layer. Static, hashable."""

    kv: KVSpec
    num_heads: int  # query heads on this device; a multiple of kv.num_kv_heads
    scale: float  # logits = scale * q . k
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    chunked: bool = False  # it sees those of its own window, one of 0 .., window .., 2 window ..
    soft_cap: float | None = None  # logits = soft_cap * tanh(logits / soft_cap)
    sinks: bool = False  # a learned logit a head joins the softmax's sum (arXiv 2309.17453)
    # Of each head: logits += slope * (position of the key - that of the query) (ALiBi, arXiv
    # 2108.12409), after soft_cap.
    alibi: tuple[float, ...] | None = None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.kv.num_kv_heads


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "page_table",
        "slots",
        "kv_lens",
        "query_starts",
        "num_rows",
        "num_decode_rows",
    ],
    meta_fields=["num_pages"],
)
@dataclass(frozen=True, kw_only=True)
class PageMetadata:
    """Where each row's tokens lie, for one ragged batch of T tokens in up to B rows.

    Rows are packed: row i owns tokens query_starts[i] .. query_starts[i + 1]; they are the last
    ones of its kv_lens[i] tokens. Rows of exactly one token that decode come first. Page 0 of
    every layer is the null page: nobody owns it and padding writes there.
    """

    page_table: Array  # [B, P] int32: page ids within a layer, 0 <= id < num_pages; unused: 0
    slots: Array  # [T] int32: page id * page_size + offset of each token; padding: a slot of page 0
    kv_lens: Array  # [B] int32: tokens of each row, those of this step included; unused rows: 0
    query_starts: Array  # [B + 1] int32, non-decreasing; unused rows start at the number of tokens
    num_rows: Array  # [] int32: rows in use
    num_decode_rows: Array  # [] int32: leading rows that have one token each
    num_pages: int  # pages a layer; layer l's page p is row l * num_pages + p of the cache

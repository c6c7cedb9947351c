"""What family files share: specs from Llama's field names, tables of names, packed projections."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.checkpoint import Part
from jaxserve.errors import UnsupportedError
from jaxserve.layers.attention import HeadAttentionSpec
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.config_fields import Config, flag, heads, layer_kinds, positive
from jaxserve.models.names import Stored, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

# Our modules of a layer -> Llama's.
LLAMA: dict[str, str] = {
    "input_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"},
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    **{f"ffn.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
# Norms of models that normalise what attention and feed-forward give, not what they take.
POST_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}


def table(
    modules: Mapping[str, str], linear: Callable[[str], Stored] = matrix
) -> dict[str, Stored]:
    """The weights and biases of modules; those of `_proj` modules are stored as `linear` says."""
    found = {}
    for ours, theirs in modules.items():
        stored = linear if ours.endswith("_proj") else plain
        found[f"{ours}.weight"] = stored(f"{theirs}.weight")
        found[f"{ours}.bias"] = plain(f"{theirs}.bias")
    return found


def top_table(embedding: str, norm: str, head: str, **more: str) -> dict[str, Stored]:
    """The weights outside the layers; the head lies beside the base model."""
    return {
        **table({"embedding": embedding, "norm": norm, **more}),
        "head.weight": matrix(f"{head}.weight", prefixed=False),
        "head.bias": plain(f"{head}.bias", prefixed=False),
    }


LLAMA_TOP = top_table("model.embed_tokens", "model.norm", "lm_head")


def packed(
    name: str,
    parts: Mapping[str, Part],
    linear: Callable[[str, Part], Stored] = matrix,
) -> dict[str, Stored]:
    """The weights and biases of modules that one tensor `name` holds, each its part."""
    found = {}
    for ours, part in parts.items():
        found[f"{ours}.weight"] = linear(f"{name}.weight", part)
        found[f"{ours}.bias"] = plain(f"{name}.bias", part)
    return found


def in_a_row(sizes: Mapping[str, int], axis: int = -2) -> dict[str, Part]:
    """Parts of these sizes, one after another."""
    total, start, parts = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        parts[name] = Part(start=start, stop=start + size, group_size=total, axis=axis)
        start += size
    return parts


def heads_of(spec: DecoderSpec) -> HeadAttentionSpec:
    """The attention of a model whose layers all have the same heads."""
    attention = spec.layers[0].attention
    if not isinstance(attention, HeadAttentionSpec):
        raise TypeError(f"no attention with a key a head: {attention}")
    return attention


def qkv_in_a_row(spec: DecoderSpec, axis: int = -2) -> dict[str, Part]:
    """All queries, then all keys, then all values."""
    a = heads_of(spec)
    sizes = {"q": a.num_heads, "k": a.num_kv_heads, "v": a.num_kv_heads}
    return in_a_row({f"attention.{p}_proj": n * a.head_dim for p, n in sizes.items()}, axis)


def qkv_by_head(spec: DecoderSpec) -> dict[str, Part]:
    """For each kv head its queries, its key and its value."""
    a = heads_of(spec)
    group = a.num_heads // a.num_kv_heads
    one = in_a_row(
        {
            "attention.q_proj": group * a.head_dim,
            "attention.k_proj": a.head_dim,
            "attention.v_proj": a.head_dim,
        }
    )
    return {
        name: Part(
            start=part.start, stop=part.stop, group_size=part.group_size, groups=a.num_kv_heads
        )
        for name, part in one.items()
    }


def gate_then_up(spec: DecoderSpec) -> dict[str, Part]:
    """The gate's rows, then as many of the up projection."""
    ffn = spec.layers[0].ffn
    if not isinstance(ffn, FFNSpec):
        raise TypeError(f"no dense feed-forward block: {ffn}")
    size = ffn.intermediate_size
    return in_a_row({"ffn.gate_proj": size, "ffn.up_proj": size})


def renamed(config: Config, **theirs: str) -> dict[str, Any]:
    """The config with fields under our names, given as ours=theirs, where ours is not there."""
    found = dict(config)
    for ours, name in theirs.items():
        if found.get(ours) is None and config.get(name) is not None:
            found[ours] = config[name]
    return found


def biases(qkv: bool, output: bool) -> dict[str, bool]:
    """Attention's switches: of queries, keys and values together, and of the output."""
    return {"q_bias": qkv, "k_bias": qkv, "v_bias": qkv, "output_bias": output}


def head_attention(config: Config, **options: Any) -> HeadAttentionSpec:
    """Attention of the config's heads, scaled by their width unless `options` say otherwise."""
    num_heads, num_kv_heads, head_dim = heads(config)
    given: dict[str, Any] = {"scale": head_dim**-0.5} | options
    return HeadAttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **given
    )


def alike(config: Config, attention: HeadAttentionSpec, ffn: FFNSpec) -> tuple[LayerSpec, ...]:
    """num_hidden_layers layers of one kind."""
    return (LayerSpec(attention=attention, ffn=ffn),) * positive(config, "num_hidden_layers")


def decoder(
    config: Config,
    layers: tuple[LayerSpec, ...],
    norm: NormSpec,
    *,
    context: int,
    tied: bool,
    **options: Any,
) -> DecoderSpec:
    """A decoder of these layers; the other sizes are the config's.

    `context` is max_position_embeddings; `tied` is what the family takes where the config does not
    say whether the head is the embedding.
    """
    return DecoderSpec(
        vocab_size=positive(config, "vocab_size"),
        hidden_size=positive(config, "hidden_size"),
        max_position_embeddings=context,
        layers=layers,
        norm=norm,
        tie_word_embeddings=flag(config, "tie_word_embeddings", tied),
        **options,
    )


def windows(config: Config, default: list[str]) -> list[int | None]:
    """The sliding window of each layer, as layer_types says, or `default`."""
    kinds = layer_kinds(config, default)
    if "chunked_attention" in kinds:
        raise UnsupportedError("layer_types has 'chunked_attention', which this family has not")
    if "sliding_attention" not in kinds:
        return [None] * len(kinds)
    window = positive(config, "sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each head (Press et al., 2022): geometric, for a power of two of heads.

    For other numbers, every other slope of twice the next smaller power follows.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    more = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * (num_heads - power), 2)]
    return tuple(slopes + more)


def mpt_slopes(num_heads: int, largest: float) -> tuple[float, ...]:
    """MPT's: down to 2^-largest, and for other numbers than powers of two, the odd ones first."""
    power = 1 << (num_heads - 1).bit_length()
    slopes = [2.0 ** (-largest * (i + 1) / power) for i in range(power)]
    if power != num_heads:
        slopes = slopes[1::2] + slopes[::2]
    return tuple(slopes[:num_heads])


def every(period: int, config: Config, *, first: bool = False) -> list[str]:
    """Kinds of layers: one in `period` attends to all, the last of each period, or the first."""
    full = 0 if first else period - 1
    return [
        "full_attention" if i % period == full else "sliding_attention"
        for i in range(positive(config, "num_hidden_layers"))
    ]

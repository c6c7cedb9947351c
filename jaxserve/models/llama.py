"""Llama and its near kin as data: config.json to spec, and where each weight comes from."""

from dataclasses import dataclass, replace

from jaxserve.errors import UnsupportedError
from jaxserve.layers.attention import HeadAttentionSpec
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    heads,
    layer_kinds,
    number,
    positive,
    rope_from_config,
)
from jaxserve.models.names import Stored, WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = (
    "LlamaForCausalLM",
    "LLaMAForCausalLM",
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

LAYER_WEIGHTS: dict[str, Stored] = {
    "input_norm.weight": plain("input_layernorm.weight"),
    "ffn_norm.weight": plain("post_attention_layernorm.weight"),
    **{f"attention.{part}_proj.weight": matrix(f"self_attn.{part}_proj.weight") for part in "qkvo"},
    **{f"attention.{part}_proj.bias": plain(f"self_attn.{part}_proj.bias") for part in "qkvo"},
    "attention.q_norm.weight": plain("self_attn.q_norm.weight"),
    "attention.k_norm.weight": plain("self_attn.k_norm.weight"),
    **{
        f"ffn.{part}_proj.weight": matrix(f"mlp.{part}_proj.weight")
        for part in ("gate", "up", "down")
    },
    **{f"ffn.{part}_proj.bias": plain(f"mlp.{part}_proj.bias") for part in ("gate", "up", "down")},
}
TOP_WEIGHTS: dict[str, Stored] = {
    "embedding.weight": plain("model.embed_tokens.weight"),
    "norm.weight": plain("model.norm.weight"),
    "head.weight": matrix("lm_head.weight", prefixed=False),
}
NAMES = WeightNames(top=TOP_WEIGHTS, layer=LAYER_WEIGHTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """In what a family differs from Llama where its config.json says nothing."""

    qkv_bias: bool | None = None  # None: attention_bias says
    output_bias: bool | None = None  # None: attention_bias says
    qk_norm: bool = False
    window: bool = False  # sliding_window counts
    needs_use_sliding_window: bool = False  # and only if use_sliding_window says so
    eps: float = 1e-6
    context: int = 2048
    tied: bool = False


KINDS = {
    "LlamaForCausalLM": Kind(),
    "LLaMAForCausalLM": Kind(),
    "MistralForCausalLM": Kind(qkv_bias=False, output_bias=False, window=True, context=4096 * 32),
    "MinistralForCausalLM": Kind(qkv_bias=False, output_bias=False, window=True, context=4096 * 32),
    "Qwen2ForCausalLM": Kind(
        qkv_bias=True,
        output_bias=False,
        window=True,
        needs_use_sliding_window=True,
        context=32768,
    ),
    "Qwen3ForCausalLM": Kind(
        qk_norm=True, window=True, needs_use_sliding_window=True, context=32768
    ),
}


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json of a Llama-like checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    return llama_like(config, KINDS[config["architectures"][0]])


def llama_like(config: Config, kind: Kind) -> DecoderSpec:
    """The decoder of a family that is Llama but for what `kind` says."""
    num_heads, num_kv_heads, head_dim = heads(config)
    context = positive(config, "max_position_embeddings", kind.context)
    bias = flag(config, "attention_bias")
    norm = NormSpec(eps=number(config, "rms_norm_eps", kind.eps))
    qkv_bias = bias if kind.qkv_bias is None else kind.qkv_bias
    full = HeadAttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=rope_from_config(config, head_dim=head_dim, context=context),
        q_bias=qkv_bias,
        k_bias=qkv_bias,
        v_bias=qkv_bias,
        output_bias=bias if kind.output_bias is None else kind.output_bias,
        qk_norm=norm if kind.qk_norm else None,
    )
    ffn = FFNSpec(
        intermediate_size=positive(config, "intermediate_size"),
        activation=activation(config, "hidden_act", default="silu"),
        bias=flag(config, "mlp_bias"),
    )
    return DecoderSpec(
        vocab_size=positive(config, "vocab_size"),
        hidden_size=positive(config, "hidden_size"),
        max_position_embeddings=context,
        layers=tuple(
            LayerSpec(attention=replace(full, window=window), ffn=ffn)
            for window in _windows(config, kind)
        ),
        norm=norm,
        tie_word_embeddings=flag(config, "tie_word_embeddings", kind.tied),
    )


def _windows(config: Config, kind: Kind) -> list[int | None]:
    """The sliding window of each layer."""
    num_layers = positive(config, "num_hidden_layers")
    on = kind.window and config.get("sliding_window") is not None
    if kind.needs_use_sliding_window:
        on = on and flag(config, "use_sliding_window")
    window = positive(config, "sliding_window") if on else None
    # Qwen2 and 3 slide from layer max_window_layers on.
    first = config.get("max_window_layers", 28) if kind.needs_use_sliding_window else 0
    default = [
        "sliding_attention" if on and i >= first else "full_attention" for i in range(num_layers)
    ]
    kinds = layer_kinds(config, default)
    if "chunked_attention" in kinds or ("sliding_attention" in kinds and not on):
        raise UnsupportedError(
            f"layer_types has {sorted(set(kinds))}, but sliding_window="
            f"{config.get('sliding_window')!r}; only sliding and full attention are supported"
        )
    return [window if k == "sliding_attention" else None for k in kinds]


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where a Llama-like checkpoint keeps its weights."""
    return NAMES

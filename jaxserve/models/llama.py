"""The Llama family as data: config.json to spec, and where each weight comes from."""

from collections.abc import Mapping
from typing import Any

from jaxserve.checkpoint import WeightSource
from jaxserve.errors import CheckpointError, UnsupportedError
from jaxserve.layers.rope import RopeSpec
from jaxserve.models.spec import DecoderSpec

ARCHITECTURES = ("LlamaForCausalLM",)

# Our name of a layer's weight -> Hugging Face's, and whether it is a matrix stored [out, in].
LAYER_WEIGHTS = {
    "input_norm.weight": ("input_layernorm.weight", False),
    "attention.q_proj.weight": ("self_attn.q_proj.weight", True),
    "attention.k_proj.weight": ("self_attn.k_proj.weight", True),
    "attention.v_proj.weight": ("self_attn.v_proj.weight", True),
    "attention.o_proj.weight": ("self_attn.o_proj.weight", True),
    "attention.q_proj.bias": ("self_attn.q_proj.bias", False),
    "attention.k_proj.bias": ("self_attn.k_proj.bias", False),
    "attention.v_proj.bias": ("self_attn.v_proj.bias", False),
    "attention.o_proj.bias": ("self_attn.o_proj.bias", False),
    "ffn_norm.weight": ("post_attention_layernorm.weight", False),
    "ffn.gate_proj.weight": ("mlp.gate_proj.weight", True),
    "ffn.up_proj.weight": ("mlp.up_proj.weight", True),
    "ffn.down_proj.weight": ("mlp.down_proj.weight", True),
    "ffn.gate_proj.bias": ("mlp.gate_proj.bias", False),
    "ffn.up_proj.bias": ("mlp.up_proj.bias", False),
    "ffn.down_proj.bias": ("mlp.down_proj.bias", False),
}
TOP_WEIGHTS = {
    "embedding.weight": ("model.embed_tokens.weight", False),
    "norm.weight": ("model.norm.weight", False),
    "head.weight": ("lm_head.weight", True),
}


def spec_from_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Reads config.json of a Llama checkpoint.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act={activation!r} is not supported; Llama's is 'silu'")
    hidden_size = positive(config, "hidden_size")
    num_heads = positive(config, "num_attention_heads")
    num_kv_heads = positive(config, "num_key_value_heads", num_heads)
    head_dim = positive(config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}; check config.json"
        )
    bias = bool(config.get("attention_bias", False))
    context = positive(config, "max_position_embeddings", 2048)
    return DecoderSpec(
        vocab_size=positive(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(config, "intermediate_size"),
        num_layers=positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope_from_config(config, head_dim=head_dim, context=context),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """The whole number `name` of a config, at least 1."""
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {name}={value!r}; a whole number from 1 is needed")
    return value


def rope_from_config(config: Mapping[str, Any], *, head_dim: int, context: int) -> RopeSpec:
    """Reads both forms: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""
    given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedError(
            f"rope scaling {kind!r} is not supported; default, linear, llama3 and yarn are"
        )
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("partial_rotary_factor is not supported for this architecture")
    attention_factor = given.get("attention_factor")
    if kind == "yarn" and attention_factor is None and given.get("mscale_all_dim"):
        raise UnsupportedError("yarn with mscale_all_dim is not supported for this architecture")
    return RopeSpec(
        head_dim=head_dim,
        theta=float(given.get("rope_theta", config.get("rope_theta", 10000.0))),
        kind=kind,
        factor=float(given.get("factor") or 1.0),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(
            given.get("original_max_position_embeddings") or context
        ),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(given.get("truncate", True)),
    )


def weight_source(path: str, shape: tuple[int, ...], num_layers: int) -> WeightSource:
    """Where the parameter `path` of the decoder comes from.

    `path` is dotted; a layer's parameter is "layers.input_norm.weight" when layers are stacked
    (shape [L, ...]) and "layers.3.input_norm.weight" when they are not.
    """
    if not path.startswith("layers."):
        name, transpose = TOP_WEIGHTS[path]
        return WeightSource(names=(name,), stacked=False, shape=shape, transpose=transpose)
    head, _, rest = path.removeprefix("layers.").partition(".")
    if head.isdigit():
        name, transpose = LAYER_WEIGHTS[rest]
        names = (f"model.layers.{head}.{name}",)
        return WeightSource(names=names, stacked=False, shape=shape, transpose=transpose)
    name, transpose = LAYER_WEIGHTS[f"{head}.{rest}"]
    names = tuple(f"model.layers.{i}.{name}" for i in range(num_layers))
    return WeightSource(names=names, stacked=True, shape=shape, transpose=transpose)

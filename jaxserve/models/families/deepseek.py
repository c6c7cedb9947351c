"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437) as data: latent attention, experts."""

from jaxserve.errors import UnsupportedError
from jaxserve.layers.ffn import FFNSpec
from jaxserve.layers.latent_attention import LatentAttentionSpec
from jaxserve.layers.moe import RouterSpec
from jaxserve.layers.norm import NormSpec
from jaxserve.layers.rope import yarn_mscale
from jaxserve.model_index import Part
from jaxserve.models.config_fields import (
    Config,
    activation,
    flag,
    number,
    positive,
    refuse,
    rope_from_config,
)
from jaxserve.models.experts import (
    DEEPSEEK_EXPERTS,
    deepseek_experts,
    deepseek_v3_router,
    later_layers,
    with_experts,
)
from jaxserve.models.kin import NAMES
from jaxserve.models.names import Stored, WeightNames, matrix, plain
from jaxserve.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")

_LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says


def spec_from_config(config: Config) -> DecoderSpec:
    """Reads config.json.

    Raises:
        CheckpointError: A needed field is missing or has the wrong type.
        UnsupportedError: The config asks for something that this family's code does not compute.
    """
    refuse(config, moe_layer_freq=1)
    v3 = config["architectures"][0] == "DeepseekV3ForCausalLM"
    context = positive(config, "max_position_embeddings", 4096 if v3 else 2048)
    layer = LayerSpec(
        attention=_attention(config, context, v3=v3),
        ffn=FFNSpec(
            intermediate_size=positive(config, "intermediate_size"),
            activation=activation(config, "hidden_act", default="silu"),
        ),
    )
    spec = DecoderSpec(
        vocab_size=positive(config, "vocab_size"),
        hidden_size=positive(config, "hidden_size"),
        max_position_embeddings=context,
        layers=(layer,) * positive(config, "num_hidden_layers"),
        norm=NormSpec(eps=number(config, "rms_norm_eps", 1e-6)),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
    )
    if v3:
        refuse(config, scoring_func="sigmoid", topk_method="noaux_tc")
        router = deepseek_v3_router(config, groups=8, top_groups=4, scale=2.5, normalize=True)
    else:
        router = _v2_router(config)
    first = config.get("first_k_dense_replace")
    first = (3 if v3 else 0) if first is None else first
    return with_experts(spec, deepseek_experts(config, router), lambda i: i >= first)


def _attention(config: Config, context: int, *, v3: bool) -> LatentAttentionSpec:
    nope_dim = positive(config, "qk_nope_head_dim", 128)
    rope_dim = positive(config, "qk_rope_head_dim", 64)
    interleaved = flag(config, "rope_interleave", True) if v3 else True
    rope = rope_from_config(config, head_dim=rope_dim, context=context, interleaved=interleaved)
    scale = (nope_dim + rope_dim) ** -0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    q_rank = config.get("q_lora_rank", 1536)
    return LatentAttentionSpec(
        num_heads=positive(config, "num_attention_heads"),
        q_rank=None if q_rank is None else positive(config, "q_lora_rank", 1536),
        kv_rank=positive(config, "kv_lora_rank", 512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=positive(config, "v_head_dim", 128),
        scale=scale,
        rope=rope,
        norm=NormSpec(eps=_LATENT_EPS),
        bias=flag(config, "attention_bias"),
    )


def _v2_router(config: Config) -> RouterSpec:
    refuse(config, scoring_func="softmax", norm_topk_prob=False)
    scale = number(config, "routed_scaling_factor", 1.0)
    method = config.get("topk_method") or "greedy"
    if method == "greedy":
        return RouterSpec(scale=scale)
    if method != "group_limited_greedy":
        raise UnsupportedError(
            f"topk_method={str(method)[:80]!r} is not supported; "
            "'greedy' and 'group_limited_greedy' are"
        )
    return RouterSpec(
        scale=scale,
        num_groups=positive(config, "n_group"),
        top_groups=positive(config, "topk_group"),
    )


def weight_names(spec: DecoderSpec) -> WeightNames:
    """Where such a checkpoint keeps its weights."""
    layer: dict[str, Stored] = {**NAMES.layer, **DEEPSEEK_EXPERTS}
    attention = spec.layers[0].attention
    if isinstance(attention, LatentAttentionSpec):
        layer |= latent_names(attention)
    return WeightNames(top=NAMES.top, layer=layer, ignored=later_layers(spec))


def latent_names(attention: LatentAttentionSpec) -> dict[str, Stored]:
    """Latent attention's weights: keys' and values' up-projections share a tensor, head by head."""

    def up(start: int, stop: int) -> Stored:
        width = attention.nope_dim + attention.value_dim
        part = Part(start=start, stop=stop, group_size=width, groups=attention.num_heads)
        return plain("self_attn.kv_b_proj.weight", part)

    projections = {
        "q_a_proj": "q_a_proj",
        "q_b_proj": "q_b_proj",
        "kv_a_proj": "kv_a_proj_with_mqa",
    }
    return {
        **{
            f"attention.{ours}.weight": matrix(f"self_attn.{theirs}.weight")
            for ours, theirs in projections.items()
        },
        **{
            f"attention.{ours}.bias": plain(f"self_attn.{theirs}.bias")
            for ours, theirs in projections.items()
        },
        "attention.q_a_norm.weight": plain("self_attn.q_a_layernorm.weight"),
        "attention.kv_a_norm.weight": plain("self_attn.kv_a_layernorm.weight"),
        "attention.k_b": up(0, attention.nope_dim),
        "attention.v_b": up(attention.nope_dim, attention.nope_dim + attention.value_dim),
    }
